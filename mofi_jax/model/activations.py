"""Activation functions of the MLPs, whose backward pass needs their input alone."""

import functools
import math
from collections.abc import Callable, Sequence

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


# x times these even powers of x is the logit of the normal distribution function.
_LOGIT = (1.59260733, 7.58280630e-2, -9.86736190e-4, 9.03315457e-6)


@jax.custom_vjp
def _logistic_gelu(x: jax.Array) -> jax.Array:
    """GELU by one exponential, for bfloat16 on TPUs, whose vector units the erf keeps busy.

    Within 0.14 % of the value for x above -5.2, a third of what bfloat16 rounds away, and 1e-6
    below; its derivative within 5e-4.
    """
    return _logistic_gelu_forward(x)[0]


def _logistic_gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x.astype(jnp.float32) * _logistic_normal(x)[0]).astype(x.dtype), x


def _logistic_gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    below, square = _logistic_normal(x)
    slope = _even_polynomial(square, [(2 * i + 1) * c for i, c in enumerate(_LOGIT)])
    derivative = below * (1 + x.astype(jnp.float32) * (1 - below) * slope)
    return ((gradient.astype(jnp.float32) * derivative).astype(x.dtype),)


_logistic_gelu.defvjp(_logistic_gelu_forward, _logistic_gelu_backward)


def _logistic_normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distribution function, and the square of x that its polynomials take."""
    x = x.astype(jnp.float32)
    square = jnp.minimum(x * x, 50.0)  # beyond, it is 0 or 1 anyway
    return 1 / (1 + jnp.exp(-x * _even_polynomial(square, _LOGIT))), square


def _even_polynomial(square: jax.Array, coefficients: Sequence[float]) -> jax.Array:
    total = jnp.zeros_like(square)
    for coefficient in reversed(coefficients):
        total = total * square + coefficient
    return total


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": _keep_input(functools.partial(jax.nn.gelu, approximate=True)),
    "quick_gelu": _keep_input(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # OpenAI CLIP
}


def choose(name: str, *, dtype: jnp.dtype, platform: str) -> Callable[[jax.Array], jax.Array]:
    """One of ACTIVATIONS, as it runs best in a dtype on a platform."""
    if (name, dtype, platform) == ("gelu", jnp.bfloat16, "tpu"):
        return _logistic_gelu
    return ACTIVATIONS[name]
