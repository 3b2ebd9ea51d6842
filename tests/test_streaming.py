"""Files of weights are written and read a block at a time, in bounded memory."""

import tracemalloc

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import numpy as safetensors_numpy

from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.distributed import meshes, stored
from mofi_jax.interop import clip_weights, huggingface
from mofi_jax.interop.folder import weights
from mofi_jax.losses import class_order
from mofi_jax.model import mofi

CONFIG = mofi.MofiConfig(
    image_size=32,
    patch_size=8,
    image=mofi.TowerConfig(128, 4, 2),
    text=mofi.TowerConfig(128, 4, 2),
    vocab_size=2_000,
    context_length=16,
    eos_id=1_999,
    embed_dim=64,
)


def peak(function):
    """Bytes allocated at a time by a function, beyond those before; numpy's count."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_any_array_is_written_as_the_library_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK", 64)
    rng = np.random.default_rng(0)
    plain = {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "transposed": rng.normal(size=(5, 30)).astype(np.float32).T,
        "half": rng.normal(size=(7, 2, 3)).astype(np.float16),
        "vector ü": rng.normal(size=33).astype(np.float32),
    }
    rows = rng.normal(size=(41, 3)).astype(np.float32)
    order = rng.permutation(41)
    arrays = plain | {
        "parts": weights.Rows((41, 3), iter([rows[:20], rows[20:]])),
        "scattered": weights.Scattered(
            (41, 3), lambda: ((order[i : i + 6], rows[order[i : i + 6]]) for i in range(0, 41, 6))
        ),
        "last": np.arange(3),
    }
    weights.save(tmp_path / "x.safetensors", arrays)
    found = safetensors_numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in (plain | {"parts": rows, "scattered": rows, "last": np.arange(3)}).items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], np.asarray(array, np.float32), name)
    again = weights.read_rows(tmp_path / "x.safetensors", "parts")
    numbers, read = (np.concatenate(x) for x in zip(*again.blocks(), strict=True))
    np.testing.assert_array_equal(numbers, np.arange(41))
    np.testing.assert_array_equal(read, rows)


def test_towers_are_written_without_a_copy_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK", 1 << 16)
    shapes = jax.eval_shape(lambda key: mofi.create(CONFIG, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    path = tmp_path / "model.safetensors"
    used = peak(lambda: weights.save(path, clip_weights.to_state_dict(CONFIG, params)))
    assert used < size / 10
    assert path.stat().st_size > size


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A class table of 5,001 entities in a checkpoint, padded and split over all devices."""
    item = epath.Path(tmp_path_factory.mktemp("item")) / "params"
    mesh = meshes.make_mesh()
    rows = class_order.padded_rows(5_001, mesh)
    table = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    tree = {
        "image": {"scale": np.ones(3, np.float32)},
        "entity_table": jax.device_put(table, NamedSharding(mesh, PartitionSpec(mesh.axis_names))),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, tree)
    return item, table


@pytest.mark.parametrize("block", [1, 700, 100_000])
def test_class_table_of_a_checkpoint_by_rows(table, tmp_path, monkeypatch, block):
    item, whole = table
    monkeypatch.setattr(stored, "_BLOCK", block)
    read = stored.read_item(item, ("entity_table",))
    np.testing.assert_array_equal(read["image"]["scale"], np.ones(3))
    np.testing.assert_array_equal(stored.read_item(item)["entity_table"], whole)
    columns = [[f"{kind}{i:05d}" for i in range(5_001)] for kind in ("Q", "name ", "")]
    entities = records.Entities(*columns, np.zeros(5_001, np.int64))
    rows = huggingface.by_entity(read["entity_table"], (5_001, 64))
    clip = huggingface.Clip(CONFIG, {"entity_table": rows}, None, entities, "decode")
    huggingface.write_entities(epath.Path(tmp_path), clip)
    found = safetensors_numpy.load_file(tmp_path / huggingface.ENTITY_TABLE_FILE)["entity_table"]
    expected = whole[class_order.table_rows(np.arange(5_001), 5_001)]
    np.testing.assert_array_equal(found, expected)
    # And again from that file, whose table stays there.
    params = {}
    huggingface.read_entities(epath.Path(tmp_path), CONFIG, params)
    (tmp_path / "again").mkdir()
    again = huggingface.Clip(CONFIG, params, None, entities, "decode")
    huggingface.write_entities(epath.Path(tmp_path) / "again", again)
    file = huggingface.ENTITY_TABLE_FILE
    assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_values_that_are_not_finite_are_told_while_they_are_written(tmp_path):
    rows = np.ones((9, 4), np.float32)
    rows[7, 2] = np.nan
    scattered = huggingface.by_entity([(0, rows[:5]), (5, rows[5:])], (9, 4))
    with pytest.raises(BadInput, match="class table holds values that are not finite"):
        weights.save(tmp_path / "x.safetensors", {"entity_table": scattered})


def test_a_damaged_table_is_told(tmp_path):
    rows = stored.Rows(epath.Path(tmp_path) / "nowhere", "entity_table", (5_001, 64))
    with pytest.raises(BadInput, match="nowhere cannot be read"):
        list(rows)
