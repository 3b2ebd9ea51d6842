"""The image tower: a ViT with class token, pre-LN, bias-free patch convolution and projection."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mofi_jax.model import layers, norms

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

# Mean and standard deviation of pixels from 0 to 1.  CLIP's are what the released MOFI evaluation
# uses too (apple/ml-mofi eval/utils.py); SigLIP's take pixels to -1 to 1.
_STATISTICS: dict[str, Statistics] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def pixel_statistics(family: str) -> Statistics:
    """Mean and standard deviation of red, green and blue by which a family's pixels are normalised.

    Of pixels divided by 255; `family` as in `mofi_jax.model.mofi.MofiConfig`.
    """
    return _STATISTICS[family]


class ImageTower(nnx.Module):
    """uint8 pictures -> embeddings before normalisation; transformers' CLIPVisionModel."""

    def __init__(self, config, *, rngs: nnx.Rngs):  # config: a `mofi_jax.model.mofi.MofiConfig`
        width, patch = config.image.width, config.patch_size
        std = width**-0.5
        normal = jax.random.normal
        self.class_embedding = nnx.Param(std * normal(rngs.params(), (width,), jnp.float32))
        # N(0, 1/fan_in): pixels enter with variance about one.
        self.patch_embedding = layers.Projection(
            (patch, patch, 3), (width,), std=(3 * patch**2) ** -0.5, use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Param(_waves(config.image_size // patch, width))
        self.pre_norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = layers.make_stack(config.image, config, rngs)
        self.post_norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = layers.Projection(
            (width,), (config.embed_dim,), std=std, use_bias=False, rngs=rngs
        )
        self.config = config

    def __call__(
        self, images: UInt8[Array, "b s s 3"] | Float[Array, "b s s 3"], mesh: Mesh | None = None
    ) -> Float[Array, "b d"]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = images.astype(jnp.float32)
        if images.dtype == jnp.uint8:  # others are normalised already
            mean, std = (jnp.asarray(values) for values in pixel_statistics(config.family))
            x = (x / 255.0 - mean) / std
        patches = _patches(x.astype(dtype), config.patch_size)
        # The class token and padding are patches of zeros: concatenated to their embeddings, they
        # would cost a copy of these, forward and backward.
        length = 1 + patches.shape[1]
        after = layers.padded_length(length, config.image, config, mesh) - length
        patches = jnp.pad(patches, ((0, 0), (1, after), (0, 0), (0, 0), (0, 0)))
        positions = self.position_embedding[...].at[0].add(self.class_embedding[...])
        x = self.patch_embedding(patches) + jnp.pad(positions, ((0, after), (0, 0))).astype(dtype)
        x = self.pre_norm(x)
        x = layers.run_stack(self.blocks, x, config, length=length, causal=False, mesh=mesh)
        return self.projection(self.post_norm(x[:, 0])).astype(jnp.float32)


def _waves(side: int, width: int) -> Float[Array, "n w"]:
    """Initial position embedding: sines and cosines of row and column, zeros for the class token.

    Learned from there on.  In short runs a ViT gets to the same loss much sooner than from small
    random numbers (arXiv 2205.01580, section 3).
    """
    rates = 10_000.0 ** -jnp.linspace(0, 1, max(1, width // 4))
    angles = jnp.arange(side, dtype=jnp.float32)[:, None] * rates
    wave = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    rows, columns = jnp.repeat(wave, side, axis=0), jnp.tile(wave, (side, 1))
    grid = jnp.concatenate([rows, columns], axis=-1)
    return jnp.pad(grid, ((1, 0), (0, width - grid.shape[1])))


@jax.named_scope("patch_embedding")
def _patches(x: Float[Array, "b s s 3"], patch: int) -> Float[Array, "b n p p 3"]:
    b, size, _, c = x.shape
    side = size // patch
    x = x.reshape(b, side, patch, side, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * side, patch, patch, c)
