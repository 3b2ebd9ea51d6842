"""Image operations, and the mini-language that names them.

``apply("decode|flip|random_resized_crop(224)", image, rng)`` applies the operations from left to
right.  Arguments are Python literals.  Every operation is a pure function of image and generator,
so that resuming and the number of workers change no pixel.  Nothing here imports jax: data workers
must never start it.

Where a model's size is known, one name stands for the operations of a whole evaluation:
`PREPROCESSINGS`.
"""

import ast
import contextlib
import ctypes
import functools
import inspect
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from mofi_jax.common.errors import BadInput
from mofi_jax.data import augment
from mofi_jax.data.decoding import (
    MAX_PIXELS,
    UndecodableImage,
    decode_fast,
    decode_rgb,
    open_picture,
    orientation,
    to_rgb,
)

__all__ = ["MAX_PIXELS", "UndecodableImage", "decode_rgb", "open_picture", "orientation", "to_rgb"]

cv2.setNumThreads(0)  # the pipeline has its own threads


# By default glibc returns whatever takes more than 128 kB to the system when it is freed, and the
# pages of the next image are zeroed anew: a quarter of the time of decoding 320 x 256 pixels.
with contextlib.suppress(AttributeError, OSError):  # another C library
    ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks that still go back at once
    ctypes.CDLL(None).mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD: what stays at the end of the heap

Rng = np.random.Generator | None  # None where nothing is drawn


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """uint8 [h, w, 3] RGB -> JPEG bytes; the same bytes for the same input and library version."""
    ok, data = cv2.imencode(
        ".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not ok:
        raise UndecodableImage("not_encodable")
    return data.tobytes()


# The preprocessings that published scores go by, for a model of `size` pixels.  Each is its
# original's arithmetic, rounded to uint8.
PREPROCESSINGS: dict[str, Callable[[int], str]] = {
    # apple/ml-mofi eval/utils.py: torchvision on the tensor, which without being asked does not
    # antialias.
    "mofi": lambda size: f"decode|resize_short({size}, 'bilinear')|center_crop({size})",
    # open_clip and OpenAI's CLIP: torchvision on the picture, by Pillow.
    "clip_torchvision": lambda size: f"decode|resize_short({size}, 'bicubic')|center_crop({size})",
    # transformers' CLIPImageProcessor: the same, up to the pixel at which an odd margin is cut.
    "clip_hf": lambda size: f"decode|resize_short({size}, 'bicubic')|center_crop({size}, 'floor')",
    # transformers' SiglipImageProcessor: the whole picture, its aspect given up.
    "siglip": lambda size: f"decode|resize({size}, 'bicubic')",
    # DINO and DINOv2: short side to 256 for 224 pixels, so that a margin is cut.
    "dino": lambda size: f"decode|resize_short({size * 256 // 224}, 'bicubic')|center_crop({size})",
}


def expand(spec: str, size: int) -> str:
    """The operations that the name of a preprocessing stands for; in others {size} is the size."""
    named = PREPROCESSINGS.get(spec.strip())
    return named(size) if named else spec.replace("{size}", str(size))


def apply(spec: str, image: np.ndarray | bytes, rng: Rng = None) -> np.ndarray:
    """What the operations of a specification make of an image; raises BadInput as `parse`."""
    for operation in parse(spec):
        image = operation(image, rng)
    return image


@functools.lru_cache(maxsize=64)
def parse(spec: str) -> tuple[Callable[..., np.ndarray], ...]:
    """The operations of a specification; raises BadInput for an unknown one or wrong arguments."""
    operations = []
    for part in map(str.strip, spec.split("|")):
        try:
            node = ast.parse(part, mode="eval").body
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            name = call.func.id
            args = [ast.literal_eval(a) for a in call.args]
            kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, AttributeError, ValueError, MemoryError, RecursionError):
            raise BadInput(
                f"The picture operation {part!r} in {spec!r} cannot be read: write "
                "name or name(literal, key=literal), separated by |."
            ) from None
        if name not in OPERATIONS:
            raise BadInput(
                f"Unknown picture operation {name!r} in {spec!r}: choose from "
                f"{', '.join(sorted(OPERATIONS))}; or, alone, {', '.join(PREPROCESSINGS)}."
            )
        signature = inspect.signature(OPERATIONS[name])
        signature = signature.replace(parameters=list(signature.parameters.values())[2:])
        try:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if not _VALID.get(name, lambda *_: True)(*bound.args):
                raise TypeError(bound)
        except TypeError:
            raise BadInput(
                f"Wrong arguments in {part!r} of {spec!r}: the operation is {name}{signature}."
            ) from None
        operations.append(functools.partial(OPERATIONS[name], **bound.arguments))
    return tuple(operations)


def decode_to(
    size: int,
    spec: str,
    data: bytes | np.ndarray,
    rng: Rng = None,
    *,
    name: str = "The preprocessing",
) -> np.ndarray:
    """The uint8 [size, size, 3] that a specification, or a name for one, makes of a picture.

    `data` is a picture file, or the uint8 [h, w, 3] that is in it.

    Raises:
      BadInput: operations that fail or give anything else; says so of `name`.
      UndecodableImage: bytes that are not a whole picture.
    """
    try:
        pixels = apply(expand(spec, size), data, rng)
    except (BadInput, UndecodableImage):
        raise
    except Exception as error:  # OpenCV's own, or Python's, about the operations' arguments
        raise BadInput(
            f"{name} fails ({type(error).__name__}: {' '.join(str(error).split())}): correct its "
            "arguments."
        ) from error
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        raise BadInput(
            f"{name} gives {list(pixels.shape)} of {pixels.dtype}, where the model takes "
            f"{[size, size, 3]} of uint8: end it with center_crop({size})."
        )
    return pixels


# What arguments must be, where the operation would not fail by itself.
_VALID: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(
        ("resize", "resize_short"),
        lambda size, method: size <= MAX_PIXELS**0.5 and method in METHODS,
    ),
    "center_crop": lambda size, odd: odd in ("even", "floor"),
    "randaugment": lambda num_ops, magnitude: (
        type(num_ops) is int and num_ops >= 0 and 0 <= magnitude <= augment.MAX_MAGNITUDE
    ),
}


def decode(data: bytes | np.ndarray, rng: Rng) -> np.ndarray:
    """Bytes -> RGB; see `decode_fast`. RGB stays what it is."""
    return data if isinstance(data, np.ndarray) else decode_fast(data)


# Pillow's filters; all but the last are antialiased.
PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
METHODS = ("area", "bilinear", *PILLOW)


def _resize(image: np.ndarray, width: int, height: int, method: str) -> np.ndarray:
    if method in PILLOW:
        return np.asarray(Image.fromarray(image).resize((width, height), PILLOW[method]))
    interpolation = cv2.INTER_LINEAR if method == "bilinear" else cv2.INTER_AREA
    if method == "area" and width >= image.shape[1]:
        # Shrinking with INTER_AREA is antialiased; growing with it is nearest-neighbour.
        interpolation = cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def resize_short(image: np.ndarray, rng: Rng, size: int, method: str = "area") -> np.ndarray:
    """Short side to ``size``, aspect kept.

    ``area`` (OpenCV, fastest) and Pillow's filters (``bicubic`` is the arithmetic of CLIP's
    preprocessings, ``bilinear_antialias``, ...) are antialiased, ``bilinear`` is not: it is the
    arithmetic of the released MOFI evaluation (tensor resize with ``antialias=False``), up to
    rounding to uint8.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    wide, high = max(size, width * size // short), max(size, height * size // short)
    if wide * high > MAX_PIXELS:  # a line of pixels would grow to gigabytes
        raise UndecodableImage("too_elongated")
    return _resize(image, wide, high, method)


def resize(image: np.ndarray, rng: Rng, size: int, method: str = "area") -> np.ndarray:
    """To ``size`` x ``size``, whatever the aspect; methods as of `resize_short`."""
    return _resize(image, size, size, method)


def center_crop(image: np.ndarray, rng: Rng, size: int, odd: str = "even") -> np.ndarray:
    """The ``size`` x ``size`` square in the middle; a smaller image gets a black border.

    Where the margin is odd, no square is in the middle: ``even`` begins at the even one of the two
    pixels in question (torchvision, Python's `round`), ``floor`` at the first (transformers).
    """
    missing = [max(0, size - side) for side in image.shape[:2]]
    if any(missing):
        image = np.pad(image, [*((n // 2, n - n // 2) for n in missing), (0, 0)])
    halves = [(side - size) / 2 for side in image.shape[:2]]
    top, left = map(round if odd == "even" else math.floor, halves)
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of the image (share of its area, aspect), resized to ``size`` x ``size``."""
    height, width = image.shape[:2]
    draws = rng.random(4)
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    return _resize(image[top : top + h, left : left + w], size, size, "area")


def flip(image: np.ndarray, rng: np.random.Generator, probability: float = 0.5) -> np.ndarray:
    """Left-right mirror with the given probability."""
    return cv2.flip(image, 1) if rng.random() < probability else image


def new_view(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.5, 1.0),
    rotate: float = 30.0,
    tolerance: int = 12,
) -> np.ndarray:
    """The subject of an image with a plain border, seen anew on another plain background.

    The background is what is connected to the corners within ``tolerance`` grey levels; the rest
    is scaled (longest side over ``size``), rotated by up to ``rotate`` degrees, placed at random
    inside the square and laid over a random colour.  An image without a plain border moves whole.
    """
    height, width = image.shape[:2]
    subject = np.dstack([image, _subject_mask(image, tolerance)])
    share = rng.uniform(*scale)
    angle = np.deg2rad(rng.uniform(-rotate, rotate))
    fine = 2 * size  # draw at twice the size and shrink with INTER_AREA: antialiasing
    factor = share * fine / max(height, width)
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    room = fine * (1 - share) / 2
    at_x, at_y = fine / 2 + rng.uniform(-room, room, 2)
    matrix = np.array(
        [
            [cos, -sin, at_x - cos * width / 2 + sin * height / 2],
            [sin, cos, at_y - sin * width / 2 - cos * height / 2],
        ]
    )
    subject = cv2.warpAffine(subject, matrix, (fine, fine), flags=cv2.INTER_LINEAR)
    subject = cv2.resize(subject, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    # The colour channels were not premultiplied: the rim mixes with the old background, as it
    # does in a picture cut out by hand.
    alpha = subject[..., 3:] / 255.0
    background = rng.uniform(0, 255, 3).astype(np.float32)
    return (subject[..., :3] * alpha + background * (1 - alpha) + 0.5).astype(np.uint8)


def _subject_mask(image: np.ndarray, tolerance: int) -> np.ndarray:
    """255 where the picture is not connected to its corners by near-equal colour."""
    height, width = image.shape[:2]
    canvas = image.copy()  # Pillow hands out read-only arrays, floodFill wants its own
    mask = np.zeros((height + 2, width + 2), np.uint8)
    flags = 4 | (255 << 8) | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE
    for corner in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)):
        if not mask[corner[1] + 1, corner[0] + 1]:
            cv2.floodFill(canvas, mask, corner, 0, (tolerance,) * 3, (tolerance,) * 3, flags)
    return 255 - mask[1:-1, 1:-1]


def light(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float = 0.3,
    contrast: float = 0.3,
    saturation: float = 0.3,
) -> np.ndarray:
    """Random factors on brightness, contrast and saturation, each within 1 +- its argument."""
    b, c, s = (1 + rng.uniform(-x, x) for x in (brightness, contrast, saturation))
    pixels = image.astype(np.float32)
    mean = pixels.mean()
    pixels = (pixels - mean) * c + mean
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = (grey[..., None] + (pixels - grey[..., None]) * s) * b
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


# Name -> (image uint8 [h, w, 3] or bytes, generator, arguments of the specification) -> image.
OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    operation.__name__: operation
    for operation in (
        *(decode, resize, resize_short, center_crop, random_resized_crop, flip, new_view, light),
        augment.randaugment,
    )
}
