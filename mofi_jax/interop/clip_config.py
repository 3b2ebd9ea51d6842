"""config.json of Hugging Face CLIPModel, both directions.

Every field is read, never assumed: one that is not there is an error, because a library default
(the activation above all) costs accuracy without a word.

Text pooling. Ours is "first EOS". transformers pools there too, unless `eos_token_id` is 2: then it
pools at the largest id of the row (transformers PR #24773, for configurations written with a wrong
id). A folder with that 2 is read if its tokenizer shows that both rules agree, which is when its
EOS has the highest id of the vocabulary; a model whose EOS really is 2 is not written at all.
"""

import functools
from collections.abc import Mapping
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.model import mofi

# gelu_new and gelu_pytorch_tanh are one formula under two names.
ACTIVATION_FROM = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ACTIVATION_TO = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Types of the fields that are not whole numbers, and fields that may also be a list of numbers.
KINDS = {"hidden_act": (str, "a name"), "layer_norm_eps": ((int, float), "a number")}
LISTS = ("eos_token_id", "image_size", "patch_size")

# transformers compares with this id before it decides how to pool.
ARGMAX_EOS = 2


def to_config(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
    """config.json's content; raises BadInput for another model's tokenizer or an EOS of id 2."""
    if tokenizer.eos_id != config.eos_id or tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"The tokenizer {tokenizer.path} (EOS {tokenizer.eos_id}, {tokenizer.vocab_size} ids) "
            f"is not the model's (EOS {config.eos_id}, {config.vocab_size} ids): give the one it "
            "was trained with."
        )
    if config.eos_id == ARGMAX_EOS:
        raise BadInput(
            f"The EOS of {tokenizer.path} has the id 2, for which transformers pools texts at "
            "another token than this model does: train with a tokenizer whose EOS has another id."
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

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "torch_dtype": "float32",  # the name before transformers v5
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": mofi.INITIAL_LOGIT_SCALE,
        "text_config": {
            "model_type": "clip_text_model",
            **tower(config.text),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(config.image),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
        },
    }


def from_config(
    values: Mapping[str, Any],
    where: epath.PathLike,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> mofi.MofiConfig:
    """config.json -> MofiConfig with dtype float32; `where` is the file named in errors.

    Raises BadInput: not a CLIPModel, a field missing, or a value that our model cannot express.
    """
    if values.get("model_type") != "clip":
        raise BadInput(
            f"{where} describes a model of type {values.get('model_type')!r}: give a folder of "
            "type 'clip' (CLIPModel)."
        )

    field_of = functools.partial(field, values, where)

    def refuse(what: str) -> None:
        raise BadInput(f"{where} has {what}, which this model cannot express: use another model.")

    def same(key: str) -> Any:
        text, vision = field_of("text_config", key), field_of("vision_config", key)
        if text != vision:
            refuse(f"{key} {text!r} for text and {vision!r} for pictures")
        return text

    def square(key: str) -> int:
        value = field_of("vision_config", key)
        sides = set(value) if isinstance(value, list) else {value}
        if len(sides) != 1:
            refuse(f"vision_config.{key} {value}")
        return sides.pop()

    def tower(section: str) -> mofi.TowerConfig:
        width = field_of(section, "hidden_size")
        layers, heads, mlp_width = (
            field_of(section, name)
            for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
        )
        return mofi.TowerConfig(width, layers, heads, mlp_width)

    activation = same("hidden_act")
    if activation not in ACTIVATION_FROM:
        refuse(f"hidden_act {activation!r}")
    fields = {
        "image_size": square("image_size"),
        "patch_size": square("patch_size"),
        "image": tower("vision_config"),
        "text": tower("text_config"),
        "vocab_size": field_of("text_config", "vocab_size"),
        "context_length": field_of("text_config", "max_position_embeddings"),
        "eos_id": _pooling_eos(field_of("text_config", "eos_token_id"), where, tokenizer),
        "embed_dim": field_of("", "projection_dim"),
        "activation": ACTIVATION_FROM[activation],
    }
    epsilon = same("layer_norm_eps")
    try:
        return mofi.MofiConfig(**fields, layer_norm_eps=float(epsilon), dtype="float32")
    except (BadInput, OverflowError) as error:
        raise BadInput(f"{where} describes no model that can be built: {error}") from error


def field(values: Mapping[str, Any], where: epath.PathLike, section: str, key: str) -> Any:
    """A value of config.json; raises BadInput where it is missing or of another type.

    The section is "text_config", "vision_config", or "" for the top.
    """
    part = values.get(section) if section else values
    value = part.get(key) if isinstance(part, Mapping) else None
    name = f"{section}.{key}".lstrip(".")
    if value is None:
        raise BadInput(
            f"{where} lacks {name}: add the value the model was trained with, since a default "
            "would be a guess."
        )
    kinds, wanted = KINDS.get(key, (int, "a whole number"))
    items = value if key in LISTS and isinstance(value, list) and value else [value]
    if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in items):
        raise BadInput(f"{where} has {name}={value!r}, not {wanted}: copy the file again.")
    return value


def _pooling_eos(
    stated: int | list[int], where: epath.PathLike, tokenizer: tokenizer_lib.Tokenizer | None
) -> int:
    """The id at whose first occurrence transformers pools, see the top of this file."""
    stated = stated[0] if isinstance(stated, list) else stated
    if stated == ARGMAX_EOS:
        if tokenizer is None or tokenizer.eos_id != tokenizer.vocab_size - 1:
            raise BadInput(
                f"{where} says eos_token_id 2, with which transformers pools texts at the largest "
                "id, but no tokenizer.json beside it shows an EOS with the highest id: set "
                "text_config.eos_token_id to the id of the EOS that the model was trained with."
            )
        return tokenizer.eos_id
    if tokenizer is not None and tokenizer.eos_id != stated:
        raise BadInput(
            f"{where} says eos_token_id {stated} and {tokenizer.path} has {tokenizer.eos_id}: put "
            "the tokenizer of this model beside it."
        )
    return stated
