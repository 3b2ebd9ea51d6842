"""Ranks and nearest rows against NumPy, on one device and eight, with ties, padding, left out."""

import re

import jax
import numpy as np
import pytest
from scipy import stats

from mofi_jax.evaluators.features import neighbours
from mofi_jax.evaluators.features.embedding import Features

# 203 rows divide neither by eight devices nor by the blocks of queries.
ROWS, DIM = 203, 6
LAYOUTS = [("1x1x1", 256), ("1x1x1", 16), ("1x8x1", 256), ("2x2x2", 10)]


@pytest.fixture
def layout(request, mesh_of, monkeypatch):
    mesh, queries = request.param
    monkeypatch.setattr(neighbours, "_QUERIES", queries)
    return mesh_of[mesh]


def unit(rng: np.random.Generator, rows: int, dim: int = 32) -> np.ndarray:
    features = rng.normal(size=(rows, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def draw_rows(rng, lines, most):
    """Up to `most` different rows in each line, filled up."""
    rows = np.full((lines, most), neighbours.NO_ROW, np.int32)
    for line in rows:
        number = rng.integers(0, most + 1)
        line[:number] = rng.choice(ROWS, number, replace=False)
    return rng.permuted(rows, axis=1)


@pytest.fixture(scope="module")
def tied():
    """Small integers: every score is exact and most are shared by several rows."""
    rng = np.random.default_rng(0)
    features = rng.integers(-2, 3, (ROWS, DIM)).astype(np.float32)
    return features, draw_rows(rng, ROWS, 5), draw_rows(rng, ROWS, 3)


def reference_scores(queries, features, left_out):
    scores = queries @ features.T
    for line, rows in zip(scores, left_out, strict=True):
        line[rows[rows != neighbours.NO_ROW]] = -np.inf
    return scores


def reference_ranks(scores, relevant):
    """By sorting all scores of every query."""
    expected = np.full(relevant.shape, np.nan)
    for query, rows in enumerate(relevant):
        ranks = stats.rankdata(-scores[query], method="average")[rows]
        expected[query] = np.where((rows < 0) | np.isinf(scores[query, rows]), np.nan, ranks)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_equals_a_full_sort(layout, tied):
    features, relevant, left_out = tied
    index = Features.of(features, layout)
    nothing = np.zeros((ROWS, 0), np.int32)
    for queries in (features, index):
        found = neighbours.ranks(queries, index, relevant)
        expected = reference_ranks(reference_scores(features, features, nothing), relevant)
        np.testing.assert_array_equal(found, expected)
    scores = reference_scores(features, features, left_out)
    found = neighbours.ranks(index, index, relevant, leave_out=left_out)
    np.testing.assert_array_equal(found, reference_ranks(scores, relevant))
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 30, ROWS - 3):
        numbers, best = neighbours.top_k(index, index, k, leave_out=left_out)
        expected = np.take_along_axis(scores, order[:, :k], axis=1)
        np.testing.assert_array_equal(best, expected)
        np.testing.assert_array_equal(numbers, order[:, :k])


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_fewer_rows_than_asked_for(mesh_of, mesh):
    index = Features.of(np.eye(3, dtype=np.float32), mesh_of[mesh])
    left_out = np.array([[1, 0], [neighbours.NO_ROW, 2]])
    numbers, scores = neighbours.top_k(np.eye(3)[:2], index, 5, leave_out=left_out)
    none = neighbours.NO_ROW
    np.testing.assert_array_equal(numbers, [[2, none, none, none, none], [1, 0, none, none, none]])
    np.testing.assert_array_equal(scores[1], [1, 0, -np.inf, -np.inf, -np.inf])
    assert neighbours.ranks(np.zeros((0, 3)), index, np.zeros((0, 2), np.int32)).shape == (0, 2)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1"])
def test_copies_of_a_row_tie_exactly(mesh_of, mesh):
    """Also where products round: the score of a row and of its copy come from one computation."""
    once = unit(np.random.default_rng(1), 300, 96)
    index = Features.of(np.concatenate([once, once]), mesh_of[mesh])
    rows = np.arange(600)
    relevant = np.stack([rows, (rows + 300) % 600], 1)
    np.testing.assert_array_equal(neighbours.ranks(index, index, relevant), 1.5)
    alone = neighbours.ranks(index, index, relevant, leave_out=rows[:, None])
    np.testing.assert_array_equal(alone, np.stack([np.full(600, np.nan), np.ones(600)], 1))


def test_nothing_depends_on_devices_or_blocks(mesh_of, monkeypatch):
    rng = np.random.default_rng(2)
    features, relevant = unit(rng, ROWS), draw_rows(rng, ROWS, 3)
    found = []
    for mesh, queries in LAYOUTS:
        monkeypatch.setattr(neighbours, "_QUERIES", queries)
        index = Features.of(features, mesh_of[mesh])
        ranks = neighbours.ranks(index, index, relevant)
        found.append((ranks, neighbours.top_k(index, index, 7)[0]))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_no_device_receives_the_features_or_the_scores(mesh_of):
    """The compiled programs exchange counts and the best alone."""
    rows = Features.of(unit(np.random.default_rng(4), 4096), mesh_of["1x8x1"]).rows
    assert rows.addressable_shards[0].data.size == rows.size // 8
    lists = np.zeros((64, 3), np.int32)
    given = rows, np.int32(4096), np.zeros((64, 32), np.float32)
    for lowered in (
        neighbours._counts.lower(*given, lists, lists, mesh=mesh_of["1x8x1"]),
        neighbours._best.lower(*given, lists, k=3, mesh=mesh_of["1x8x1"]),
    ):
        program = lowered.compile().as_text()
        moved = re.findall(r"= \(?\w+\[([\d,]*)\].* (?:all-|collective-)", program)
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in moved]
        # Some numbers per device and query, against 64 x 4,096 scores.
        assert sizes
        assert max(sizes) <= 64 * 8 * 8, sizes


def test_rows_that_cannot_be(mesh_of):
    index, rows = Features.of(np.eye(10), mesh_of["1x1x1"]), np.arange(10)[:, None]
    with pytest.raises(ValueError, match="row 10 of an index of 10"):
        neighbours.ranks(index, index, rows + 1)
    with pytest.raises(ValueError, match="9 lists of rows for 10 queries"):
        neighbours.top_k(index, index, 1, leave_out=rows[1:])
    with pytest.raises(ValueError, match="rows 0 to 10 of 10"):
        index.take([0, 10])


def test_ranks_are_exact_whatever_the_default_precision(mesh_of):
    rng = np.random.default_rng(6)
    features, relevant = unit(rng, ROWS), draw_rows(rng, ROWS, 4)
    index = Features.of(features, mesh_of["1x1x1"])
    with jax.default_matmul_precision("bfloat16"):
        found = neighbours.ranks(index, index, relevant)
    exact = features.astype(np.float64) @ features.T.astype(np.float64)
    np.testing.assert_array_equal(found, reference_ranks(exact, relevant))


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
@pytest.mark.parametrize("rows", [1, 9, 203])
def test_features_are_gathered_as_asked(mesh_of, mesh, rows):
    array = unit(np.random.default_rng(7), rows)
    features = Features.of(array, mesh_of[mesh])
    assert len(features) == rows
    np.testing.assert_array_equal(features.numpy(), array)
    numbers = np.random.default_rng(8).integers(0, rows, 70)
    np.testing.assert_array_equal(features.take(numbers), array[numbers])
    assert features.take([]).shape == (0, 32)
