"""Sampled softmax: a step's positives and a few random classes in place of all (Partial FC).

Every device draws from its own rows of the class table: first the classes that are labels of the
global batch, then others uniformly without replacement, up to a fixed number of places.  The rows
drawn at random stand for those that were not, by a correction of their logits (log-Q,
arXiv 1412.2007), so that the sum of exponentials is right on average.  At a rate of 1 every row is
drawn and the loss is the exact one.

`draw` chooses, `take_rows` fetches the rows, `entity.entity_softmax(..., sample=...)` is the loss
over them, `put_rows` writes rows back.  No row ever leaves its device, and rows that were not drawn
are neither read nor written.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key, Shaped

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.losses import blocks, entity


def places(table_rows: int, rate: float, mesh: Mesh) -> int:
    """Rows that each device draws, a multiple of 8; raises BadInput for a rate outside (0, 1]."""
    if not 0 < rate <= 1:
        raise BadInput(f"config.losses.entity.sample_rate={rate} must be above 0 and at most 1.")
    share = table_rows // mesh.size
    return min(share, -(-math.ceil(rate * share) // 8) * 8)


def draw(
    key: Key[Array, ""],
    label_ids: Int[Array, "b k"],
    *,
    table_rows: int,
    num_entities: int,
    rate: float,
    mesh: Mesh,
) -> entity.Sample:
    """Chooses the classes of one step.

    Args:
      key: typed key of the step, the same on all devices.  What is drawn depends on it, on the
        labels and on the number of devices.
      label_ids: as for `entity.entity_softmax`.
      table_rows: rows of the table, padded to the mesh; `num_entities` of them are real.
      rate: share of the rows to draw, in (0, 1].

    Returns:
      `places` rows a device.  Where a device's positives are more than its places, a random part
      of them is drawn and the others are counted in `overflow`: their labels take no part in this
      step.

    Raises BadInput: a rate outside (0, 1], or a table that does not fit vocabulary and mesh.
    """
    share, count = table_rows // mesh.size, places(table_rows, rate, mesh)
    entity.check_table(table_rows, num_entities, mesh)

    def shard(key, ids):
        device = lax.axis_index(meshes.ALL_AXES)
        ids = blocks.gather_batch(ids)
        sample = _draw_share(key, ids, device, share, count, table_rows, num_entities)
        return sample._replace(overflow=lax.psum(sample.overflow, meshes.ALL_AXES))

    specs = entity.Sample(blocks.CLASSES, blocks.CLASSES, P())
    return blocks.shard_map(shard, mesh, (P(), blocks.BATCH), specs)(key, label_ids)


def _draw_share(key, ids, device, share, count, table_rows, num_entities) -> entity.Sample:
    """`count` of a device's `share` rows."""
    key, first, own = jax.random.fold_in(key, device), device * share, jnp.arange(share)
    real = first + own < num_entities
    ids = jnp.where(ids < first, share, ids - first)
    positive = jnp.zeros(share, bool).at[ids.reshape(-1)].set(True, mode="drop") & real
    # Positives above everything, padding below; a random order within each.
    score = jax.random.uniform(key, (share,)) + 2.0 * positive - 2.0 * ~real
    score, chosen = lax.top_k(score, count)
    drawn = score >= 0
    # Empty places point beyond the table, each to a row of its own, so that indices stay unique.
    rows = jnp.where(drawn, first + chosen, table_rows + own[:count])
    drawn_positive = positive[chosen] & drawn
    rows, drawn_positive = lax.sort((rows.astype(jnp.int32), drawn_positive), num_keys=1)

    positives, drawn_positives = jnp.sum(positive), jnp.sum(drawn_positive)
    others = jnp.sum(real) - positives
    drawn_others = jnp.sum(drawn) - drawn_positives
    # A positive is there for certain; another row with probability drawn_others / others.
    log_q = jnp.log(jnp.maximum(others, 1) / jnp.maximum(drawn_others, 1))
    return entity.Sample(
        rows=rows,
        log_q=jnp.where(drawn_positive, 0.0, log_q).astype(jnp.float32),
        overflow=(positives - drawn_positives).astype(jnp.float32),
    )


def take_rows(
    array: Shaped[Array, "e ..."], rows: Int[Array, " s"], mesh: Mesh
) -> Shaped[Array, "s ..."]:
    """The drawn rows of the class table, or of anything laid out as it is; empty places are 0."""

    def shard(array, rows):
        local = rows - lax.axis_index(meshes.ALL_AXES) * array.shape[0]
        return array.at[local].get(
            mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
        )

    specs = (blocks.CLASSES, blocks.CLASSES)
    return blocks.shard_map(shard, mesh, specs, blocks.CLASSES)(array, rows)


def put_rows(
    array: Shaped[Array, "e ..."],
    rows: Int[Array, " s"],
    values: Shaped[Array, "s ..."],
    mesh: Mesh,
) -> Shaped[Array, "e ..."]:
    """The array with its drawn rows replaced, in place where the array is donated."""

    def shard(array, rows, values):
        local = rows - lax.axis_index(meshes.ALL_AXES) * array.shape[0]
        return array.at[local].set(
            values, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    specs = (blocks.CLASSES, blocks.CLASSES, blocks.CLASSES)
    return blocks.shard_map(shard, mesh, specs, blocks.CLASSES)(array, rows, values)
