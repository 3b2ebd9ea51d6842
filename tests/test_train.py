"""Training as a whole: it learns, resumes bit for bit, and does not depend on the device count."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from mofi_jax import inference, telemetry, train
from mofi_jax.common.errors import BadInput, Preempted
from mofi_jax.data import ops, pipeline, records, tokenizer
from mofi_jax.distributed import meshes
from mofi_jax.training import checkpoint, run_folder
from tests import datasets

REPOSITORY = epath.Path(__file__).parent.parent


def losses(workdir):
    return [line["loss"] for line in telemetry.read_metrics(workdir) if "loss" in line]


def scores(workdir):
    lines = telemetry.read_metrics(workdir)
    return {line["step"]: line["mine/map"] for line in lines if "mine/map" in line}


def assert_same_parameters(a, b):
    a, b = checkpoint.restore_params(a), checkpoint.restore_params(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


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
def test_one_step_of_every_task(data, tmp_path, task):
    config = datasets.tiny_config(data, f"task={task}", steps=1)
    train.main(config, str(tmp_path))
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


def stop_after_four(config, workdir, monkeypatch):
    """The same run, cut by an exception when it draws its fifth batch."""
    draw = train.pipeline.training_stream

    def failing_stream(*args, **kwargs):
        yield from itertools.islice(draw(*args, **kwargs), 4)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.pipeline, "training_stream", failing_stream)
        with pytest.raises(KeyboardInterrupt):
            train.main(config, str(workdir))


def test_stopped_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch):
    config = datasets.tiny_config(data, steps=6)
    train.main(config, str(tmp_path / "whole"))
    stop_after_four(config, tmp_path / "cut", monkeypatch)
    assert "to_devices" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "cut" / "result.json").exists()
    train.main(config, str(tmp_path / "cut"))
    assert_same_parameters(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (telemetry.read_metrics(tmp_path / name) for name in ("whole", "cut"))
    assert [line["step"] for line in cut] == [line["step"] for line in whole]
    assert [line["loss"] for line in cut] == [line["loss"] for line in whole]


KILLED = """
    import os, signal, sys
    from absl import flags
    flags.FLAGS.mark_as_parsed()
    from mofi_jax import telemetry, train
    from tests import datasets, test_train
    push = telemetry.Metrics.push
    def killed(self, step, metrics):
        if step == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        push(self, step, metrics)
    telemetry.Metrics.push = killed
    train.main(test_train.killed_config(sys.argv[1]), sys.argv[2])
"""


def killed_config(data):
    config = datasets.tiny_config(data, steps=40)
    config.checkpoint.every = "10 steps"
    return config


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    """kill -9 while training, the same command again: the same parameters, bit for bit."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(data), str(tmp_path / "killed")],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # The save of step 20 may or may not be through; it begins when that of step 10 is.
    assert checkpoint.saved_steps(tmp_path / "killed")[-1] in (10, 20)
    assert 10 <= len(losses(tmp_path / "killed")) < 25
    assert not (tmp_path / "killed" / "result.json").exists()
    train.main(killed_config(data), str(tmp_path / "killed"))
    train.main(killed_config(data), str(tmp_path / "whole"))
    assert_same_parameters(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "mesh", [{"replica": 1, "fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}]
)
def test_eight_devices_follow_the_curve_of_one(data, tmp_path, mesh, monkeypatch):
    """20 steps in fp32 within 1e-5 relative, also with parameters that do not divide evenly."""
    config = datasets.tiny_config(data, steps=20)
    config.checkpoint.every = "20 steps"
    train.main(config, str(tmp_path / "one"))
    monkeypatch.undo()
    config.mesh.update(mesh)
    train.main(config, str(tmp_path / "eight"))
    eight, one = losses(tmp_path / "eight"), losses(tmp_path / "one")
    assert len(one) == 20
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_other_device_count_on_resume(data, tmp_path, monkeypatch):
    """Four steps on one device, the rest on eight: restored onto other shardings and padding."""
    config = datasets.tiny_config(data, steps=6)
    train.main(config, str(tmp_path / "whole"))
    stop_after_four(config, tmp_path / "moved", monkeypatch)
    monkeypatch.undo()
    train.main(config, str(tmp_path / "moved"))
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=1e-5)


def test_wall_time_is_told_by_phase_across_a_restart(data, tmp_path, monkeypatch):
    """The steps after the last checkpoint are lost; all phases together are the wall time."""
    config = datasets.tiny_config(data, steps=6)
    config.checkpoint.every = "3 steps"
    began = time.time()
    stop_after_four(config, tmp_path, monkeypatch)
    before = json.loads((tmp_path / telemetry.GOODPUT_FILE).read_text())
    time.sleep(0.3)
    train.main(config, str(tmp_path))
    wall = time.time() - began
    result = json.loads((tmp_path / "result.json").read_text())
    split = result["goodput"]
    assert set(split) == set(telemetry.PHASES)
    assert sum(split.values()) == pytest.approx(wall, abs=0.3)
    assert split["down"] >= 0.3
    assert 0 < split["lost"] < before["seconds"]["step"] + before["seconds"]["input"]
    assert all(split[phase] > 0 for phase in ("start", "compile", "input", "step", "checkpoint"))
    assert result["seconds"] == pytest.approx(split["input"] + split["step"], abs=0.3)
    lines = telemetry.read_metrics(tmp_path)
    for line in lines:
        shares = [line[f"goodput/{phase}"] for phase in telemetry.PHASES]
        assert sum(shares) == pytest.approx(1)
        assert 0 <= line.get("speed/data_wait", 0) <= 1
    assert sum("speed/images_per_second" in line for line in lines) == 4  # of 6, but two are first
    assert lines[-1]["speed/tokens_per_second"] == pytest.approx(
        lines[-1]["speed/images_per_second"] * config.model.context_length
    )


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
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert [line.split("  ")[0] for line in told] == [
        f"step {n}/6 ({100 * n / 6:.1f} %)" for n in range(1, 7)
    ]
    assert "loss " in told[-1]
    assert "img/s  data wait " in told[-1]
    assert any(r.getMessage().startswith("goodput ") for r in caplog.records)


def test_finished_run_is_left_alone(data, tmp_path):
    config = datasets.tiny_config(data, steps=2)
    train.main(config, str(tmp_path))
    before = (tmp_path / "result.json").stat().st_mtime_ns
    train.main(config, str(tmp_path))
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


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


def test_checkpoint_of_another_shape_is_refused_by_name(data, tmp_path):
    config = datasets.tiny_config(data, steps=2)
    train.main(config, str(tmp_path))
    config.total = "4 steps"
    config.model.image.width = 32
    with pytest.raises(
        BadInput,
        match=r"another model \(image.width was 16 and is 32\), .* other arrays.* choose another",
    ):
        train.main(config, str(tmp_path))
    (tmp_path / "model.json").unlink()
    with pytest.raises(
        BadInput, match=r"params/image/class_embedding is \(16,\) there and \(32,\)"
    ):
        train.main(config, str(tmp_path))


def test_resume_on_other_data_is_refused(data, tmp_path):
    config = datasets.tiny_config(data, steps=2)
    train.main(config, str(tmp_path))
    config.total = "4 steps"
    config.seed = 1
    with pytest.raises(BadInput, match=r"trained on other data \(seed was 0 and is 1"):
        train.main(config, str(tmp_path))
    config.seed = 0
    datasets.write(tmp_path / "more", examples=50)
    config.data.dir = str(tmp_path / "more")
    with pytest.raises(BadInput, match=r"examples was 48 and is 50.*with mofi_jax\.grow"):
        train.main(config, str(tmp_path))
    (tmp_path / records.ENTITIES_FILE).unlink()
    with pytest.raises(BadInput, match=f"a new run with --config.init.model={tmp_path}"):
        train.main(config, str(tmp_path))


def test_a_shard_replaced_by_another_is_other_data(tmp_path):
    config = datasets.tiny_config(tmp_path)
    datasets.write(tmp_path, examples=8, shards=2)
    source = records.open_source(tmp_path, "i2e")
    texts = tokenizer.Tokenizer(source.directory / records.TOKENIZER_FILE, 12)
    parts = [pipeline.Part("i2e", source), pipeline.Part("more", source)]

    before = run_folder.data_fingerprint(config, parts, texts)
    one, other = source.files
    assert one.stat().length == other.stat().length  # ArrayRecord fills up blocks of 64 kB
    other.copy(one, overwrite=True)
    after = run_folder.data_fingerprint(config, parts, texts)
    changed = run_folder.data_changes(before, after)
    assert [part.partition(" was ")[0] for part in changed.split("; ")] == [
        *("extra.more.shards", "shards")
    ]
    # Runs of versions that knew nothing of shards go on.
    old = {key: value for key, value in before.items() if key != "shards"}
    del old["extra"]["more"]["shards"]
    assert run_folder.data_changes(old, after) == ""
    assert "seed was" in run_folder.data_changes(old, after | {"seed": 7})
    # They shuffled single records.
    del old["block"]
    assert run_folder.data_changes(old, after) == ""
    assert run_folder.data_changes(old, after | {"block": 128}) == "block was 1 and is 128"


def test_data_that_differ_on_another_host_are_refused(data, tmp_path, monkeypatch):
    # As a host that is not the first, which has another set.
    monkeypatch.setattr(run_folder.hosts, "agree", lambda find: find() | {"examples": 7})
    with pytest.raises(BadInput, match=r"not those of process 0 \(examples was 7 and is 48\)"):
        train.main(datasets.tiny_config(data), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_mixture_is_trained_on_and_is_part_of_the_fingerprint(data, tmp_path):
    config = datasets.tiny_config(data, steps=6)
    config.data.extra = {"pairs": {"dir": str(data), "name": "i2t", "weight": 0.5}}
    train.main(config, str(tmp_path))
    # The pictures without labels are among the examples.
    shares = [line["labelled_share"] for line in telemetry.read_metrics(tmp_path)]
    assert np.mean(shares) == pytest.approx(2 / 3, abs=0.02)
    config.total = "8 steps"
    config.data.extra.pairs.weight = 0.25
    with pytest.raises(BadInput, match=r"other data \(extra.pairs.weight was 0.5 and is 0.25"):
        train.main(config, str(tmp_path))


def test_the_state_of_the_input_is_small(data):
    """At most 10 kB with ten sets: a position and what it is a position of, no iterator."""
    config = datasets.tiny_config(data)
    source = records.open_source(data, "i2e")
    parts = [train.pipeline.Part(f"set_{i}", source, 0.5) for i in range(10)]
    texts = tokenizer.Tokenizer(source.directory / records.TOKENIZER_FILE, 12)
    fingerprint = run_folder.data_fingerprint(config, parts, texts)
    seconds = dict.fromkeys(telemetry.PHASES, 1e6)
    position = checkpoint.Position(10**12, fingerprint, seconds, run_folder.as_json(config))
    assert len(fingerprint["extra"]) == 9
    assert len(json.dumps(dataclasses.asdict(position))) <= 10_000


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
            "config.data.train_ops=.*fails on the first",
        ),
        ("data.eval_ops", "decode|resize_short(20)", "the model takes .16, 16, 3."),
        ("data.threads", 0, "config.data.threads must be"),
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


def test_a_shorter_total_than_what_was_trained_is_refused(data, tmp_path):
    train.main(datasets.tiny_config(data, steps=4), str(tmp_path))
    with pytest.raises(BadInput, match=r"is at step 4, beyond config\.total='2 steps'"):
        train.main(datasets.tiny_config(data, steps=2), str(tmp_path))


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


def test_a_preempted_run_saves_and_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    """SIGTERM in the third step, at which an evaluation is due: saved first, evaluated after."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for entity in range(4):
        for i in range(2):
            rgb = datasets.drawing(entity, 100 + i)
            (pictures / f"{entity}_{i}.jpg").write_bytes(ops.encode_jpeg(rgb, 95))
    config = datasets.tiny_config(data, steps=6)
    config.checkpoint.every = "5 steps"
    config.evaluators = {"mine": {"kind": "retrieval", "images": str(pictures), "every": "3 steps"}}
    train.main(config, str(tmp_path / "whole"))
    push = telemetry.Metrics.push

    def terminated(self, step, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return push(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Metrics, "push", terminated)
        with pytest.raises(Preempted, match="is at step 3: the same command goes on"):
            train.main(config, str(tmp_path / "left"))
    assert checkpoint.saved_steps(tmp_path / "left") == [3]
    train.main(config, str(tmp_path / "left"))
    assert_same_parameters(tmp_path / "whole", tmp_path / "left")
    whole, left = (scores(tmp_path / name) for name in ("whole", "left"))
    assert sorted(whole) == [0, 3, 6]
    assert whole == left


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


def test_a_disk_that_fills_up_in_the_second_save(data, tmp_path, monkeypatch):
    save = checkpoint.Checkpointer.save

    def full(self, step, *args):
        if step > 2:  # what tensorstore says
            raise ValueError(f'writing "{tmp_path}/x": No space left on device')
        save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", full)
    sentence = r"cannot be written \(no space left on device\).*goes on from step 2"
    with pytest.raises(BadInput, match=sentence):
        train.main(datasets.tiny_config(data, steps=4), str(tmp_path))


def test_a_workdir_that_is_a_pattern_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(BadInput, match=r"--workdir=.* has one of the characters"):
        train.main(datasets.tiny_config(data, steps=4), str(tmp_path / "run [lr=1e-3]"))
    assert not list(tmp_path.iterdir())


def test_goes_on_with_other_means_from_the_step_before_a_damaged_one(data, tmp_path, caplog):
    """What decides neither shapes nor meaning nor the order of the data may change."""
    config = datasets.tiny_config(data, "task=contrastive", steps=4)
    config.checkpoint.keep = 2
    train.main(config, str(tmp_path))
    (tmp_path / checkpoint.FOLDER / "4/params/_METADATA").unlink()
    changes = {
        "total": "6 steps",
        "model.remat": "full",
        "model.attention": "xla",
        "model.dtype": "bfloat16",
        "microbatches": 2,
        "data.threads": 3,
        "data.prefetch": 1,
    }
    before = {key: config.to_dict() for key in changes}
    for key in changes:
        for part in key.split("."):
            before[key] = before[key][part]
    config.update_from_flattened_dict(changes)
    train.main(config, str(tmp_path))
    for key, value in changes.items():
        assert value != before[key]
        assert f"{key} was {before[key]!r} and is {value!r}" in caplog.text
    assert "the checkpoint of step 4 is damaged" in caplog.text
    assert checkpoint.last_step(tmp_path) == 6
    assert (tmp_path / checkpoint.FOLDER / "4.damaged").exists()
    steps = [line["step"] for line in telemetry.read_metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, 7))
