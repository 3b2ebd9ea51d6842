"""Ranks against a full sort, on one device and eight, with ties and padding."""

import re

import jax
import numpy as np
import pytest
from scipy import stats

from mofi_jax.evaluators import ranks

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
    relevant = np.full((QUERIES, 5), ranks.NO_ROW, np.int32)
    for query in range(QUERIES):
        others = rng.choice(np.delete(np.arange(ROWS), query), rng.integers(0, 5), replace=False)
        relevant[query, : len(others) + 1] = rng.permutation([query, *others])
    return features, relevant


def reference_ranks(scores, relevant):
    """By sorting all scores of every query."""
    expected = np.full(relevant.shape, np.nan)
    for query, rows in enumerate(relevant):
        rows = rows[rows != ranks.NO_ROW]
        found = stats.rankdata(-scores[query], method="average")[rows]
        expected[query, : len(rows)] = np.sort(found)
    return expected


def count(mesh, features, queries, relevant, block_size=4096, query_block=256):
    return ranks.count_ranks(
        features, queries, relevant, mesh=mesh, block_size=block_size, query_block=query_block
    )


@pytest.mark.parametrize(("mesh", "block_size", "query_block"), LAYOUTS)
def test_ranks_equal_a_full_sort(mesh_of, tied, mesh, block_size, query_block):
    features, relevant = tied
    queries = features[:QUERIES]
    counts = count(mesh_of[mesh], features, queries, relevant, block_size, query_block)
    expected = reference_ranks(queries @ features.T, relevant)
    np.testing.assert_array_equal(counts.ranks(), expected)


def test_without_equals_an_index_that_lacks_the_row(mesh_of, tied):
    features, relevant = tied
    queries = np.arange(QUERIES)
    counts = count(mesh_of["1x8x1"], features, features[:QUERIES], relevant)
    scores = features[:QUERIES] @ features.T
    scores[queries, queries] = -np.inf
    others = np.where(relevant == queries[:, None], ranks.NO_ROW, relevant)
    expected = reference_ranks(scores, others)
    np.testing.assert_array_equal(counts.without(queries).ranks(), expected)
    with pytest.raises(ValueError, match="not among the relevant rows"):
        counts.without(queries + 100)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_copies_of_a_row_tie_exactly(mesh_of, mesh):
    """Also where products round: the score of a row and of its copy come from one computation."""
    once = unit(np.random.default_rng(1), 300, 96)
    features = np.concatenate([once, once, once[:7]])
    relevant = np.stack([np.arange(150), np.arange(150) + 300], 1).astype(np.int32)
    counts = count(mesh_of[mesh], features, features[150:300], relevant, block_size=256)
    np.testing.assert_array_equal(counts.equal, np.where(relevant % 300 < 7, 2, 1))
    # One comes directly after the other, and neither counts as above the other.
    np.testing.assert_array_equal(counts.greater[:, 0], counts.greater[:, 1])


def test_ranks_do_not_depend_on_devices_or_blocks(mesh_of):
    features = unit(np.random.default_rng(2), ROWS)
    relevant = np.random.default_rng(3).integers(0, ROWS, (ROWS, 3)).astype(np.int32)
    first, *others = (
        count(mesh_of[mesh], features, features, relevant, *sizes).ranks()
        for mesh, *sizes in LAYOUTS
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_no_device_receives_the_index_or_the_scores(mesh_of, monkeypatch):
    """The compiled program exchanges counts alone."""
    features = unit(np.random.default_rng(4), 4096)
    programs = []

    def compiled(index, *arguments, mesh):
        assert index.addressable_shards[0].data.size == features.size // 8
        programs.append(run.lower(index, *arguments, mesh=mesh).compile().as_text())
        return run(index, *arguments, mesh=mesh)

    run = ranks._rank_counts
    monkeypatch.setattr(ranks, "_rank_counts", compiled)
    count(mesh_of["1x8x1"], features, features[:64], np.zeros((64, 3), np.int32))
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)", programs[0])
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved]
    # Some numbers per device and query, against 64 x 4,096 scores.
    assert sizes
    assert max(sizes) <= 64 * 8 * 8, sizes


def test_a_relevant_row_that_is_not_there(mesh_of):
    features = unit(np.random.default_rng(5), 10)
    with pytest.raises(ValueError, match="relevant row 10 of an index of 10"):
        count(mesh_of["1x1x1"], features, features, np.full((10, 1), 10, np.int32))


def test_scores_are_float32_whatever_the_default_precision(mesh_of):
    features = unit(np.random.default_rng(6), 64)
    relevant = np.arange(64, dtype=np.int32)[:, None] ^ 1
    with jax.default_matmul_precision("bfloat16"):
        scores = count(mesh_of["1x1x1"], features, features, relevant).scores[:, 0]
    exact = features.astype(np.float64) @ features.T.astype(np.float64)
    np.testing.assert_allclose(scores, exact[np.arange(64), relevant[:, 0]], atol=1e-6)
