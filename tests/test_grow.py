"""A run carried over to a larger vocabulary: rows by QID, moments, new rows, and it trains on."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from mofi_jax import grow, telemetry, train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.distributed import meshes, sharding
from mofi_jax.losses import class_order
from mofi_jax.training import checkpoint
from tests import datasets

TABLE = sharding.ENTITY_TABLE


@pytest.fixture(autouse=True)
def one_device(monkeypatch, mesh_of):
    monkeypatch.setattr(meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])


@pytest.fixture(scope="module")
def data(tmp_path_factory, trained):
    """The old data of seven entities; the new of ten, the old ones among them with other ids."""
    old, new = trained / "data", tmp_path_factory.mktemp("new")
    old_version = old / "i2e" / records.VERSION
    version = datasets.write(new, entities=10)
    # The tokenizer stays that of the old data: a run's words keep their meaning.
    (version / records.TOKENIZER_FILE).write_bytes(
        (old_version / records.TOKENIZER_FILE).read_bytes()
    )
    known = records.read_entities(version / records.ENTITIES_FILE)
    order = [8, 3, 0, 9, 6, 1, 5, 2, 7, 4]
    records.write_entities(
        version / records.ENTITIES_FILE,
        records.Entities(
            qids=[known.qids[i] for i in order],
            names=[known.names[i] for i in order],
            descriptions=[known.descriptions[i] for i in order],
            counts=np.arange(20, 10, -1),
        ),
    )
    return old, new


def by_qid(workdir, leaf, entities):
    """{qid: its part of an array laid out as the class table is}."""
    rows = class_order.table_rows(np.arange(len(entities)), len(entities))
    return dict(zip(entities.qids, np.asarray(leaf)[rows], strict=True))


def saved(workdir):
    """The class table and everything laid out as it is, by the path in the checkpoint."""
    folder = workdir / checkpoint.FOLDER
    [step] = [p for p in folder.iterdir() if p.name.isdigit()]
    import orbax.checkpoint as ocp

    leaves = {}
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore((step / item).absolute())
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            leaves[f"{item}/{sharding.path_name(path)}"] = np.asarray(leaf)
    return leaves


@pytest.mark.parametrize("task", ["multitask", pytest.param("supervised", marks=pytest.mark.slow)])
def test_grows_and_trains_on(data, trained, tmp_path, task):
    old_data, new_data = data
    run = trained / "run"
    if task == "supervised":
        run = tmp_path / "run"
        config = datasets.tiny_config(old_data, f"task={task}", steps=20)
        config.checkpoint.every = "20 steps"
        train.main(config, str(run))
    grow.main(str(run), str(new_data), str(tmp_path / "grown"))
    result = json.loads((tmp_path / "grown" / "result_grow.json").read_text())
    assert (result["kept"], result["added"], result["dropped"]) == (7, 3, 0)
    assert result["new_rows"] == ("text tower" if task == "multitask" else "random")

    old = records.read_entities(run / records.ENTITIES_FILE)
    new = records.read_entities(tmp_path / "grown" / records.ENTITIES_FILE)
    assert len(new) == 10
    before, after = saved(run), saved(tmp_path / "grown")
    assert before.keys() == after.keys()
    moved = [name for name in before if name.endswith(TABLE)]
    assert len(moved) == 4, "table, two moments, last step"
    for name in before:
        if name in moved:
            was = by_qid(run, before[name], old)
            now = by_qid(tmp_path / "grown", after[name], new)
            for qid in old.qids:
                np.testing.assert_array_equal(now[qid], was[qid], err_msg=f"{name} {qid}")
            for qid in set(new.qids) - set(old.qids):
                if "mu" in name or "nu" in name:
                    np.testing.assert_array_equal(now[qid], 0)
                elif "last_step" in name:
                    assert now[qid] == 20
                else:
                    length = np.median([np.linalg.norm(row) for row in was.values()])
                    assert np.linalg.norm(now[qid]) == pytest.approx(length, rel=1e-4)
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)

    # The same command on the new data goes on from step 20.
    config = datasets.tiny_config(new_data, f"task={task}", steps=22)
    train.main(config, str(tmp_path / "grown"))
    lines = telemetry.read_metrics(tmp_path / "grown")
    assert [line["step"] for line in lines] == [21, 22]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert json.loads((tmp_path / "grown" / "result.json").read_text())["entities"] == 10


def test_new_rows_are_what_the_text_tower_says(data, trained, tmp_path):
    from mofi_jax import inference

    _, new_data = data
    grow.main(str(trained / "run"), str(new_data), str(tmp_path / "grown"))
    model = inference.load(tmp_path / "grown", mesh=meshes.make_mesh())
    fresh = [i for i, qid in enumerate(model.towers.entities.qids) if qid in ("Q007", "Q008")]
    words = [model.towers.entities.text(i, with_description=True) for i in fresh]
    ids, cosines = model.towers.nearest_entities(model.params, model.embed_texts(words), 1)
    assert ids[:, 0].tolist() == fresh
    np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-5)


def test_runs_of_versions_without_blocks_shuffled_single_records(data, tmp_path):
    config = datasets.tiny_config(data[0])
    del config.data["block"]
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    assert grow.read_config(epath.Path(tmp_path)).data.block == 1


def test_refusals(data, tmp_path):
    old_data, new_data = data
    train.main(datasets.tiny_config(new_data, steps=1), str(tmp_path / "run"))
    with pytest.raises(BadInput, match=r"3 of 10 entities of .* \(Q007, Q008, Q009\).*drop"):
        grow.main(str(tmp_path / "run"), str(old_data), str(tmp_path / "grown"))
    assert not (tmp_path / "grown").exists()
    with pytest.raises(BadInput, match="--missing=keep: choose refuse or drop"):
        grow.main(str(tmp_path / "run"), str(old_data), str(tmp_path / "grown"), missing="keep")
    grow.main(str(tmp_path / "run"), str(old_data), str(tmp_path / "less"), missing="drop")
    result = json.loads((tmp_path / "less" / "result_grow.json").read_text())
    assert (result["kept"], result["dropped"]) == (7, 3)
    with pytest.raises(BadInput, match="is not empty"):
        grow.main(str(tmp_path / "run"), str(new_data), str(tmp_path / "run"))
    with pytest.raises(BadInput, match="is no training run"):
        grow.main(str(tmp_path / "nothing"), str(new_data), str(tmp_path / "grown"))
    with pytest.raises(BadInput, match="--model=s3://bucket/run is a remote path"):
        grow.main("s3://bucket/run", str(new_data), str(tmp_path / "grown"))
    before = (tmp_path / "less" / "result_grow.json").stat().st_mtime_ns
    grow.main(str(tmp_path / "run"), str(old_data), str(tmp_path / "less"), missing="drop")
    assert (tmp_path / "less" / "result_grow.json").stat().st_mtime_ns == before


def test_a_kill_leaves_nothing_to_train_in(data, trained, tmp_path, monkeypatch):
    """Until everything is written there is no folder; the same command then starts over."""
    _, new_data = data
    shutil.copytree(trained / "run", tmp_path / "run")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            grow.main(str(tmp_path / "run"), str(new_data), str(tmp_path / "grown"))
    assert not (tmp_path / "grown").exists()
    grow.main(str(tmp_path / "run"), str(new_data), str(tmp_path / "grown"))
    assert (tmp_path / "grown" / "result_grow.json").exists()
    assert not (tmp_path / "grown.partial").exists()

    description = json.loads((tmp_path / "run" / "model.json").read_text())
    del description["table_order"]
    (tmp_path / "run" / "model.json").write_text(json.dumps(description))
    with pytest.raises(BadInput, match="its class table has another order"):
        grow.main(str(tmp_path / "run"), str(new_data), str(tmp_path / "again"))


def test_another_tokenizer_or_no_entities(data, trained, tmp_path):
    old_data, _ = data
    other = tmp_path / "other"
    datasets.write(other, entities=9)
    with pytest.raises(BadInput, match="is not the tokenizer of"):
        grow.main(str(trained / "run"), str(other), str(tmp_path / "grown"))
    train.main(datasets.tiny_config(old_data, "task=contrastive", steps=1), str(tmp_path / "clip"))
    with pytest.raises(BadInput, match="no vocabulary to grow"):
        grow.main(str(tmp_path / "clip"), str(other), str(tmp_path / "grown"))
