"""Scaled dot-product attention by the implementation that suits the device.

The sequence is the second axis, the dimensions of all heads the last; the softmax runs in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mofi_jax.common.errors import BadInput
from mofi_jax.model import attention_kernel, attention_split

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "split", "pallas")

# What "auto" means on each platform; where it does not run "auto" is "xla".
# gpu: forward and backward of B/16's attention layer, 197 tokens, batch 1,024, took 8.5 ms by cuDNN
# and 16.5 by XLA on an H200, with gradients 1.1 % and 0.9 % off float32's.
# `python -m benchmarks.train_step --only attention` measures both on the device at hand and says
# which to write here.
# tpu: by the compiler's clock (`python -m benchmarks.tpu_step --only attention`).
AUTO = {"gpu": "cudnn", "tpu": "pallas", "cpu": "xla"}


def attend(
    query: Float[Array, "b n e"],
    key: Float[Array, "b n e"],
    value: Float[Array, "b n e"],
    *,
    heads: int,
    length: int,
    causal: bool,
    implementation: str,
) -> Float[Array, "b n e"]:
    """softmax(query key^T / sqrt(d)) value for each head of d = e / heads dimensions.

    "split" and "pallas" have functions of their own (`attention_split`, `attention_kernel`).

    Args:
      length: positions from here on are padding (`padding`): no other position attends to them or
        has a gradient through them, and their own outputs mean nothing.
      causal: position i attends to positions up to i alone.
      implementation: "xla" or "cudnn", as `choose` gives it.
    """
    shape = query.shape
    query, key, value = (x.reshape(*shape[:2], heads, -1) for x in (query, key, value))
    if implementation == "cudnn":
        return _cudnn(query, key, value, length=length, causal=causal).reshape(shape)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk",
        query * query.shape[-1] ** -0.5,
        key,
        preferred_element_type=jnp.float32,
    )
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    with jax.named_scope("softmax"):
        weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(shape)


def padding(length: int, implementation: str) -> int:
    """Positions to append to a sequence of ``length`` for the implementation."""
    # Jax refuses gradients of odd lengths through cuDNN, and those of a ViT with class token (197,
    # 257) and of a context of 77 tokens are odd.
    if implementation == "pallas":
        return -length % attention_kernel.ROWS
    return length % 2 if implementation == "cudnn" else 0


def _cudnn(query: Array, key: Array, value: Array, *, length: int, causal: bool) -> Array:
    run = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if causal:  # padding comes after every position
        return run(query, key, value, is_causal=True)
    if length == key.shape[1]:
        return run(query, key, value)
    batch = key.shape[0]
    key, value = _cut_gradient(key, length), _cut_gradient(value, length)
    # As lengths, not as a mask: that would be a bias to cuDNN, a tensor of logits to read.
    return run(query, key, value, key_value_seq_lengths=jnp.full((batch,), length, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut_gradient(x: Array, length: int) -> Array:
    """x; its gradient from position ``length`` on is zero, whatever cuDNN leaves there."""
    return x


def _cut_gradient_backward(length: int, _: None, gradient: Array) -> tuple[Array]:
    zeros = jnp.zeros_like(gradient[:, length:])
    return (jax.lax.dynamic_update_slice_in_dim(gradient, zeros, length, axis=1),)


_cut_gradient.defvjp(lambda x, length: (x, None), _cut_gradient_backward)


def choose(
    implementation: str, *, length: int, causal: bool, head_dim: int, dtype: jnp.dtype, device: Any
) -> str:
    """One of IMPLEMENTATIONS other than "auto", for sequences and a device it will run on.

    "split" is "cudnn" where it saves no tile, as in B/16's image tower, and where attention is
    causal, which it has no mask for.

    Raises BadInput: one on a device, or for a length, head dimension or dtype that it does not run
    on.
    """
    runs = {
        "xla": True,
        **dict.fromkeys(("cudnn", "split"), _cudnn_runs(device, head_dim, dtype)),
        "pallas": device.platform == "tpu" and length <= attention_kernel.LONGEST,
    }
    if implementation == "auto":
        preferred = AUTO.get(device.platform, "xla")
        return preferred if runs[preferred] else "xla"
    if not runs[implementation]:
        cudnn = (
            "an NVIDIA GPU from Ampere on, bfloat16, and heads of a multiple of 8 up to 128 "
            "dimensions (256 from Hopper on)"
        )
        needs = {
            **dict.fromkeys(("cudnn", "split"), cudnn),
            "pallas": f"a TPU, and sequences of at most {attention_kernel.LONGEST} positions",
        }
        raise BadInput(
            f"config.model.attention={implementation!r} does not run on {device.device_kind} with "
            f"heads of {head_dim} dimensions in {jnp.dtype(dtype).name} and sequences of {length}: "
            f"it needs {needs[implementation]}; choose auto or xla."
        )
    if implementation == "split" and (causal or not attention_split.splits(length)):
        return "cudnn"
    return implementation


def _cudnn_runs(device: Any, head_dim: int, dtype: jnp.dtype) -> bool:
    """What jax.nn.dot_product_attention(implementation="cudnn") asks for."""
    # "9.0" on an H200; AMD's GPUs say "gfx942", other devices have no such attribute.
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    if device.platform != "gpu" or not major.isdigit() or int(major) < 8:
        return False
    largest = 256 if int(major) >= 9 else 128
    return dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= largest
