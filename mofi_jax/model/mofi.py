"""MOFI: an image tower and a text tower with one shared embedding space.

In one of two families: "clip" is MOFI's own and CLIP's, "siglip" SigLIP's and SigLIP 2's
(arXiv 2303.15343, 2502.14786), with attention pooling, texts without a causal mask and no
projection of pictures.

Functions of (config, params, inputs) for everyone outside ``model/``; NNX stays inside.  The tower
shapes are those of the release (apple/ml-mofi README: image 86/303/631 M, text 64/124/354 M
parameters without projections), the arithmetic is that of Hugging Face CLIPModel or SiglipModel.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch
from mofi_jax.model import activations, attention, image, layers, text

Params = dict[str, Any]
TOWERS = {"image": image.ImageTower, "text": text.TextTower}

# CLIP's initial temperature and cap (arXiv 2103.00020 section 2.5; axlearn vision/clip.py).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = 100.0
# The parameters that are logarithms of a scale.
LOG_SCALES = ("logit_scale", "entity_log_scale")

# SigLIP's temperature and bias at the start: nearly all pairs are negatives, and the bias says so
# before anything is learned (arXiv 2303.15343, section 3.2).
SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = math.log(10.0), -10.0

# What sizes may be: generous, yet small enough that a damaged file does not take all memory.
LIMITS = {
    "image_size": (1, 8_192),
    "patch_size": (1, 1_024),
    "width": (1, 65_536),
    "layers": (1, 1_024),
    "heads": (1, 1_024),
    "mlp_width": (0, 262_144),
    "vocab_size": (1, 10_000_000),
    "context_length": (1, 65_536),
    "eos_id": (text.LARGEST_ID, 10_000_000),
    "embed_dim": (1, 65_536),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of one transformer."""

    width: int
    layers: int
    heads: int
    mlp_width: int = 0  # 0: four times the width

    def __post_init__(self):
        if self.mlp_width == 4 * self.width:  # one spelling, so that equal shapes are equal
            object.__setattr__(self, "mlp_width", 0)

    @property
    def hidden_width(self) -> int:
        """The width inside the MLPs."""
        return self.mlp_width or 4 * self.width


@dataclasses.dataclass(frozen=True)
class MofiConfig:
    """Everything that decides the shapes and the arithmetic of both towers."""

    image_size: int  # pixels, a multiple of the patch
    patch_size: int
    image: TowerConfig
    text: TowerConfig
    vocab_size: int
    context_length: int
    eos_id: int  # CLIP's texts pool at the first one, or as `text.LARGEST_ID` says
    embed_dim: int
    activation: str = "gelu"  # exact; or "gelu_tanh", "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "bfloat16"  # of matrix products, or "float32"; parameters are always float32
    remat: str = "none"  # or "dots", "full", see `layers.REMAT`
    attention: str = "auto"  # or "xla", "cudnn", "pallas", see `attention.AUTO`
    family: str = "clip"  # or "siglip", whose arithmetic the towers have

    def __post_init__(self):
        for prefix, part in (("", self), ("image.", self.image), ("text.", self.text)):
            for name, (low, high) in LIMITS.items():
                value = getattr(part, name, low)
                if type(value) is not int or not low <= value <= high:
                    raise BadInput(
                        f"config.model.{prefix}{name}={value!r} must be a whole number from {low} "
                        f"to {high}: correct it."
                    )
            if prefix and part.width % part.heads:
                raise BadInput(
                    f"config.model.{prefix}width={part.width} does not divide into {part.heads} "
                    "heads: change one of them."
                )
        if self.eos_id >= self.vocab_size:
            raise BadInput(
                f"eos_id {self.eos_id} is not below vocab_size {self.vocab_size}: give the sizes "
                "of the model's own tokenizer."
            )
        if type(self.layer_norm_eps) is not float or not 0 <= self.layer_norm_eps < 1:
            raise BadInput(
                f"config.model.layer_norm_eps={self.layer_norm_eps!r} must be a number from 0 to "
                "1: correct it."
            )
        if self.image_size % self.patch_size:
            raise BadInput(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: "
                "change config.model.image_size or the variant."
            )
        choices = {
            "family": ("clip", "siglip"),
            "activation": tuple(activations.ACTIVATIONS),
            "dtype": ("bfloat16", "float32"),
            "remat": tuple(layers.REMAT),
            "attention": attention.IMPLEMENTATIONS,
        }
        for key, allowed in choices.items():
            if not isinstance(getattr(self, key), str) or getattr(self, key) not in allowed:
                raise BadInput(
                    f"config.model.{key}={getattr(self, key)!r} is unknown: choose from "
                    f"{', '.join(allowed)}."
                )
        if self.family == "siglip" and self.embed_dim != self.image.width:
            raise BadInput(
                f"A model of family siglip has no projection of pictures, so that embed_dim "
                f"{self.embed_dim} would have to be the image tower's width: set "
                f"config.model.embed_dim={self.image.width}."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def in_words(self) -> str:
        """As ``ViT of 12 layers, width 768, patches of 16 in 224 pixels``, and of the texts."""
        image, text = self.image, self.text
        return (
            f"pictures of {self.image_size} pixels by a ViT of {image.layers} layers, width "
            f"{image.width}, patch {self.patch_size}; texts of {self.context_length} tokens by "
            f"{text.layers} layers, width {text.width}"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MofiConfig":
        """Raises BadInput for a field that is missing, unknown, of another type or out of range."""
        try:
            towers = {name: TowerConfig(**values[name]) for name in ("image", "text")}
            return cls(**{**values, **towers})
        except (KeyError, TypeError) as error:
            raise BadInput(
                f"The model's fields are not those of MofiConfig ({error}): correct them."
            ) from error


# Shapes by name: towers (width, layers, heads), embedding.  B, L and H are MOFI's (depth and width
# follow from the published parameter counts), Ti and S are for small machines.
VARIANTS: dict[str, dict[str, Any]] = {
    name: {
        "patch_size": int(name.partition("/")[2]),
        "image": TowerConfig(*image_tower),
        "text": TowerConfig(*text_tower),
        "embed_dim": embed_dim,
    }
    for name, image_tower, text_tower, embed_dim in (
        ("Ti/16", (192, 12, 3), (192, 6, 3), 192),
        ("S/16", (384, 12, 6), (384, 12, 6), 384),
        ("B/16", (768, 12, 12), (512, 12, 8), 512),
        ("L/14", (1024, 24, 16), (768, 12, 12), 768),
        ("H/14", (1280, 32, 16), (1024, 24, 16), 1024),
    )
}


@functools.lru_cache(maxsize=32)
def _graph(config: MofiConfig, tower: str) -> nnx.GraphDef:
    """The tower without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: TOWERS[tower](config, rngs=nnx.Rngs(0))))[0]


def create(
    config: MofiConfig, key: jax.Array, *, towers: tuple[str, ...] = ("image", "text")
) -> Params:
    """New float32 parameters; run it under jit with ``out_shardings`` to create them sharded.

    Returns:
      {"image": ..., "text": ..., "logit_scale": scalar, and of SigLIP "logit_bias": scalar} or
      those of the towers asked for; the leaves of each tower's "blocks" are stacked along a leading
      layer axis.
    """
    params: Params = {}
    for name in towers:
        tower_key = jax.random.fold_in(key, list(TOWERS).index(name))
        tower = TOWERS[name](config, rngs=nnx.Rngs(params=tower_key))
        params[name] = nnx.to_pure_dict(nnx.state(tower, nnx.Param))
    if "text" in towers:
        siglip = config.family == "siglip"
        params |= siglip_logits() if siglip else {"logit_scale": jnp.float32(INITIAL_LOGIT_SCALE)}
    return params


def siglip_logits() -> Params:
    """The initial temperature and bias of SigLIP's loss."""
    return {
        "logit_scale": jnp.float32(SIGLIP_LOGIT_SCALE),
        "logit_bias": jnp.float32(SIGLIP_LOGIT_BIAS),
    }


def _run(
    config: MofiConfig,
    params: Params,
    tower: str,
    inputs: jax.Array,
    *options: Any,
    mesh: Mesh | None,
) -> jax.Array:
    if tower not in params:
        raise BadInput(
            f"This model has no {tower} tower: it was trained without one; train with "
            "task=contrastive or task=multitask."
        )
    # Blocks gather theirs a layer at a time, and rows of a table are looked up where they lie.
    parts = {
        name: part
        if name in ("blocks", "token_embedding")
        else jax.tree.map(lambda leaf: global_batch.gathered(leaf, mesh), part)
        for name, part in params[tower].items()
    }
    embeddings = nnx.merge(_graph(config, tower), parts)(inputs, mesh, *options)
    # Not norm(): its gradient at a vector of zeros is NaN, whatever bounds it afterwards.
    square = jnp.sum(embeddings * embeddings, axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def embed_images(
    config: MofiConfig,
    params: Params,
    images: UInt8[Array, "b s s 3"] | Float[Array, "b s s 3"],
    mesh: Mesh | None = None,
    kept: Int[Array, "b k"] | None = None,
) -> Float[Array, "b d"]:
    """RGB pictures -> float32 L2-normalised embeddings; the mesh's batch axes split the batch.

    uint8 is normalised by the pixel statistics, floats are normalised already.  Pictures may have
    another size than the config's, and a training may look at `kept` patches of each alone: see
    `image.ImageTower`.
    """
    return _run(config, params, "image", images, kept, mesh=mesh)


def embed_texts(
    config: MofiConfig, params: Params, tokens: Int[Array, "b t"], mesh: Mesh | None = None
) -> Float[Array, "b d"]:
    """int32 token ids -> float32 L2-normalised embeddings; `mesh` as for `embed_images`."""
    return _run(config, params, "text", tokens, mesh=mesh)


def capped_exp(logarithm: Float[Array, ""]) -> Float[Array, ""]:
    """The scale of which a parameter (`LOG_SCALES`) is the logarithm, capped at 100."""
    # The cap takes no part in the gradient, or a parameter at it or loaded beyond it would stay.
    value = jnp.minimum(jnp.exp(logarithm), MAX_LOGIT_SCALE)
    return jax.lax.stop_gradient(value) * jnp.exp(logarithm - jax.lax.stop_gradient(logarithm))


def logit_scale(config: MofiConfig, params: Params) -> Float[Array, ""]:
    """By what the cosines of pictures with texts are multiplied.

    SigLIP has no cap: its releases have scales beyond 100.
    """
    return (capped_exp if config.family == "clip" else jnp.exp)(params["logit_scale"])


def capped(config: MofiConfig, params: Params, frozen: Sequence[str] = ()) -> Params:
    """The parameters after an update: scales beyond their cap, if not frozen, are put back to it.

    CLIP does so too; SigLIP's `logit_scale` has no cap.
    """
    scales = LOG_SCALES if config.family == "clip" else LOG_SCALES[1:]
    names = [name for name in scales if name in params and name not in frozen]
    cap = math.log(MAX_LOGIT_SCALE)
    return params | {name: jnp.minimum(params[name], cap) for name in names}


def parameter_count(config: MofiConfig, tower: str) -> int:
    """Number of parameters of one tower without its projection, as the released table counts."""
    shapes = jax.eval_shape(lambda k: create(config, k, towers=(tower,)), jax.random.key(0))[tower]
    shapes.pop("projection", None)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
