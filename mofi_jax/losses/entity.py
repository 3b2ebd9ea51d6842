"""Entity classification: large-margin cosine softmax over a class table sharded on all devices.

Two versions of one function.  `entity_softmax_dense` is the definition: logits for every class,
differentiated by jax.  `entity_softmax` computes the same numbers without ever holding more than
a tile of logits: each device walks through its own share of the classes in blocks, with a running
max and sum of exponentials, and walks through them again in the backward pass.  The table and its
gradient never move.

The loss of a row with labels k of weight w_k (axlearn's ``large_margin_cosine_loss`` with soft
targets; CosFace, arXiv 1801.09414; ArcFace, arXiv 1801.07698)::

    z_c  = scale * margined(cos(x, W_c))    the margin where c is a label, cos itself elsewhere
    loss = -sum_k w_k * log_softmax(z)_k

This file knows nothing of models, of where labels come from, or of the weight of a task.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch, meshes
from mofi_jax.losses import base, blocks, class_order, margins

# The logit of what is no class: finite, so that no inf - inf can arise, and exp(it) is exactly 0.
MASKED = -1e30
# Floor of a row's squared norm.  Rows of N(0, 0.01^2) with 512 entries have 5e-2.
_TINY = 1e-12
# Up to this many labels a row are compared with each class of a block, which XLA fuses into the
# logits' own pass; more are scattered into a tile of targets.
_COMPARED_LABELS = 8
# Fewest classes a block: every block adds to the fp32 gradient of all embeddings, which costs as
# many bytes as reading this many logits again.
_SHORTEST_BLOCK = 2048


class Sample(NamedTuple):
    """Some rows of a class table in place of all (`entity_sampling.draw`).

    Attributes:
      rows: int32 [s], row numbers of the whole table; numbers beyond its last row are empty places.
        Sharded as the table is, every device's share rows of its own, ascending.
      log_q: float32 [s], added to the logits: -log of the probability with which a row was drawn.
      overflow: float32 scalar, labels of the batch (distinct classes) that found no place.
    """

    rows: Int[Array, " s"]
    log_q: Float[Array, " s"]
    overflow: Float[Array, ""]


# ---------------------------------------------------------------------------- shared by both


def dot(subscripts: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
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


def unit_rows(rows: Array) -> tuple[Array, Array]:
    """Rows scaled to length 1 and the factor [c, 1] that did it; a row of zeros stays zero."""
    factor = lax.rsqrt(jnp.maximum(jnp.sum(rows * rows, axis=-1, keepdims=True), _TINY))
    return rows * factor, factor


def _real_labels(ids: Array, weights: Array, num_entities: int) -> tuple[Array, Array]:
    """Labels with every kind of padding (id out of range, weight 0) as id -1, weight 0."""
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    real = (ids >= 0) & (ids < num_entities) & (weights > 0)
    return jnp.where(real, ids, -1), jnp.where(real, weights, 0.0)


def _targets(ids: Array, weights: Array, columns: Array, *, contiguous: bool) -> Array:
    """Weight of each class `columns` [c] as a label of each row: [b, c], 0 where it is none."""
    target = jnp.zeros((ids.shape[0], columns.shape[0]), jnp.float32)
    if contiguous and ids.shape[1] > _COMPARED_LABELS:
        places = jnp.where(ids < columns[0], columns.shape[0], ids - columns[0])
        rows = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
        return target.at[rows, places].add(weights, mode="drop")
    # One comparison per label, unrolled: XLA fuses these into the logits' own pass, whereas
    # a [b, c, k] comparison or a scatter is materialised.
    for k in range(ids.shape[1]):
        target += jnp.where(ids[:, k, None] == columns, weights[:, k, None], 0.0)
    return target


def check_table(embeddings: Array, table: Array, num_entities: int, mesh: Mesh) -> None:
    """Raises BadInput unless table and batch divide over the mesh and hold the vocabulary."""
    if table.shape[0] % mesh.size:
        raise BadInput(
            f"entity_table has {table.shape[0]} rows, which {mesh.size} devices cannot share "
            f"evenly: pad it to class_order.padded_rows(...) = "
            f"{class_order.padded_rows(table.shape[0], mesh)} rows."
        )
    if not 0 < num_entities <= table.shape[0]:
        raise BadInput(
            f"entity_table has {table.shape[0]} rows but num_entities is {num_entities}: "
            "build the table from the entities.parquet of the same data."
        )
    if embeddings.shape[0] % global_batch.batch_shards(mesh):
        raise BadInput(
            f"a batch of {embeddings.shape[0]} does not divide over "
            f"{global_batch.batch_shards(mesh)} batch shards: choose a multiple of that number."
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
    margin_kind: str = "cosface",
    compute_dtype: DTypeLike,
    sample: Sample | None = None,
) -> base.LossSum:
    """The definition of `entity_softmax`, with all b x e logits in memory.

    Arguments and result are those of `entity_softmax`, less the mesh and the block size.
    """
    dtype = jnp.dtype(compute_dtype)
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    columns = jnp.arange(table.shape[0]) if sample is None else sample.rows
    real = columns < num_entities
    cos = dot("bd,ed->be", embeddings, unit_rows(table)[0], dtype)
    cos = jnp.where(real, cos, 0.0)
    target = _targets(ids, weights, columns, contiguous=sample is None)
    hit = target > 0
    logits = scale * jnp.where(hit, margins.margined(cos, margin, margin_kind), cos)
    if sample is not None:
        logits += sample.log_q
    log_p = jax.nn.log_softmax(jnp.where(real, logits, MASKED), axis=-1)
    best_label = jnp.max(jnp.where(hit, cos, MASKED), axis=-1)
    best_other = jnp.max(jnp.where(hit | ~real, MASKED, cos), axis=-1)
    labelled = jnp.any(hit, axis=-1)
    return base.LossSum(
        total=-jnp.sum(target * log_p),
        count=jnp.sum(labelled, dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
        cosine=jnp.sum(jnp.where(labelled, best_label, 0.0)),
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
    margin_kind: str = "cosface",
    mesh: Mesh,
    block_size: int | None = None,
    compute_dtype: DTypeLike,
    sample: Sample | None = None,
) -> base.LossSum:
    """Exact large-margin softmax over all entities; memory does not grow with their number.

    Per device a tile of fp32 logits (`blocks.TILE_BYTES`; two copies of it, or four where XLA's CPU
    scheduler trades memory for concurrency), the gathered embeddings and an fp32 accumulator of
    their gradient are alive, beside the table shard and its gradient.
    8 * b * e * d FLOP for value and gradient, divided by the devices.  Collectives: all-gather of
    embeddings and labels, all-reduce of [b] vectors, reduce-scatter of the embeddings' gradient.

    Gradients are exact for embeddings, table and a traced scale; labels are constants.

    Args:
      embeddings: L2-normalised image embeddings, fp32 or bf16; batch over `meshes.BATCH_AXES`.
        A row of zeros has cosine 0 with every class.
      table: raw class rows, fp32, normalised inside; rows over `meshes.ALL_AXES`.  Rows from
        num_entities on are padding, which receives no probability and no gradient.
      label_ids: rows of the table (`class_order.table_rows` of entity ids); -1, like any id outside
        [0, num_entities), is padding.
      label_weights: weights > 0 that sum to 1 per row; 0 is padding.  A row that is all padding
        is skipped.  An id given twice in a row has the sum of its weights and one margin.
      num_entities: number of real rows of the table.
      scale: factor of the cosines, > 0; a traced scalar may be learned.
      margin: subtracted from the cosine (CosFace) or added to the angle (ArcFace) of every label.
      margin_kind: "cosface" or "arcface".
      mesh: the mesh of `meshes.make_mesh`.
      block_size: classes per block; None chooses it, and how many rows of the batch a tile has,
        from the shapes and the kind of device.
      compute_dtype: operands of the matrix products; logits and sums are always fp32.
      sample: the classes that `table` holds, where it is not the whole table but the rows
        ``entity_sampling.take_rows(table, sample.rows)``.  A label that is not in the sample counts
        as padding, and `correct` compares with the sample's classes only.

    Returns:
      Sums over the rows that have a label.

    Raises:
      BadInput: the table does not divide over the mesh, the batch not over its batch axes,
        num_entities does not fit the table, or an unknown kind of margin.
    """
    check_table(embeddings, table, num_entities if sample is None else table.shape[0], mesh)
    if margin_kind not in margins.KINDS:
        raise BadInput(f"margin_kind={margin_kind!r}: choose from {', '.join(margins.KINDS)}.")
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    fixed_scale = float(scale) if isinstance(scale, int | float) else None
    static = _Static(
        num_entities=num_entities,
        scale=fixed_scale,
        margin=float(margin),
        margin_kind=margin_kind,
        mesh=mesh,
        block_size=block_size,
        dtype=jnp.dtype(compute_dtype),
        # Logits between -scale * (1 + margin) and scale, so that their exponentials fit fp32 with
        # the largest possible logit in place of the largest: one pass over the tile, not two.
        bounded=sample is None and fixed_scale is not None and fixed_scale * (2 + margin) < 85,
    )
    scale = None if fixed_scale is not None else jnp.asarray(scale, jnp.float32)
    return _softmax_in_blocks(static, embeddings, table, ids, weights, scale, sample)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is constant in the compiled program."""

    num_entities: int
    scale: float | None  # None: traced
    margin: float
    margin_kind: str
    mesh: Mesh
    block_size: int | None
    dtype: jnp.dtype
    bounded: bool

    def margined(self, cos: Array) -> Array:
        return margins.margined(cos, self.margin, self.margin_kind)

    def margin_slope(self, cos: Array) -> Array | float:
        return margins.slope(cos, self.margin, self.margin_kind)

    def tile(self, batch: int, classes: int) -> tuple[int, int]:
        """Rows of the batch and classes in one tile of logits."""
        logits = blocks.tile_bytes(self.mesh) // 4
        if self.block_size is not None:
            length = min(self.block_size, classes)
        else:
            length = blocks.even_length(classes, max(_SHORTEST_BLOCK, logits // batch), 128)
        return blocks.even_length(batch, logits // length, 8), length


# A traced scale and a sample are both there or not: None is an empty tree to shard_map.
_FORWARD_SPECS = (blocks.BATCH, blocks.CLASSES, blocks.BATCH, blocks.BATCH, P())
_SAMPLE_SPECS = Sample(blocks.CLASSES, blocks.CLASSES, P())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_in_blocks(static, embeddings, table, ids, weights, scale, sample):
    return _softmax_forward(static, embeddings, table, ids, weights, scale, sample)[0]


def _softmax_forward(static, embeddings, table, ids, weights, scale, sample):
    run = blocks.shard_map(
        functools.partial(_forward_shard, static),
        static.mesh,
        in_specs=(*_FORWARD_SPECS, _SAMPLE_SPECS if sample else None),
        out_specs=(base.LossSum(P(), P(), P(), P()), (P(), P(), P())),
    )
    loss, statistics = run(embeddings, table, ids, weights, scale, sample)
    return loss, (embeddings, table, ids, weights, scale, sample, statistics)


def _softmax_backward(static, residuals, cotangent):
    sample = residuals[5]
    run = blocks.shard_map(
        functools.partial(_backward_shard, static),
        static.mesh,
        in_specs=(*_FORWARD_SPECS, _SAMPLE_SPECS if sample else None, (P(), P(), P()), P()),
        out_specs=(blocks.BATCH, blocks.CLASSES, P()),
    )
    d_embeddings, d_table, d_scale = run(*residuals, cotangent.total)
    return d_embeddings, d_table, None, None, d_scale, None


_softmax_in_blocks.defvjp(_softmax_forward, _softmax_backward)


class _Block(NamedTuple):
    """Some of this device's classes."""

    unit: Array  # [c, d] rows of length 1
    factor: Array  # [c, 1] what made them so
    columns: Array  # [c] row numbers of the whole table
    real: Array  # [c] columns that are classes
    log_q: Array | float  # [c]


def _class_block(static, table, sample, start, size):
    unit, factor = unit_rows(lax.dynamic_slice_in_dim(table, start, size))
    if sample is None:
        columns = lax.axis_index(meshes.ALL_AXES) * table.shape[0] + start + jnp.arange(size)
        log_q = 0.0
    else:
        columns = lax.dynamic_slice_in_dim(sample.rows, start, size)
        log_q = lax.dynamic_slice_in_dim(sample.log_q, start, size)
    return _Block(unit, factor, columns, columns < static.num_entities, log_q)


def _tile(static, block, x, ids, weights, sample):
    """Cosines of a tile (0 for what is no class), label weights, and which are labels."""
    cos = jnp.where(block.real, dot("bd,cd->bc", x, block.unit, static.dtype), 0.0)
    target = _targets(ids, weights, block.columns, contiguous=sample is None)
    return cos, target, target > 0


def _slice(arrays: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), arrays)


def _update(arrays: Any, parts: Any, start: Any) -> Any:
    return jax.tree.map(
        lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 0), arrays, parts
    )


def _forward_shard(static, embeddings, table, ids, weights, scale, sample):
    scale = static.scale if scale is None else scale
    x = blocks.gather_batch(embeddings.astype(static.dtype))
    ids, weights = blocks.gather_batch(ids), blocks.gather_batch(weights)
    batch_length, class_length = static.tile(x.shape[0], table.shape[0])

    def walk(x, ids, weights):
        """Over this device's classes: the sums of some rows of the batch."""

        def body(carry, start, size):
            top, exp_sum, mass, target_sum, best_label, best_other = carry
            block = _class_block(static, table, sample, start, size)
            cos, target, hit = _tile(static, block, x, ids, weights, sample)
            label = jnp.max(jnp.where(hit, cos, MASKED), axis=1)
            other = jnp.max(jnp.where(hit | ~block.real, MASKED, cos), axis=1)
            # The margin sits inside the block: repairing the log-sum-exp afterwards would cancel
            # catastrophically once scale * margin exceeds about 10.
            z = scale * jnp.where(hit, static.margined(cos), cos) + block.log_q
            if static.bounded:
                new = top
            elif sample is None:
                # From the cosines, not from z: contracted into a multiply-add, the two roundings
                # of z would differ and bias exp_sum by up to an ulp of the logits in every block.
                new = jnp.maximum(top, scale * jnp.maximum(static.margined(label), other))
            else:
                new = jnp.maximum(top, jnp.max(jnp.where(block.real, z, MASKED), axis=1))
            p = jnp.where(block.real, jnp.exp(z - new[:, None]), 0.0)
            exp_sum = exp_sum * jnp.exp(top - new) + jnp.sum(p, axis=1)
            mass += jnp.sum(target, axis=1)
            target_sum += jnp.sum(target * z, axis=1)
            best_label = jnp.maximum(best_label, label)
            best_other = jnp.maximum(best_other, other)
            return new, exp_sum, mass, target_sum, best_label, best_other

        lowest = jnp.full(x.shape[0], MASKED, jnp.float32)
        zeros = jnp.zeros(x.shape[0], jnp.float32)
        # The running max starts at the lowest real logit, far above padding: a shard of nothing
        # but padding then sums to exactly 0.
        first = scale if static.bounded else -scale * (1.0 + static.margin)
        carry = (zeros + first, zeros, zeros, zeros, lowest, lowest)
        return blocks.over_blocks(table.shape[0], class_length, body, carry)

    rows = x, ids, weights
    sums = (jnp.zeros(x.shape[0], jnp.float32),) * 6
    local_top, exp_sum, mass, target_sum, best_label, best_other = blocks.over_blocks(
        x.shape[0],
        batch_length,
        lambda sums, start, size: _update(sums, walk(*_slice(rows, start, size)), start),
        sums,
    )
    top, best_label, best_other = lax.pmax((local_top, best_label, best_other), meshes.ALL_AXES)
    exp_sum, mass, target_sum = lax.psum(
        (exp_sum * jnp.exp(local_top - top), mass, target_sum), meshes.ALL_AXES
    )
    # The log-sum-exp stays in two parts: at a scale of 100 their fp32 sum would be 4e-6 off.
    log_sum = jnp.log(exp_sum)
    loss = base.LossSum(
        total=jnp.sum((mass * top - target_sum) + mass * log_sum),
        count=jnp.sum(mass > 0, dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
        cosine=jnp.sum(jnp.where(mass > 0, best_label, 0.0)),
    )
    return loss, (top, log_sum, mass)


def _backward_shard(static, embeddings, table, ids, weights, scale, sample, statistics, d_total):
    learned = scale is not None
    scale = scale if learned else static.scale
    x = blocks.gather_batch(embeddings.astype(static.dtype))
    ids, weights = blocks.gather_batch(ids), blocks.gather_batch(weights)
    batch_length, class_length = static.tile(x.shape[0], table.shape[0])
    rows = x, ids, weights, *statistics

    def over_classes(carry, class_start, class_size):
        d_x, d_table, d_scale = carry
        block = _class_block(static, table, sample, class_start, class_size)

        def over_batch(carry, start, size):
            d_x, d_unit, d_scale = carry
            x, ids, weights, top, log_sum, mass = _slice(rows, start, size)
            cos, target, hit = _tile(static, block, x, ids, weights, sample)
            margined = jnp.where(hit, static.margined(cos), cos)
            z = scale * margined + block.log_q
            p = jnp.exp(z - top[:, None] - log_sum[:, None])
            d_z = jnp.where(block.real, d_total * (mass[:, None] * p - target), 0.0)
            if learned:
                d_scale += jnp.sum(d_z * margined)
            d_cos = scale * d_z * jnp.where(hit, static.margin_slope(cos), 1.0)
            d_unit += dot("bc,bd->cd", d_cos, x, static.dtype)
            own = lax.dynamic_slice_in_dim(d_x, start, size)
            own += dot("bc,cd->bd", d_cos, block.unit, static.dtype)
            return lax.dynamic_update_slice_in_dim(d_x, own, start, 0), d_unit, d_scale

        carry = d_x, jnp.zeros(block.unit.shape, jnp.float32), d_scale
        d_x, d_unit, d_scale = blocks.over_blocks(x.shape[0], batch_length, over_batch, carry)
        along = jnp.sum(d_unit * block.unit, axis=1, keepdims=True)
        d_rows = block.factor * (d_unit - block.unit * along)
        return d_x, _update(d_table, d_rows, class_start), d_scale

    carry = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(table.shape, jnp.float32),
        jnp.zeros((), jnp.float32),
    )
    d_x, d_table, d_scale = blocks.over_blocks(table.shape[0], class_length, over_classes, carry)
    # Each device has the whole batch's gradient through its own classes: add them up and keep
    # this device's rows, first over the axes that split the batch, then over those that do not.
    d_x = lax.psum_scatter(d_x, meshes.BATCH_AXES, scatter_dimension=0, tiled=True)
    if static.mesh.shape["tensor"] > 1:
        d_x = lax.psum(d_x, "tensor")
    d_scale = lax.psum(d_scale, meshes.ALL_AXES) if learned else None
    return d_x.astype(embeddings.dtype), d_table.astype(table.dtype), d_scale
