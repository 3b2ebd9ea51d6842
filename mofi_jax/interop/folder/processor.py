"""Pixels of a Hugging Face folder: transformers' image processor files, both directions.

What transformers does with a picture splits in two: the operations up to uint8, which `data.ops`
has under other names, and an affine map of uint8 to what the patch embedding takes. The map of a
folder that is not ours is folded into the weights, which is exact.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.model import image as image_lib

PREPROCESS = "preprocess.json"  # ours: the exact operations
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of transformers 5, with the same inside

# What transformers takes where a file says nothing: the class attributes of its image processors
# (models/*/image_processing_*.py of 5.24; the same since 4.32).
_ALL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CLIP = _ALL | {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": image_lib.pixel_statistics("clip")[0],
    "image_std": image_lib.pixel_statistics("clip")[1],
}
_SIGLIP = _ALL | {
    "size": {"height": 224, "width": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _SIGLIP,
    # Of any shape, cut into no more than so many patches; the squares that a model takes here.
    "Siglip2": _SIGLIP | {"resample": 2, "default_to_square": True, "size": None},
    "ViT": _SIGLIP | {"resample": 2, "default_to_square": True},
}
OF_FAMILY = {"clip": "CLIP", "siglip": "Siglip"}

# Pillow's numbers for its filters, and our names for them.
RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear_antialias",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
# The filter nearest to a method that Pillow does not have.
NEAREST = {"bilinear": 2, "area": 3}


@dataclasses.dataclass(frozen=True)
class Processor:
    """How a picture becomes what the patch embedding takes."""

    operations: str  # `data.ops`, from bytes to uint8 [s, s, 3]
    scale: tuple[float, ...] = ()  # uint8 * scale + shift, by channel; () for the family's own
    shift: tuple[float, ...] = ()

    def folded(
        self, kernel: Float[np.ndarray, "p p 3 w"], family: str
    ) -> tuple[Float[np.ndarray, "p p 3 w"], Float[np.ndarray, " w"]]:
        """A patch embedding's weights for pixels normalised as `family` does, and its bias."""
        none = np.zeros(kernel.shape[-1], kernel.dtype)
        if not self.scale:
            return kernel, none
        mean, std = (np.float64(v) for v in image_lib.pixel_statistics(family))
        scale = 255 * np.float64(self.scale) * std
        shift = 255 * np.float64(self.scale) * mean + np.float64(self.shift)
        if np.allclose(scale, 1, rtol=0, atol=1e-5) and np.allclose(shift, 0, rtol=0, atol=1e-5):
            return kernel, none
        logging.info("another normalisation of pixels is folded into the patch embedding")
        bias = np.einsum("pqcw,c->w", kernel.astype(np.float64), shift)
        return (kernel * scale[:, None]).astype(kernel.dtype), bias.astype(kernel.dtype)


def read(folder: epath.PathLike, image_size: int, family: str) -> Processor:
    """What a folder says of pixels: preprocess.json if ours, else transformers' file.

    A folder with neither (weights alone) gets the family's usual preprocessing. Raises BadInput:
    a damaged file, or one that does not end in squares of `image_size`.
    """
    folder = epath.Path(folder)
    values, path = _values(folder)
    fields = None if values is None else _Fields(values, path, family)
    scale, shift = fields.affine() if fields else ((), ())
    if (folder / PREPROCESS).exists():
        operations = exact(folder / PREPROCESS, image_size)
    elif fields:
        operations = fields.operations(image_size)
    else:
        usual = {"clip": "clip_hf", "siglip": "siglip"}[family]
        logging.warning(
            "%s has no %s: pictures are preprocessed as %s does.", folder, PREPROCESSOR, usual
        )
        operations = ops.expand(usual, image_size)
    return Processor(operations, scale, shift)


def to_config(preprocess: str, image_size: int, family: str) -> dict[str, Any]:
    """preprocessor_config.json: the nearest that CLIPImageProcessor can express.

    It always antialiases; the exact operations are in preprocess.json beside it.
    """
    mean, std = image_lib.pixel_statistics(family)
    resize = re.search(r"resize(_short)?\((\d+)(?:, *(?:method=)?'(\w+)')?", preprocess)
    side = int(resize[2]) if resize else image_size
    square = resize is not None and not resize[1]
    method = (resize and resize[3]) or "area"
    numbers = NEAREST | {name: number for number, name in RESAMPLING.items()}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": resize is not None,
        "size": {"height": side, "width": side} if square else {"shortest_edge": side},
        "resample": numbers[method],
        "do_center_crop": "center_crop" in preprocess,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def expresses(preprocess: str, image_size: int, family: str) -> bool:
    """Whether `to_config` says exactly these operations, or only something near them."""
    values = to_config(preprocess, image_size, family)
    return _Fields(values, epath.Path(), family).operations(image_size) == preprocess


def exact(path: epath.Path, image_size: int) -> str:
    """The operations that a preprocess.json holds; raises BadInput if it is damaged."""
    spec = files.read_json_object(path, "copy the whole folder again").get("preprocess")
    if not isinstance(spec, str):
        raise BadInput(f"{path} lacks the key preprocess: export the model again.")
    ops.parse(ops.expand(spec, image_size))
    return spec


def _values(folder: epath.Path) -> tuple[dict[str, Any] | None, epath.Path]:
    """The image processor's fields and their file, by transformers' order of preference."""
    remedy = "copy the whole folder again"
    path = folder / PROCESSOR
    if path.exists():
        values = files.read_json_object(path, remedy).get("image_processor")
        if isinstance(values, dict):
            return values, path
    path = folder / PREPROCESSOR
    return (files.read_json_object(path, remedy) if path.exists() else None), path


class _Fields:
    """The fields of one file, with what transformers takes where they are missing or null."""

    def __init__(self, values: Mapping[str, Any], path: epath.Path, family: str):
        self._path = path
        named = values.get("image_processor_type") or values.get("feature_extractor_type")
        named = named if isinstance(named, str) else OF_FAMILY[family]
        kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", named)
        if kind not in DEFAULTS:
            logging.warning("%s names %s, read as CLIP's.", path, named)
        defaults = DEFAULTS.get(kind, _CLIP)
        self._values = {
            key: default if values.get(key) is None else values[key]
            for key, default in defaults.items()
        }

    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and shift of uint8, by channel."""
        scale = self._numbers("rescale_factor") if self._switch("do_rescale") else np.ones(3)
        shift = np.zeros(3)
        if self._switch("do_normalize"):
            std = self._numbers("image_std")
            if not std.all():
                self._refuse("image_std")
            scale, shift = scale / std, -self._numbers("image_mean") / std
        return tuple(scale.tolist()), tuple(shift.tolist())

    def operations(self, image_size: int) -> str:
        """What comes before that, ending in a square of `image_size`."""
        return "|".join(["decode", *self._steps(image_size)])

    def _steps(self, image_size: int) -> list[str]:
        steps, fits = [], False
        if self._values["size"] is None:
            self._values["size"] = {"height": image_size, "width": image_size}
            logging.warning("%s keeps the shape of pictures, here they are squares.", self._path)
        if self._switch("do_resize"):
            size, method = self._size("size"), self._method()
            if size.keys() == {"shortest_edge"}:
                steps.append(f"resize_short({size['shortest_edge']}, {method!r})")
            elif size.keys() == {"height", "width"} and len(set(size.values())) == 1:
                steps.append(f"resize({size['height']}, {method!r})")
                fits = size["height"] == image_size
            else:
                self._refuse("size")
        if self._switch("do_center_crop"):
            if self._size("crop_size") != {"height": image_size, "width": image_size}:
                self._refuse("crop_size", f"where the model takes {image_size} x {image_size}")
        elif fits:
            return steps
        elif "shortest_edge" in self._size("size") or not steps:
            logging.warning(
                "%s leaves pictures their aspect, where the model takes squares: they are cropped.",
                self._path,
            )
        else:
            self._refuse("size", f"where the model takes {image_size} x {image_size}")
        return [*steps, f"center_crop({image_size}, 'floor')"]

    def _size(self, key: str) -> dict[str, int]:
        """A size as transformers standardises it: by shortest_edge, or by height and width."""
        value = self._values[key]
        if isinstance(value, dict):
            value = {name: side for name, side in value.items() if side is not None}
        elif isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        elif key == "size" and not self._values["default_to_square"]:
            value = {"shortest_edge": value}
        else:
            value = {"height": value, "width": value}
        limit = math.isqrt(ops.MAX_PIXELS)
        if not all(type(side) is int and 0 < side <= limit for side in value.values()):
            self._refuse(key)
        return value

    def _method(self) -> str:
        value = self._values["resample"]
        if isinstance(value, str):
            names = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
            value = dict(zip(names, RESAMPLING, strict=True)).get(value.lower())
        if type(value) is not int or value not in RESAMPLING:
            self._refuse("resample")
        return RESAMPLING[value]

    def _switch(self, key: str) -> bool:
        if not isinstance(self._values[key], bool):
            self._refuse(key)
        return self._values[key]

    def _numbers(self, key: str) -> Float[np.ndarray, " 3"]:
        """A number, or one for each channel."""
        try:
            values = np.array(self._values[key], np.float64)
            if np.isfinite(values).all() and values.shape in ((), (3,)):
                return np.broadcast_to(values, 3)
        except (TypeError, ValueError, OverflowError):
            pass
        self._refuse(key)
        raise AssertionError

    def _refuse(self, key: str, why: str = "which cannot be read") -> None:
        value = json.dumps(self._values[key])
        raise BadInput(
            f"{self._path} has {key} {value[:80]}, {why}: correct it, or put a {PREPROCESS} with "
            "the operations beside it."
        )
