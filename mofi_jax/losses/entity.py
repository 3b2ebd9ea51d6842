"""Entity classification: large-margin cosine softmax over a class table sharded on all devices.

Two versions of one function.  `entity_softmax_dense` is the definition: logits for every class,
differentiated by jax.  `entity_softmax` computes the same numbers without ever holding more than
a block of logits: each device walks through its own share of the classes in blocks, with a
running max and sum of exponentials, and walks through them again in the backward pass.  The table
and its gradient never move.  `entity_logits_topk` is the same walk for evaluation.

The loss of a row with labels k of weight w_k (axlearn's ``large_margin_cosine_loss`` with soft
targets; CosFace, arXiv 1801.09414)::

    z_c  = scale * (cos(x, W_c) - margin * [c is a label])
    loss = -sum_k w_k * log_softmax(z)_k

This file knows nothing of models, of where labels come from, or of the weight of a task.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mofi_jax import partition
from mofi_jax.errors import BadInput
from mofi_jax.losses import base

# The cosine of padding: finite, so that no inf - inf can arise, and exp(scale * it) is exactly 0.
_MASKED = -1e30
# Floor of a row's squared norm.  Rows of N(0, 0.01^2) with 512 entries have 5e-2.
_TINY = 1e-12

# ---------------------------------------------------------------------------- shared by both


def _dot(subscripts: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """Matrix product of operands in `dtype`, accumulated and returned in fp32."""
    # fp32 means fp32: by default GPUs would round the operands to TF32 and TPUs to bf16.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(
        subscripts,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _unit_rows(rows: Array) -> tuple[Array, Array]:
    """Rows scaled to length 1 and the factor [c, 1] that did it; a row of zeros stays zero."""
    factor = lax.rsqrt(jnp.maximum(jnp.sum(rows * rows, axis=-1, keepdims=True), _TINY))
    return rows * factor, factor


def _real_labels(ids: Array, weights: Array, num_entities: int) -> tuple[Array, Array]:
    """Labels with every kind of padding (id out of range, weight 0) as id -1, weight 0."""
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    real = (ids >= 0) & (ids < num_entities) & (weights > 0)
    return jnp.where(real, ids, -1), jnp.where(real, weights, 0.0)


def _targets(ids: Array, weights: Array, columns: Array) -> Array:
    """Weight of each class `columns` [c] as a label of each row: [b, c], 0 where it is none."""
    target = jnp.zeros((ids.shape[0], columns.shape[0]), jnp.float32)
    # One comparison per label, unrolled: XLA fuses these into the logits' own pass, whereas
    # a [b, c, k] comparison or a scatter is materialised.
    for k in range(ids.shape[1]):
        target += jnp.where(ids[:, k, None] == columns, weights[:, k, None], 0.0)
    return target


def _check(embeddings: Array, table: Array, num_entities: int, mesh: Mesh) -> None:
    if table.shape[0] % mesh.size:
        raise BadInput(
            f"entity_table has {table.shape[0]} rows, which {mesh.size} devices cannot share "
            f"evenly: pad it to partition.padded_rows(...) = "
            f"{partition.padded_rows(table.shape[0], mesh)} rows."
        )
    if not 0 < num_entities <= table.shape[0]:
        raise BadInput(
            f"entity_table has {table.shape[0]} rows but num_entities is {num_entities}: "
            "build the table from the entities.parquet of the same data."
        )
    if embeddings.shape[0] % partition.batch_shards(mesh):
        raise BadInput(
            f"a batch of {embeddings.shape[0]} does not divide over "
            f"{partition.batch_shards(mesh)} batch shards: choose a multiple of that number."
        )


# ---------------------------------------------------------------------------- dense reference


def entity_softmax_dense(
    embeddings: Float[Array, "b d"],
    table: Float[Array, "e d"],
    label_ids: Int[Array, "b k"],
    label_weights: Float[Array, "b k"],
    *,
    num_entities: int,
    scale: float | Float[Array, ""],
    margin: float,
    compute_dtype: DTypeLike,
) -> base.LossSum:
    """The definition of `entity_softmax`, with all b x e logits in memory.

    Arguments and result are those of `entity_softmax`, less the mesh and the block size.
    """
    dtype = jnp.dtype(compute_dtype)
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    columns = jnp.arange(table.shape[0])
    cos = _dot("bd,ed->be", embeddings, _unit_rows(table)[0], dtype)
    cos = jnp.where(columns < num_entities, cos, _MASKED)
    target = _targets(ids, weights, columns)
    log_p = jax.nn.log_softmax(scale * (cos - margin * (target > 0)), axis=-1)
    best_label = jnp.max(jnp.where(target > 0, cos, _MASKED), axis=-1)
    best_other = jnp.max(jnp.where(target > 0, _MASKED, cos), axis=-1)
    return base.LossSum(
        total=-jnp.sum(target * log_p),
        count=jnp.sum(jnp.any(weights > 0, axis=-1), dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
    )


# ---------------------------------------------------------------------------- exact, in blocks


def entity_softmax(
    embeddings: Float[Array, "b d"],
    table: Float[Array, "e d"],
    label_ids: Int[Array, "b k"],
    label_weights: Float[Array, "b k"],
    *,
    num_entities: int,
    scale: float | Float[Array, ""],
    margin: float,
    mesh: Mesh,
    block_size: int,
    compute_dtype: DTypeLike,
) -> base.LossSum:
    """Exact large-margin softmax over all entities; memory does not grow with their number.

    Per device a block of logits (b x block_size fp32; two copies, or four where XLA's CPU scheduler
    trades memory for concurrency), the gathered embeddings and an fp32 accumulator of their
    gradient are alive, beside the table shard and its gradient.
    8 * b * e * d FLOP for value and gradient, divided by the devices.  Collectives: all-gather of
    embeddings and labels, all-reduce of [b] vectors, reduce-scatter of the embeddings' gradient.

    Gradients are exact for embeddings, table and scale; labels are constants.

    Args:
      embeddings: L2-normalised image embeddings, fp32 or bf16; batch over `partition.BATCH_AXES`.
      table: raw class rows, fp32, normalised inside; rows over `partition.ALL_AXES`.  Rows from
        num_entities on are padding, which receives no probability and no gradient.
      label_ids: entity ids; -1, like any id outside [0, num_entities), is padding.
      label_weights: weights > 0 that sum to 1 per row; 0 is padding.  A row that is all padding
        is skipped.  An id given twice in a row has the sum of its weights and one margin.
      num_entities: number of real rows of the table.
      scale: factor of the cosines, > 0; a traced scalar may be learned.
      margin: subtracted from the cosine of every label (CosFace).
      mesh: the mesh of `partition.make_mesh`.
      block_size: classes per block; 2048 or more keeps the accumulation of the embeddings'
        gradient a small part of the work at d = 512.
      compute_dtype: operands of the matrix products; logits and sums are always fp32.

    Returns:
      Sums over the rows that have a label.

    Raises:
      BadInput: the table does not divide over the mesh, the batch not over its batch axes, or
        num_entities does not fit the table.
    """
    _check(embeddings, table, num_entities, mesh)
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    static = _Static(num_entities, float(margin), mesh, block_size, jnp.dtype(compute_dtype))
    scale = jnp.asarray(scale, jnp.float32)
    return _softmax_in_blocks(static, embeddings, table, ids, weights, scale)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The arguments of `entity_softmax` that are constants of the compiled program."""

    num_entities: int
    margin: float
    mesh: Mesh
    block_size: int
    dtype: jnp.dtype

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        # The replication check knows neither that gathered labels are equal on all devices nor
        # custom_vjp's two passes.  Autodiff never crosses these maps, so it has nothing to guard.
        return jax.shard_map(
            functools.partial(function, self),
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )


_BATCH = P(partition.BATCH_AXES)
_CLASSES = P(partition.ALL_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_in_blocks(static, embeddings, table, ids, weights, scale):
    return _softmax_forward(static, embeddings, table, ids, weights, scale)[0]


def _softmax_forward(static, embeddings, table, ids, weights, scale):
    run = static.shard_map(
        _forward_shard,
        in_specs=(_BATCH, _CLASSES, _BATCH, _BATCH, P()),
        out_specs=(base.LossSum(P(), P(), P()), P(), P()),
    )
    loss, top, log_sum = run(embeddings, table, ids, weights, scale)
    return loss, (embeddings, table, ids, weights, scale, top, log_sum)


def _softmax_backward(static, residuals, cotangent):
    run = static.shard_map(
        _backward_shard,
        in_specs=(_BATCH, _CLASSES, _BATCH, _BATCH, P(), P(), P(), P()),
        out_specs=(_BATCH, _CLASSES, P()),
    )
    d_embeddings, d_table, d_scale = run(*residuals, cotangent.total)
    return d_embeddings, d_table, None, None, d_scale


_softmax_in_blocks.defvjp(_softmax_forward, _softmax_backward)


def _gather(x: Array) -> Array:
    """The rows of all batch shards, on every device."""
    return lax.all_gather(x, partition.BATCH_AXES, axis=0, tiled=True)


def _over_blocks(
    rows: int, block_size: int, body: Callable[[Any, Any, int], Any], carry: Any
) -> Any:
    """``carry = body(carry, start, size)`` for the blocks of range(rows); the last may be small."""
    # A block of its own for the tail: padding the shard would copy the table, and a clamped
    # last slice would visit rows twice.
    full, tail = divmod(rows, block_size)
    if full:
        carry = lax.fori_loop(0, full, lambda i, c: body(c, i * block_size, block_size), carry)
    return body(carry, full * block_size, tail) if tail else carry


def _cosines(static, x, table, start, size):
    """Cosines [b, size] with a block of this device's rows, its global ids and its unit rows."""
    unit, factor = _unit_rows(lax.dynamic_slice_in_dim(table, start, size))
    columns = lax.axis_index(partition.ALL_AXES) * table.shape[0] + start + jnp.arange(size)
    cos = _dot("bd,cd->bc", x, unit, static.dtype)
    return jnp.where(columns < static.num_entities, cos, _MASKED), columns, unit, factor


def _forward_shard(static, embeddings, table, ids, weights, scale):
    x, ids, weights = _gather(embeddings.astype(static.dtype)), _gather(ids), _gather(weights)

    def body(carry, start, size):
        top, exp_sum, target_sum, best_label, best_other = carry
        cos, columns, _, _ = _cosines(static, x, table, start, size)
        target = _targets(ids, weights, columns)
        hit = target > 0
        label = jnp.max(jnp.where(hit, cos, _MASKED), axis=1)
        other = jnp.max(jnp.where(hit, _MASKED, cos), axis=1)
        # The running max is carried, not recomputed: contracted into a multiply-add, its two
        # roundings would differ and bias exp_sum by up to an ulp of the logits in every block.
        new = jnp.maximum(top, scale * jnp.maximum(label - static.margin, other))
        # The margin sits inside the block: repairing the log-sum-exp afterwards would cancel
        # catastrophically once scale * margin exceeds about 10.
        z = scale * (cos - static.margin * hit)
        exp_sum = exp_sum * jnp.exp(top - new) + jnp.sum(jnp.exp(z - new[:, None]), axis=1)
        target_sum += jnp.sum(target * z, axis=1)
        best_label, best_other = jnp.maximum(best_label, label), jnp.maximum(best_other, other)
        return new, exp_sum, target_sum, best_label, best_other

    lowest = jnp.full(x.shape[0], _MASKED, jnp.float32)
    zeros = jnp.zeros(x.shape[0], jnp.float32)
    # The running max starts at the lowest real logit, far above padding: a shard of nothing but
    # padding then sums to exactly 0.
    carry = (zeros - scale * (1.0 + static.margin), zeros, zeros, lowest, lowest)
    carry = _over_blocks(table.shape[0], static.block_size, body, carry)
    local_top, exp_sum, target_sum, best_label, best_other = carry

    top, best_label, best_other = lax.pmax((local_top, best_label, best_other), partition.ALL_AXES)
    exp_sum, target_sum = lax.psum(
        (exp_sum * jnp.exp(local_top - top), target_sum), partition.ALL_AXES
    )
    # The log-sum-exp stays in two parts: at a scale of 100 their fp32 sum would be 4e-6 off.
    log_sum = jnp.log(exp_sum)
    mass = jnp.sum(weights, axis=1)
    loss = base.LossSum(
        total=jnp.sum((mass * top - target_sum) + mass * log_sum),
        count=jnp.sum(jnp.any(weights > 0, axis=1), dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
    )
    return loss, top, log_sum


def _backward_shard(static, embeddings, table, ids, weights, scale, top, log_sum, d_total):
    x, ids, weights = _gather(embeddings.astype(static.dtype)), _gather(ids), _gather(weights)
    mass = jnp.sum(weights, axis=1, keepdims=True)

    def body(carry, start, size):
        d_x, d_table, d_scale = carry
        cos, columns, unit, factor = _cosines(static, x, table, start, size)
        target = _targets(ids, weights, columns)
        cos = cos - static.margin * (target > 0)
        p = jnp.exp(scale * cos - top[:, None] - log_sum[:, None])
        d_cos = (d_total * scale) * (mass * p - target)
        d_scale += jnp.sum(d_cos * cos, axis=1)
        d_x += _dot("bc,cd->bd", d_cos, unit, static.dtype)
        d_unit = _dot("bc,bd->cd", d_cos, x, static.dtype)
        d_rows = factor * (d_unit - unit * jnp.sum(d_unit * unit, axis=1, keepdims=True))
        return d_x, lax.dynamic_update_slice_in_dim(d_table, d_rows, start, 0), d_scale

    carry = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(table.shape, jnp.float32),
        jnp.zeros(x.shape[0], jnp.float32),
    )
    d_x, d_table, d_scale = _over_blocks(table.shape[0], static.block_size, body, carry)
    # Each device has the whole batch's gradient through its own classes: add them up and keep
    # this device's rows, first over the axes that split the batch, then over those that do not.
    d_x = lax.psum_scatter(d_x, partition.BATCH_AXES, scatter_dimension=0, tiled=True)
    if static.mesh.shape["tensor"] > 1:
        d_x = lax.psum(d_x, "tensor")
    d_scale = lax.psum(jnp.sum(d_scale), partition.ALL_AXES) / scale
    return d_x.astype(embeddings.dtype), d_table.astype(table.dtype), d_scale


# ---------------------------------------------------------------------------- top k


def entity_logits_topk(
    embeddings: Float[Array, "b d"],
    table: Float[Array, "e d"],
    *,
    num_entities: int,
    k: int,
    mesh: Mesh,
    block_size: int = 8192,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The k entities closest to each embedding, without gathering a b x e matrix.

    Every device keeps the best k of its own classes, block by block; only those are exchanged.

    Args:
      embeddings: L2-normalised, batch over `partition.BATCH_AXES`.
      table: raw class rows, over `partition.ALL_AXES`; rows from num_entities on are padding.
      num_entities: number of real rows of the table.
      k: how many entities, at most num_entities.
      mesh: the mesh of `partition.make_mesh`.
      block_size: classes per block; bounds the memory at b x block_size cosines.

    Returns:
      Entity ids int32 and their cosines fp32 (without scale or margin), best first; of equal
      cosines the lower id comes first.

    Raises:
      BadInput: as `entity_softmax`, or k exceeds num_entities.
    """
    _check(embeddings, table, num_entities, mesh)
    if not 0 < k <= num_entities:
        raise BadInput(f"k={k} nearest of {num_entities} entities: choose 1 to {num_entities}.")
    static = _Static(num_entities, 0.0, mesh, block_size, jnp.dtype(jnp.float32))

    def shard(static, embeddings, table):
        x = _gather(embeddings.astype(jnp.float32))

        def body(carry, start, size):
            cos, columns, _, _ = _cosines(static, x, table, start, size)
            columns = jnp.broadcast_to(columns.astype(jnp.int32), cos.shape)
            # Earlier blocks come first and top_k prefers the first of equals: the lower id.
            cos, pick = lax.top_k(jnp.concatenate([carry[0], cos], axis=1), k)
            ids = jnp.concatenate([carry[1], columns], axis=1)
            return cos, jnp.take_along_axis(ids, pick, axis=1)

        carry = (
            jnp.full((x.shape[0], k), _MASKED, jnp.float32),
            jnp.full((x.shape[0], k), num_entities, jnp.int32),
        )
        best = _over_blocks(table.shape[0], static.block_size, body, carry)
        # Each device receives every device's best, for its own rows only.
        best = lax.all_to_all(best, partition.BATCH_AXES, split_axis=0, concat_axis=1, tiled=True)
        cos, ids = lax.all_gather(best, "tensor", axis=1, tiled=True)
        cos, ids = lax.sort((-cos, ids), dimension=1, num_keys=2)
        return ids[:, :k], -cos[:, :k]

    run = static.shard_map(shard, in_specs=(_BATCH, _CLASSES), out_specs=(_BATCH, _BATCH))
    return run(embeddings, table)
