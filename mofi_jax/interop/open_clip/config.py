"""open_clip_config.json, both directions, and the config.json by which timm opens the image tower.

What open_clip_config.json leaves out is as open_clip's own dataclasses have it (open_clip 3.3,
`model.py`: CLIPVisionCfg, CLIPTextCfg; `transform.py`: PreprocessCfg).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop.folder import processor
from mofi_jax.model import image as image_lib
from mofi_jax.model import mofi
from mofi_jax.model import text as text_lib

CONFIG = "open_clip_config.json"
COPY_AGAIN = "copy the whole folder again"

# Fields that say nothing of inference, or whose value says that nothing is out of the ordinary.
NEUTRAL = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pad_id"}
NEUTRAL |= {"hf_tokenizer_name", "custom_text", "init_logit_scale", "init_logit_bias"}
ORDINARY = {"pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
UNUSED = ("timm_", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")
TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
TIMM_EPSILON = 1e-5  # of timm's CLIP towers, in code and not in config.json


def to_model(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
    def tower(shape: mofi.TowerConfig) -> dict[str, Any]:
        values = {"layers": shape.layers, "width": shape.width}
        values["mlp_ratio"] = _ratio(shape.hidden_width, shape.width)
        if config.layer_norm_eps != 1e-5:
            values["norm_kwargs"] = {"eps": config.layer_norm_eps}
        if config.activation == "gelu_tanh":
            values["act_kwargs"] = {"approximate": "tanh"}
        return values

    image = config.image
    largest = config.eos_id in (text_lib.LARGEST_ID, tokenizer.vocab_size - 1)
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            **tower(image),
            "head_width": image.width // image.heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        "text_cfg": {
            **tower(config.text),
            "heads": config.text.heads,
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            # Any name: it is the folder's own tokenizer that is read.
            "hf_tokenizer_name": "tokenizer",
            # Every release pools at the largest id; at the first EOS only newer ones.
            "pool_type": "argmax" if largest else "eos",
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
    }


def _ratio(hidden: int, width: int) -> float:
    """mlp_ratio, from which open_clip and timm get int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else float(np.nextafter(ratio, np.inf))


def to_preprocess(preprocess: str, config: mofi.MofiConfig) -> dict[str, Any]:
    """The nearest that open_clip can express; the exact operations are in preprocess.json."""
    mean, std = image_lib.pixel_statistics(config.family)
    return {
        "size": config.image_size,
        "mode": "RGB",
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear" if "bilinear" in preprocess else "bicubic",
        "resize_mode": "squash" if re.search(r"\bresize\(", preprocess) else "shortest",
        "fill_color": 0,
    }


def to_timm(config: mofi.MofiConfig, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """config.json by which `timm.create_model("local-dir:FOLDER")` opens the image tower."""
    size = config.image_size
    return {
        # Any of its CLIP towers, whose shape is then overridden.
        "architecture": "vit_base_patch16_clip_224",
        "num_classes": config.embed_dim,
        "num_features": config.image.width,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": config.patch_size,
            "embed_dim": config.image.width,
            "depth": config.image.layers,
            "num_heads": config.image.heads,
            "mlp_ratio": _ratio(config.image.hidden_width, config.image.width),
            "act_layer": TIMM_ACTIVATIONS[config.activation],
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": pixels["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": "squash" if pixels["resize_mode"] == "squash" else "center",
            "mean": pixels["mean"],
            "std": pixels["std"],
            "num_classes": config.embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


class Fields:
    """A part of open_clip_config.json; remembers what was asked for, to find what was not."""

    def __init__(self, values: Any, path: epath.Path, name: str = "model_cfg"):
        if not isinstance(values, dict):
            raise BadInput(f"{path} lacks {name}: {COPY_AGAIN}.")
        self.path, self.name, self._values, self._asked = path, name, values, set()

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def part(self, key: str) -> "Fields":
        return Fields(self.get(key), self.path, f"{self.name}.{key}")

    def number(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # height and width
        if type(value) is not int:
            raise self.refusal(key)
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise self.refusal(key)
        return float(value)

    def only(self, key: str, name: str, default: Any) -> Any:
        """The field of an object that has no other."""
        value = self.get(key, {name: default})
        if not isinstance(value, dict) or value.keys() - {name}:
            raise self.refusal(key)
        return value.get(name, default)

    def refusal(self, key: str) -> BadInput:
        return BadInput(
            f"{self.path} has {self.name}.{key}={self._values.get(key)!r}, which this model cannot "
            "express: use a CLIP whose image tower is a plain ViT, with open_clip's own text tower."
        )

    def refuse_the_rest(self) -> None:
        for key, value in self._values.items():
            neutral = not value or key in NEUTRAL or ORDINARY.get(key) == value
            if key not in self._asked and not neutral and not key.startswith(UNUSED):
                raise self.refusal(key)


def from_model(model: Fields, tokenizer: tokenizer_lib.Tokenizer | None) -> mofi.MofiConfig:
    image, text = model.part("vision_cfg"), model.part("text_cfg")
    for part, key in ((image, "timm_model_name"), (text, "hf_model_name"), (image, "pool_type")):
        if part.get(key, "tok") != "tok":
            raise part.refusal(key)
    activations, epsilons, towers = [], [], []
    for part, width in ((image, 768), (text, 512)):
        width = part.number("width", width)
        heads = part.number("heads", 8) if part is text else None
        if heads is None:
            head_width = part.number("head_width", 64)
            if head_width < 1:
                raise part.refusal("head_width")
            heads = width // head_width
        hidden = int(width * part.real("mlp_ratio", 4.0))
        tanh = part.only("act_kwargs", "approximate", "none") == "tanh"
        quick = bool(model.get("quick_gelu", False))
        activations.append("quick_gelu" if quick else "gelu_tanh" if tanh else "gelu")
        epsilons.append(part.only("norm_kwargs", "eps", 1e-5))
        towers.append((width, part.number("layers", 12), heads, hidden))
    if activations[0] != activations[1]:
        raise text.refusal("act_kwargs")
    if epsilons[0] != epsilons[1] or type(epsilons[0]) not in (int, float):
        raise text.refusal("norm_kwargs")
    vocabulary = text.number("vocab_size", 49_408)
    eos_id = _pooling_eos(text, tokenizer)
    try:
        config = mofi.MofiConfig(
            image_size=image.number("image_size", 224),
            patch_size=image.number("patch_size", 16),
            image=mofi.TowerConfig(*towers[0]),
            text=mofi.TowerConfig(*towers[1]),
            vocab_size=vocabulary,
            context_length=text.number("context_length", 77),
            eos_id=eos_id,
            embed_dim=model.number("embed_dim"),
            activation=activations[0],
            layer_norm_eps=float(epsilons[0]),
            dtype="float32",
        )
    except BadInput as error:
        raise BadInput(f"{model.path} describes no model that can be built: {error}") from error
    for part in (model, image, text):
        part.refuse_the_rest()
    return config


def _pooling_eos(text: Fields, tokenizer: tokenizer_lib.Tokenizer | None) -> int:
    """The id at whose first occurrence texts pool, or LARGEST_ID."""
    pool, stated = text.get("pool_type", "argmax"), text.number("eos_id", 2)
    if pool not in ("argmax", "eos"):
        raise text.refusal("pool_type")
    if pool == "argmax":
        highest = tokenizer is not None and tokenizer.eos_id == tokenizer.vocab_size - 1
        return tokenizer.eos_id if highest else text_lib.LARGEST_ID
    if tokenizer is not None and tokenizer.eos_id != stated:
        raise BadInput(
            f"{text.path} pools texts at id {stated}, and the EOS of {tokenizer.path} is "
            f"{tokenizer.eos_id}: put the tokenizer of this model there."
        )
    return stated


def from_preprocess(
    folder: epath.Path, values: Any, config: mofi.MofiConfig
) -> processor.Processor:
    fields = Fields(values, folder / CONFIG, "preprocess_cfg")
    mean, std = image_lib.pixel_statistics(config.family)
    mean, std = (
        np.asarray(fields.get(k, v), np.float64) for k, v in (("mean", mean), ("std", std))
    )
    method, mode = fields.get("interpolation", "bicubic"), fields.get("resize_mode", "shortest")
    size = config.image_size
    method = "bilinear_antialias" if method == "bilinear" else "bicubic"
    steps = {
        "shortest": f"decode|resize_short({size}, {method!r})|center_crop({size})",
        "squash": f"decode|resize({size}, {method!r})",
    }
    if mode not in steps:
        raise fields.refusal("resize_mode")
    if (folder / processor.PREPROCESS).exists():
        operations = processor.exact(folder / processor.PREPROCESS, size)
    else:
        operations = steps[mode]
    return processor.Processor(operations, tuple(1 / 255 / std), tuple(-mean / std))
