"""The doctor on a healthy set-up and on broken ones: each is named, with its remedy."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from configs import mofi as mofi_config
from configs import quickstart
from mofi_jax import train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import limits, records
from mofi_jax.doctor import __main__ as doctor
from mofi_jax.doctor import machine, pace
from mofi_jax.doctor.__main__ import GIB
from mofi_jax.doctor.machine import Report
from mofi_jax.training import checkpoint, run_folder, setup, state, step
from tests import datasets

REPOSITORY = pathlib.Path(__file__).parent.parent
EIGHT = {"replica": 1, "fsdp": 8, "tensor": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.write(folder, name="i2e")
    datasets.write(folder, name="i2t")
    return folder


@pytest.fixture
def devices(monkeypatch):
    """What jax would find, without the time that finding it takes; to be changed by a test."""
    found = {
        **{"platform": "tpu", "kind": "TPU v5 lite", "devices": 8, "local": 8, "processes": 1},
        **{"memory": 16 * GIB, "slices": 1, "mesh": dict(EIGHT)},
    }
    monkeypatch.setattr(machine, "devices", lambda report, **_: found)
    monkeypatch.setattr(pace, "rate", lambda *_: (1e12, "as a test has it"))
    return found


def told(report, level="problem"):
    return {name: text for name, own, text in report.checks if own == level}


# ------------------------------------------------------------------------- the whole


def test_healthy_set_up_has_no_problem_and_leaves_nothing_behind(data, tmp_path, devices):
    config = datasets.tiny_config(data)
    config.checkpoint.every = "0 steps"
    report = doctor.examine(config, str(tmp_path / "new" / "run"))
    assert told(report) == {}
    assert "saves nothing before the run ends" in told(report, "warning")["config"]
    looked_at = {"packages", "workdir", "data", "first record", "model", "device memory", "disk"}
    assert looked_at | {"sharding", "time"} <= told(report, "ok").keys()
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_that_of_the_training(data, tmp_path, devices, monkeypatch, mesh_of):
    config = datasets.tiny_config(data, "task=supervised", steps=2)
    monkeypatch.setattr(train.meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])
    train.main(config, str(tmp_path / "run"))
    report = doctor.examine(config, str(tmp_path / "run"))
    assert told(report) == {}
    assert ("workdir", "ok", "resumes from step 2") in report.checks
    parameters = json.loads((tmp_path / "run/result.json").read_text())["parameters"]
    assert told(report, "ok")["model"].startswith(f"{parameters / 1e6:,.1f} M parameters")
    # What it says of a checkpoint's size is right within the files' own overhead.
    [step] = checkpoint.saved_steps(tmp_path / "run")
    folder = tmp_path / "run" / checkpoint.FOLDER / str(step)
    arrays = sum(path.stat().st_size for path in folder.rglob("d/*") if path.is_file())
    said = float(told(report, "ok")["disk"].split(" of ")[1].split()[0]) * GIB
    assert said == pytest.approx(arrays, abs=0.01 * GIB)

    # Another model, and other data, all at once.
    config.model.image.width, config.seed = 32, 5
    problem = told(doctor.examine(config, str(tmp_path / "run")))["workdir"]
    assert "it holds another model" in problem
    assert "seed was 0 and is 5" in problem


def damage(config, folder):
    shutil.copytree(config.data.dir, folder / "copy")
    config.data.dir = str(folder / "copy")
    shard = min((folder / "copy/i2e" / records.VERSION).glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])


BROKEN = {
    "batch": (lambda c, _: c.update(batch_size=12), "does not divide over the 8 devices"),
    "data": (lambda c, _: c.data.update(dir="/no/where"), "no data set 'i2e' in /no/where"),
    "data, damaged": (damage, "is cut short or damaged"),
    "data, unlabelled": (lambda c, _: c.data.update(name="i2t"), "has no entities"),
    "first record": (lambda c, _: c.data.update(eval_ops="decode"), "eval_ops='decode' gives"),
    "config": (lambda c, _: c.update(microbatches=0), "config.microbatches must be"),
    "evaluators": (
        lambda c, _: c.update(evaluators={"mine": {"kind": "retrieval", "images": "/no/x.tar"}}),
        "config.evaluators.mine.images: There is no picture set at /no/x.tar",
    ),
    "model": (lambda c, _: c.update(total="ten steps"), "ten steps"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_set_up_is_named(name, data, tmp_path, devices):
    change, sentence = BROKEN[name]
    config = datasets.tiny_config(data, "task=supervised")
    change(config, tmp_path)
    problems = told(doctor.examine(config, str(tmp_path / "run")))
    assert sentence in problems[name.partition(",")[0]]


def test_state_that_does_not_fit_a_device(data, tmp_path, devices):
    devices["memory"] = 1000
    report = doctor.examine(datasets.tiny_config(data), str(tmp_path / "run"))
    assert list(told(report)) == ["device memory"]
    assert "GiB of state on each of 8 devices" in told(report, "warning")["sharding"]


def test_a_batch_of_a_pod_on_two_cores(data, tmp_path, devices, monkeypatch):
    """configs/mofi.py as it is, on a laptop."""
    devices.update({"platform": "cpu", "memory": None, "devices": 1, "local": 1})
    devices["mesh"] = {"replica": 1, "fsdp": 1, "tensor": 1}
    monkeypatch.setattr(machine, "unseen", lambda _: None)
    monkeypatch.setattr(pace, "rate", lambda *_: (2e11, "as a test has it"))
    config = mofi_config.get_config("variant=B/16")
    config.data.dir = str(data)
    problems = told(doctor.examine(config, str(tmp_path / "run")))
    assert problems.keys() == {"memory", "time"}
    assert "of a batch of 32,768: take a smaller --config.batch_size" in problems["memory"]
    # 14.4e9 pictures of 140 GFLOP, most of them the image tower's three passes of 35 GFLOP.
    years = float(problems["time"].removeprefix("about ").split(" years")[0].replace(",", ""))
    assert 200 < years < 500


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_the_memory_of_a_batch_is_that_of_the_devices_dtype(
    platform, dtype, data, tmp_path, devices, monkeypatch
):
    devices["platform"] = platform
    monkeypatch.setattr(machine, "unseen", lambda _: None)
    seen = []
    monkeypatch.setattr(pace, "batch_bytes", lambda model, *_, **__: seen.append(model.dtype) or 0)
    config = datasets.tiny_config(data)
    config.model.dtype = "auto"
    doctor.examine(config, str(tmp_path / "run"))
    assert seen == [dtype]


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_what_a_batch_needs_is_no_more_than_the_compiler_finds(remat, mesh_of):
    """For which it is the least: a refusal has to be right."""
    config = quickstart.get_config()
    config.model.remat = remat
    config.model.image.layers = 2
    sizes = {"vocab_size": 100, "eos_id": 99, "num_entities": 7, "examples_per_epoch": 1000}
    made = setup.make(config, mesh_of["1x1x1"], **sizes)
    structs, shardings = state.abstract(made.init, mesh_of["1x1x1"])
    update = step.make_train_step(made.context, made.tx, shardings)
    batch = setup.batch_structs(config, mesh_of["1x1x1"])
    found = update.lower(structs, batch).compile().memory_analysis().temp_size_in_bytes
    least = pace.batch_bytes(made.context.model, config.batch_size, texts=True, microbatches=1)
    assert least < found
    if remat == "none":  # with full the inputs of the blocks are the smaller part
        assert least > 0.1 * found


@pytest.mark.slow
def test_the_speed_is_measured_on_a_piece_of_the_model():
    config = quickstart.get_config()
    config.model.image.layers = 8
    sizes = {"vocab_size": 100, "eos_id": 99, "num_entities": 7, "examples_per_epoch": 1000}
    found = {"processes": 1, "kind": "cpu", "devices": 1}
    rate, how = pace.rate(run_folder.as_json(config), sizes, found)
    assert rate > 1e8
    assert how.startswith("measured on steps of ")


def test_the_speed_of_several_hosts_is_assumed():
    pod = {"processes": 8, "kind": "TPU v5 lite", "devices": 64}
    assert pace.rate({}, {}, pod)[0] == 0.4 * 197e12 * 64
    assert pace.rate({}, {}, {"processes": 8, "kind": "abacus", "devices": 1})[0] == 0


def test_fewer_shards_than_hosts(data, tmp_path, devices):
    devices["processes"] = 8
    problems = told(doctor.examine(datasets.tiny_config(data), str(tmp_path / "run")))
    assert "has 4 shards for 8 hosts" in problems["shards"]


def test_full_disk(data, tmp_path, devices, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    problems = told(doctor.examine(datasets.tiny_config(data), str(tmp_path / "run")))
    assert "make room, or lower config.checkpoint.keep" in problems["disk"]


@pytest.mark.parametrize(
    ("workdir", "sentence"),
    [("s3://b/run", "or gs://BUCKET"), ("file/run", "cannot be written (not a dir")],
)
def test_workdir_that_cannot_be_written(workdir, sentence, data, tmp_path, devices):
    (tmp_path / "file").write_text("")
    workdir = workdir if "://" in workdir else str(tmp_path / workdir)
    problems = told(doctor.examine(datasets.tiny_config(data), workdir))
    assert sentence in problems["workdir"]


def test_command_ends_with_json_lines_and_an_exit_code(data, tmp_path):
    command = [
        *(sys.executable, "-m", "mofi_jax.doctor", "--config", "configs/quickstart.py", "--json"),
        *(f"--config.data.dir={data}", f"--workdir={tmp_path / 'run'}"),
    ]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    [problem] = [line for line in lines if line["level"] == "problem"]
    assert problem["check"] == "batch"
    assert "128 does not divide over the 3 devices" in problem["text"]


# ------------------------------------------------------------------------- single checks


def test_versions():
    report = Report()
    machine.versions(report, ["jax>=0.10  # why", "", "-r other.txt", "numpy<1", "no-such>=1"])
    assert told(report)["packages"].startswith("numpy<1 is needed, 2")
    assert "; no-such>=1 is needed, none is installed: run pip" in told(report)["packages"]
    report = Report()
    machine.versions(report, doctor.REQUIREMENTS.read_text().splitlines())
    assert told(report) == {}


def test_plugin_of_another_jax(monkeypatch):
    versions = {"libtpu": "0.0.9", "jax": "0.10.2", "jax-cuda13-plugin": "0.10.2"}
    monkeypatch.setattr(machine, "installed", versions.get)
    asked = [
        *('libtpu==0.0.30.*; extra == "tpu"', 'jax-cuda12-plugin>=1; extra == "cuda12"'),
        'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
    ]
    monkeypatch.setattr(machine.importlib.metadata, "requires", {"jax": asked}.get)
    report = Report()
    machine.versions(report, [])
    told_of = told(report)["packages"]
    assert told_of.startswith("libtpu==0.0.30.* is needed, 0.0.9 is installed: run pip")
    assert 'pip install -U "jax[tpu]"' in told_of


def look(report=None, timeout=20, mesh=None, **options):
    report = report or Report()
    joined = {"distributed": bool(options), "coordinator": "", "processes": "", "process": ""}
    mesh = mesh or {"replica": 1, "fsdp": -1, "tensor": 1}
    return machine.devices(report, timeout=timeout, mesh=mesh, **{**joined, **options}), report


def test_devices_and_mesh(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "6")
    found, report = look(mesh={"replica": 2, "fsdp": -1, "tensor": 1})
    assert (found["devices"], found["processes"], found["memory"]) == (6, 1, None)
    assert found["slices"] == 1
    assert found["mesh"] == {"replica": 2, "fsdp": 3, "tensor": 1}
    found, report = look(mesh={"replica": 4, "fsdp": -1, "tensor": 1})
    assert found is None
    assert "does not cover 6 devices" in told(report)["devices"]


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def test_two_hosts_find_each_other(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    address, found = f"localhost:{free_port()}", {}

    def one(process):
        found[process], _ = look(
            timeout=60, coordinator=address, processes="2", process=str(process)
        )

    threads = [threading.Thread(target=one, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i]["processes"] for i in (0, 1)] == [2, 2]
    assert [(found[i]["devices"], found[i]["local"]) for i in (0, 1)] == [(4, 2), (4, 2)]


def test_a_host_that_never_comes_and_a_port_that_is_taken():
    port = free_port()
    address = f"localhost:{port}"
    _, report = look(timeout=1, coordinator=address, processes="2", process="0")
    assert "1 of 2 processes did not connect within 1 s (missing: 1" in told(report)["devices"]
    with socket.create_server(("", port)):
        _, report = look(timeout=5, coordinator=address, processes="2", process="0")
    assert f"cannot listen on port {port}" in told(report)["devices"]


def test_a_start_that_hangs_does_not_hang_the_doctor(monkeypatch, tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 30\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(machine.sys, "executable", str(hanging))
    monkeypatch.setattr(machine, "DEVICE_TIMEOUT", 0.3)
    found, report = look()
    assert found is None
    assert "jax found no devices within 0.3 s" in told(report)["devices"]
    hanging.write_text("#!/bin/sh\necho 'RuntimeError: no driver' >&2; exit 1\n")
    monkeypatch.setattr(machine, "DEVICE_TIMEOUT", 20)
    assert "jax does not start (RuntimeError: no driver)" in told(look()[1])["devices"]


@pytest.mark.parametrize(
    ("versions", "file", "sentence"),
    [
        ({}, "nvidia0", "nvidia0 (installed: no plugin): unset"),
        ({"jax-cuda13-plugin": "0.10.2"}, "nvidia0", "(installed: jax-cuda13-plugin 0.10.2)"),
        ({}, "accel0", 'run pip install "jax[cuda13]" (jax[cuda12] with a driver below 580)'),
        ({"libtpu": "0.0.30"}, "vfio/0", "vfio/0 (installed: libtpu 0.0.30)"),
        ({}, "vfio/0", None),  # of another device
    ],
)
def test_devices_that_jax_does_not_see(versions, file, sentence, monkeypatch, tmp_path):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev" / file).touch()
    monkeypatch.setattr(machine, "installed", versions.get)
    report = Report()
    machine.unseen(report, str(tmp_path))
    assert (sentence or "nothing") in told(report).get("devices", "nothing")


def test_a_process_that_holds_a_device(tmp_path):
    fds = tmp_path / "proc/4242/fd"
    fds.mkdir(parents=True)
    (fds / "1").symlink_to("/dev/null")
    (fds / "2").symlink_to("/dev/nvidiactl")
    report = Report()
    machine.holders(report, str(tmp_path))
    assert report.checks == []
    (fds / "7").symlink_to("/dev/vfio/0")
    machine.holders(report, str(tmp_path))
    assert "process 4242 holds /dev/vfio/0" in told(report, "warning")["leftover"]


@pytest.mark.parametrize(
    ("limits_here", "shards", "raised"),
    [((1024, 4096), 768, False), ((1024, 4096), 769, True), ((1024, -1), 10**5, True)],
)
def test_the_limit_of_open_files_is_raised_where_it_may_be(
    limits_here, shards, raised, monkeypatch, caplog
):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: limits_here)
    found = []
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, new: found.append(new))
    with caplog.at_level("INFO"):
        limits.allow_open_files(shards)
    needed = shards + limits.OTHER_FILES
    assert found == ([(needed, limits_here[1])] if raised else [])
    assert ("raised the limit of open files from 1024" in caplog.text) == bool(raised)


def test_more_shards_than_files_may_be_open(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (256, 300))
    sentence = r"at most 300 files here, and 100 shards need 356.*ulimit -Hn 356"
    with pytest.raises(BadInput, match=sentence):
        limits.allow_open_files(100)


@pytest.mark.parametrize(
    ("function", "step"),
    [("rename", "renaming a folder"), ("fsync", "writing and syncing"), ("replace", "replacing")],
)
def test_file_systems_that_cannot_hold_checkpoints(function, step, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(machine.os, function, refuse)
    report = Report()
    assert machine.folder(report, tmp_path / "run") is None
    assert step in told(report)["workdir"]
    assert "fails (Operation not supported): name another folder" in told(report)["workdir"]
    assert "--rename-dir-limit" in told(report)["workdir"]
    assert list(tmp_path.iterdir()) == []
