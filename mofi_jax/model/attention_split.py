"""Attention with the first position apart from the others, for NVIDIA GPUs.

The kernels of cuDNN work in tiles of 128 positions, so that a ViT's 257, a class token and 256
patches, cost them as much as 384.  Here they see the patches alone.  The class token adds one logit
to the softmax of each patch, which is merged into the kernel's result by the logarithms of both
sums, and its own query is one more row.  These are passes over queries, keys and values, without
matrix products.

The result is that of attention over all positions, and so is the gradient: the kernels for it
compute a softmax's weights from the logits and the logarithm of their sum, and need the result for
its inner product with the gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2).  Given both
of all positions they return what goes through the keys that they see.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TILE = 128

First = Float[Array, "b h d"]
Others = Float[Array, "b n h d"]


def splits(length: int) -> bool:
    """Whether the positions of a sequence fill whole tiles without the first one."""
    return length > TILE and length % TILE == 1


def attend(
    first: tuple[First, First, First], others: tuple[Others, Others, Others]
) -> tuple[First, Others]:
    """softmax(query key^T / sqrt(d)) value over the first and the n other positions.

    Args:
      first: queries, keys and values of the first position.
      others: those of the other positions.

    Returns: the results of the first position, and of the others.
    """
    with jax.named_scope("first"):
        of_first = _first(*first, *others[1:])
    return of_first, _others(*others, *first[1:])


def _first(query: First, first_key: First, first_value: First, key: Others, value: Others) -> First:
    """The first position's result."""
    own = _inner(query[:, None], first_key[:, None])
    weights = jax.nn.softmax(jnp.concatenate([own, _inner(query[:, None], key)], 1), axis=1)
    own, of_others = weights[:, 0, :, None], weights[:, 1:, :, None]
    result = own * _float32(first_value) + (of_others * _float32(value)).sum(1)
    return result.astype(query.dtype)


def _inner(query: Float[Array, "b #n h d"], key: Float[Array, "b #n h d"]) -> Float[Array, "b n h"]:
    """Logits, float32.  As a sum: a product of matrices would want its inputs in another order."""
    return (_float32(query) * _float32(key)).sum(-1) * query.shape[-1] ** -0.5


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)


@jax.custom_vjp
def _others(
    query: Others, key: Others, value: Others, first_key: First, first_value: First
) -> Others:
    """The other positions' results."""
    return _others_forward(query, key, value, first_key, first_value)[0]


def _others_forward(query, key, value, first_key, first_value):
    result, log_sum = _kernel(query, key, value)
    logit = _inner(query, first_key[:, None])
    log_sum = jnp.logaddexp(log_sum, logit)
    weight = jnp.exp(logit - log_sum)[..., None]
    result = (1 - weight) * _float32(result) + weight * _float32(first_value)[:, None]
    result = result.astype(query.dtype)
    return result, (query, key, value, first_key, first_value, result, log_sum)


def _others_backward(residuals, gradient):
    query, key, value, first_key, first_value, result, log_sum = residuals
    d_query, d_key, d_value = _kernel_gradient(query, key, value, result, log_sum, gradient)
    scale = query.shape[-1] ** -0.5
    weight = jnp.exp(_inner(query, first_key[:, None]) - log_sum)[..., None]
    gradient, query = _float32(gradient), _float32(query)
    ahead = gradient * (_float32(first_value)[:, None] - _float32(result))
    d_logit = scale * weight * ahead.sum(-1, keepdims=True)
    d_query += (d_logit * _float32(first_key)[:, None]).astype(d_query.dtype)
    d_first_key = (d_logit * query).sum(1).astype(first_key.dtype)
    d_first_value = (weight * gradient).sum(1).astype(first_value.dtype)
    return d_query, d_key, d_value, d_first_key, d_first_value


_others.defvjp(_others_forward, _others_backward)


def _kernel(query: Others, key: Others, value: Others) -> tuple[Others, Float[Array, "b n h"]]:
    """cuDNN's attention, and the logarithm of the sum of each softmax, float32."""
    result, log_sum = _operation("fwd", query, key, value)
    return result, log_sum.transpose(0, 2, 1)


def _kernel_gradient(
    query: Others,
    key: Others,
    value: Others,
    result: Others,
    log_sum: Float[Array, "b n h"],
    gradient: Others,
) -> tuple[Others, Others, Others]:
    """Gradients of queries, keys and values by cuDNN."""
    log_sum = log_sum.transpose(0, 2, 1)
    d_query, d_key, d_value = _operation("bwd", query, key, value, log_sum, result, gradient)
    return d_query, d_key, d_value


def _operation(name: str, query: Array, key: Array, value: Array, *last: Array) -> list[Array]:
    """One of the two operations by which jax computes cuDNN's attention and its gradient.

    Jax has no public name for either, and `jax.nn.dot_product_attention` rounds the logarithms that
    it returns to bfloat16.  So this takes them from the program of its gradient, where the inputs
    of the backward one end with logarithms, result and gradient.
    """

    def gradients(*arrays: Array) -> Any:
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        result, pull = jax.vjp(attend, *arrays)
        return pull(result)

    program = jax.make_jaxpr(gradients)(query, key, value)
    [equation] = (
        equation
        for equation in program.eqns
        if equation.primitive.name.startswith(f"dot_product_attention_{name}")
    )
    unused = equation.invars[3 : len(equation.invars) - len(last)]  # bias, lengths, offsets, pages
    unused = [jnp.zeros(x.aval.shape, x.aval.dtype) for x in unused]
    return equation.primitive.bind(query, key, value, *unused, *last, **equation.params)
