"""Runs that stop and go on: bit for bit, and only with the model and the data they began with."""

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

from mofi_jax import telemetry, train
from mofi_jax.common.errors import BadInput, Preempted
from mofi_jax.data import ops, pipeline, records, tokenizer
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
    earlier = config.copy_and_resolve_references()
    earlier.max_replicated = 0.02  # a key that earlier versions had
    stop_after_four(earlier, tmp_path / "cut", monkeypatch)
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
    from tests import datasets, test_resume
    push = telemetry.Metrics.push
    def killed(self, step, metrics):
        if step == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        push(self, step, metrics)
    telemetry.Metrics.push = killed
    train.main(test_resume.killed_config(sys.argv[1]), sys.argv[2])
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


def test_finished_run_is_left_alone(data, tmp_path):
    config = datasets.tiny_config(data, steps=6)
    train.main(config, str(tmp_path))
    before = (tmp_path / "result.json").stat().st_mtime_ns
    train.main(config, str(tmp_path))
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


def test_checkpoint_of_another_shape_is_refused_by_name(data, tmp_path):
    config = datasets.tiny_config(data, steps=6)
    train.main(config, str(tmp_path))
    config.total = "8 steps"
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
    config = datasets.tiny_config(data, steps=6)
    train.main(config, str(tmp_path))
    config.total = "8 steps"
    config.seed, config.data.block = 1, 8
    words = r"trained on other data \(block was 1 and is 8; seed was 0 and is 1"
    with pytest.raises(BadInput, match=words):
        train.main(config, str(tmp_path))
    config.seed, config.data.block = 0, 1
    datasets.write(tmp_path / "more", examples=50)
    config.data.dir = str(tmp_path / "more")
    with pytest.raises(BadInput, match=r"examples was 48 and is 50.*with `mofi grow`"):
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


def test_a_first_record_that_one_host_cannot_read_ends_all(data, tmp_path, monkeypatch):
    told = []

    def all_or_none(do):
        try:
            return do()
        except BadInput as error:
            told.append(error)
            raise

    monkeypatch.setattr(train.hosts, "all_or_none", all_or_none)
    config = datasets.tiny_config(data)
    config.data.eval_ops = "decode|center_crop(7)"
    with pytest.raises(BadInput, match=r"eval_ops=.* gives \[7, 7, 3\]") as raised:
        train.main(config, str(tmp_path))
    assert told == [raised.value]


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


def test_a_shorter_total_than_what_was_trained_is_refused(data, tmp_path):
    train.main(datasets.tiny_config(data, steps=6), str(tmp_path))
    with pytest.raises(BadInput, match=r"is at step 6, beyond config\.total='4 steps'"):
        train.main(datasets.tiny_config(data, steps=4), str(tmp_path))


def test_a_preempted_run_saves_and_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    """SIGTERM in the third step, at which an evaluation is due: saved first, evaluated after.

    Its score is the best: that step is kept, though it was saved before it was known to be.
    """
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for entity in range(4):
        for i in range(2):
            rgb = datasets.drawing(entity, 100 + i)
            (pictures / f"{entity}_{i}.jpg").write_bytes(ops.encode_jpeg(rgb, 95))
    config = datasets.tiny_config(data, steps=6)
    config.checkpoint.update({"every": "5 steps", "keep": 1, "keep_best": "mine/map"})
    config.evaluators = {"mine": {"kind": "retrieval", "images": str(pictures), "every": "3 steps"}}
    run_all = train.evaluation.run_all

    def best_at_three(evaluators, embedder, progress):
        found = run_all(evaluators, embedder, progress)
        rounds.append(len(rounds))
        return {**found, "mine/map": (0.2, 0.9, 0.4)[rounds[-1]]}

    monkeypatch.setattr(train.evaluation, "run_all", best_at_three)
    rounds = []
    train.main(config, str(tmp_path / "whole"))
    rounds.clear()
    push = telemetry.Metrics.push

    def terminated(self, step, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return push(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Metrics, "push", terminated)
        with pytest.raises(Preempted, match="is saved at step 3: the same command resumes"):
            train.main(config, str(tmp_path / "left"))
    assert checkpoint.saved_steps(tmp_path / "left") == [3]
    train.main(config, str(tmp_path / "left"))
    assert_same_parameters(tmp_path / "whole", tmp_path / "left")
    whole, left = (scores(tmp_path / name) for name in ("whole", "left"))
    assert sorted(whole) == [0, 3, 6]
    assert whole == left
    for name in ("whole", "left"):
        assert checkpoint.saved_steps(tmp_path / name) == [3, 6]
        assert json.loads((tmp_path / name / checkpoint.BEST_FILE).read_text())["step"] == 3
    whole, left = (checkpoint.restore_params(tmp_path / n, "best") for n in ("whole", "left"))
    jax.tree.map(np.testing.assert_array_equal, whole, left)


def test_a_disk_that_fills_up_in_the_second_save(data, tmp_path, monkeypatch):
    save = checkpoint.Checkpointer.save

    def full(self, step, *args):
        if step > 2:  # what tensorstore says
            raise ValueError(f'writing "{tmp_path}/x": No space left on device')
        save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", full)
    sentence = r"cannot be written \(no space left on device\).*goes on from step 2"
    with pytest.raises(BadInput, match=sentence):
        train.main(datasets.tiny_config(data, steps=6), str(tmp_path))


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
