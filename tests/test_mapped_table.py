"""The class table that stays in its file, against the one that lies on devices."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mofi_jax.common import errors
from mofi_jax.losses import class_order, entity_topk, mapped_table

DIM = 24
COUNT = 300


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def table_file(folder, dtype=np.float32, rows=None):
    if rows is None:
        rows = np.random.default_rng(0).normal(0.3, 5, (COUNT, DIM))
    path = folder / "entity_table.safetensors"
    # Something before it, so that it does not begin where the data do.
    arrays = {"before": np.zeros(3, np.uint8), "entity_table": rows.astype(dtype)}
    safetensors.numpy.save_file(arrays, path)
    return path, rows.astype(dtype).astype(np.float64)


@pytest.fixture(params=[1, 50, COUNT, 10 * COUNT])
def block(request, monkeypatch):
    """Entities that a thread takes at a time."""
    monkeypatch.setattr(mapped_table, "_BLOCK", request.param * 4 * DIM)
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_nearest_are_those_of_brute_force(tmp_path, block, dtype):
    path, rows = table_file(tmp_path, dtype)
    table = mapped_table.MappedTable.open(path, "entity_table")
    assert table.rows.dtype == dtype
    assert not table.rows.flags.owndata
    queries = unit(np.random.default_rng(1).normal(size=(7, DIM)))
    cosines = queries @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    for k in (1, 10, COUNT):
        ids, found = table.nearest(queries, k)
        assert (ids.dtype, found.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(ids, np.argsort(-cosines, axis=1)[:, :k])
        np.testing.assert_allclose(found, -np.sort(-cosines, axis=1)[:, :k], atol=1e-6)
    expected = np.log(np.exp(20 * cosines).sum(1))
    np.testing.assert_allclose(table.log_sum(queries, 20.0), expected, atol=1e-5)
    ids, found = table.nearest(queries[:0], 3)
    assert ids.shape == found.shape == (0, 3)
    assert table.log_sum(queries[:0], 20.0).shape == (0,)


def test_the_lower_of_equal_entities_comes_first(tmp_path, block):
    rows = np.random.default_rng(0).normal(size=(COUNT, DIM))
    rows[[3, 40, 41, 200]] = rows[299]
    rows[7] = 0
    path, _ = table_file(tmp_path, rows=rows)
    table = mapped_table.MappedTable.open(path, "entity_table")
    for k, expected in ((5, [3, 40, 41, 200, 299]), (3, [3, 40, 41])):
        ids, _ = table.nearest(unit(rows[299:]), k)
        np.testing.assert_array_equal(ids, [expected])
    _, found = table.nearest(unit(rows[:1]), COUNT)
    assert np.isfinite(found).all()
    assert (found == 0).sum() == 1


def test_the_same_as_on_devices(tmp_path, mesh_of):
    path, _ = table_file(tmp_path)
    table = mapped_table.MappedTable.open(path, "entity_table")
    queries = unit(np.random.default_rng(1).normal(size=(8, DIM)))
    padded = np.pad(np.asarray(table), ((0, -COUNT % 8), (0, 0)))
    rows, cosines = jax.jit(entity_topk.entity_topk, static_argnames=("num_entities", "k", "mesh"))(
        queries, padded, num_entities=COUNT, k=10, mesh=mesh_of["8x1x1"]
    )
    ids, found = table.nearest(queries, 10)
    np.testing.assert_array_equal(ids, class_order.table_entities(np.asarray(rows), COUNT))
    np.testing.assert_allclose(found, cosines, atol=1e-6)


def test_to_jax_it_holds_no_arrays(tmp_path):
    table = mapped_table.MappedTable.open(table_file(tmp_path)[0], "entity_table")
    params = {"image": np.ones(3), "entity_table": table}
    assert len(jax.tree.leaves(params)) == 1
    assert jax.jit(lambda p: p["image"].sum())(params) == 3


def test_refusals(tmp_path):
    path, rows = table_file(tmp_path)
    table = mapped_table.MappedTable.open(path, "entity_table")
    for k in (0, COUNT + 1):
        with pytest.raises(errors.BadInput, match=f"k={k} nearest of {COUNT}"):
            table.nearest(np.ones((1, DIM), np.float32), k)
    for bad in (np.nan, np.inf):
        rows[123, 4] = bad
        path, _ = table_file(tmp_path, rows=rows)
        table = mapped_table.MappedTable.open(path, "entity_table")
        with pytest.raises(errors.BadInput, match="not finite"):
            table.nearest(np.ones((1, DIM), np.float32), 3)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:40], whole[:-1], b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(errors.BadInput, match="cannot be read"):
            mapped_table.MappedTable.open(path, "entity_table")
    for array in (np.ones((4, 3), np.int64), np.ones(4), np.ones((0, 3))):
        safetensors.numpy.save_file({"entity_table": array}, path)
        with pytest.raises(errors.BadInput, match="no matrix of floats"):
            mapped_table.MappedTable.open(path, "entity_table")
    with pytest.raises(errors.BadInput, match="cannot be read"):
        mapped_table.MappedTable.open(path, "another")
    with pytest.raises(errors.BadInput, match="cannot be read"):
        mapped_table.MappedTable.open(tmp_path / "absent", "entity_table")
