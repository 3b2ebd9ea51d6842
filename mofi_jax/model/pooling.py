"""Attention pooling: one vector of all tokens of a sequence, as SigLIP's image tower ends."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mofi_jax.model import activations, layers, norms


class AttentionPooling(nnx.Module):
    """Attention of one learned query, the probe, then an MLP (arXiv 2205.01917, section 3.2).

    Parameterised as transformers' SiglipMultiheadAttentionPoolingHead.
    """

    def __init__(self, tower, config, *, rngs: nnx.Rngs):  # as `layers.Block` takes them
        width = tower.width
        std = width**-0.5
        self.probe = nnx.Param(std * jax.random.normal(rngs.params(), (width,), jnp.float32))
        self.attention = layers.Attention(width, tower.heads, std=std, out_std=std, rngs=rngs)
        self.norm = norms.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = layers.Mlp(
            width, tower.hidden_width, std=(2 * width) ** -0.5, out_std=std, rngs=rngs
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b n w"]) -> Float[Array, "b w"]:
        attention = self.attention
        with jax.named_scope("attention_pooling"):
            query = attention.query(self.probe[...])
            query = query * query.shape[-1] ** -0.5
            # The same query for every picture: the keys' kernel takes it in, and tokens need no
            # keys of their own.  Nor values: the kernel comes after the mean, not before it.  The
            # key's bias adds the same to all logits of a head, which the softmax removes.
            keys = jnp.einsum("whd,hd->wh", attention.key.kernel[...], query).astype(x.dtype)
            logits = jnp.einsum("bnw,wh->bhn", x, keys, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
            means = jnp.einsum("bhn,bnw->bhw", weights, x)
            value = attention.value
            values = jnp.einsum("bhw,whd->bhd", means, value.kernel[...].astype(x.dtype))
            x = attention.out(values + value.bias[...].astype(x.dtype))
            activate = activations.ACTIVATIONS[self.activation]
            return x + self.mlp.fc2(activate(self.mlp.fc1(self.norm(x))))
