"""The image tower: a ViT with class token, pre-LN, bias-free patch convolution and projection."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mofi_jax.model import layers

# CLIP's pixel statistics; the released MOFI evaluation uses them too (apple/ml-mofi eval/utils.py).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTower(nnx.Module):
    """uint8 pictures -> embeddings before normalisation; Hugging Face CLIPVisionModel's arithmetic.

    Args:
      config: a `mofi_jax.model.mofi.MofiConfig`.
    """

    def __init__(self, config, *, rngs: nnx.Rngs):
        width, patch = config.image.width, config.patch_size
        tokens = (config.image_size // patch) ** 2
        std = width**-0.5
        normal = jax.random.normal
        self.class_embedding = nnx.Param(std * normal(rngs.params(), (width,), jnp.float32))
        # N(0, 1/fan_in): pixels enter with variance about one.
        self.patch_embedding = layers.Projection(
            (patch, patch, 3), (width,), std=(3 * patch**2) ** -0.5, use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Param(
            std * normal(rngs.params(), (1 + tokens, width), jnp.float32)
        )
        self.pre_norm = layers.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = layers.make_stack(
            width,
            config.image.heads,
            config.image.layers,
            activation=config.activation,
            eps=config.layer_norm_eps,
            rngs=rngs,
        )
        self.post_norm = layers.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = layers.Projection(
            (width,), (config.embed_dim,), std=std, use_bias=False, rngs=rngs
        )
        self.config = config

    def __call__(self, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = images.astype(jnp.float32) / 255.0
        x = (x - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
        x = self.patch_embedding(_patches(x.astype(dtype), config.patch_size))
        cls = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding[...].astype(dtype)
        x = layers.run_stack(self.blocks, self.pre_norm(x), None, remat=config.remat)
        return self.projection(self.post_norm(x[:, 0])).astype(jnp.float32)


def _patches(x: Float[Array, "b s s 3"], patch: int) -> Float[Array, "b n p p 3"]:
    b, size, _, c = x.shape
    side = size // patch
    x = x.reshape(b, side, patch, side, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * side, patch, patch, c)
