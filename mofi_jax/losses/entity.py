"""Entity classification: large-margin cosine softmax over a class table sharded on all devices.

Two versions of one function.  `entity_softmax_dense` is the definition: logits for every class,
differentiated by jax.  `entity_softmax` computes the same numbers without ever holding more than
a tile of logits: each device walks through its own share of the classes in blocks, with a running
max and sum of exponentials, and again in the backward pass.  The table and its gradient never move.

The loss of a row with labels k of weight w_k (axlearn's ``large_margin_cosine_loss`` with soft
targets; CosFace, arXiv 1801.09414; ArcFace, arXiv 1801.07698)::

    z_c  = scale * margined(cos(x, W_c))    the margin where c is a label, cos itself elsewhere
    loss = -sum_k w_k * log_softmax(z)_k
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.losses import blocks, margins

# Floor of a row's squared norm.  Rows of N(0, 0.01^2) with 512 entries have 5e-2.
_TINY = 1e-12
# Up to this many labels a row are compared with each class of a block, which XLA fuses into the
# logits' own pass; more are scattered into a tile of targets.
_COMPARED_LABELS = 8
# Fewest classes a block: every block adds to the fp32 gradient of all embeddings, which costs as
# many bytes as reading this many logits again.
_SHORTEST_BLOCK = 2048


class Sample(NamedTuple):
    """Some rows of a class table in place of all (`entity_sampling.draw`)."""

    # Row numbers of the whole table; those beyond its last row are empty places.  Sharded as the
    # table is, every device's share rows of its own, ascending.
    rows: Int[Array, " s"]
    log_q: Float[Array, " s"]  # added to the logits: -log of a row's probability to be drawn
    overflow: Float[Array, ""]  # labels of the batch (distinct classes) that found no place


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


def check_table(rows: int, num_entities: int, mesh: Mesh) -> None:
    """Raises BadInput unless the table's rows divide over the mesh and hold the vocabulary."""
    if rows % mesh.size or not 0 < num_entities <= rows:
        raise BadInput(
            f"num_entities={num_entities} and a table of {rows} rows on {mesh.size} devices do not "
            "fit: pad it with class_order.padded_rows(num_entities, mesh)."
        )


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
) -> blocks.LossSum:
    """The definition of `entity_softmax`, with all b x e logits in memory."""
    dtype = jnp.dtype(compute_dtype)
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    columns = jnp.arange(table.shape[0]) if sample is None else sample.rows
    real = columns < num_entities
    cos = blocks.dot("bd,ed->be", embeddings, unit_rows(table)[0], dtype)
    cos = jnp.where(real, cos, 0.0)
    target = _targets(ids, weights, columns, contiguous=sample is None)
    hit = target > 0
    logits = scale * jnp.where(hit, margins.margined(cos, margin, margin_kind), cos)
    if sample is not None:
        logits += sample.log_q
    log_p = jax.nn.log_softmax(jnp.where(real, logits, blocks.MASKED), axis=-1)
    best_label = jnp.max(jnp.where(hit, cos, blocks.MASKED), axis=-1)
    best_other = jnp.max(jnp.where(hit | ~real, blocks.MASKED, cos), axis=-1)
    labelled = jnp.any(hit, axis=-1)
    return blocks.LossSum(
        total=-jnp.sum(target * log_p),
        count=jnp.sum(labelled, dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
        cosine=jnp.sum(jnp.where(labelled, best_label, 0.0)),
    )


@jax.named_scope("entity_softmax")
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
) -> blocks.LossSum:
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
      scale: factor of the cosines, > 0; a traced scalar may be learned.
      margin: subtracted from the cosine (CosFace) or added to the angle (ArcFace) of every label.
      margin_kind: "cosface" or "arcface".
      block_size: classes per block; None chooses it, and how many rows of the batch a tile has,
        from the shapes and the kind of device.
      compute_dtype: operands of the matrix products; logits and sums are always fp32.
      sample: the classes of `table`, if it is ``entity_sampling.take_rows(table, sample.rows)``
        and not the whole table.  A label that is not in the sample counts as padding, and `correct`
        compares with the sample's classes only.

    Returns:
      Sums over the rows that have a label.

    Raises:
      BadInput: the table does not divide over the mesh, the batch not over its batch axes,
        num_entities does not fit the table, or an unknown kind of margin.
    """
    check_table(table.shape[0], num_entities if sample is None else table.shape[0], mesh)
    blocks.check_batch(embeddings.shape[0], mesh)
    if margin_kind not in margins.KINDS:
        raise BadInput(f"margin_kind={margin_kind!r}: choose from {', '.join(margins.KINDS)}.")
    ids, weights = _real_labels(label_ids, label_weights, num_entities)
    fixed_scale = float(scale) if isinstance(scale, int | float) else None
    static = _Static(
        num_entities=num_entities,
        scale=fixed_scale,
        margin=float(margin),
        margin_kind=margin_kind,
        dtype=jnp.dtype(compute_dtype),
        tile=_tile_shape(mesh, embeddings.shape[0], table.shape[0] // mesh.size, block_size),
        # Logits between -scale * (1 + margin) and scale, so that their exponentials fit fp32 with
        # the largest possible logit in place of the largest: one pass over the tile, not two.
        bounded=sample is None and fixed_scale is not None and fixed_scale * (2 + margin) < 85,
    )
    # Without a traced scale or a sample, these are None: an empty tree to shard_map.
    scale = None if fixed_scale is not None else jnp.asarray(scale, jnp.float32)
    drawn = None if sample is None else (sample.rows, sample.log_q)
    return blocks.sharded(
        mesh,
        functools.partial(_forward, static),
        functools.partial(_backward, static),
        (embeddings, table, scale, (ids, weights), drawn),
        (blocks.BATCH, blocks.CLASSES, P(), blocks.BATCH, blocks.CLASSES),
        residual_specs=(P(), blocks.CLASSES),
        differentiable=3,
    )


class _Static(NamedTuple):
    """What is constant in the compiled program."""

    num_entities: int
    scale: float | None  # None: traced
    margin: float
    margin_kind: str
    dtype: jnp.dtype
    tile: tuple[int, int]
    bounded: bool


def _tile_shape(mesh: Mesh, batch: int, classes: int, block_size: int | None) -> tuple[int, int]:
    """Rows of the batch and classes in one tile of logits."""
    length = blocks.tile_columns(mesh, batch, classes, block_size, shortest=_SHORTEST_BLOCK)
    return blocks.even_length(batch, blocks.tile_logits(mesh) // length, 8), length


class _Classes(NamedTuple):
    """Some of this device's classes."""

    unit: Array  # [c, d] rows of length 1
    factor: Array  # [c, 1] what made them so
    columns: Array  # [c] row numbers of the whole table
    real: Array  # [c] columns that are classes
    log_q: Array | float  # [c]


def _class_block(static, table, factors, drawn, start, size):
    rows, factor = blocks.slice_rows((table, factors), start, size)
    factor = factor[:, None]
    if drawn is None:
        columns = lax.axis_index(meshes.ALL_AXES) * table.shape[0] + start + jnp.arange(size)
        log_q = 0.0
    else:
        columns, log_q = blocks.slice_rows(drawn, start, size)
    return _Classes(rows * factor, factor, columns, columns < static.num_entities, log_q)


class _Tile(NamedTuple):
    """Some rows of the batch [b] and some classes [c]; [b, c]."""

    cos: Array  # 0 for what is no class
    target: Array  # weight of the class as a label
    hit: Array  # it is a label
    margined: Array  # cosines, less the margin where the class is a label
    z: Array  # logits


def _logits(static, scale, classes, x, ids, weights, contiguous):
    cos = blocks.dot("bd,cd->bc", x, classes.unit, static.dtype)
    cos = jnp.where(classes.real, cos, 0.0)
    target = _targets(ids, weights, classes.columns, contiguous=contiguous)
    hit = target > 0
    # The margin sits inside the tile: repairing the log-sum-exp afterwards would cancel
    # catastrophically once scale * margin exceeds about 10.
    margined = jnp.where(hit, margins.margined(cos, static.margin, static.margin_kind), cos)
    return _Tile(cos, target, hit, margined, scale * margined + classes.log_q)


def _forward(static, embeddings, table, scale, labels, drawn):
    scale = static.scale if scale is None else scale
    x = blocks.gather_batch(embeddings.astype(static.dtype))
    ids, weights = blocks.gather_batch(labels)
    # Once for all tiles and both passes; a column would fill TPU memory as 128 do.
    factors = unit_rows(table)[1][:, 0]
    batch_length, class_length = static.tile

    def over_classes(x, ids, weights):
        """The sums of some rows of the batch over this device's classes."""

        def body(carry, start, size):
            top, exp_sum, weight_sum, target_sum, best_label, best_other = carry
            classes = _class_block(static, table, factors, drawn, start, size)
            tile = _logits(static, scale, classes, x, ids, weights, drawn is None)
            label = jnp.max(jnp.where(tile.hit, tile.cos, blocks.MASKED), axis=1)
            other = jnp.where(tile.hit | ~classes.real, blocks.MASKED, tile.cos)
            other = jnp.max(other, axis=1)
            if static.bounded:
                new = top
            elif drawn is None:
                # From the cosines, not from z: contracted into a multiply-add, the two roundings
                # of z would differ and bias exp_sum by up to an ulp of the logits in every block.
                label_logit = margins.margined(label, static.margin, static.margin_kind)
                new = jnp.maximum(top, scale * jnp.maximum(label_logit, other))
            else:
                z = jnp.where(classes.real, tile.z, blocks.MASKED)
                new = jnp.maximum(top, jnp.max(z, axis=1))
            p = jnp.where(classes.real, jnp.exp(tile.z - new[:, None]), 0.0)
            exp_sum = exp_sum * jnp.exp(top - new) + jnp.sum(p, axis=1)
            weight_sum += jnp.sum(tile.target, axis=1)
            target_sum += jnp.sum(tile.target * tile.z, axis=1)
            best_label = jnp.maximum(best_label, label)
            best_other = jnp.maximum(best_other, other)
            return new, exp_sum, weight_sum, target_sum, best_label, best_other

        lowest = jnp.full(x.shape[0], blocks.MASKED, jnp.float32)
        zeros = jnp.zeros(x.shape[0], jnp.float32)
        # The running max starts at the lowest real logit, far above padding: a shard of nothing
        # but padding then sums to exactly 0.
        first = scale if static.bounded else -scale * (1.0 + static.margin)
        carry = (zeros + first, zeros, zeros, zeros, lowest, lowest)
        return blocks.over_blocks(table.shape[0], class_length, body, carry)

    def over_batch(sums, start, size):
        rows = blocks.slice_rows((x, ids, weights), start, size)
        return blocks.update_rows(sums, over_classes(*rows), start)

    sums = (jnp.zeros(x.shape[0], jnp.float32),) * 6
    sums = blocks.over_blocks(x.shape[0], batch_length, over_batch, sums)
    local_top, exp_sum, weight_sum, target_sum, best_label, best_other = sums
    top, best_label, best_other = lax.pmax((local_top, best_label, best_other), meshes.ALL_AXES)
    exp_sum, weight_sum, target_sum = lax.psum(
        (exp_sum * jnp.exp(local_top - top), weight_sum, target_sum), meshes.ALL_AXES
    )
    # The log-sum-exp stays in two parts: at a scale of 100 their fp32 sum would be 4e-6 off.
    log_sum = jnp.log(exp_sum)
    loss = blocks.LossSum(
        total=jnp.sum((weight_sum * top - target_sum) + weight_sum * log_sum),
        count=jnp.sum(weight_sum > 0, dtype=jnp.float32),
        correct=jnp.sum(best_label > best_other, dtype=jnp.float32),
        cosine=jnp.sum(jnp.where(weight_sum > 0, best_label, 0.0)),
    )
    return loss, ((top, log_sum, weight_sum), factors)


def _backward(static, embeddings, table, scale, labels, drawn, residuals, d_total):
    statistics, factors = residuals
    learned = scale is not None
    scale = scale if learned else static.scale
    x = blocks.gather_batch(embeddings.astype(static.dtype))
    rows = x, *blocks.gather_batch(labels), *statistics
    batch_length, class_length = static.tile

    def over_classes(carry, class_start, class_size):
        d_x, d_table, d_scale = carry
        classes = _class_block(static, table, factors, drawn, class_start, class_size)

        def over_batch(carry, start, size):
            d_x, d_unit, d_scale = carry
            x, ids, weights, top, log_sum, weight_sum = blocks.slice_rows(rows, start, size)
            tile = _logits(static, scale, classes, x, ids, weights, drawn is None)
            p = jnp.exp(tile.z - top[:, None] - log_sum[:, None])
            d_z = d_total * (weight_sum[:, None] * p - tile.target)
            d_z = jnp.where(classes.real, d_z, 0.0)
            if learned:
                d_scale += jnp.sum(d_z * tile.margined)
            slope = margins.slope(tile.cos, static.margin, static.margin_kind)
            d_cos = scale * d_z * jnp.where(tile.hit, slope, 1.0)
            d_unit += blocks.dot("bc,bd->cd", d_cos, x, static.dtype)
            own = blocks.slice_rows(d_x, start, size)
            own += blocks.dot("bc,cd->bd", d_cos, classes.unit, static.dtype)
            return blocks.update_rows(d_x, own, start), d_unit, d_scale

        carry = d_x, jnp.zeros(classes.unit.shape, jnp.float32), d_scale
        d_x, d_unit, d_scale = blocks.over_blocks(x.shape[0], batch_length, over_batch, carry)
        along = jnp.sum(d_unit * classes.unit, axis=1, keepdims=True)
        d_rows = classes.factor * (d_unit - classes.unit * along)
        return d_x, blocks.update_rows(d_table, d_rows, class_start), d_scale

    d_x, d_scale = jnp.zeros(x.shape, jnp.float32), jnp.zeros((), jnp.float32)
    carry = d_x, lax.empty(table.shape, jnp.float32), d_scale  # every row is written
    d_x, d_table, d_scale = blocks.over_blocks(table.shape[0], class_length, over_classes, carry)
    # Each device has the whole batch's gradient through its own classes: add them up and keep
    # this device's rows, first over the axes that split the batch, then over those that do not.
    d_x = lax.psum_scatter(d_x, meshes.BATCH_AXES, scatter_dimension=0, tiled=True)
    if lax.axis_size("tensor") > 1:
        d_x = lax.psum(d_x, "tensor")
    d_scale = lax.psum(d_scale, meshes.ALL_AXES) if learned else None
    return d_x.astype(embeddings.dtype), d_table.astype(table.dtype), d_scale
