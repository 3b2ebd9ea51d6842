"""config.json of Hugging Face CLIPModel and CLIPVisionModelWithProjection, both directions.

A file is read as transformers reads it: what it leaves out is at transformers' default (since 4.32
only differences from the defaults are saved), and `text_config_dict` or `vision_config_dict`, where
there, stands for the section of that name. Which defaults were taken is logged.

Text pooling. Ours is "first EOS". transformers pools there too, unless `eos_token_id` is 2: then it
pools at the largest id of the row (transformers PR #24773, for configurations written with a wrong
id). A folder with that 2 is read as "first EOS" if its tokenizer shows that both rules agree, which
is when its EOS has the highest id of the vocabulary, else as "largest id". A model that pools at
its first EOS, of id 2, is not written at all.
"""

import functools
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.model import mofi
from mofi_jax.model import text as text_lib

# transformers has several names for each formula.
ACTIVATION_FROM = {
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
        "gelu_tanh",
    ),
}
ACTIVATION_TO = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# What transformers takes for a field that is not there or null, of the fields read here: those of
# CLIPConfig, CLIPTextConfig and CLIPVisionConfig (models/clip/configuration_clip.py of 5.24). They
# are older than the saving of differences: the last to change was eos_token_id (PR #24773, 4.31).
_TOWER = {
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"projection_dim": 512},
    "text_config": _TOWER
    | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
    "vision_config": _TOWER
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
    },
}

# Types of the fields that are not whole numbers, and fields that may also be a list of numbers.
KINDS = {"hidden_act": (str, "a name"), "layer_norm_eps": ((int, float), "a number")}
LISTS = ("eos_token_id", "image_size", "patch_size")

CLIP_MODEL, VISION_MODEL = "clip", "clip_vision_model"

# transformers compares with this id before it decides how to pool.
ARGMAX_EOS = 2

# What MofiConfig says of the text tower of a model that has none.
NO_TEXT = {"text": mofi.TowerConfig(1, 1, 1), "vocab_size": 1, "context_length": 1, "eos_id": 0}


def to_config(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer | None) -> dict[str, Any]:
    """config.json's content: of CLIPModel, or without a tokenizer of CLIPVisionModelWithProjection.

    Raises BadInput for another model's tokenizer, or an EOS of id 2.
    """
    if tokenizer is not None:
        check_tokenizer(config, tokenizer)
        if config.eos_id == ARGMAX_EOS:
            raise BadInput(
                f"The EOS of {tokenizer.path} has the id 2, for which transformers pools texts at "
                "another token than this model does: train with a tokenizer whose EOS has another "
                "id."
            )

    def tower(shape: mofi.TowerConfig) -> dict[str, Any]:
        return {
            "hidden_size": shape.width,
            "intermediate_size": shape.hidden_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "hidden_act": ACTIVATION_TO[config.activation],
            "layer_norm_eps": config.layer_norm_eps,
            "attention_dropout": 0.0,
            "projection_dim": config.embed_dim,
        }

    # Under both names: the second is the one before transformers v5.
    dtype = {"dtype": "float32", "torch_dtype": "float32"}
    vision = {
        "model_type": VISION_MODEL,
        **tower(config.image),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
    }
    if tokenizer is None:
        return {"architectures": ["CLIPVisionModelWithProjection"], **dtype, **vision}
    return {
        "architectures": ["CLIPModel"],
        "model_type": CLIP_MODEL,
        **dtype,
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": mofi.INITIAL_LOGIT_SCALE,
        "text_config": {
            "model_type": "clip_text_model",
            **tower(config.text),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ARGMAX_EOS
            if config.eos_id == text_lib.LARGEST_ID
            else tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        },
        "vision_config": vision,
    }


def check_tokenizer(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer) -> None:
    """Raises BadInput for a tokenizer that is another model's."""
    same_end = config.eos_id in (tokenizer.eos_id, text_lib.LARGEST_ID)
    if not same_end or tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"The tokenizer {tokenizer.path} (EOS {tokenizer.eos_id}, {tokenizer.vocab_size} ids) "
            f"is not the model's (EOS {config.eos_id}, {config.vocab_size} ids): give the one it "
            "was trained with."
        )


def resolve(values: Mapping[str, Any], where: epath.PathLike) -> dict[str, Any]:
    """config.json with every field that `from_config` reads, as transformers resolves them.

    Without `text_config` if it describes an image tower alone. Raises BadInput for what describes
    neither that nor a CLIPModel.
    """
    kind, defaults = values.get("model_type"), DEFAULTS
    if kind == VISION_MODEL:
        values = {"projection_dim": values.get("projection_dim"), "vision_config": values}
        defaults = {name: part for name, part in DEFAULTS.items() if name != "text_config"}
    elif kind != CLIP_MODEL:
        raise BadInput(
            f"{where} describes a model of type {kind!r}: give a folder of type {CLIP_MODEL!r} "
            f"(CLIPModel) or {VISION_MODEL!r} (CLIPVisionModelWithProjection), or of SigLIP."
        )
    return {"model_type": kind, **with_defaults(values, where, defaults)}


def with_defaults(
    values: Mapping[str, Any], where: epath.PathLike, defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The fields of a config.json that have `defaults`, by section, "" being the top.

    Raises BadInput for a section that is no object.
    """
    resolved: dict[str, Any] = {}
    taken = []
    for section, of_section in defaults.items():
        # The _dict is a whole configuration: what it leaves out is at its default, whatever the
        # section of that name says.
        override = values.get(f"{section}_dict")
        part = (values if not section else values.get(section)) if override is None else override
        part = {} if part is None else part
        if not isinstance(part, Mapping):
            raise BadInput(
                f"{where} has {section}={part!r}, not an object of fields: copy the file again."
            )
        found = {
            key: default if part.get(key) is None else part[key]
            for key, default in of_section.items()
        }
        taken += [
            f"{section}.{key}={default!r}".lstrip(".")
            for key, default in of_section.items()
            if part.get(key) is None
        ]
        resolved |= {section: found} if section else found
    if taken:
        logging.info("%s leaves at transformers' defaults: %s", where, ", ".join(taken))
    return resolved


def from_config(
    values: Mapping[str, Any],
    where: epath.PathLike,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> mofi.MofiConfig:
    """What `resolve` gives -> MofiConfig with dtype float32; `where` is the file named in errors.

    An image tower alone has `NO_TEXT` in place of a text tower. Raises BadInput: a value of another
    type, or one that our model cannot express.
    """
    fields = shared_fields(values, where)
    if "text_config" in values:
        stated = field(values, where, "text_config", "eos_token_id")
        fields["eos_id"] = _pooling_eos(stated, where, tokenizer)
    return build({**fields, "embed_dim": field(values, where, "", "projection_dim")}, where)


def build(fields: Mapping[str, Any], where: epath.PathLike) -> mofi.MofiConfig:
    """The model of dtype float32 that a file describes; raises BadInput if there is none."""
    try:
        return mofi.MofiConfig(**fields, dtype="float32")
    except (BadInput, OverflowError) as error:
        raise BadInput(f"{where} describes no model that can be built: {error}") from error


def _refuse(where: epath.PathLike, what: str) -> None:
    raise BadInput(f"{where} has {what}, which this model cannot express: use another model.")


def square(values: Mapping[str, Any], where: epath.PathLike, key: str) -> int:
    """A side of vision_config; raises BadInput for one of two lengths."""
    value = field(values, where, "vision_config", key)
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        _refuse(where, f"vision_config.{key} {value}")
    return sides.pop()


def shared_fields(values: Mapping[str, Any], where: epath.PathLike) -> dict[str, Any]:
    """The fields of MofiConfig that all families have under the same names; BadInput as above."""
    field_of = functools.partial(field, values, where)
    sections = [section for section in ("text_config", "vision_config") if section in values]

    def same(key: str) -> Any:
        first, last = (field_of(section, key) for section in (sections[0], sections[-1]))
        if first != last:
            _refuse(where, f"{key} {first!r} for text and {last!r} for pictures")
        return last

    def tower(section: str) -> mofi.TowerConfig:
        width = field_of(section, "hidden_size")
        layers, heads, mlp_width = (
            field_of(section, name)
            for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        )
        return mofi.TowerConfig(width, layers, heads, mlp_width)

    activation = same("hidden_act")
    if activation not in ACTIVATION_FROM:
        _refuse(where, f"hidden_act {activation!r}")
    if field_of("vision_config", "num_channels") != 3:
        _refuse(where, "vision_config.num_channels other than 3")
    text = NO_TEXT
    if "text_config" in sections:
        text = {
            "text": tower("text_config"),
            "vocab_size": field_of("text_config", "vocab_size"),
            "context_length": field_of("text_config", "max_position_embeddings"),
        }
    try:
        epsilon = float(same("layer_norm_eps"))
    except OverflowError as error:
        raise BadInput(f"{where} has a layer_norm_eps beyond all numbers: correct it.") from error
    return {
        "image_size": square(values, where, "image_size"),
        "patch_size": square(values, where, "patch_size"),
        "image": tower("vision_config"),
        "activation": ACTIVATION_FROM[activation],
        "layer_norm_eps": epsilon,
        **text,
    }


def field(values: Mapping[str, Any], where: epath.PathLike, section: str, key: str) -> Any:
    """A value of what `resolve` gives; raises BadInput where it is of another type.

    The section is "text_config", "vision_config", or "" for the top.
    """
    value = values[section][key] if section else values[key]
    kinds, wanted = KINDS.get(key, (int, "a whole number"))
    items = value if key in LISTS and isinstance(value, list) and value else [value]
    if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in items):
        name = f"{section}.{key}".lstrip(".")
        raise BadInput(f"{where} has {name}={value!r}, not {wanted}: copy the file again.")
    return value


def _pooling_eos(
    stated: int | list[int], where: epath.PathLike, tokenizer: tokenizer_lib.Tokenizer | None
) -> int:
    """The id at whose first occurrence transformers pools, or LARGEST_ID: the top of this file."""
    stated = stated[0] if isinstance(stated, list) else stated
    if stated == ARGMAX_EOS:
        if tokenizer is not None and tokenizer.eos_id == tokenizer.vocab_size - 1:
            return tokenizer.eos_id
        logging.warning(
            "%s says eos_token_id 2, so that texts pool at their largest id, and no tokenizer "
            "beside it shows that this is the EOS.",
            where,
        )
        return text_lib.LARGEST_ID
    if tokenizer is not None and tokenizer.eos_id != stated:
        raise BadInput(
            f"{where} says eos_token_id {stated} and {tokenizer.path} has {tokenizer.eos_id}: put "
            "the tokenizer of this model beside it."
        )
    return stated
