"""Exact ranks among many features, without ever holding all scores.

The index lies sharded over every device of the mesh; queries pass over it in blocks.  A ranking
metric needs no sort: the rank of a relevant row follows from the number of rows that score higher,
so one matrix product per (query block, index block) and a few sums are all there is, and memory
stays at block x block whatever the size of the index.

Scores are dot products in float32 at the highest matmul precision: bf16 products make ties, and
ties make ranks arbitrary.  This file knows nothing of pictures, classes or metrics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from mofi_jax.distributed import meshes, sharding

NO_ROW = -1  # pads lists of row numbers


@dataclasses.dataclass(frozen=True)
class RankCounts:
    """For every query and each of its relevant rows: how many index rows score higher or the same.

    Attributes:
      rows: int32 [q, r], the relevant row numbers, `NO_ROW` where a query has fewer than r.
      scores: float32 [q, r], their scores; -inf at padding.
      greater: int32 [q, r], rows of the index with a higher score.
      equal: int32 [q, r], other rows of the index with the same score.
    """

    rows: np.ndarray
    scores: np.ndarray
    greater: np.ndarray
    equal: np.ndarray

    def without(self, excluded: Int[np.ndarray, " q"]) -> "RankCounts":
        """The counts that an index without row `excluded[i]` would give query i.

        Each excluded row must be among the query's relevant rows (as a query is in its own class),
        which is why no second pass over the index is needed.
        """
        drop = self.rows == excluded[:, None]
        if not np.array_equal(drop.sum(1), np.ones(len(drop))):
            raise ValueError("an excluded row is not among the relevant rows of its query")
        score = np.where(drop, self.scores, 0.0).sum(1, dtype=np.float32)[:, None]
        return RankCounts(
            rows=np.where(drop, NO_ROW, self.rows),
            scores=np.where(drop, -np.inf, self.scores),
            greater=self.greater - (score > self.scores),
            equal=self.equal - (score == self.scores),
        )

    def ranks(self) -> Float[np.ndarray, "q r"]:
        """1-based ranks of the relevant rows, ascending in each line, NaN at the end as padding.

        Equal scores share their mean rank, 1 + #greater + 0.5 * #other equal.
        """
        ranks = 1.0 + self.greater + 0.5 * self.equal
        return np.sort(np.where(self.rows == NO_ROW, np.nan, ranks), axis=1)


def count_ranks(
    features: Float[np.ndarray, "e d"],
    queries: Float[np.ndarray, "q d"],
    relevant: Int[np.ndarray, "q r"],
    *,
    mesh: Mesh,
    block_size: int = 4096,
    query_block: int = 256,
) -> RankCounts:
    """Counts, for each query, the index rows above and beside each of its relevant rows.

    Args:
      features: the index, finite and the same on every host; L2-normalised if the score is to be
        the cosine.
      queries: finite and the same on every host; a query that is a row of the index meets itself
        there (`RankCounts.without` takes it out again).
      relevant: row numbers, filled up with `NO_ROW`.
      mesh: the devices to use.
      block_size: index rows scored at a time, over all devices together.
      query_block: queries scored at a time; device memory grows with query_block * block_size.

    Returns:
      The counts, on every host.
    """
    if len(relevant) and relevant.max() >= len(features):
        raise ValueError(f"relevant row {relevant.max()} of an index of {len(features)} rows")
    size, count = len(features), len(queries)
    rows = -(-min(block_size, size) // mesh.size)
    blocks = -(-size // (rows * mesh.size))
    # Row i is at i in row-major order of the first three dimensions; padding follows.
    index = np.pad(features.astype(np.float32), ((0, blocks * mesh.size * rows - size), (0, 0)))
    index = index.reshape(blocks, mesh.size, rows, -1)
    split = NamedSharding(mesh, PartitionSpec(None, meshes.ALL_AXES))
    index = jax.make_array_from_callback(index.shape, split, index.__getitem__)

    # Blocks of one shape, the last one padded, make one compiled program.
    query_block = min(query_block, count)
    padding = ((0, -count % query_block), (0, 0))
    queries = np.pad(queries.astype(np.float32), padding)
    relevant = np.pad(relevant.astype(np.int32), padding, constant_values=NO_ROW)
    parts = []
    for start in range(0, len(queries), query_block):
        block = slice(start, start + query_block)
        # Arrays without a name are replicated.
        block = sharding.put(mesh, (queries[block], relevant[block]))
        # Not fetched before all blocks are dispatched.
        parts.append(_rank_counts(index, size, *block, mesh=mesh))
    scores, greater, equal = (
        np.concatenate([np.asarray(a) for a in arrays])[:count]
        for arrays in zip(*parts, strict=True)
    )
    relevant = relevant[:count]
    scores = np.where(relevant == NO_ROW, -np.inf, scores).astype(np.float32)
    return RankCounts(rows=relevant, scores=scores, greater=greater, equal=equal)


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
            above = (scores > threshold).sum((2, 3), dtype=jnp.int32)
            # The row itself is known by its number, not by its score.
            beside = ((scores == threshold) & ~is_row).sum((2, 3), dtype=jnp.int32)
            return own, greater + above, equal + beside

        return jax.lax.cond(turn < blocks, find, count), None

    zeros = jnp.zeros(relevant.shape, jnp.int32)
    # Two passes through one and the same matrix product.  The scores of the relevant rows could be
    # had more cheaply, but another product rounds differently in the last bit, and then copies of a
    # picture would no longer tie.
    start = (zeros.astype(jnp.float32), zeros, zeros)
    counts, _ = jax.lax.scan(visit, start, jnp.arange(2 * blocks))
    return jax.lax.with_sharding_constraint(counts, sharding.replicated(mesh))
