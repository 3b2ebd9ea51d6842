"""Exact ranks and nearest neighbours among many features, without ever holding all scores.

The index lies sharded over every device of the mesh; queries pass over it in blocks.  A ranking
metric needs no sort: the rank of a relevant row follows from the number of rows that score higher,
so one matrix product per (query block, index block) and a few sums are all there is, and memory
stays at block x block whatever the size of the index.

Scores are dot products in float32 at the highest matmul precision: bf16 products make ties, and
ties make ranks arbitrary.  This file knows nothing of pictures, classes or metrics.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes, sharding

TIES = ("mean", "optimistic", "pessimistic")
NO_ROW = -1  # pads lists of row numbers


@dataclasses.dataclass(frozen=True)
class Index:
    """Features on the mesh; make one with `build_index`.

    Attributes:
      features: float32 [blocks, shards, rows, d], split over all mesh axes on `shards`.  Row i of
        the original array is at i in row-major order of the first three dimensions; what lies
        beyond `size` is padding.
      size: number of real rows.
      mesh: the devices that hold it.
    """

    features: jax.Array
    size: int
    mesh: Mesh

    def __len__(self) -> int:
        return self.size


@dataclasses.dataclass(frozen=True)
class RankCounts:
    """For every query and each of its relevant rows: how many index rows stand above and beside it.

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

    def ranks(self, ties: str = "mean") -> Float[np.ndarray, "q r"]:
        """1-based ranks of the relevant rows, ascending in each line, NaN at the end as padding.

        Args:
          ties: "mean" is 1 + #greater + 0.5 * #other equal.  "optimistic" puts the relevant ones
            among equal scores first, "pessimistic" last: the bounds of what any sort may return.
        """
        real = self.rows != NO_ROW
        if ties == "mean":
            ranks = 1.0 + self.greater + 0.5 * self.equal
        elif ties in TIES:
            # Among equal scores the relevant rows keep some order of their own: count those before.
            order = np.argsort(-self.scores, axis=1, kind="stable")
            sorted_scores = np.take_along_axis(self.scores, order, axis=1)
            same = sorted_scores[:, :, None] == sorted_scores[:, None, :]
            before = np.empty(self.rows.shape, np.int64)
            np.put_along_axis(before, order, np.tril(same, -1).sum(2), axis=1)
            siblings = np.empty(self.rows.shape, np.int64)
            np.put_along_axis(siblings, order, same.sum(2) - 1, axis=1)
            ranks = 1.0 + self.greater + before
            if ties == "pessimistic":
                ranks = ranks + self.equal - siblings
        else:
            raise BadInput(f"Unknown tie policy {ties!r}: choose {', '.join(TIES)}.")
        return np.sort(np.where(real, ranks, np.nan), axis=1)


def build_index(features: Float[np.ndarray, "e d"], *, mesh: Mesh, block_size: int = 4096) -> Index:
    """Spreads features over the devices; every host passes the same array.

    Args:
      features: one row per picture, L2-normalised if the score is to be the cosine.
      mesh: the devices to use.
      block_size: index rows scored at a time, over all devices together.

    Raises:
      BadInput: no rows, or numbers that are not finite.  NaN compares false with everything and
        would otherwise give every relevant row rank 1.
    """
    _check_finite(features, "index")
    size, shards = len(features), mesh.size
    rows = -(-min(block_size, size) // shards)
    blocks = -(-size // (rows * shards))
    padded = np.zeros((blocks * shards * rows, features.shape[1]), np.float32)
    padded[:size] = features
    padded = padded.reshape(blocks, shards, rows, -1)
    sharding = NamedSharding(mesh, PartitionSpec(None, meshes.ALL_AXES))
    return Index(
        features=jax.make_array_from_callback(padded.shape, sharding, lambda at: padded[at]),
        size=size,
        mesh=mesh,
    )


def count_ranks(
    index: Index,
    queries: Float[np.ndarray, "q d"],
    relevant: Int[np.ndarray, "q r"],
    *,
    query_block: int = 256,
) -> RankCounts:
    """Counts, for each query, the index rows above and beside each of its relevant rows.

    Args:
      index: what is searched; a query that is a row of it meets itself there
        (`RankCounts.without` takes it out again).
      queries: features of the queries, same on every host.
      relevant: row numbers, filled up with `NO_ROW`.
      query_block: queries scored at a time; device memory grows with query_block * block_size.

    Returns:
      The counts, on every host.

    Raises:
      BadInput: queries that are not finite.
    """
    _check_finite(queries, "query")
    if len(relevant) and relevant.max() >= index.size:
        raise ValueError(f"relevant row {relevant.max()} of an index of {index.size} rows")
    # All blocks are dispatched before the first result is fetched.
    parts = [
        _rank_counts(index.features, index.size, *block, mesh=index.mesh)
        for block in _query_blocks(index.mesh, query_block, queries, relevant)
    ]
    scores, greater, equal = (
        np.concatenate([np.asarray(a) for a in arrays])[: len(queries)]
        for arrays in zip(*parts, strict=True)
    )
    scores = np.where(relevant == NO_ROW, -np.inf, scores).astype(np.float32)
    return RankCounts(rows=relevant.astype(np.int32), scores=scores, greater=greater, equal=equal)


def top_k(
    index: Index,
    queries: Float[np.ndarray, "q d"],
    k: int,
    *,
    excluded: Int[np.ndarray, " q"] | None = None,
    query_block: int = 256,
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """The k best index rows of each query, best first; equal scores in order of row number.

    Args:
      index: what is searched.
      queries: features of the queries, same on every host.
      k: how many; at most the size of the index (less one with `excluded`).
      excluded: a row number per query that is passed over (the query itself), or `NO_ROW`.
      query_block: queries scored at a time.

    Returns:
      Row numbers int32 [q, k] and scores float32 [q, k], on every host.

    Raises:
      BadInput: queries that are not finite, or k larger than the index.
    """
    _check_finite(queries, "query")
    if not 0 < k <= index.size - (excluded is not None):
        raise BadInput(
            f"{k} nearest neighbours asked of {index.size} rows: choose a smaller number."
        )
    if excluded is None:
        excluded = np.full(len(queries), NO_ROW, np.int32)
    parts = [
        _top_k(index.features, index.size, *block, k=k, mesh=index.mesh)
        for block in _query_blocks(index.mesh, query_block, queries, excluded)
    ]
    rows, scores = (
        np.concatenate([np.asarray(a) for a in arrays])[: len(queries)]
        for arrays in zip(*parts, strict=True)
    )
    return rows, scores


# --------------------------------------------------------------------------------- on the devices


def _scores(queries, block, number, size):
    """Scores float32 [q, shards, rows] of one index block, -inf at padding, and its row numbers."""
    shards, rows, _ = block.shape
    row_numbers = (number * shards * rows + jnp.arange(shards * rows)).reshape(shards, rows)
    scores = jnp.einsum(
        "qd,srd->qsr",
        queries,
        block,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(row_numbers < size, scores, -jnp.inf), row_numbers


@functools.partial(jax.jit, static_argnames="mesh")
def _rank_counts(features, size, queries, relevant, *, mesh):
    """(scores, greater, equal), each [q, r], replicated."""

    def find(carry, scores, is_row):
        own, greater, equal = carry
        found = jnp.where(is_row, scores[:, None], 0.0).sum((2, 3))  # at most one term is not 0
        return own + found, greater, equal

    def count(carry, scores, is_row):
        own, greater, equal = carry
        threshold, scores = own[:, :, None, None], scores[:, None]
        greater += (scores > threshold).sum((2, 3), dtype=jnp.int32)
        # The row itself is told by its number, not by its score.
        equal += ((scores == threshold) & ~is_row).sum((2, 3), dtype=jnp.int32)
        return own, greater, equal

    def visit_block(phase, carry, block, number):
        scores, row_numbers = _scores(queries, block, number, size)
        is_row = row_numbers == relevant[:, :, None, None]
        return jax.lax.cond(phase == 0, find, count, carry, scores, is_row)

    def visit_index(carry, phase):
        def visit(carry, block_and_number):
            return visit_block(phase, carry, *block_and_number), None

        numbers = jnp.arange(features.shape[0])
        return jax.lax.scan(visit, carry, (features, numbers))[0], None

    zeros = jnp.zeros(relevant.shape, jnp.int32)
    start = (jnp.zeros(relevant.shape, jnp.float32), zeros, zeros)
    # Two passes through one and the same matrix product.  The scores of the relevant rows could be
    # had more cheaply, but another product rounds differently in the last bit, and then copies of a
    # picture would no longer tie.
    counts, _ = jax.lax.scan(visit_index, start, jnp.arange(2))
    return jax.lax.with_sharding_constraint(counts, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _top_k(features, size, queries, excluded, *, k, mesh):
    """(row numbers, scores), each [q, k], replicated."""
    blocks, _, rows, _ = features.shape
    local_k = min(k, rows)

    def visit(best, block_and_number):
        scores, row_numbers = _scores(queries, *block_and_number, size)
        scores = jnp.where(row_numbers == excluded[:, None, None], -jnp.inf, scores)
        # First among the rows of each device, then among the winners.  A sort, because XLA splits
        # one along its other dimensions, whereas it gathers all scores for a top_k.
        row_numbers = jnp.broadcast_to(row_numbers, scores.shape)
        scores, found = jax.lax.sort((-scores, row_numbers), dimension=2, num_keys=1)
        scores, found = -scores[:, :, :local_k], found[:, :, :local_k]
        # Both steps prefer the first of equals: earlier blocks, then shards, so lower row numbers.
        scores = jnp.concatenate([best[1], scores.reshape(len(queries), -1)], axis=1)
        found = jnp.concatenate([best[0], found.reshape(len(queries), -1)], axis=1)
        scores, at = jax.lax.top_k(scores, k)
        return (jnp.take_along_axis(found, at, axis=1), scores), None

    nothing = (
        jnp.full((len(queries), k), NO_ROW, jnp.int32),
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
    )
    best, _ = jax.lax.scan(visit, nothing, (features, jnp.arange(blocks)))
    return jax.lax.with_sharding_constraint(best, sharding.replicated(mesh))


# ------------------------------------------------------------------------------------ on the host


def _query_blocks(
    mesh: Mesh, length: int, queries: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Replicated blocks of queries and their row numbers, the last one filled up to equal length.

    One shape means one compiled program.
    """
    length = min(length, len(queries))
    for start in range(0, len(queries), length):
        block = np.zeros((length, *queries.shape[1:]), np.float32)
        block_rows = np.full((length, *rows.shape[1:]), NO_ROW, np.int32)
        count = min(length, len(queries) - start)
        block[:count] = queries[start : start + count]
        block_rows[:count] = rows[start : start + count]
        yield _replicate(mesh, block), _replicate(mesh, block_rows)


def _replicate(mesh: Mesh, array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding.replicated(mesh), lambda at: array[at]
    )


def _check_finite(features: np.ndarray, what: str) -> None:
    if not len(features):
        raise BadInput(f"The {what} features are empty: there is nothing to rank.")
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise BadInput(
            f"The {what} features are not finite (row {bad}): the model has diverged or its "
            "weights are damaged; use an earlier checkpoint."
        )
