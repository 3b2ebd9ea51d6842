"""LayerNorm, and standardisation alone, for norms whose scale and bias fold into what follows."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def _moments(x: jax.Array, eps: float, one_pass: bool = False) -> tuple[jax.Array, jax.Array]:
    """Mean, and one over the standard deviation, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    if one_pass:
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardise(x: jax.Array, eps: float, platform: str) -> jax.Array:
    """x with mean 0 and variance 1 along its last axis; arithmetic in float32.

    XLA for GPUs makes one pass over the array in either direction where nothing but the result
    comes out: there the backward pass computes mean and variance again.  TPUs need a pass for each
    mean, but none for two sums of one array, which the product before them takes along.  As the
    difference of two, the variance of numbers that bfloat16 has rounded loses nothing in float32.
    """
    return _standardise_forward(x, eps, platform)[0]


def _standardise_forward(x, eps, platform):
    one_pass = platform == "tpu" and x.dtype == jnp.bfloat16
    mean, factor = _moments(x, eps, one_pass)
    return ((x.astype(jnp.float32) - mean) * factor).astype(x.dtype), (x, mean, factor)


def _standardise_backward(eps, platform, residuals, gradient):
    x, mean, factor = residuals
    if platform == "gpu":
        x, gradient = jax.lax.optimization_barrier((x, gradient))
        mean, factor = _moments(x, eps)
    unit = (x.astype(jnp.float32) - mean) * factor
    g = gradient.astype(jnp.float32)
    along = (g * unit).mean(-1, keepdims=True)
    return ((factor * (g - g.mean(-1, keepdims=True) - unit * along)).astype(x.dtype),)


standardise.defvjp(_standardise_forward, _standardise_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; statistics in float32 whatever the compute dtype."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
        unit = standardise(x.astype(jnp.float32), self.eps, "")
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)
