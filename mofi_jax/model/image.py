"""The image tower, a ViT.

CLIP's has a class token, a norm before the blocks, a bias-free patch convolution and a projection;
SigLIP's a bias and attention pooling.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from mofi_jax.model import layers, norms, pooling

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
    """uint8 pictures -> embeddings before normalisation.

    transformers' CLIPVisionModelWithProjection or SiglipVisionModel, by the family.
    """

    def __init__(self, config, *, rngs: nnx.Rngs):  # config: a `mofi_jax.model.mofi.MofiConfig`
        width, patch = config.image.width, config.patch_size
        std = width**-0.5
        positions = _waves(config.image_size // patch, width)
        clip = config.family == "clip"
        if clip:
            normal = jax.random.normal(rngs.params(), (width,), jnp.float32)
            self.class_embedding = nnx.Param(std * normal)
            positions = jnp.pad(positions, ((1, 0), (0, 0)))
        # N(0, 1/fan_in): pixels enter with variance about one.
        self.patch_embedding = layers.Projection(
            (patch, patch, 3), (width,), std=(3 * patch**2) ** -0.5, use_bias=not clip, rngs=rngs
        )
        self.position_embedding = nnx.Param(positions)
        if clip:
            self.pre_norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = layers.make_stack(config.image, config, rngs)
        self.post_norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        if clip:
            self.projection = layers.Projection(
                (width,), (config.embed_dim,), std=std, use_bias=False, rngs=rngs
            )
        else:
            self.head = pooling.AttentionPooling(config.image, config, rngs=rngs)
        self.config = config

    def __call__(
        self,
        images: UInt8[Array, "b s s 3"] | Float[Array, "b s s 3"],
        mesh: Mesh | None = None,
        kept: Int[Array, "b k"] | None = None,
    ) -> Float[Array, "b d"]:
        """Embeddings of pictures of any size that is a multiple of the patch.

        Positions are resampled (`resampled`) where the size is not the config's.

        Args:
          kept: the patches of each picture that are looked at, row by row from 0 (`kept_patches`);
            all of them if left out.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = images.astype(jnp.float32)
        if images.dtype == jnp.uint8:  # others are normalised already
            mean, std = (jnp.asarray(values) for values in pixel_statistics(config.family))
            x = (x / 255.0 - mean) / std
        patches = _patches(x.astype(dtype), config.patch_size)
        clip = config.family == "clip"
        before = 1 if clip else 0
        positions = resampled(self.position_embedding[...], before + patches.shape[1])
        if kept is not None:
            patches = jnp.take_along_axis(patches, kept[:, :, None, None, None], axis=1)
        # The class token and padding are patches of zeros: concatenated to their embeddings, they
        # would cost a copy of these, forward and backward.
        length = before + patches.shape[1]
        padded = layers.padded_length(length, config.image, config, causal=False, mesh=mesh)
        after = padded - length
        patches = jnp.pad(patches, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))
        if clip:
            positions = positions.at[0].add(self.class_embedding[...])
        positions = positions.astype(dtype)
        if kept is None:
            positions = jnp.pad(positions, ((0, after), (0, 0)))
        else:
            # As a product, for the gradient of a lookup would add up rows one by one.  -1 is zeros.
            rows = jnp.pad(before + kept, ((0, 0), (before, 0)))
            rows = jnp.pad(rows, ((0, 0), (0, after)), constant_values=-1)
            positions = jax.nn.one_hot(rows, len(positions), dtype=dtype) @ positions
        x = self.patch_embedding(patches) + positions
        if clip:
            x = self.pre_norm(x)
        x = layers.run_stack(self.blocks, x, config, length=length, causal=False, mesh=mesh)
        if clip:
            return self.projection(self.post_norm(x[:, 0])).astype(jnp.float32)
        return self.head(self.post_norm(x[:, :length])).astype(jnp.float32)


def resampled(
    positions: Float[Array | np.ndarray, "n w"], length: int
) -> Float[Array | np.ndarray, "m w"]:
    """Position embeddings of a square grid, row by row after a class token, for `length` of them.

    Bicubic, antialiased where the grid shrinks; that of the class token, where there is one (CLIP),
    stays, as in open_clip and timm.
    """
    if len(positions) == length:
        return positions
    (old, first), (new, _) = _grid(len(positions)), _grid(length)
    grid = positions[first:].reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([positions[:first], grid.reshape(new * new, -1)])


def can_resample(old: int, new: int) -> bool:
    """Whether `resampled` fits: both lengths are a square, or both a square and a class token."""
    grids = _grid(old), _grid(new)
    return all(side for side, _ in grids) and len({first for _, first in grids}) == 1


def _grid(length: int) -> tuple[int, int]:
    """Patches along a side and class tokens; a side of 0 if the others are no square."""
    for first in (1, 0):
        side = math.isqrt(max(0, length - first))
        if side and side * side == length - first:
            return side, first
    return 0, 0


def kept_patches(key: jax.Array, batch: int, patches: int, dropout: float) -> Int[Array, "b k"]:
    """Patch dropout: a random subset of each picture's patches, ascending (FLIP, arXiv 2212.00794).

    A picture's subset depends on the key and on its row in the batch alone, on no mesh.

    Args:
      patches: of a picture.
      dropout: share of them that is left out; one stays at least.
    """
    noise = jax.random.uniform(key, (batch, patches))
    order = jnp.argsort(noise, axis=1)[:, : kept_count(patches, dropout)]
    return jnp.sort(order, axis=1)


def kept_count(patches: int, dropout: float) -> int:
    """How many of a picture's patches patch dropout leaves."""
    return max(1, round(patches * (1 - dropout)))


def _waves(side: int, width: int) -> Float[Array, "n w"]:
    """Initial position embedding of the patches: sines and cosines of row and column.

    Learned from there on.  In short runs a ViT gets to the same loss much sooner than from small
    random numbers (arXiv 2205.01580, section 3).
    """
    rates = 10_000.0 ** -jnp.linspace(0, 1, max(1, width // 4))
    angles = jnp.arange(side, dtype=jnp.float32)[:, None] * rates
    wave = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    rows, columns = jnp.repeat(wave, side, axis=0), jnp.tile(wave, (side, 1))
    grid = jnp.concatenate([rows, columns], axis=-1)
    return jnp.pad(grid, ((0, 0), (0, width - grid.shape[1])))


@jax.named_scope("patch_embedding")
def _patches(x: Float[Array, "b s s 3"], patch: int) -> Float[Array, "b n p p 3"]:
    b, size, _, c = x.shape
    side = size // patch
    x = x.reshape(b, side, patch, side, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * side, patch, patch, c)
