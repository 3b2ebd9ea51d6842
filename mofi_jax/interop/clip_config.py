"""config.json of Hugging Face CLIPModel, both directions.

Every field is read, never assumed: one that is not there is an error, because a library default
(the activation above all) costs accuracy without a word.

Text pooling. Ours is "first EOS". transformers pools there too, unless `eos_token_id` is 2: then it
pools at the largest id of the row (transformers PR #24773, for configurations written with a wrong
id). A folder with that 2 is read if its tokenizer shows that both rules agree, which is when its
EOS has the highest id of the vocabulary; a model whose EOS really is 2 is not written at all.
"""

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

HEADS = "num_attention_heads"
# What a number may be, as for our own config.
SIZES = {
    "hidden_size": mofi.LIMITS["width"],
    "intermediate_size": (1, 4 * mofi.LIMITS["width"][1]),
    "num_hidden_layers": mofi.LIMITS["layers"],
    HEADS: mofi.LIMITS["heads"],
    "vocab_size": mofi.LIMITS["vocab_size"],
    "max_position_embeddings": mofi.LIMITS["context_length"],
    "eos_token_id": mofi.LIMITS["eos_id"],
    "image_size": mofi.LIMITS["image_size"],
    "patch_size": mofi.LIMITS["patch_size"],
    "projection_dim": mofi.LIMITS["embed_dim"],
}
LISTS = ("eos_token_id", "image_size", "patch_size")  # may also be several numbers
KINDS = {"hidden_act": (str, "a name"), "layer_norm_eps": ((int, float), "a number")}

# transformers compares with this id before it decides how to pool.
ARGMAX_EOS = 2


def to_config(config: mofi.MofiConfig, tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      BadInput: the tokenizer is not the model's, or its EOS has the id 2.
    """
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
            "intermediate_size": 4 * shape.width,
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

    Raises:
      BadInput: not a CLIPModel, a field missing, or a value that our model cannot express.
    """
    if values.get("model_type") != "clip":
        raise BadInput(
            f"{where} describes a model of type {values.get('model_type')!r}: give a folder of "
            "type 'clip' (CLIPModel)."
        )

    def refuse(what: str) -> None:
        raise BadInput(f"{where} has {what}, which this model cannot express: use another model.")

    def same(key: str) -> Any:
        text, vision = (
            field(values, where, f"{tower}_config", key) for tower in ("text", "vision")
        )
        if text != vision:
            refuse(f"{key} {text!r} for text and {vision!r} for pictures")
        return text

    def square(key: str) -> int:
        value = field(values, where, "vision_config", key)
        sides = set(value) if isinstance(value, list) else {value}
        if len(sides) != 1:
            refuse(f"vision_config.{key} {value}")
        return sides.pop()

    def tower(section: str) -> mofi.TowerConfig:
        width, inner, layers, heads = (
            field(values, where, section, key)
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", HEADS)
        )
        if inner != 4 * width:
            refuse(f"{section}.intermediate_size other than 4 x hidden_size")
        return mofi.TowerConfig(width, layers, heads)

    activation = same("hidden_act")
    if activation not in ACTIVATION_FROM:
        refuse(f"hidden_act {activation!r}")
    stated = field(values, where, "text_config", "eos_token_id")
    try:
        return mofi.MofiConfig(
            image_size=square("image_size"),
            patch_size=square("patch_size"),
            image=tower("vision_config"),
            text=tower("text_config"),
            vocab_size=field(values, where, "text_config", "vocab_size"),
            context_length=field(values, where, "text_config", "max_position_embeddings"),
            eos_id=_pooling_eos(stated, where, tokenizer),
            embed_dim=field(values, where, "", "projection_dim"),
            activation=ACTIVATION_FROM[activation],
            layer_norm_eps=float(same("layer_norm_eps")),
            dtype="float32",
            remat="none",
        )
    except BadInput as error:
        if str(where) in str(error):
            raise
        raise BadInput(f"{where} describes no model that can be built: {error}") from error


def field(values: Mapping[str, Any], where: epath.PathLike, section: str, key: str) -> Any:
    """A value of config.json, checked for type and range.

    Args:
      section: "text_config", "vision_config", or "" for the top.

    Raises:
      BadInput: the section is no object, or the value is missing, of another type or out of range.
    """
    part = values.get(section) if section else values
    value = part.get(key) if isinstance(part, Mapping) else None
    name = f"{section}.{key}".lstrip(".")
    if value is None:
        raise BadInput(
            f"{where} lacks {name}: add the value the model was trained with, since a default "
            "would be a guess."
        )
    if key in SIZES:
        low, high = SIZES[key]
        numbers = value if isinstance(value, list) and key in LISTS and value else [value]
        fits = all(type(number) is int and low <= number <= high for number in numbers)
        wanted = f"a whole number from {low} to {high}"
    else:
        kinds, wanted = KINDS[key]
        fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits:
        shown = repr(value)[:50]
        raise BadInput(f"{where} has {name}={shown}, which must be {wanted}: copy the file again.")
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
