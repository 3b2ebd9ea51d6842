"""Ranks and neighbours against a full sort, on one device and eight, with ties and padding."""

import re

import jax
import numpy as np
import pytest
from scipy import stats

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators import neighbours

# 203 rows divide neither by the block sizes nor by eight devices.
ROWS, QUERIES, DIM = 203, 37, 6
LAYOUTS = [("1x1x1", 4096, 256), ("1x1x1", 50, 16), ("1x8x1", 4096, 256), ("2x2x2", 64, 10)]


def unit(rng: np.random.Generator, rows: int, dim: int = 32) -> np.ndarray:
    features = rng.normal(size=(rows, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def tied():
    """Small integers: every score is exact and most are shared by several rows."""
    rng = np.random.default_rng(0)
    features = rng.integers(-2, 3, (ROWS, DIM)).astype(np.float32)
    # Between one and five relevant rows a query, itself among them.
    relevant = np.full((QUERIES, 5), neighbours.NO_ROW, np.int32)
    for query in range(QUERIES):
        others = rng.choice(np.delete(np.arange(ROWS), query), rng.integers(0, 5), replace=False)
        relevant[query, : len(others) + 1] = rng.permutation([query, *others])
    return features, relevant


def reference_ranks(scores, relevant, ties):
    """By sorting all scores of every query."""
    ranks = np.full(relevant.shape, np.nan)
    for query, rows in enumerate(relevant):
        rows = rows[rows != neighbours.NO_ROW]
        if ties == "mean":
            found = stats.rankdata(-scores[query], method="average")[rows]
        else:
            is_relevant = np.isin(np.arange(scores.shape[1]), rows)
            last = is_relevant if ties == "pessimistic" else ~is_relevant
            order = np.lexsort((last, -scores[query]))
            found = np.flatnonzero(is_relevant[order]) + 1
        ranks[query, : len(rows)] = np.sort(found)
    return ranks


@pytest.mark.parametrize(("mesh", "block_size", "query_block"), LAYOUTS)
def test_ranks_equal_a_full_sort(mesh_of, tied, mesh, block_size, query_block):
    features, relevant = tied
    index = neighbours.build_index(features, mesh=mesh_of[mesh], block_size=block_size)
    counts = neighbours.count_ranks(index, features[:QUERIES], relevant, query_block=query_block)
    scores = features[:QUERIES] @ features.T
    for ties in neighbours.TIES:
        np.testing.assert_array_equal(counts.ranks(ties), reference_ranks(scores, relevant, ties))


def test_without_equals_an_index_that_lacks_the_row(mesh_of, tied):
    features, relevant = tied
    queries = np.arange(QUERIES)
    index = neighbours.build_index(features, mesh=mesh_of["1x8x1"])
    counts = neighbours.count_ranks(index, features[:QUERIES], relevant).without(queries)
    scores = features[:QUERIES] @ features.T
    scores[queries, queries] = -np.inf
    others = np.where(relevant == queries[:, None], neighbours.NO_ROW, relevant)
    for ties in neighbours.TIES:
        np.testing.assert_array_equal(counts.ranks(ties), reference_ranks(scores, others, ties))
    with pytest.raises(ValueError, match="not among the relevant rows"):
        neighbours.count_ranks(index, features[:QUERIES], relevant).without(queries + 100)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_copies_of_a_row_tie_exactly(mesh_of, mesh):
    """Also where products round: the score of a row and of its copy come from one computation."""
    once = unit(np.random.default_rng(1), 300, 96)
    features = np.concatenate([once, once, once[:7]])
    relevant = np.stack([np.arange(150), np.arange(150) + 300], 1).astype(np.int32)
    index = neighbours.build_index(features, mesh=mesh_of[mesh], block_size=256)
    counts = neighbours.count_ranks(index, features[150:300], relevant)
    np.testing.assert_array_equal(counts.equal, np.where(relevant % 300 < 7, 2, 1))
    # One comes directly after the other, and neither counts as above the other.
    np.testing.assert_array_equal(counts.greater[:, 0], counts.greater[:, 1])


def test_ranks_do_not_depend_on_devices_or_blocks(mesh_of):
    features = unit(np.random.default_rng(2), ROWS)
    relevant = np.random.default_rng(3).integers(0, ROWS, (ROWS, 3)).astype(np.int32)
    results = [
        neighbours.count_ranks(
            neighbours.build_index(features, mesh=mesh_of[mesh], block_size=block_size),
            features,
            relevant,
            query_block=query_block,
        ).ranks()
        for mesh, block_size, query_block in LAYOUTS
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize(("mesh", "block_size", "query_block"), LAYOUTS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_k_equals_a_stable_sort(mesh_of, tied, mesh, block_size, query_block, k):
    features, _ = tied
    index = neighbours.build_index(features, mesh=mesh_of[mesh], block_size=block_size)
    excluded = np.arange(QUERIES, dtype=np.int32)
    excluded[::5] = neighbours.NO_ROW
    rows, scores = neighbours.top_k(
        index, features[:QUERIES], k, excluded=excluded, query_block=query_block
    )
    expected = features[:QUERIES] @ features.T
    out = np.flatnonzero(excluded != neighbours.NO_ROW)
    expected[out, excluded[out]] = -np.inf
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, order, 1))


def test_no_device_receives_the_index_or_the_scores(mesh_of):
    features = unit(np.random.default_rng(4), 4096)
    index = neighbours.build_index(features, mesh=mesh_of["1x8x1"], block_size=4096)
    assert index.features.addressable_shards[0].data.size == features.size // 8
    queries, rows = features[:64], np.zeros((64, 3), np.int32)
    programs = {
        "ranks": (neighbours._rank_counts, (queries, rows), {}),
        "top_k": (neighbours._top_k, (queries, rows[:, 0]), {"k": 5}),
    }
    for name, (function, arguments, options) in programs.items():
        arguments = [neighbours._replicate(index.mesh, a) for a in arguments]
        lowered = function.lower(index.features, 4096, *arguments, mesh=index.mesh, **options)
        moved = re.findall(
            r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)", lowered.compile().as_text()
        )
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved]
        # Counts and winners only: some per device and query, against 64 x 4,096 scores.
        assert sizes, name
        assert max(sizes) <= 64 * 8 * 8, (name, sizes)


def test_refuses_what_would_give_a_wrong_number(mesh_of):
    features = unit(np.random.default_rng(5), 10)
    broken = features.copy()
    broken[3, 1] = np.nan
    index = neighbours.build_index(features, mesh=mesh_of["1x1x1"])
    relevant = np.zeros((10, 1), np.int32)
    with pytest.raises(BadInput, match=r"index features are not finite \(row 3\)"):
        neighbours.build_index(broken, mesh=mesh_of["1x1x1"])
    with pytest.raises(BadInput, match="query features are not finite"):
        neighbours.count_ranks(index, broken, relevant)
    with pytest.raises(BadInput, match="empty"):
        neighbours.build_index(features[:0], mesh=mesh_of["1x1x1"])
    with pytest.raises(BadInput, match="10 nearest neighbours asked of 10 rows"):
        neighbours.top_k(index, features, 10, excluded=np.arange(10, dtype=np.int32))
    with pytest.raises(BadInput, match="Unknown tie policy"):
        neighbours.count_ranks(index, features, relevant).ranks("median")
    with pytest.raises(ValueError, match="relevant row 10 of an index of 10"):
        neighbours.count_ranks(index, features, relevant + 10)


def test_scores_are_float32_whatever_the_default_precision(mesh_of):
    features = unit(np.random.default_rng(6), 64)
    index = neighbours.build_index(features, mesh=mesh_of["1x1x1"])
    with jax.default_matmul_precision("bfloat16"):
        _, scores = neighbours.top_k(index, features, 3)
    exact = np.sort(features.astype(np.float64) @ features.T.astype(np.float64), axis=1)[:, ::-1]
    np.testing.assert_allclose(scores, exact[:, :3], atol=1e-6)
