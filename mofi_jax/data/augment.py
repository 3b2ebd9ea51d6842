"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719): operations of the paper's set on one image.

Each is a pure function of uint8 [h, w, 3] and a strength in [-1, 1]: 0 changes nothing, 1 is the
paper's magnitude 10, and those with a direction are drawn with either sign.  (In the paper's own
code the effect of some shrinks as the magnitude grows; here, as in torchvision and timm, all grow.)
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0

_GREY = (128, 128, 128)  # what moves in from outside, as in AutoAugment
_MAX_SHEAR, _MAX_SHIFT, _MAX_DEGREES = 0.3, 150 / 331, 30.0  # AutoAugment, arXiv 1805.09501
_MAX_ENHANCE, _MAX_BITS_LOST = 0.9, 4


def _affine(image: np.ndarray, matrix: list[list[Any]]) -> np.ndarray:
    """x' = M [x, y, 1] about the centre; the size stays."""
    height, width = image.shape[:2]
    (a, b, right), (c, d, down) = matrix
    x, y = (width - 1) / 2, (height - 1) / 2
    about = np.array([[a, b, right + x - a * x - b * y], [c, d, down + y - c * x - d * y]])
    return cv2.warpAffine(image, about, (width, height), flags=cv2.INTER_LINEAR, borderValue=_GREY)


def _by_pillow(
    function: Callable[[Image.Image, float], Image.Image],
) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda image, strength: np.asarray(function(Image.fromarray(image), strength))


def _enhanced(kind: type) -> Callable[[np.ndarray, float], np.ndarray]:
    return _by_pillow(lambda image, s: kind(image).enhance(1 + _MAX_ENHANCE * s))


def _rotated(image: np.ndarray, strength: float) -> np.ndarray:
    angle = math.radians(_MAX_DEGREES * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    return _affine(image, [[cos, -sin, 0], [sin, cos, 0]])


# Name -> (image, strength) -> image: the 14 operations of the paper's table.
OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda image, _: image,
    "auto_contrast": _by_pillow(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": _by_pillow(lambda image, _: ImageOps.equalize(image)),
    "rotate": _rotated,
    "solarize": _by_pillow(lambda image, s: ImageOps.solarize(image, round(256 * (1 - s)))),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": _by_pillow(
        lambda image, s: ImageOps.posterize(image, 8 - round(_MAX_BITS_LOST * s))
    ),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, s: _affine(image, [[1, _MAX_SHEAR * s, 0], [0, 1, 0]]),
    "shear_y": lambda image, s: _affine(image, [[1, 0, 0], [_MAX_SHEAR * s, 1, 0]]),
    "translate_x": lambda image, s: _affine(
        image, [[1, 0, _MAX_SHIFT * s * image.shape[1]], [0, 1, 0]]
    ),
    "translate_y": lambda image, s: _affine(
        image, [[1, 0, 0], [0, 1, _MAX_SHIFT * s * image.shape[0]]]
    ),
}

ONE_SIDED = frozenset({"solarize", "posterize"})  # no strength below 0


def randaugment(
    image: np.ndarray, rng: np.random.Generator, num_ops: int = 2, magnitude: float | int = 9
) -> np.ndarray:
    """Applies ``num_ops`` operations drawn with replacement, at one magnitude, 0 to 10.

    The defaults are the paper's for ImageNet (ResNet-50).  The image is uint8 [h, w, 3].
    """
    names = tuple(OPERATIONS)
    strength = magnitude / MAX_MAGNITUDE
    for draw, side in rng.random((num_ops, 2)):
        name = names[int(draw * len(names))]
        sign = 1 if name in ONE_SIDED or side < 0.5 else -1
        image = OPERATIONS[name](image, sign * strength)
    return image
