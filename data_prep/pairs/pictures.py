"""Pictures: which can be used, and a hash by which near-copies find each other."""

import functools
import importlib.metadata
import typing

import numpy as np
from jaxtyping import Int64, UInt8

from data_prep.pairs.samples import Rejected

# No single web picture is larger; what claims to be is not read into memory to find out.
MAX_BYTES = 100_000_000

# What decides which pixels bytes become: stages that decode have it in their settings.
DECODERS = {name: importlib.metadata.version(name) for name in ("opencv-python-headless", "pillow")}

# Cosines in fixed point. Whole numbers give the same hash on every machine, where the last bits of
# floating point matrix products, and with them the bits of flat pictures, depend on the processor.
_FIXED_POINT = 1 << 14
_STRIP = 1 << 20  # pixels made grey at once: Pillow would first take a third more than they have


class Checked(typing.NamedTuple):
    """A usable picture: width and height in pixels, and its perceptual hash."""

    width: int
    height: int
    phash: int


def check_picture(data: bytes, limits: dict) -> Checked:
    """Decodes a picture in full, once, and tells its size and hash.

    The size is read from the header first: a picture of a billion pixels is never decoded.

    Args:
      data: the file's bytes.
      limits: `min_side` (px of the shorter side), `max_aspect` (longer over shorter), `max_pixels`.

    Raises:
      Rejected: "empty_picture", "too_many_bytes", "not_a_picture", "too_small", "too_wide",
        "too_many_pixels", "truncated" or "corrupt".
    """
    from mofi_jax.data import ops

    if not data:
        raise Rejected("empty_picture")
    if len(data) > MAX_BYTES:
        raise Rejected("too_many_bytes")
    try:
        with ops.open_picture(data) as picture:
            width, height = picture.size
    except ops.UndecodableImage as error:
        raise Rejected(str(error)) from None
    if min(width, height) < limits["min_side"]:
        raise Rejected("too_small")
    if max(width, height) > limits["max_aspect"] * min(width, height):
        raise Rejected("too_wide")
    if width * height > limits["max_pixels"]:
        raise Rejected("too_many_pixels")
    try:
        rgb = ops.decode_rgb(data)
    except ops.UndecodableImage as error:
        raise Rejected(str(error)) from None
    height, width = rgb.shape[:2]
    return Checked(width, height, perceptual_hash(rgb))


def perceptual_hash(rgb: UInt8[np.ndarray, "h w 3"]) -> int:
    """The 64-bit pHash of a picture, as a signed integer of the same bits.

    Grey, shrunk to 32 x 32; each of the 8 x 8 lowest frequencies of its cosine transform gives one
    bit: above their median or not, the first bit the highest. The hash of `imagehash.phash`, of
    which it differs by a few bits where that shrinks large pictures without an intermediate step.
    A picture of one colour carries nothing to tell it from another of its kind.
    """
    from PIL import Image

    height, width = rgb.shape[:2]
    grey = Image.new("L", (width, height))
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        grey.paste(Image.fromarray(rgb[top : top + rows]).convert("L"), (0, top))
    # Reducing large pictures by whole factors first costs no accuracy at this size.
    small = grey.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    cosines = _cosines()
    frequencies = cosines @ np.asarray(small, np.int64) @ cosines.T
    # Half the sum of the middle two: doubling the others keeps whole numbers.
    middle = np.sort(frequencies, axis=None)[31:33].sum()
    bits = np.packbits(2 * frequencies.ravel() > middle)
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def hamming(a: Int64[np.ndarray, "..."], b: Int64[np.ndarray, "..."]) -> np.ndarray:
    """How many bits differ between hashes, elementwise with broadcasting; uint8 in 0..64."""
    return np.bitwise_count(np.bitwise_xor(a, b).astype(np.uint64))


@functools.cache
def _cosines() -> np.ndarray:
    """int64 [8, 32]: the lowest frequencies of the cosine transform (type II) of 32 values."""
    angles = np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)
    return np.rint(np.cos(angles) * _FIXED_POINT).astype(np.int64)
