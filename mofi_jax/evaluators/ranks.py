"""Exact ranks among many features, without ever holding all scores.

The features lie sharded over every device of the mesh; as queries they pass over it in blocks.  A
ranking metric needs no sort: the rank of a relevant row follows from the number of rows that score
higher, so one matrix product per (query block, index block) and a few sums are all there is, and
memory stays at block x block whatever the number of features.

Scores are dot products in float32 at the highest matmul precision: bf16 products make ties, and
ties make ranks arbitrary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from mofi_jax.distributed import meshes, sharding

NO_ROW = -1  # pads lists of row numbers


def relevant_ranks(
    features: Float[np.ndarray, "n d"],
    relevant: Int[np.ndarray, "n r"],
    *,
    mesh: Mesh,
    block_size: int = 4096,
    query_block: int = 256,
) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "n r"]]:
    """Ranks of the relevant rows when every row queries all rows.

    Args:
      features: finite and the same on every host; L2-normalised if the score is to be the cosine.
      relevant: for each row the numbers of its relevant rows, itself among them, filled up with
        `NO_ROW`.
      block_size: rows scored at a time, over all devices together.
      query_block: queries scored at a time; device memory grows with query_block * block_size.

    Returns:
      1-based ranks, ascending in each line, NaN at the end as padding, on every host: among all
      rows, and among all but the query itself.  Equal scores share their mean rank.
    """
    size = len(features)
    if relevant.max() >= size:
        raise ValueError(f"relevant row {relevant.max()} of an index of {size} rows")
    itself = relevant == np.arange(size)[:, None]
    if not np.all(itself.sum(1) == 1):
        raise ValueError("a row is not among its own relevant rows")
    features = features.astype(np.float32)
    rows = -(-min(block_size, size) // mesh.size)
    blocks = -(-size // (rows * mesh.size))
    # Row i is at i in row-major order of the first three dimensions; padding follows.
    index = np.pad(features, ((0, blocks * mesh.size * rows - size), (0, 0)))
    index = index.reshape(blocks, mesh.size, rows, -1)
    split = NamedSharding(mesh, PartitionSpec(None, meshes.ALL_AXES))
    index = jax.make_array_from_callback(index.shape, split, index.__getitem__)

    # Blocks of one shape, the last one padded, make one compiled program.
    query_block = min(query_block, size)
    padding = ((0, -size % query_block), (0, 0))
    queries = np.pad(features, padding)
    wanted = np.pad(relevant.astype(np.int32), padding, constant_values=NO_ROW)
    parts = []
    for start in range(0, len(queries), query_block):
        block = slice(start, start + query_block)
        # Arrays without a name are replicated.
        block = sharding.put(mesh, (queries[block], wanted[block]))
        # Not fetched before all blocks are dispatched.
        parts.append(_rank_counts(index, size, *block, mesh=mesh))
    scores, greater, equal = (
        np.concatenate([np.asarray(a) for a in arrays])[:size]
        for arrays in zip(*parts, strict=True)
    )
    ranks = np.where(relevant == NO_ROW, np.nan, 1.0 + greater + 0.5 * equal)
    own = scores[itself][:, None]  # the query's score with itself
    others = np.where(itself, np.nan, ranks - (own > scores) - 0.5 * (own == scores))
    return np.sort(ranks, axis=1), np.sort(others, axis=1)


@functools.partial(jax.jit, static_argnames="mesh")
def _rank_counts(index, size, queries, relevant, *, mesh):
    """(scores, greater, equal), each [q, r], replicated; `index` is [blocks, shards, rows, d]."""
    blocks, shards, rows, _ = index.shape

    def visit(carry, turn):
        own, greater, equal = carry
        block = turn % blocks
        row_numbers = (block * shards * rows + jnp.arange(shards * rows)).reshape(shards, rows)
        scores = jnp.einsum(
            "qd,srd->qsr",
            queries,
            jax.lax.dynamic_index_in_dim(index, block, keepdims=False),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(row_numbers < size, scores, -jnp.inf)[:, None]
        is_row = row_numbers == relevant[:, :, None, None]

        def find():
            found = jnp.where(is_row, scores, 0.0).sum((2, 3))  # at most one term is not 0
            return own + found, greater, equal

        def count():
            threshold = own[:, :, None, None]
            higher = (scores > threshold).sum((2, 3), dtype=jnp.int32)
            # The row itself is known by its number, not by its score.
            ties = ((scores == threshold) & ~is_row).sum((2, 3), dtype=jnp.int32)
            return own, greater + higher, equal + ties

        return jax.lax.cond(turn < blocks, find, count), None

    zeros = jnp.zeros(relevant.shape, jnp.int32)
    # Two passes through one and the same matrix product.  The scores of the relevant rows could be
    # had more cheaply, but another product rounds differently in the last bit, and then copies of a
    # picture would no longer tie.
    start = (zeros.astype(jnp.float32), zeros, zeros)
    counts, _ = jax.lax.scan(visit, start, jnp.arange(2 * blocks))
    return jax.lax.with_sharding_constraint(counts, sharding.replicated(mesh))
