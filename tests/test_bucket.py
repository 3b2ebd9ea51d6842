"""``--workdir=gs://...``: a bucket on loopback in place of a disk, with the real clients of one."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading

import gcsfs
import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import eval as eval_config
from data_prep import engine
from data_prep.dataset import publish
from mofi_jax import curves, evaluate, export, telemetry, train
from mofi_jax.common import checksums, files
from mofi_jax.common.errors import BadInput, Preempted, StorageFailed
from mofi_jax.data import records
from mofi_jax.distributed import meshes
from mofi_jax.doctor import __main__ as doctor
from mofi_jax.doctor import machine, pace
from mofi_jax.telemetry import metrics_file
from mofi_jax.training import checkpoint, run_folder, run_lock, state
from tests import buckets, datasets
from tests.test_checkpoint import POSITION, initialiser

REPOSITORY = epath.Path(__file__).parent.parent
SAMPLE = REPOSITORY / "data_prep/sample/unseen.tar"


@pytest.fixture(scope="module")
def served():
    """(the bucket's objects, the environment that leads to them); TensorStore reads it once."""
    with buckets.served() as (objects, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield objects, environment


@pytest.fixture
def folder(served, request):
    """A folder of the bucket, as `files.output_folder` gives it."""
    name = f"gs://{buckets.BUCKET}/{request.node.name}/run"
    return files.output_folder(name, "--workdir", bucket=True)


def steps(workdir):
    return [row["step"] for row in telemetry.read_metrics(workdir)]


def test_files_in_a_bucket(folder, served):
    assert not folder.exists()  # judging it left nothing
    files.write_json(folder / "a.json", {"a": 1})
    files.write_text(folder / "sub/b.txt", "ü")
    assert files.read_json(folder / "a.json", "") == {"a": 1}
    assert files.list_files(folder) == ["a.json", "sub/b.txt"]
    objects, _ = served
    objects.put(f"{os.fspath(folder).partition(buckets.BUCKET)[2][1:]}/c", b"")  # another client's
    assert files.list_files(folder) == ["a.json", "c", "sub/b.txt"]
    checksums.write(folder)
    assert checksums.damage(folder) is None
    files.write_text(folder / "sub/b.txt", "u")
    assert checksums.damage(folder) == "sub/b.txt is not what was saved"


def test_a_data_set_is_published_to_a_bucket(folder, served, tmp_path):
    datasets.write(tmp_path)
    config, work = ml_collections.ConfigDict({"publish": str(folder)}), engine.Engine(tmp_path)
    source = tmp_path / "i2e" / records.VERSION
    names = sorted(path.name for path in source.iterdir())
    assert publish.run(config, work, "i2e")["copied"] == len(names) > 4
    assert publish.run(config, work, "i2e")["copied"] == 0
    objects, _ = served
    target = f"{os.fspath(folder).partition(buckets.BUCKET)[2][1:]}/i2e/{records.VERSION}"
    held = {name: data for name, (_, data) in objects.held.items() if name.startswith(target)}
    for name in names:
        assert held[f"{target}/{name}"] == (source / name).read_bytes()
    assert sorted(held) == sorted(f"{target}/{name}" for name in [*names, publish.SUMS_FILE])
    # What the data set does not hold any more is deleted there.
    gone = next(name for name in names if ".array_record-" in name)
    (source / gone).unlink()
    assert publish.run(config, work, "i2e")["deleted"] == 1
    assert f"{target}/{gone}" not in objects.held


def test_a_place_that_cannot_be_is_one_sentence(served, monkeypatch):
    for text, said in (
        ("s3://bucket/run", "is a remote path: name a local one, or gs://BUCKET"),
        ("gs://elsewhere/run", "cannot be written .*: check the bucket's name"),
        (f"gs://{buckets.BUCKET}/run*", "has one of the characters"),
    ):
        with pytest.raises(BadInput, match=f"^--workdir=.*{said}"):
            files.output_folder(text, "--workdir", bucket=True)
    with pytest.raises(BadInput, match=r"^--model=gs://forbidden/run cannot be read .*: check the"):
        files.input_folder("gs://forbidden/run", "--model")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BadInput, match=r"--model=gs://b/run needs a client of buckets: pip install gcsfs"
    ):
        files.input_folder("gs://b/run", "--model")


def test_a_bucket_that_refuses_a_write_is_one_sentence(folder, served, mesh_of, monkeypatch):
    """Exit code 1, as it may be back: the next start looks at it again."""
    train_state, _ = state.create(initialiser(), 5, mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(folder, keep=3)
    checkpointer.save(20, train_state, POSITION)
    checkpointer.wait()

    def save():
        checkpointer.save(40, train_state, POSITION)
        checkpointer.wait()

    def away():
        raise gcsfs.retry.HttpError({"code": 503, "message": "Service Unavailable"})

    monkeypatch.setattr(served[0], "read_only", True)
    for write, reason in (
        (lambda: files.write_text(folder / "a.json", "{}"), "Forbidden: .*"),
        (save, "(PERMISSION_DENIED|Forbidden): .*"),  # TensorStore or gcsfs, whichever is first
        (away, "Service Unavailable, 503"),
    ):
        said = rf"^--workdir={folder} cannot be written \({reason}\): look at .* from step 20\.$"
        with pytest.raises(StorageFailed, match=said) as caught, run_folder.storage_errors(folder):
            write()
        assert caught.value.exit_code == 1


def test_a_preempted_run_is_no_failure_of_its_bucket():
    workdir = epath.Path("gs://bucket/run")
    with pytest.raises(Preempted), run_folder.storage_errors(workdir):
        raise Preempted(f"{workdir} is saved at step 4: the same command resumes from there.")


def test_metrics_come_in_parts(folder, monkeypatch):
    monkeypatch.setattr(metrics_file, "_PART_BYTES", 100)
    metrics = telemetry.Metrics(folder, resume_step=-1)
    for step in range(1, 9):
        metrics.write(step, {"loss": 1 / step})
        if step % 2 == 0:
            metrics.store()
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith("metrics"))
    assert names[0] == "metrics-000000.jsonl"
    assert len(names) > 1
    # The process is killed here, and another goes on from the checkpoint of step 5.
    metrics = telemetry.Metrics(folder, resume_step=5)
    assert steps(folder) == [1, 2, 3, 4, 5]
    metrics.write(6, {"loss": 0.0})
    metrics.close()
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert curves.read_runs([os.fspath(folder)])[0].heading == "run: 6 steps"


def test_a_row_is_stored_within_a_minute_whatever_the_loop_does(folder, monkeypatch):
    assert metrics_file._UPLOAD_SECONDS < 60
    monkeypatch.setattr(metrics_file, "_UPLOAD_SECONDS", 0.0)
    rows = metrics_file.MetricsFile(folder, resume_step=-1)
    rows.append({"step": 1})
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert steps(folder) == [1]


def test_rows_whose_upload_failed_are_stored_with_the_next(folder, monkeypatch):
    rows = metrics_file.MetricsFile(folder, resume_step=-1)
    rows.append({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.upload()
    rows.upload()
    assert steps(folder) == [1]


def test_parts_that_were_copied_to_a_disk_are_read_and_gone_on_with(tmp_path):
    for number, step in enumerate((1, 2, 3)):
        (tmp_path / f"metrics-{number:06d}.jsonl").write_text(json.dumps({"step": step}) + "\n")
    rows = metrics_file.MetricsFile(tmp_path, resume_step=2)
    rows.append({"step": 3, "again": True})
    rows.close()
    assert telemetry.read_metrics(tmp_path)[1:] == [{"step": 2}, {"step": 3, "again": True}]


def test_the_doctor_on_a_bucket(folder, tmp_path, monkeypatch):
    datasets.write(tmp_path, examples=32, shards=1)
    mesh = {"replica": 1, "fsdp": 1, "tensor": 1}
    found = {"platform": "tpu", "processes": 1, "memory": 2**34, "slices": 1, "mesh": mesh}
    monkeypatch.setattr(pace, "rate", lambda *_: (1e12, "as a test has it"))
    monkeypatch.setattr(machine, "devices", lambda *_, **__: found)
    report = doctor.examine(datasets.tiny_config(tmp_path, "task=supervised"), os.fspath(folder))
    assert [check for check in report.checks if check[1] == "problem"] == []
    assert not folder.exists()


def test_a_bucket_has_no_lock(folder, caplog):
    with run_lock.held(folder):
        assert not folder.exists()
    assert "cannot be locked (buckets have no locks): start no second run in it" in caplog.text


def test_damaged_and_unfinished_steps(folder, mesh_of):
    train_state, _ = state.create(initialiser(), 5, mesh_of["1x2x1"])
    checkpointer = checkpoint.Checkpointer(folder, keep=3)
    for step in (20, 40):
        checkpointer.save(step, train_state, POSITION)
    checkpointer.close()
    steps = checkpointer.folder
    (steps / "40/params/_METADATA").unlink()
    files.write_text(steps / "60/params/_METADATA", "{}")  # its process was killed
    assert checkpoint.saved_steps(folder) == [20, 40]
    step, damaged = checkpoint.latest_intact(folder)
    assert (step, [number for number, _ in damaged]) == (20, [40])
    checkpoint.set_aside(folder, damaged, step)
    checkpointer = checkpoint.Checkpointer(folder, keep=3)
    assert sorted(path.name for path in steps.iterdir()) == ["20", "40.damaged"]
    structs, _ = state.abstract(initialiser(), mesh_of["1x1x1"])
    restored = checkpoint.restore(folder, 20, structs)
    jax.tree.map(np.testing.assert_array_equal, train_state, restored)
    checkpointer.save(40, restored, POSITION)
    checkpointer.close()
    assert checkpoint.last_step(folder) == 40


# ---------------------------------------------------------------------------- the whole cycle


def config_of(data):
    """That of the fixture `trained`, with a checkpoint on the way."""
    config = datasets.tiny_config(data, steps=20)
    config.checkpoint.update({"every": "10 steps", "keep": 1})
    return config


def check_finished(run, whole, tmp_path):
    """A run in the bucket against an uninterrupted one on disk; then evaluated and exported."""
    ours, theirs = checkpoint.restore_params(run), checkpoint.restore_params(whole)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, theirs = (
        [(row["step"], row["loss"]) for row in telemetry.read_metrics(where) if "loss" in row]
        for where in (run, whole)
    )
    assert ours == theirs
    assert files.read_json(run / "result.json", "")["steps"] == 20
    with tarfile.open(SAMPLE) as tar:
        tar.extractall(tmp_path / "set", members=tar.getmembers()[:12], filter="data")
    evaluate.main(eval_config.get_config(f"gpr1200={tmp_path / 'set'}"), str(run))
    [model] = files.read_json(run / "evaluation/result.json", "")["models"]
    assert model["metrics"]["gpr1200"]["map"] > 0
    assert "gpr1200" in (run / "evaluation/index.html").read_text()
    export.main(str(run), str(tmp_path / "exported"))
    assert files.read_json(tmp_path / "exported/result.json", "")["max_abs_diff"] <= 1e-4


def test_trains_resumes_evaluates_and_exports(trained, folder, mesh_of, tmp_path, monkeypatch):
    monkeypatch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
    watch = telemetry.Metrics.watch

    def killed(self, step, metrics):
        if step == 13:
            raise KeyboardInterrupt
        watch(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Metrics, "watch", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(config_of(trained / "data"), str(folder))
    assert checkpoint.saved_steps(folder) == [10]
    train.main(config_of(trained / "data"), str(folder), profile="18:19")
    check_finished(folder, trained / "run", tmp_path)
    names = files.list_files(folder)
    for start in ("profile/plugins/", "tensorboard/events", "goodput.json"):
        assert any(name.startswith(start) for name in names), names


KILLED = """
    import os, signal, sys
    from absl import flags
    from mofi_jax import telemetry, train
    from tests import test_bucket

    flags.FLAGS.mark_as_parsed()
    watch = telemetry.Metrics.watch

    def killed(self, step, metrics):
        watch(self, step, metrics)
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    telemetry.Metrics.watch = killed
    train.main(test_bucket.config_of(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_processes_are_gone_on_with(trained, folder, served, mesh_of, tmp_path):
    """kill -9 before the first save, then while the second is being uploaded."""
    environment = {name: value for name, value in os.environ.items() if "COMPILATION" not in name}

    def start(kill_at):
        command = [sys.executable, "-c", textwrap.dedent(KILLED)]
        arguments = [str(trained / "data"), str(folder), str(kill_at)]
        return subprocess.run(
            command + arguments, cwd=REPOSITORY, env=environment, check=False
        ).returncode

    assert [start(5), start(18), start(0)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert any(name.startswith("programs/") for name in files.list_files(folder))
    check_finished(folder, trained / "run", tmp_path)
