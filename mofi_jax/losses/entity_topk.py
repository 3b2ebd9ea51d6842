"""The classes closest to an embedding, over a class table sharded on all devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.losses import blocks, entity


def entity_topk(
    embeddings: Float[Array, "b d"],
    table: Float[Array, "e d"],
    *,
    num_entities: int,
    k: int,
    mesh: Mesh,
    block_size: int = 8192,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The k classes closest to each embedding, without gathering a b x e matrix.

    Every device keeps the best k of its own classes, block by block; only those are exchanged.

    Args:
      embeddings: L2-normalised, batch over `meshes.BATCH_AXES`.
      table: raw class rows, over `meshes.ALL_AXES`; rows from num_entities on are padding.
      block_size: classes per block; bounds the memory at b x block_size cosines.

    Returns:
      Rows of the table int32 (`class_order.table_entities` gives their entities) and their cosines
      fp32 (without scale or margin), best first; of equal cosines the lower row comes first.

    Raises BadInput: as `entity.entity_softmax`, or k exceeds num_entities.
    """
    entity.check_table(table.shape[0], num_entities, mesh)
    blocks.check_batch(embeddings.shape[0], mesh)
    if not 0 < k <= num_entities:
        raise BadInput(f"k={k} nearest of {num_entities} entities: choose 1 to {num_entities}.")

    def shard(embeddings, table):
        x = blocks.gather_batch(embeddings.astype(jnp.float32))
        first = lax.axis_index(meshes.ALL_AXES) * table.shape[0]

        def body(carry, start, size):
            unit, _ = entity.unit_rows(blocks.slice_rows(table, start, size))
            columns = (first + start + jnp.arange(size)).astype(jnp.int32)
            cos = blocks.dot("bd,cd->bc", x, unit)
            cos = jnp.where(columns < num_entities, cos, blocks.MASKED)
            # Earlier blocks come first and top_k prefers the first of equals: the lower row.
            cos, pick = lax.top_k(jnp.concatenate([carry[0], cos], axis=1), k)
            rows = jnp.broadcast_to(columns, (x.shape[0], size))
            rows = jnp.concatenate([carry[1], rows], axis=1)
            return cos, jnp.take_along_axis(rows, pick, axis=1)

        carry = (
            jnp.full((x.shape[0], k), blocks.MASKED, jnp.float32),
            jnp.full((x.shape[0], k), num_entities, jnp.int32),
        )
        best = blocks.over_blocks(table.shape[0], block_size, body, carry)
        # Each device receives every device's best, for its own rows only.
        best = lax.all_to_all(best, meshes.BATCH_AXES, split_axis=0, concat_axis=1, tiled=True)
        cos, rows = lax.all_gather(best, "tensor", axis=1, tiled=True)
        cos, rows = lax.sort((-cos, rows), dimension=1, num_keys=2)
        return rows[:, :k], -cos[:, :k]

    run = blocks.shard_map(shard, mesh, (blocks.BATCH, blocks.CLASSES), blocks.BATCH)
    return run(embeddings, table)


def entity_log_sum(
    embeddings: Float[Array, "b d"],
    table: Float[Array, "e d"],
    scale: float | Float[Array, ""],
    *,
    num_entities: int,
    mesh: Mesh,
    block_size: int = 8192,
) -> Float[Array, " b"]:
    """log sum exp(scale * cosine) over all classes, the softmax's denominator without a margin.

    Args and memory as of `entity_topk`; scale > 0.
    """
    entity.check_table(table.shape[0], num_entities, mesh)
    blocks.check_batch(embeddings.shape[0], mesh)

    def shard(embeddings, table, scale):
        x = blocks.gather_batch(embeddings.astype(jnp.float32))
        first = lax.axis_index(meshes.ALL_AXES) * table.shape[0]

        def body(carry, start, size):
            unit, _ = entity.unit_rows(blocks.slice_rows(table, start, size))
            columns = first + start + jnp.arange(size)
            logits = scale * blocks.dot("bd,cd->bc", x, unit)
            logits = jnp.where(columns < num_entities, logits, blocks.MASKED)
            return jnp.logaddexp(carry, jax.nn.logsumexp(logits, axis=1))

        carry = jnp.full(x.shape[0], blocks.MASKED, jnp.float32)
        sums = blocks.over_blocks(table.shape[0], block_size, body, carry)
        sums = jax.nn.logsumexp(lax.all_gather(sums, meshes.ALL_AXES), axis=0)
        own = lax.axis_index(meshes.BATCH_AXES) * embeddings.shape[0]
        return lax.dynamic_slice_in_dim(sums, own, embeddings.shape[0])

    specs = (blocks.BATCH, blocks.CLASSES, P())
    scale = jnp.asarray(scale, jnp.float32)
    return blocks.shard_map(shard, mesh, specs, blocks.BATCH)(embeddings, table, scale)
