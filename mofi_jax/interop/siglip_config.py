"""config.json of transformers' SiglipModel and SiglipVisionModel, both directions.

Also of Siglip2Model and Siglip2VisionModel (NaFlex), whose pictures have any shape: read as a model
of squares, the shape of its position embeddings. SigLIP 2 at a fixed size is a SiglipModel. Missing
fields are resolved as in `clip_config`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import clip_config
from mofi_jax.model import mofi

MODEL, VISION_MODEL = "siglip", "siglip_vision_model"
NAFLEX, NAFLEX_VISION = "siglip2", "siglip2_vision_model"
MODEL_TYPES = (MODEL, VISION_MODEL, NAFLEX, NAFLEX_VISION)

# What transformers takes for a field that is not there or null (models/siglip/
# configuration_siglip.py and siglip2's of 5.24).
_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TEXT = _TOWER | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 0}
_VISION = _TOWER | {"patch_size": 16, "num_channels": 3, "vision_use_head": True}


def resolve(values: Mapping[str, Any], where: epath.PathLike) -> dict[str, Any]:
    """config.json with every field that `from_config` reads, as transformers resolves them.

    Without `text_config` if it describes an image tower alone; BadInput as `clip_config.resolve`.
    """
    kind = values.get("model_type")
    naflex = kind in (NAFLEX, NAFLEX_VISION)
    defaults = {
        "vision_config": _VISION | ({"num_patches": 256} if naflex else {"image_size": 224})
    }
    if kind in (VISION_MODEL, NAFLEX_VISION):
        values = {"vision_config": values}
    else:
        defaults["text_config"] = _TEXT
    return {"model_type": kind, **clip_config.with_defaults(values, where, defaults)}


def from_config(
    values: Mapping[str, Any],
    where: epath.PathLike,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> mofi.MofiConfig:
    """What `resolve` gives -> MofiConfig with dtype float32; `where` is the file named in errors.

    An image tower alone has `clip_config.NO_TEXT`. Raises BadInput: a value of another type, or one
    that our model cannot express.
    """
    field = functools.partial(clip_config.field, values, where)
    if values["vision_config"]["vision_use_head"] is not True:
        raise BadInput(
            f"{where} has vision_config.vision_use_head other than true, and without its head the "
            "tower gives no embedding: use a model that has it."
        )
    if "num_patches" in values["vision_config"]:
        side = math.isqrt(max(0, field("vision_config", "num_patches")))
        if side**2 != field("vision_config", "num_patches"):
            raise BadInput(f"{where} has vision_config.num_patches, no square: use another model.")
        size = side * clip_config.square(values, where, "patch_size")
        vision = {**values["vision_config"], "image_size": size}
        values = {**values, "vision_config": vision}
    fields = clip_config.shared_fields(values, where)
    width = fields["image"].width
    if "text_config" in values:
        # Texts pool at their last position, whatever is there.
        fields["eos_id"] = 0 if tokenizer is None else tokenizer.eos_id
        size = field("text_config", "projection_size") or fields["text"].width
        if size != width:
            raise BadInput(
                f"{where} has texts of {size} dimensions and pictures of {width}: correct "
                "text_config.projection_size."
            )
    return clip_config.build({**fields, "embed_dim": width, "family": "siglip"}, where)


def to_config(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer | None) -> dict[str, Any]:
    """config.json's content: of SiglipModel, or without a tokenizer of SiglipVisionModel.

    Raises BadInput for another model's tokenizer.
    """

    def tower(shape: mofi.TowerConfig) -> dict[str, Any]:
        return {
            "hidden_size": shape.width,
            "intermediate_size": shape.hidden_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "hidden_act": clip_config.ACTIVATION_TO[config.activation],
            "layer_norm_eps": config.layer_norm_eps,
            "attention_dropout": 0.0,
        }

    # Under both names: the second is the one before transformers v5.
    dtype = {"dtype": "float32", "torch_dtype": "float32"}
    vision = {
        "model_type": VISION_MODEL,
        **tower(config.image),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "vision_use_head": True,
    }
    if tokenizer is None:
        return {"architectures": ["SiglipVisionModel"], **dtype, **vision}
    clip_config.check_tokenizer(config, tokenizer)
    return {
        "architectures": ["SiglipModel"],
        "model_type": MODEL,
        **dtype,
        "text_config": {
            "model_type": "siglip_text_model",
            **tower(config.text),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "projection_size": config.embed_dim,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        },
        "vision_config": vision,
    }
