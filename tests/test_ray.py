"""Ray: two machines of a local cluster write the same bytes as one process, also when one dies."""

import functools
import hashlib
import os
import pathlib
import signal
import tarfile
import threading
import time

import pytest

from configs import i2e as i2e_config
from data_prep import build_i2e, engine
from data_prep.engine import executors
from mofi_jax.common import errors
from tests.inputs import tar_bytes

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

SETTINGS = {"version": 1}
SAMPLE = pathlib.Path(__file__).parents[1] / "data_prep/sample"


def shout(task, outputs, settings):
    """Slow enough that a machine can die while it works; notes which machine that was."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    with open(outputs.workdir / f"begun-{node}", "a") as file:
        file.write(task.name + "\n")
    text = pathlib.Path(task.inputs[0]).read_text()
    if ray.is_initialized():
        time.sleep(0.3)
    if text == "bad":
        raise errors.BadInput("word.txt holds the word bad: write another.")
    outputs.path(f"shout/{task.name}.txt").write_text(text.upper())
    outputs.write_rejects([(text, "too_loud")])
    return {"words": 1, "process": 0}


def load_once(task, outputs, settings):
    """Stands for a stage with a model: notes the process that would have loaded it."""
    outputs.path(f"model/{task.name}.txt").write_text(str(os.getpid()))
    return {"pictures": 1}


@pytest.fixture(scope="module")
def cluster():
    # Workers find `tests` because the driver's import path is theirs.
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def executor(cluster):
    found = executors.Ray(cluster.address)
    yield found
    found.close()


def make_tasks(folder, words):
    folder.mkdir()
    tasks = []
    for number, word in enumerate(words):
        (folder / f"{number}.txt").write_text(word)
        tasks.append(engine.Task(f"{number:05d}", (folder / f"{number}.txt",)))
    return tasks


def digests(work):
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("shout", "rejects")
        for path in sorted((work / folder).iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


def test_two_machines_write_the_same_bytes_as_one_process(tmp_path, executor):
    tasks = make_tasks(tmp_path / "in", [f"word {i}" for i in range(8)])
    engine.Engine(tmp_path / "here").map_shards("shout", shout, tasks, SETTINGS)
    work = engine.Engine(tmp_path / "ray", executor=executor)
    work.map_shards("shout", shout, tasks, SETTINGS)
    assert digests(tmp_path / "ray") == digests(tmp_path / "here")
    assert len(list((tmp_path / "ray").glob("begun-*"))) == 2, "both machines worked"

    begun = {path: path.read_text() for path in (tmp_path / "ray").glob("begun-*")}
    work.map_shards("shout", shout, tasks, SETTINGS)
    assert {path: path.read_text() for path in begun} == begun, "finished shards stay"


def test_bad_input_and_quarantine_cross_machines(tmp_path, executor):
    tasks = make_tasks(tmp_path / "in", ["one", "bad", "two", "three"])
    work = engine.Engine(tmp_path / "w", executor=executor)
    with pytest.raises(errors.BadInput, match=r"word\.txt holds the word bad"):
        work.map_shards("shout", shout, tasks, SETTINGS)
    work = engine.Engine(tmp_path / "w", executor=executor, failure_budget=0.25)
    assert len(work.map_shards("shout", shout, tasks, SETTINGS)) == 3
    assert work.quarantined == {"shout/00001": 1}


def test_an_accelerator_stage_runs_in_one_process_per_machine(tmp_path, executor):
    tasks = make_tasks(tmp_path / "in", [str(i) for i in range(6)])
    work = engine.Engine(tmp_path / "w", executor=executor)
    work.map_shards("model", load_once, tasks, SETTINGS, accelerator=True)
    processes = {path.read_text() for path in (tmp_path / "w/model").glob("*.txt")}
    assert 1 <= len(processes) <= 2
    assert str(os.getpid()) not in processes


def test_a_task_asks_for_what_its_stage_needs_and_never_for_more_than_there_is(
    tmp_path, executor, monkeypatch
):
    asked = []
    options = executor._attempt.options
    monkeypatch.setattr(
        executor._attempt, "options", lambda **names: asked.append(names) or options(**names)
    )
    tasks = make_tasks(tmp_path / "in", ["one", "two"])
    work = engine.Engine(tmp_path / "w", executor=executor)
    work.map_shards("shout", shout, tasks[:1], SETTINGS, memory=1)
    work.map_shards("shout", shout, tasks, SETTINGS, cpus=64, memory=1 << 20)
    machine = max(node["Resources"]["memory"] for node in executor._alive())
    assert asked == [
        {"num_cpus": 1, "memory": 1 << 30},
        {"num_cpus": 1, "memory": int(machine)},
    ]


@pytest.mark.slow
def test_a_machine_that_dies_in_mid_job_changes_no_byte(tmp_path, cluster, executor):
    tasks = make_tasks(tmp_path / "in", [f"word {i}" for i in range(12)])
    engine.Engine(tmp_path / "here").map_shards("shout", shout, tasks, SETTINGS)
    doomed = cluster.second
    node_id = doomed.node_id

    def kill_when_it_works():
        while not (tmp_path / f"ray/begun-{node_id}").exists():
            time.sleep(0.02)
        # The raylet is the machine's daemon; its workers die with it.
        for info in doomed.all_processes["raylet"]:
            os.kill(info.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_it_works, daemon=True)
    (tmp_path / "ray").mkdir()
    killer.start()
    work = engine.Engine(tmp_path / "ray", executor=executor)
    work.map_shards("shout", shout, tasks, SETTINGS)
    killer.join(timeout=60)
    assert not killer.is_alive(), "the machine was killed while it worked"
    assert digests(tmp_path / "ray") == digests(tmp_path / "here")
    cluster.remove_node(doomed, allow_graceful=False)
    cluster.second = cluster.add_node(num_cpus=1)


@pytest.mark.slow
def test_the_whole_pipeline_writes_the_same_shards_on_two_machines(tmp_path, cluster):
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(SAMPLE / f"pairs/{shard:05d}.tar.gz") as source:
            members = [(m.name, source.extractfile(m).read()) for m in source.getmembers()[:45]]
        (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    arguments = f"folder={folder},kb={SAMPLE / 'knowledge_base.jsonl.gz'},labels=text"
    config = i2e_config.get_config(arguments)
    config.update({"min_images": 1, "shard_examples": 10, "vocab_size": 300, "workers": 1})
    here = build_i2e.build(config, str(tmp_path / "here"))
    on_ray = functools.partial(executors.Ray, cluster.address)
    there = build_i2e.build(config, str(tmp_path / "ray"), on_ray)
    assert there["shards_sha256"] == here["shards_sha256"]
    assert there["stages"] == here["stages"]
    assert here["stages"]["shards"]["records"] > 35


def test_an_address_where_no_cluster_answers_is_told():
    with pytest.raises(errors.BadInput, match=r"No Ray cluster answers at '127\.0\.0\.1:1'"):
        executors.Ray("127.0.0.1:1")
