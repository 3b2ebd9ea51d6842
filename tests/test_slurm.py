"""SLURM: array jobs write the same bytes as one process, also when one of them dies.

submitit's own local cluster starts the jobs as processes; what sbatch makes of its scripts is
submitit's affair.
"""

import os
import pathlib

import pytest

from data_prep import build_i2e, engine
from data_prep.engine import executors, slurm
from mofi_jax.common import errors
from tests.test_ray import digests, make_tasks, shout

submitit = pytest.importorskip("submitit")

SETTINGS = {"version": 1}


@pytest.fixture
def executor(tmp_path):
    return slurm.Slurm(tmp_path / "jobs", "time=5", "partition=gpu", cluster="local")


def die_beside_others(task, outputs, settings):
    """Kills the process of its run, and where it is alone that of "bad"."""
    word = pathlib.Path(task.inputs[0]).read_text()
    first = not (outputs.workdir / "begun").exists()
    (outputs.workdir / "begun").touch()
    if word == "bad" or first:
        os._exit(1)
    return shout(task, outputs, settings)


def test_an_array_writes_the_same_bytes_as_one_process(tmp_path, executor):
    tasks = make_tasks(tmp_path / "in", ["one", "two", "three"])
    engine.Engine(tmp_path / "here").map_shards("shout", shout, tasks, SETTINGS)
    work = engine.Engine(tmp_path / "there", executor=executor)
    work.map_shards("shout", shout, tasks, SETTINGS)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert not (tmp_path / "jobs").exists()


def test_a_run_that_dies_costs_the_shard_that_killed_it(tmp_path, executor, monkeypatch):
    monkeypatch.setattr(slurm.Slurm, "_MOST_RUNS", 2)
    # How long submitit waits for a result to be seen on a slow file system.
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    tasks = make_tasks(tmp_path / "in", ["one", "bad", "two", "three"])
    work = engine.Engine(tmp_path / "w", executor=executor, failure_budget=0.25)
    made = work.map_shards("shout", die_beside_others, tasks, SETTINGS)
    assert [manifest["shard"] for manifest in made] == ["00000", "00002", "00003"]
    assert [*work.quarantined] == ["shout/00001"]
    [note] = (tmp_path / "w/quarantine").iterdir()
    assert "SLURM" in note.read_text()
    assert [*(tmp_path / "jobs").glob("*.err")], "logs that may say why"


def test_the_memory_of_a_stage_is_asked_for_unless_the_user_did(executor):
    asked = []
    job = engine_job(memory=6)
    for one in executor._executors:
        one.update_parameters = lambda **names: asked.append(names)
    executor._submitted = lambda runs, _: iter([(run, [None] * len(run)) for run in runs])
    [*executor.run([job], False)]
    executor._options[True]["slurm_mem"] = "64GB"
    [*executor.run([job], True)]
    assert asked[0] == {"slurm_mem": "6GB", "slurm_cpus_per_task": 1, "slurm_time": 5}
    assert asked[1]["slurm_mem"] == "64GB"
    assert asked[1]["slurm_partition"] == "gpu"


def test_what_sbatch_refuses_is_told_and_an_accelerator_is_asked_for_where_it_works(
    tmp_path, monkeypatch
):
    refusal = f"grep '^#SBATCH' $1 >> {tmp_path}/asked; echo no such partition >&2; exit 1"
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{refusal}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executor = slurm.Slurm(tmp_path / "jobs", "time=5", "partition=gpu,gpus_per_node=1")
    for accelerator in (True, False):
        with pytest.raises(errors.BadInput, match="no such partition"):
            [*executor.run([engine_job(), engine_job()], accelerator)]
    asked = (tmp_path / "asked").read_text()
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(errors.BadInput, match="mend --slurm"):
        [*executor.run([engine_job()], False)]
    assert asked.count("--time=5") == 2
    assert asked.count("--partition=gpu") == asked.count("--gpus-per-node=1") == 1


@pytest.mark.parametrize(
    ("options", "told"), [("colour=red", "colour"), ("time=4h", "cannot be used")]
)
def test_an_option_that_slurm_does_not_know_is_told(tmp_path, options, told):
    with pytest.raises(errors.BadInput, match=told):
        slurm.Slurm(tmp_path, options, "", cluster="local")


def test_where_there_is_no_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(errors.BadInput, match="where sbatch is"):
        slurm.Slurm(tmp_path, "", "")


def test_a_flag_of_another_engine_is_told(tmp_path):
    with pytest.raises(errors.BadInput, match="--slurm is for --engine=slurm"):
        build_i2e.main(None, str(tmp_path), engine="ray", slurm="time=5")
    with pytest.raises(errors.BadInput, match="choose local, ray, slurm"):
        build_i2e.main(None, str(tmp_path), engine="dask")


def engine_job(**needs):
    task = engine.Task("00000", ())
    return executors.jobs.Job("w", "shout", shout, task, {}, {}, **needs)
