"""Nearest rows and exact ranks among many features, without ever holding all scores.

The index lies split over every device of the mesh; queries pass over it in blocks.  A device scores
a block against its rows and keeps the best k, or counts the rows above each relevant one: a rank
follows from the number of rows that score higher, so it needs no sort.  Only these few numbers are
exchanged, and memory does not grow with the index: scores of a block take 64 MB on a device.

Scores are dot products in float32 at the highest matmul precision: bf16 products make ties, and
ties make ranks arbitrary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Float64, Int, Int32

from mofi_jax.distributed import meshes, sharding
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.losses import blocks

NO_ROW = -1  # pads lists of row numbers

_SCORES = 2**24  # held by a device at a time
_QUERIES = 256  # at most: more scores do not fit the caches of a CPU
_LANES = 64  # counters of one rank at least


def top_k(
    queries: Features | Float[np.ndarray, "q d"],
    index: Features,
    k: int,
    *,
    leave_out: Int[np.ndarray, "q m"] | None = None,
) -> tuple[Int32[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Numbers and scores of the k rows of `index` nearest to each query, on every host.

    Args:
      queries: finite; an array is the same on every host.
      leave_out: rows that a query may not find (itself, junk), filled up with `NO_ROW`.

    Returns:
      Best first, of equal scores the lower row first; `NO_ROW` and -inf where there are fewer.
    """
    run = functools.partial(_best, k=k, mesh=index.mesh)
    found = _in_blocks(run, queries, index, _rows(leave_out, queries, index))
    # Fewer than k columns if the index has fewer rows.
    missing = ((0, 0), (0, k - found[0].shape[1]))
    numbers = np.pad(found[0], missing, constant_values=NO_ROW)
    return numbers, np.pad(found[1], missing, constant_values=-np.inf)


def ranks(
    queries: Features | Float[np.ndarray, "q d"],
    index: Features,
    relevant: Int[np.ndarray, "q r"],
    *,
    leave_out: Int[np.ndarray, "q m"] | None = None,
) -> Float64[np.ndarray, "q r"]:
    """Ranks of the relevant rows among all rows of `index`, on every host.

    Args:
      queries: finite; an array is the same on every host.
      relevant: rows of the index, filled up with `NO_ROW`.
      leave_out: rows that count nowhere for a query (itself, junk), filled up with `NO_ROW`.

    Returns:
      1-based, in the order of `relevant`; equal scores share their mean rank.  NaN for `NO_ROW` and
      for relevant rows that are left out.

    Raises ValueError: a row beyond the index.
    """
    run = functools.partial(_counts, mesh=index.mesh)
    rows = _rows(relevant, queries, index), _rows(leave_out, queries, index)
    [above] = _in_blocks(run, queries, index, *rows)
    return np.where(above > 0, (1 + above) / 2, np.nan)


def _rows(numbers: np.ndarray | None, queries: Any, index: Features) -> np.ndarray:
    if numbers is None:
        return np.zeros((len(queries), 0), np.int32)
    if len(numbers) != len(queries):
        raise ValueError(f"{len(numbers)} lists of rows for {len(queries)} queries")
    if numbers.max(initial=NO_ROW) >= len(index):
        raise ValueError(f"row {numbers.max()} of an index of {len(index)} rows")
    return numbers.astype(np.int32)


def _in_blocks(
    run: Callable[..., Any], queries: Any, index: Features, *lists: np.ndarray
) -> list[np.ndarray]:
    """Results of run(index rows, size, queries, *lists) for all queries, in blocks of one size."""
    held = max(index.rows.shape[0] // index.mesh.size, 1)  # rows on a device
    wide = max(held, *(_LANES * numbers.shape[1] for numbers in lists))
    block = max(1, min(_QUERIES, _SCORES // wide, len(queries)))
    results = []
    # One block even without any query, so that its result has the right shape.
    for start in range(0, max(len(queries), 1), block):
        rows = np.arange(start, start + block)
        parts = [_padded(numbers[start : start + block], block, NO_ROW) for numbers in lists]
        if isinstance(queries, Features):
            part = queries.on_all(rows)
        else:
            part = np.asarray(queries[start : start + block], np.float32)
            part = sharding.put(index.mesh, _padded(part, block, 0))
        parts = sharding.put(index.mesh, parts)
        results.append(run(index.rows, len(index), part, *parts))
        # Fetched one block late: the next one is under way, and no more than that.
        if len(results) > 1:
            results[-2] = jax.tree.map(np.asarray, results[-2])
    return [np.concatenate(parts)[: len(queries)] for parts in zip(*results, strict=True)]


def _padded(part: np.ndarray, rows: int, value: int) -> np.ndarray:
    padding = ((0, rows - len(part)), (0, 0))
    return np.pad(part, padding, constant_values=value)


def _scores(rows: jax.Array, first: Any, size: Any, queries: Any, left_out: Any) -> jax.Array:
    """Scores [q, n] of a device's rows; -inf for padding and for what is left out."""
    scores = blocks.dot("qd,nd->qn", queries, rows)
    if size < len(rows) * lax.axis_size(meshes.ALL_AXES):  # a pass over all scores, seldom needed
        scores = jnp.where(first + jnp.arange(len(rows)) < size, scores, -jnp.inf)
    if left_out.shape[1]:
        local = left_out - first
        local = jnp.where(local < 0, len(rows), local)  # beyond the end: dropped
        lines = jnp.arange(len(queries))[:, None]
        scores = scores.at[lines, local].set(-jnp.inf, mode="drop")
    # Computed once: another product would round differently in the last bit, and then copies of a
    # picture would no longer tie.
    return lax.optimization_barrier(scores)


@functools.partial(jax.jit, static_argnames=("size", "k", "mesh"))
def _best(rows, size, queries, left_out, *, k: int, mesh: Mesh):
    """(numbers, scores), each [q, min(k, padded index)], replicated."""

    def shard(rows, queries, left_out):
        first = lax.axis_index(meshes.ALL_AXES) * len(rows)
        best, columns = lax.top_k(_scores(rows, first, size, queries, left_out), min(k, len(rows)))
        best, numbers = lax.all_gather((best, first + columns), meshes.ALL_AXES, axis=1, tiled=True)
        # Lower rows come first and top_k prefers the first of equals.
        best, picked = lax.top_k(best, min(k, best.shape[1]))
        numbers = jnp.take_along_axis(numbers, picked, axis=1)
        return jnp.where(best > -jnp.inf, numbers, NO_ROW), best

    return blocks.shard_map(shard, mesh, (P(meshes.ALL_AXES), P(), P()), P())(
        rows, queries, left_out
    )


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _counts(rows, size, queries, relevant, left_out, *, mesh: Mesh):
    """Twice the rows that score higher, and once those that score the same, [q, r], replicated.

    A relevant row is among the latter, so that 0 stands for one that takes no part.
    """

    def shard(rows, queries, relevant, left_out):
        first = lax.axis_index(meshes.ALL_AXES) * len(rows)
        scores = _scores(rows, first, size, queries, left_out)
        local = relevant - first
        here = (local >= 0) & (local < len(rows))
        own = jnp.take_along_axis(scores, jnp.clip(local, 0, len(rows) - 1), axis=1)
        own = lax.psum(jnp.where(here, own, 0.0), meshes.ALL_AXES)
        above = lax.psum(_above(scores, own), meshes.ALL_AXES)
        return (jnp.where((relevant >= 0) & (own > -jnp.inf), above, 0),)

    return blocks.shard_map(shard, mesh, (P(meshes.ALL_AXES), P(), P(), P()), P())(
        rows, queries, relevant, left_out
    )


def _above(scores: jax.Array, own: jax.Array) -> jax.Array:
    """How many of the scores [q, n] exceed each of [q, r], twice, and how many equal it, once."""

    def compared(part):
        part, threshold = part[:, None], own[:, :, None]
        return (part > threshold).astype(jnp.int32) + (part >= threshold)

    # A sum over lines, as written, takes the CPU several times as long as their product: here lanes
    # count side by side and are summed once.
    lanes = min(max(_LANES, 2**18 // max(own.size, 1)), scores.shape[1])
    whole = scores.shape[1] // lanes

    def visit(i, counts):
        return counts + compared(lax.dynamic_slice_in_dim(scores, i * lanes, lanes, axis=1))

    counts = lax.fori_loop(0, whole, visit, jnp.zeros((*own.shape, lanes), jnp.int32))
    return counts.sum(2) + compared(scores[:, whole * lanes :]).sum(2)
