"""The text tower: causal and pooled at the first end-of-text token (CLIP), or neither (SigLIP)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mofi_jax.model import layers, norms

# As eos_id: texts pool at their largest id (`interop.clip_config` says of which models).
LARGEST_ID = -1


class TextTower(nnx.Module):
    """Token ids -> embeddings before normalisation.

    transformers' CLIPTextModelWithProjection or SiglipTextModel, by the family.
    """

    def __init__(self, config, *, rngs: nnx.Rngs):  # config: a `mofi_jax.model.mofi.MofiConfig`
        width = config.text.width
        normal = jax.random.normal
        self.token_embedding = nnx.Param(
            0.02 * normal(rngs.params(), (config.vocab_size, width), jnp.float32)
        )
        self.position_embedding = nnx.Param(
            0.01 * normal(rngs.params(), (config.context_length, width), jnp.float32)
        )
        self.blocks = layers.make_stack(config.text, config, rngs)
        self.final_norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = layers.Projection(
            (width,),
            (config.embed_dim,),
            std=width**-0.5,
            use_bias=config.family == "siglip",
            rngs=rngs,
        )
        self.config = config

    def __call__(self, tokens: Int[Array, "b t"], mesh: Mesh | None = None) -> Float[Array, "b d"]:
        config = self.config
        length = tokens.shape[1]
        causal = config.family == "clip"
        padded = layers.padded_length(length, config.text, config, causal=causal, mesh=mesh)
        after = padded - length
        positions = jnp.pad(self.position_embedding[...][:length], ((0, after), (0, 0)))
        with jax.named_scope("token_embedding"):
            x = self.token_embedding[...][jnp.pad(tokens, ((0, 0), (0, after)))] + positions
        x = x.astype(jnp.dtype(config.dtype))
        x = layers.run_stack(self.blocks, x, config, length=length, causal=causal, mesh=mesh)
        if causal:
            # What follows the end-of-text token cannot reach it through the causal mask, so padding
            # needs no mask of its own.
            largest = config.eos_id == LARGEST_ID
            end = jnp.argmax(tokens if largest else tokens == config.eos_id, axis=1)
            pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        else:
            # Padding takes part: SigLIP was trained with it, and pools at the last position.
            pooled = x[:, length - 1]
        return self.projection(self.final_norm(pooled)).astype(jnp.float32)
