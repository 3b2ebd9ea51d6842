"""Activation functions of the MLPs, whose backward pass needs their input alone."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Elementwise functions save their input alone for the backward pass, whatever the remat policy: the
# float32 values in between take several times the memory, and the backward pass reads the input
# anyway.
_keep_input = functools.partial(jax.checkpoint, prevent_cse=False)


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), in float32: 1 + erf in bfloat16 would lose the small values of negative x.

    The gradient is written out so that it needs the input alone, and not the value again.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_distribution(x32)).astype(x.dtype), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    below, density = (_normal if x.dtype == jnp.float32 else _normal_approximation)(x32)
    return ((gradient.astype(jnp.float32) * (below + x32 * density)).astype(x.dtype),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_distribution(x: jax.Array) -> jax.Array:
    # erf, and not the erfc of jax.nn.gelu(approximate=False), which XLA makes of two polynomials:
    # four times as long on a CPU, forward and backward.
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distribution function and density of the normal distribution, float32."""
    return _normal_distribution(x), jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def _normal_approximation(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same to 3e-7, by arithmetic that shares no subexpression with the forward pass.

    Unless loops or rematerialisation separate the two passes, XLA would find what they share and
    keep it in float32: 24 GiB at L/14's batch of 256, written and read.  Abramowitz and Stegun's
    7.1.26 has the density as a factor, so that both cost one exponential.
    """
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    t = 1 / (1 + (0.3275911 * math.sqrt(0.5)) * jnp.abs(x))
    terms = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    series = jnp.zeros_like(x)
    for term in reversed(terms):
        series = t * (0.5 * (2 * math.pi) ** 0.5 * term + series)
    tail = series * density
    return jnp.where(x < 0, tail, 1 - tail), density


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": _keep_input(functools.partial(jax.nn.gelu, approximate=True)),
    "quick_gelu": _keep_input(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # OpenAI CLIP
}
