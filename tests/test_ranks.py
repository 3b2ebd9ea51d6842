"""Ranks against a full sort, on one device and eight, with ties and padding."""

import re

import jax
import numpy as np
import pytest
from scipy import stats

from mofi_jax.evaluators import ranks

# 203 rows divide neither by the block sizes nor by eight devices.
ROWS, DIM = 203, 6
LAYOUTS = [("1x1x1", 4096, 256), ("1x1x1", 50, 16), ("1x8x1", 4096, 256), ("2x2x2", 64, 10)]


def unit(rng: np.random.Generator, rows: int, dim: int = 32) -> np.ndarray:
    features = rng.normal(size=(rows, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def draw_relevant(rng, rows, most):
    """Between one and `most` relevant rows for each row, itself among them."""
    relevant = np.full((rows, most), ranks.NO_ROW, np.int32)
    for row in range(rows):
        others = rng.choice(np.delete(np.arange(rows), row), rng.integers(0, most), replace=False)
        relevant[row, : len(others) + 1] = rng.permutation([row, *others])
    return relevant


@pytest.fixture(scope="module")
def tied():
    """Small integers: every score is exact and most are shared by several rows."""
    rng = np.random.default_rng(0)
    return rng.integers(-2, 3, (ROWS, DIM)).astype(np.float32), draw_relevant(rng, ROWS, 5)


def reference_ranks(scores, relevant):
    """By sorting all scores of every query."""
    expected = np.full(relevant.shape, np.nan)
    for query, rows in enumerate(relevant):
        rows = rows[rows != ranks.NO_ROW]
        found = stats.rankdata(-scores[query], method="average")[rows]
        expected[query, : len(rows)] = np.sort(found)
    return expected


@pytest.mark.parametrize(("mesh", "block_size", "query_block"), LAYOUTS)
def test_ranks_equal_a_full_sort(mesh_of, tied, mesh, block_size, query_block):
    features, relevant = tied
    among_all, among_others = ranks.relevant_ranks(
        features, relevant, mesh=mesh_of[mesh], block_size=block_size, query_block=query_block
    )
    scores = features @ features.T
    np.testing.assert_array_equal(among_all, reference_ranks(scores, relevant))
    np.fill_diagonal(scores, -np.inf)
    others = np.where(relevant == np.arange(ROWS)[:, None], ranks.NO_ROW, relevant)
    np.testing.assert_array_equal(among_others, reference_ranks(scores, others))


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_copies_of_a_row_tie_exactly(mesh_of, mesh):
    """Also where products round: the score of a row and of its copy come from one computation."""
    once = unit(np.random.default_rng(1), 300, 96)
    features = np.concatenate([once, once])
    rows = np.arange(600)
    relevant = np.stack([rows, (rows + 300) % 600], 1).astype(np.int32)
    among_all, among_others = ranks.relevant_ranks(
        features, relevant, mesh=mesh_of[mesh], block_size=256
    )
    np.testing.assert_array_equal(among_all, 1.5)
    np.testing.assert_array_equal(among_others[:, 0], 1)


def test_ranks_do_not_depend_on_devices_or_blocks(mesh_of):
    rng = np.random.default_rng(2)
    features, relevant = unit(rng, ROWS), draw_relevant(rng, ROWS, 3)
    first, *others = (
        ranks.relevant_ranks(
            features, relevant, mesh=mesh_of[mesh], block_size=block_size, query_block=query_block
        )
        for mesh, block_size, query_block in LAYOUTS
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_no_device_receives_the_features_or_the_scores(mesh_of, monkeypatch):
    """The compiled program exchanges counts alone."""
    features = unit(np.random.default_rng(4), 4096)
    programs = []

    def compiled(index, *arguments, mesh):
        assert index.addressable_shards[0].data.size == features.size // 8
        if not programs:
            programs.append(run.lower(index, *arguments, mesh=mesh).compile().as_text())
        return [np.zeros((64, 3))] * 3

    run = ranks._rank_counts
    monkeypatch.setattr(ranks, "_rank_counts", compiled)
    relevant = draw_relevant(np.random.default_rng(4), 4096, 3)
    ranks.relevant_ranks(features, relevant, mesh=mesh_of["1x8x1"], query_block=64)
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)", programs[0])
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved]
    # Some numbers per device and query, against 64 x 4,096 scores.
    assert sizes
    assert max(sizes) <= 64 * 8 * 8, sizes


def test_relevant_rows_that_cannot_be(mesh_of):
    features, rows = unit(np.random.default_rng(5), 10), np.arange(10, dtype=np.int32)
    with pytest.raises(ValueError, match="relevant row 10 of an index of 10"):
        ranks.relevant_ranks(features, rows[:, None] + 1, mesh=mesh_of["1x1x1"])
    with pytest.raises(ValueError, match="not among its own relevant rows"):
        ranks.relevant_ranks(features, rows[::-1, None], mesh=mesh_of["1x1x1"])


def test_ranks_are_exact_whatever_the_default_precision(mesh_of):
    rng = np.random.default_rng(6)
    features, relevant = unit(rng, 64), draw_relevant(rng, 64, 4)
    with jax.default_matmul_precision("bfloat16"):
        among_all, _ = ranks.relevant_ranks(features, relevant, mesh=mesh_of["1x1x1"])
    exact = features.astype(np.float64) @ features.T.astype(np.float64)
    np.testing.assert_array_equal(among_all, reference_ranks(exact, relevant))
