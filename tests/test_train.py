"""Training as a whole: it learns, evaluates, and does not depend on the device count."""

import json

import jax
import numpy as np
import pytest

from mofi_jax import inference, telemetry, train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.distributed import meshes
from mofi_jax.training import checkpoint
from tests import datasets


def losses(workdir):
    return [line["loss"] for line in telemetry.read_metrics(workdir) if "loss" in line]


@pytest.fixture(autouse=True)
def one_device(monkeypatch, mesh_of):
    """Eight simulated devices on few cores are slow: only the tests about devices ask for them."""
    monkeypatch.setattr(train.meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.write(folder, name="i2e")
    datasets.write(folder, name="i2t")
    return folder


@pytest.mark.parametrize("task", ["supervised", "contrastive", "multitask"])
def test_one_step_of_every_task(data, tmp_path, task, caplog):
    config = datasets.tiny_config(data, f"task={task}", steps=1)
    with caplog.at_level("INFO"):
        train.main(config, str(tmp_path))
    assert "GiB of state on the only device" in caplog.text
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 1
    assert result["examples"] == config.batch_size
    [line] = telemetry.read_metrics(tmp_path)
    parts = {f"loss_{name}" for name in config.losses}
    assert parts <= line.keys()
    weighted = sum(config.losses[n].weight * line[f"loss_{n}"] for n in config.losses)
    assert line["loss"] == pytest.approx(weighted, rel=1e-6)
    params = checkpoint.restore_params(tmp_path)
    assert ("entity_table" in params) == (task != "contrastive")
    assert ("text" in params) == (task != "supervised")
    towers = inference.load(tmp_path, mesh=meshes.make_mesh()).towers
    assert (towers.tokenizer is None) == (task == "supervised")
    assert (towers.entities is None) == (task == "contrastive")


def learning_config(data, arg, steps):
    """Wide enough to learn within seconds, without augmentation."""
    config = datasets.tiny_config(data, arg, steps=steps)
    config.optimizer.learning_rate = 2e-3
    config.model.image.width = config.model.text.width = 32
    config.data.train_ops = "decode|resize_short(16)|flip"
    config.checkpoint.every = "0 steps"
    return config


def test_contrastive_learns_from_unlabelled_pairs(data, tmp_path):
    train.main(learning_config(data, "task=contrastive,data=i2t", 100), str(tmp_path))
    assert checkpoint.saved_steps(tmp_path) == [100]  # the end is saved also where nothing else is
    curve = losses(tmp_path)
    assert np.mean(curve[-10:]) < 0.6 * np.mean(curve[:10])


def test_multitask_learns_the_entities(data, tmp_path):
    train.main(learning_config(data, "task=multitask", 100), str(tmp_path))
    accuracy = [line["entity_accuracy"] for line in telemetry.read_metrics(tmp_path)]
    assert np.mean(accuracy[-10:]) > 0.7 > 0.5 > np.mean(accuracy[:5])


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"replica": 1, "fsdp": 8}, marks=pytest.mark.slow),
        {"replica": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_eight_devices_follow_the_curve_of_one(data, tmp_path, mesh, monkeypatch, caplog):
    """20 steps in fp32 within 1e-5 relative, also with parameters that do not divide evenly."""
    config = datasets.tiny_config(data, steps=20)
    config.checkpoint.every = "20 steps"
    train.main(config, str(tmp_path / "one"))
    monkeypatch.undo()
    config.mesh.update(mesh)
    monkeypatch.setattr(train.accelerators, "memory_of", lambda _: 1000)
    train.main(config, str(tmp_path / "eight"))
    [warned] = [r for r in caplog.records if "of state on each of 8 devices" in r.getMessage()]
    assert warned.levelname == "WARNING"
    eight, one = losses(tmp_path / "eight"), losses(tmp_path / "one")
    assert len(one) == 20
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_profile_of_chosen_steps(data, tmp_path):
    config = datasets.tiny_config(data, steps=6)
    with pytest.raises(BadInput, match="--profile=7:8 ends after the run's 6 steps"):
        train.main(config, str(tmp_path), "7:8")
    assert not list(tmp_path.iterdir())
    train.main(config, str(tmp_path), "2:4")
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"train" in traces[0].read_bytes()
    # Writing it takes longer than the steps, and is none.
    split = json.loads((tmp_path / "result.json").read_text())["goodput"]
    assert split["profile"] > 0.1


def test_a_log_file_says_how_far_the_run_is(data, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    config = datasets.tiny_config(data, steps=6)
    config.optimizer.warmup = "6 steps"
    train.main(config, str(tmp_path))
    assert any("never reaches its peak" in r.getMessage() for r in caplog.records)
    lines = [r.getMessage() for r in caplog.records]
    for what in ("devices: 1 x CPU with ", "data: ", "model: ", "run: 6 steps of ", "evaluators: "):
        assert any(line.startswith(what) for line in lines), what
    [estimate] = [line for line in lines if line.startswith("the first step took ")]
    assert estimate.endswith(" s to the end")
    told = [line for line in lines if line.startswith("step ")]
    assert told[-1].startswith("step 6/6 (100.0 %)  ")
    assert "loss " in told[-1]
    assert "img/s  data wait " in told[-1]
    assert any(r.getMessage().startswith("goodput ") for r in caplog.records)


def test_evaluates_in_the_loop(data, tmp_path, caplog):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for entity in range(4):
        for i in range(2):
            rgb = datasets.drawing(entity, 100 + i)
            (pictures / f"{entity}_{i}.jpg").write_bytes(ops.encode_jpeg(rgb, 95))
    config = datasets.tiny_config(data, "task=contrastive", steps=4)
    (tmp_path / "classes").write_text('{"class": 0, "label": "thing", "id": "Q0"}')
    mine = {"kind": "retrieval", "images": str(pictures), "every": "2 steps"}
    config.evaluators = {
        "mine": mine,
        "never": mine | {"every": "0 steps"},
        "entity": mine | {"kind": "classification", "classes": str(tmp_path / "classes")},
    }
    with caplog.at_level("INFO"):
        train.main(config, str(tmp_path / "run"))
    assert "config.evaluators.never is left out: its `every` is 0" in caplog.text
    assert "config.evaluators.entity is left out: the model has no entities" in caplog.text
    scored = [line for line in telemetry.read_metrics(tmp_path / "run") if "mine/map" in line]
    assert [line["step"] for line in scored] == [0, 2, 4]
    assert all(0 < line["mine/map"] <= 1 for line in scored)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["mine/map"] == scored[-1]["mine/map"]
    assert {key.partition("/")[0] for key in result["scores"]} == {"mine"}


def test_entity_loss_needs_labels(data, tmp_path):
    config = datasets.tiny_config(data, "task=supervised,data=i2t")
    with pytest.raises(BadInput, match="has no entities"):
        train.main(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_labels_beyond_the_vocabulary(tmp_path):
    version = datasets.write(tmp_path / "data")
    entities = records.read_entities(version / records.ENTITIES_FILE)
    short = records.Entities(
        entities.qids[:3], entities.names[:3], entities.descriptions[:3], entities.counts[:3]
    )
    records.write_entities(version / records.ENTITIES_FILE, short)
    config = datasets.tiny_config(tmp_path / "data", steps=3)
    with pytest.raises(BadInput, match="beyond the vocabulary of 3 entities"):
        train.main(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "data.train_ops",
            "decode|resize_short(0)",
            "config.data.train_ops=.*fails \\(",
        ),
        ("data.eval_ops", "decode|resize_short(20)", "the model takes .16, 16, 3."),
        ("data.threads", 0, "config.data.threads must be"),
        ("checkpoint.keep_best", "mine/map", "keep_best=mine/map names no evaluator that"),
        ("log_every", "often", "config.log_every='often' is not a duration"),
        ("total", "0.0 steps", "trains for no step at all"),
    ],
)
def test_bad_values_are_told_before_anything_is_written(data, tmp_path, key, value, sentence):
    config = datasets.tiny_config(data, steps=2)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(BadInput, match=sentence):
        train.main(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    config = datasets.tiny_config(data, "task=contrastive", steps=30)
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 1e30
    config.optimizer.warmup = "0 steps"
    config.checkpoint.every = "1 steps"
    with pytest.raises(BadInput, match=r"The loss is (nan|inf) at step .* names the 16 examples"):
        train.main(config, str(tmp_path))
    lines = (tmp_path / telemetry.NAN_FILE).read_text().splitlines()
    assert len({line.split("\t")[1] for line in lines}) == config.batch_size == len(lines)
    params = checkpoint.restore_params(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_average_is_what_is_evaluated_and_read(data, tmp_path):
    """Against numpy, over parameters saved at every step; with a decay that has to grow."""
    config = datasets.tiny_config(data, "task=supervised", steps=4)
    config.checkpoint.update({"every": "1 steps", "keep": 4})
    config.ema.decay = 0.2
    train.main(config, str(tmp_path))

    def at(step, item):
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(tmp_path / checkpoint.FOLDER / str(step) / item)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]

    average = at(1, "ema")
    for step in (2, 3, 4):
        decay = min(0.2, step / (9 + step))
        params = at(step, "params")
        average = [decay * a + (1 - decay) * p for a, p in zip(average, params, strict=True)]
        for a, b in zip(average, at(step, "ema"), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
    read = jax.tree.leaves(checkpoint.restore_params(tmp_path))
    for a, b in zip(read, at(4, "ema"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != p) for a, p in zip(read, at(4, "params"), strict=True))


def test_a_frozen_tower_stays_and_is_not_differentiated(data, tmp_path):
    config = datasets.tiny_config(data, "task=contrastive", steps=3)
    config.optimizer.frozen = ("image",)
    config.optimizer.weight_decay = 0.5
    train.main(config, str(tmp_path / "frozen"))
    config.total = "1 steps"
    config.optimizer.learning_rate = 1e-30
    train.main(config, str(tmp_path / "still"))
    frozen, still = (checkpoint.restore_params(tmp_path / n) for n in ("frozen", "still"))
    jax.tree.map(np.testing.assert_array_equal, frozen["image"], still["image"])
    assert np.any(frozen["text"]["token_embedding"] != still["text"]["token_embedding"])


def test_adafactor_learns_too(data, tmp_path):
    config = learning_config(data, "task=supervised", 60)
    config.optimizer.kind = "adafactor"
    config.optimizer.layer_decay = 0.9
    train.main(config, str(tmp_path))
    curve = losses(tmp_path)
    assert np.mean(curve[-10:]) < 0.7 * np.mean(curve[:10])


def test_a_workdir_that_is_a_pattern_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(BadInput, match=r"--workdir=.* has one of the characters"):
        train.main(datasets.tiny_config(data, steps=4), str(tmp_path / "run [lr=1e-3]"))
    assert not list(tmp_path.iterdir())
