"""Picture operations on numpy examples, and the mini-language that names them.

``build("decode|flip|random_resized_crop(224)")`` gives a function ``(example, rng) -> example``
that applies the operations from left to right to ``example["image"]``.  Arguments are Python
literals.  Every operation is a pure function of the picture and the generator, so that resuming and
the number of workers change no pixel.  Nothing here imports jax: data workers must never start it.
"""

import ast
import ctypes
import functools
import importlib.util
import inspect
import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from mofi_jax.common.errors import BadInput
from mofi_jax.data import augment

cv2.setNumThreads(0)  # the pipeline has its own threads


def _keep_freed_pictures() -> None:
    """Has glibc keep the memory of freed pictures for the next ones.

    By default whatever takes more than 128 kB goes back to the system when it is freed, and the
    pages of the next picture are zeroed anew: a quarter of the time of decoding 320 x 256 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks that still go back at once
    mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD: what stays at the end of the heap


_keep_freed_pictures()

Operation = Callable[[np.ndarray, np.random.Generator | None], np.ndarray]

OPERATIONS: dict[str, Callable[..., Operation]] = {}


class UndecodableImage(ValueError):
    """Bytes that are not a whole picture; ``reason`` is one short word for counters."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


# What the web has, and Pillow reads by itself (MPO, of cameras, is a JPEG to it): an EPS would be
# handed to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
if importlib.util.find_spec("PIL.AvifImagePlugin"):
    _FORMATS += ("AVIF",)
# Largest picture that is decoded, by what its header declares: 256 MB in Pillow's memory, and a
# file of 2 kB can declare a hundred times as much.
MAX_PIXELS = 64_000_000
# Pillow's own limit is above; between them it would only warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_picture(data: bytes) -> Image.Image:
    """Reads a picture's header: format, mode, size; nothing is decoded yet, of whatever size.

    Raises:
      UndecodableImage: reason "empty", "not_a_picture" or "too_many_pixels" (of Pillow's limit).
    """
    if not data:
        raise UndecodableImage("empty")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise UndecodableImage("too_many_pixels") from None
    except Exception:  # noqa: BLE001  Pillow's parsers raise whatever the bytes lead them to
        raise UndecodableImage("not_a_picture") from None


def decode_rgb(data: bytes) -> np.ndarray:
    """Decodes any common picture format strictly.

    JPEG (also CMYK and grey), PNG (also palette, 16 bit), WebP, AVIF (by newer Pillows), BMP, TIFF
    and the first frame of GIF; alpha is laid over white, a camera's orientation tag is obeyed.
    Pillow does it, because OpenCV has releases that fill what is missing of a truncated JPEG with
    grey and say nothing.

    Returns:
      uint8 [height, width, 3], RGB.

    Raises:
      UndecodableImage: reason "empty", "not_a_picture", "too_many_pixels" (beyond `MAX_PIXELS`),
        "truncated" or "corrupt".
    """
    picture = open_picture(data)
    if picture.width * picture.height > MAX_PIXELS:
        raise UndecodableImage("too_many_pixels")
    try:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return _to_rgb(picture)
    except Exception as error:  # noqa: BLE001
        words = str(error).lower()
        cut_short = "truncated" in words or "not enough" in words or "unexpected end" in words
        raise UndecodableImage("truncated" if cut_short else "corrupt") from None


def _to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow clips 16-bit grey to 255 on conversion; keep the high byte instead.
        high = np.clip(np.asarray(picture) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(high[..., None], 3, axis=-1)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    # Pillow converts to the same mode by copying.
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _declared_pixels(jpeg: bytes) -> int | None:
    """Width times height in the header of a JPEG; None where it is not a plain chain of segments.

    Takes 2 microseconds, where Pillow takes 20 and decoding 300.
    """
    at, end = 2, len(jpeg) - 8
    while at < end and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame begins
            height, width = jpeg[at + 5 : at + 7], jpeg[at + 7 : at + 9]
            return int.from_bytes(height, "big") * int.from_bytes(width, "big")
        if not (0xC0 <= marker <= 0xCF or 0xDB <= marker <= 0xFE):  # without length, or none at all
            return None
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """uint8 [h, w, 3] RGB -> JPEG bytes; the same bytes for the same input and library version."""
    ok, data = cv2.imencode(
        ".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not ok:
        raise UndecodableImage("not_encodable")
    return data.tobytes()


def build(spec: str) -> Callable[[Mapping[str, Any], np.random.Generator | None], dict[str, Any]]:
    """Compiles a specification such as ``decode|resize_short(224)|center_crop(224)``.

    Returns:
      A picklable function ``(example, rng) -> example`` that replaces ``example["image"]``.

    Raises:
      BadInput: an unknown operation, a wrong argument, or something that is not a literal.
    """
    parse(spec)  # complain now, not in a data worker
    return functools.partial(_apply, spec)


def _apply(
    spec: str, example: Mapping[str, Any], rng: np.random.Generator | None = None
) -> dict[str, Any]:
    image = example["image"]
    for operation in parse(spec):
        image = operation(image, rng)
    return {**example, "image": image}


@functools.lru_cache(maxsize=64)
def parse(spec: str) -> tuple[Operation, ...]:
    """The operations of a specification, in order; raises BadInput as `build` does."""
    operations = []
    for part in spec.split("|"):
        try:
            node = ast.parse(part.strip(), mode="eval").body
            name = node.func.id if isinstance(node, ast.Call) else node.id
            call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
            args = [ast.literal_eval(a) for a in call.args]
            kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, AttributeError, ValueError, MemoryError, RecursionError):
            raise BadInput(
                f"The picture operation {part.strip()!r} in {spec!r} cannot be read: write "
                "name or name(literal, key=literal), separated by |."
            ) from None
        if name not in OPERATIONS:
            raise BadInput(
                f"Unknown picture operation {name!r} in {spec!r}: choose from "
                f"{', '.join(sorted(OPERATIONS))}."
            )
        try:
            operations.append(OPERATIONS[name](*args, **kwargs))
        except TypeError:
            raise BadInput(
                f"Wrong arguments in {part.strip()!r} of {spec!r}: the operation is "
                f"{name}{inspect.signature(OPERATIONS[name])}."
            ) from None
    return tuple(operations)


def _register(factory: Callable[..., Operation]) -> Callable[..., Operation]:
    OPERATIONS[factory.__name__] = factory
    return factory


@_register
def decode() -> Operation:
    """Bytes -> RGB.  OpenCV for JPEG (twice as fast as Pillow), the strict decoder for the rest."""

    def apply(data: bytes, rng: np.random.Generator | None) -> np.ndarray:
        if data[:2] == b"\xff\xd8" and (_declared_pixels(data) or math.inf) <= MAX_PIXELS:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None:
                return image
        return decode_rgb(data)

    return apply


def _resize(image: np.ndarray, width: int, height: int, method: str) -> np.ndarray:
    interpolation = {
        # Shrinking with INTER_AREA is antialiased; growing with it is nearest-neighbour.
        "area": cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC,
        "bilinear": cv2.INTER_LINEAR,
    }[method]
    return cv2.resize(image, (width, height), interpolation=interpolation)


@_register
def resize_short(size: int, method: str = "area") -> Operation:
    """Short side to ``size``, aspect kept.  ``area`` is antialiased, ``bilinear`` is not.

    ``bilinear`` is the arithmetic of the released MOFI evaluation (tensor resize with
    ``antialias=False``, apple/ml-mofi eval/utils.py), up to rounding to uint8.
    """
    if method not in ("area", "bilinear") or size > MAX_PIXELS**0.5:
        raise TypeError(size, method)

    def apply(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        height, width = image.shape[:2]
        short = min(height, width)
        wide, high = max(size, width * size // short), max(size, height * size // short)
        if wide * high > MAX_PIXELS:  # a line of pixels would grow to gigabytes
            raise UndecodableImage("too_elongated")
        return _resize(image, wide, high, method)

    return apply


@_register
def center_crop(size: int) -> Operation:
    """The ``size`` x ``size`` square in the middle; the picture must be at least as large."""

    def apply(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        top, left = (image.shape[0] - size + 1) // 2, (image.shape[1] - size + 1) // 2
        return image[top : top + size, left : left + size]

    return apply


@_register
def random_resized_crop(
    size: int,
    scale: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Operation:
    """A random part of the picture (share of its area, aspect), resized to ``size`` x ``size``."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        draws = rng.random(4)
        area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
        w = min(width, max(1, round(math.sqrt(area * aspect))))
        h = min(height, max(1, round(math.sqrt(area / aspect))))
        top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
        return _resize(image[top : top + h, left : left + w], size, size, "area")

    return apply


@_register
def flip(probability: float = 0.5) -> Operation:
    """Left-right mirror with the given probability."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cv2.flip(image, 1) if rng.random() < probability else image

    return apply


@_register
def new_view(
    size: int, scale: tuple[float, float] = (0.5, 1.0), rotate: float = 30.0, tolerance: int = 12
) -> Operation:
    """The subject of a picture with a plain border, seen anew on another plain background.

    The background is what is connected to the corners within ``tolerance`` grey levels; the rest
    is scaled (longest side over ``size``), rotated by up to ``rotate`` degrees, placed at random
    inside the square and laid over a random colour.  A picture without a plain border moves as a
    whole.
    """

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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

    return apply


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


@_register
def light(brightness: float = 0.3, contrast: float = 0.3, saturation: float = 0.3) -> Operation:
    """Random factors on brightness, contrast and saturation, each within 1 +- its argument."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        b, c, s = (1 + rng.uniform(-x, x) for x in (brightness, contrast, saturation))
        pixels = image.astype(np.float32)
        mean = pixels.mean()
        pixels = (pixels - mean) * c + mean
        grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        pixels = (grey[..., None] + (pixels - grey[..., None]) * s) * b
        return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)

    return apply


@_register
def randaugment(num_ops: int = 2, magnitude: float | int = 9) -> Operation:
    """``num_ops`` operations drawn from the set of RandAugment, at magnitude 0 to 10 (`augment`).

    The defaults are the paper's for ImageNet (ResNet-50).
    """
    if not (type(num_ops) is int and num_ops >= 0 and 0 <= magnitude <= augment.MAX_MAGNITUDE):
        raise TypeError(num_ops, magnitude)

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return augment.randaugment(image, rng, num_ops=num_ops, magnitude=magnitude)

    return apply
