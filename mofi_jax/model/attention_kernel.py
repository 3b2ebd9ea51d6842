"""Attention over short sequences on TPUs: one Pallas kernel forward and one backward.

XLA writes the logits of every head to HBM in float32 and pads the lanes of a head.  Here some heads
of a picture are one step of the grid: their queries, keys and values lie in VMEM as the products
around attention make them, heads are cut from the lanes, and nothing of size n x n leaves the core.
The backward pass computes the probabilities again from one number for each query and head.

Logits are held transposed, keys along sublanes and queries along lanes: maximum and sums over keys
are then additions of registers, and a query's statistics a row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mofi_jax.distributed import meshes

LANES = 128  # of a register
ROWS = 8  # sublanes of a register: what sequences are padded to a multiple of
MASKED = -1e30  # a logit that no probability is left of; finite, as rows may be masked altogether

# Positions of a sequence: its logits lie in VMEM, and the kernel's code grows with them.
LONGEST = 640
AHEAD = 3  # heads, whose logits are computed before this one's are done
HEADS_A_STEP = 4  # at least
LOG2_E = math.log2(math.e)


def attend(
    qkv: Float[Array, "b n qkv"],
    query_bias: Float[Array, "e"],
    *,
    heads: int,
    length: int,
    causal: bool,
    mesh: Mesh | None,
) -> Float[Array, "b n e"]:
    """softmax((query + bias) key^T / sqrt(d)) value for each head of d = e / heads lanes.

    Args:
      qkv: of each of `pieces` of the heads its queries, keys and values.
      length: positions from here on are padding, which no other position attends to; n is a
        multiple of ROWS.
      causal: position i attends to positions up to i alone.
      mesh: its batch axes split b, its tensor axis the heads; None for one device.
    """
    run = functools.partial(_attend, length, causal, len(query_bias) // heads)
    if mesh is not None:
        axis = "tensor" if _shards(mesh, heads) > 1 else None
        spec = P(meshes.BATCH_AXES, None, axis)
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(spec, P(axis)), out_specs=spec, check_vma=False
        )
    return run(qkv, query_bias)


def pieces(heads: int, head_dim: int, mesh: Mesh | None) -> int:
    """Into how many pieces `attend` wants the heads cut: one for each device and step of its grid.

    Some heads at a time keep the matrix units nearly as busy as all, and compile in a third of the
    time, for each layer.
    """
    shards = _shards(mesh, heads)
    mine = heads // shards
    groups = (n for n in range(mine, 1, -1) if mine % n == 0 and mine // n >= HEADS_A_STEP)
    whole = (n for n in groups if mine // n * head_dim % LANES == 0)
    return shards * next(whole, 1)


def _shards(mesh: Mesh | None, heads: int) -> int:
    shards = 1 if mesh is None else mesh.shape["tensor"]
    return shards if heads % shards == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(length, causal, head_dim, qkv, query_bias):
    return _attend_forward(length, causal, head_dim, qkv, query_bias)[0]


def _attend_forward(length, causal, head_dim, qkv, query_bias):
    batch, rows, width = qkv.shape[0], qkv.shape[1], len(query_bias)
    bias = query_bias.astype(jnp.float32)[None]
    groups = pieces(width // head_dim, head_dim, None)
    statistics = (batch, groups, width // head_dim // groups, rows)
    outputs = (
        jax.ShapeDtypeStruct((batch, rows, width), qkv.dtype),
        jax.ShapeDtypeStruct(statistics, jnp.float32),
    )
    options = {"length": length, "causal": causal, "head_dim": head_dim}
    attended, statistics = _call(_forward, options, groups, (qkv, bias), outputs)
    return attended, (qkv, bias, statistics)


def _attend_backward(length, causal, head_dim, residuals, gradient):
    qkv, bias, statistics = residuals
    outputs = (
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct((len(qkv), *bias.shape), jnp.float32),
    )
    options = {"length": length, "causal": causal, "head_dim": head_dim}
    inputs = qkv, bias, statistics, gradient
    d_qkv, d_bias = _call(_backward, options, statistics.shape[1], inputs, outputs)
    return d_qkv, d_bias.sum((0, 1)).astype(qkv.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, options, groups, inputs, outputs):
    def block(x):
        if x.ndim == 4:  # statistics
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, group: (b, group, 0, 0))
        lanes = x.shape[-1] // groups
        if x.ndim == 3:
            return pl.BlockSpec((None, x.shape[1], lanes), lambda b, group: (b, 0, group))
        return pl.BlockSpec((x.shape[0], lanes), lambda b, group: (0, group))

    return pl.pallas_call(
        functools.partial(kernel, **options),
        grid=(len(inputs[0]), groups),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        name=f"attention{kernel.__name__}",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=48 * 2**20
        ),
    )(*inputs)


class _Head(NamedTuple):
    """A head's arrays, on the lanes of all heads that share registers with it, the others zero.

    A product over lanes costs no more than over the head's own, and nothing has to be shifted.
    """

    mine: Array | None  # bool [1, lanes], None where a head has its lanes alone
    first: bool  # of those that share
    last: bool
    lanes: tuple[slice, slice, slice]  # of queries, keys and values

    def only(self, x: Array) -> Array:
        return x if self.mine is None else jnp.where(self.mine, x, jnp.zeros_like(x))

    def add(self, before: Array | None, part: Array) -> Array:
        return part if self.first else before + part


def _heads(width: int, head_dim: int) -> list[_Head]:
    shared = LANES // head_dim if LANES % head_dim == 0 else 1
    while width // head_dim % shared:
        shared //= 2
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, shared * head_dim), 1) // head_dim
    heads = []
    for head in range(width // head_dim):
        place = head % shared
        start = (head - place) * head_dim
        lanes = (slice(i * width + start, i * width + start + len(lane[0])) for i in range(3))
        mine = lane == place if shared > 1 else None
        heads.append(_Head(mine, place == 0, place == shared - 1, tuple(lanes)))
    return heads


def _query(qkv, bias, head, head_dim):
    """The head's queries, scaled so that logits are powers of 2."""
    lanes = head.lanes[0]
    query = (qkv[:, lanes].astype(jnp.float32) + bias[:, lanes]) * (head_dim**-0.5 * LOG2_E)
    return head.only(query.astype(qkv.dtype))


def _forward(qkv, bias, out, statistics, *, length, causal, head_dim):
    def logits_of(head):
        return _logits(_query(qkv, bias, head, head_dim), qkv[:, head.lanes[1]], length, causal)

    heads = _heads(out.shape[1], head_dim)
    # Logits of a few heads ahead: their products run while this head's softmax does.
    ahead = [logits_of(head) for head in heads[:AHEAD]]
    attended = None
    for number, head in enumerate(heads):
        logits = ahead.pop(0)
        if number + AHEAD < len(heads):
            ahead.append(logits_of(heads[number + AHEAD]))
        largest = logits.max(0, keepdims=True)
        weights = jnp.exp2(logits - largest)
        total = weights.sum(0, keepdims=True)
        statistics[number : number + 1, :] = largest + jnp.log2(total)
        weights = (weights * (1 / total)).astype(qkv.dtype)
        attended = head.add(attended, _dot(weights, head.only(qkv[:, head.lanes[2]]), 0, 0))
        if head.last:
            out[:, head.lanes[0]] = attended.astype(out.dtype)


def _backward(qkv, bias, statistics, d_out, d_qkv, d_bias, *, length, causal, head_dim):
    d_query = d_key = d_value = None
    for number, head in enumerate(_heads(d_out.shape[1], head_dim)):
        query = _query(qkv, bias, head, head_dim)
        key, gradient = qkv[:, head.lanes[1]], head.only(d_out[:, head.lanes[0]])
        logits = _logits(query, key, length, causal)
        weights = jnp.exp2(logits - statistics[number : number + 1, :])
        d_weights = _dot(qkv[:, head.lanes[2]], gradient, 1, 1)
        along = (weights * d_weights).sum(0, keepdims=True)
        d_logits = (weights * (d_weights - along)).astype(qkv.dtype)
        # In this order the compiler keeps the matrix units busy: a picture of B/16 takes 6,100
        # cycles on a v5e, and 7,400 with the queries' gradient first.
        d_value = head.add(d_value, _dot(weights.astype(qkv.dtype), gradient, 1, 0))
        d_key = head.add(d_key, _dot(d_logits, query, 1, 0))
        d_query = head.add(d_query, _dot(d_logits, head.only(key), 0, 0))
        if head.last:
            scaled = d_query * head_dim**-0.5
            d_bias[:, head.lanes[0]] = scaled.sum(0, keepdims=True)
            gradients = scaled, d_key * (1 / LOG2_E), d_value
            for lanes, value in zip(head.lanes, gradients, strict=True):
                d_qkv[:, lanes] = value.astype(d_qkv.dtype)


def _logits(query, key, length, causal):
    """[keys, queries], float32; what is masked is MASKED."""
    logits = _dot(key, query, 1, 1)
    rows = len(logits)
    if causal:  # padding comes after every position
        keys, queries = (jax.lax.broadcasted_iota(jnp.int32, (rows, rows), i) for i in (0, 1))
        return jnp.where(keys <= queries, logits, MASKED)
    if length == rows:
        return logits
    whole = length // ROWS * ROWS
    keys = whole + jax.lax.broadcasted_iota(jnp.int32, (rows - whole, 1), 0)
    masked = jnp.where(keys < length, logits[whole:], MASKED)
    return jnp.concatenate([logits[:whole], masked])


def _dot(a, b, contracted_a, contracted_b):
    dimensions = (((contracted_a,), (contracted_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
