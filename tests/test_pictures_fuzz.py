"""Pictures with anything done to them: pixels or one word, and what is accepted can be written."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from data_prep.dataset import shards
from data_prep.pairs import pictures
from mofi_jax.data import ops
from tests.fuzzing import fuzz, mutated
from tests.inputs import picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, of metadata
LIMITS = {"min_side": 16, "max_aspect": 4.0, "max_pixels": ops.MAX_PIXELS}
REASONS = {
    *("empty_picture", "too_many_bytes", "not_a_picture", "too_small", "too_wide"),
    *("too_many_pixels", "truncated", "corrupt", "empty"),
}


def rotated():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    return exif


SOUND = {
    "jpeg": [
        picture(48, 40, "jpeg", exif=rotated()),
        picture(48, 40, "jpeg", "CMYK"),
        picture(48, 40, "jpeg", "L", progressive=True),
    ],
    "png": [
        picture(48, 40, "png", exif=rotated()),
        picture(48, 40, "png", "P", transparency=3),
        picture(48, 40, "png", "I;16"),
        picture(48, 40, "png", "LA"),
    ],
    "gif": [picture(48, 40, "gif", "P"), picture(48, 40, "gif", "L", interlace=0)],
    "webp": [
        picture(48, 40, "webp", exif=rotated()),
        picture(48, 40, "webp", "RGBA", lossless=True),
    ],
    "bmp": [picture(48, 40, "bmp"), picture(48, 40, "bmp", "P")],
    "tiff": [
        picture(48, 40, "tiff", exif=rotated()),
        picture(48, 40, "tiff", "L", compression="tiff_lzw"),
    ],
}
NUMBERS = (0, 1, 5_000, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
TOKENS = [
    *(struct.pack(f"{end}{kind}", n & most) for n in NUMBERS for end in "<>"
      for kind, most in (("H", 0xFFFF), ("I", 0xFFFFFFFF))),
    *(b"\xff\xd8", b"\xff\xda", b"\xff\xc2", b"\xff\xe1", b"\xff" * 50),
    *(b"Exif\0\0", b"II*\0\x08\0\0\0", b"\x12\x01\x03\0\1\0\0\0\6\0\0\0"),
    *(b"IDAT", b"IEND", b"eXIf", b"acTL", b"iCCP", b"VP8X", b"ANIM", b"ALPH", b"\x2c", b"\x21\xfe"),
]  # fmt: skip


def with_checksums(png):
    """The same PNG, its checksums made right."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data[: len(png)])


@pytest.mark.parametrize("kind", SOUND)
@fuzz(100, more=st.data())
def test_a_picture_is_pixels_or_one_word(kind, more):
    data = more.draw(mutated(SOUND[kind], TOKENS))
    if kind == "png":
        data = with_checksums(data)
    try:
        seen = pictures.check_picture(data, LIMITS)
    except pictures.Rejected as rejected:
        assert str(rejected) in REASONS  # noqa: PT017  an answer as well
        seen = None
    try:
        fast = ops.apply("decode", data)
        assert fast.dtype == np.uint8
        assert fast.ndim == fast.shape[2] == 3
    except ops.UndecodableImage as error:
        assert str(error) in REASONS  # noqa: PT017
        assert seen is None
    if seen:
        jpeg, width, height = shards.to_jpeg(data, 512, 95)
        assert ops.apply("decode", jpeg).shape == (height, width, 3)
        assert max(width, height) / min(width, height) < 5
