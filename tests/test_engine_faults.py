"""The engine when things go wrong: retries, quarantine, the failure budget, a full disk."""

import errno
import functools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.engine import jobs, manifests
from mofi_jax.common import errors, processes


def shout(task, outputs, settings):
    """Upper-cases a file; what the file says may make it fail."""
    text = pathlib.Path(task.inputs[0]).read_text()
    if text == "bad":
        raise errors.BadInput("word.txt holds the word bad: write another.")
    if text == "broken":
        raise KeyError("no such word")
    if text == "odd":
        raise pa.ArrowInvalid("a column of text\nis none")
    if text == "flaky":
        attempts = outputs.workdir / "attempts"
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        if len(attempts.read_text()) < settings["works_at"]:
            raise ConnectionResetError("the file server hung up")
    if text == "slow":
        (outputs.workdir / f"begun-{os.getpid()}").touch()
        time.sleep(1)
    outputs.path(f"shout/{task.name}.txt").write_text(text.upper())
    return {"words": 1}


def loud(task, outputs, settings):
    with open(outputs.path(f"loud/{task.name}.bin"), "wb") as file:
        file.write(b"x" * settings["bytes"])
    return {"files": 1}


def make_tasks(folder, words):
    folder.mkdir(exist_ok=True)
    for number, word in enumerate(words):
        (folder / f"{number}.txt").write_text(word)
    return [engine.Task(f"{n:05d}", (folder / f"{n}.txt",)) for n in range(len(words))]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_PAUSE", 0.01)


def test_reading_that_fails_is_tried_again_a_bounded_number_of_times(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["flaky"]), engine.Engine(tmp_path / "w")
    work.map_shards("shout", shout, tasks, {"works_at": 3})
    assert (work.workdir / "attempts").read_text() == "xxx"
    (work.workdir / "attempts").unlink()
    with pytest.raises(engine.ShardError, match="ConnectionResetError: the file server hung up"):
        work.map_shards("shout", shout, tasks, {"works_at": 9})
    assert (work.workdir / "attempts").read_text() == "x" * jobs.ATTEMPTS


def test_a_mistake_in_the_code_is_not_tried_again(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["broken"]), engine.Engine(tmp_path / "w")
    with pytest.raises(engine.ShardError, match="KeyError"):
        work.map_shards("shout", shout, tasks, {})


def test_what_a_library_says_of_a_user_s_file_is_told_in_one_sentence(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["odd"]), engine.Engine(tmp_path / "w")
    table = tmp_path / "in/0.parquet"
    table.write_text("odd")
    told = r"in/0.parquet cannot be read \(a column of text is none"
    with pytest.raises(errors.BadInput, match=told):
        work.map_shards("shout", shout, [engine.Task("0", (table,))], {})
    # Of what these libraries do not read, or a stage wrote, it is a mistake in the code.
    for wrong in (tasks, make_tasks(tmp_path / "w/in", ["odd"])):
        with pytest.raises(engine.ShardError, match="ArrowInvalid"):
            work.map_shards("shout", shout, wrong, {})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_shard_goes_into_quarantine_while_the_budget_lasts(tmp_path, workers):
    words = ["one", "bad", "two", "broken", "three", "four", "five", "six"]
    tasks = make_tasks(tmp_path / "in", words)
    with pytest.raises((errors.BadInput, engine.ShardError)):  # one of eight is allowed, not two
        engine.Engine(tmp_path / "w", workers, failure_budget=0.12).map_shards(
            "shout", shout, tasks, {}
        )
    work = engine.Engine(tmp_path / "w", workers, failure_budget=0.25)
    manifests = work.map_shards("shout", shout, tasks, {})
    assert [m["shard"] for m in manifests] == [f"0000{n}" for n in (0, 2, 4, 5, 6, 7)]
    assert sorted(work.quarantined) == ["shout/00001", "shout/00003"]
    note = json.loads((tmp_path / "w/quarantine/shout-00001.json").read_text())
    assert note["error"] == "word.txt holds the word bad: write another."
    assert note["inputs"] == [str(tmp_path / "in/1.txt")]
    rejects = pq.read_table(tmp_path / "w/rejects/shout-00001.parquet").to_pylist()
    assert rejects == [{"key": "1.txt", "stage": "shout", "reason": "quarantined"}]

    # The next run tries again; what works leaves the quarantine.
    (tmp_path / "in/1.txt").write_text("good")
    work = engine.Engine(tmp_path / "w", workers, failure_budget=0.25)
    assert len(work.map_shards("shout", shout, tasks, {})) == 7
    assert work.quarantined == {"shout/00003": 1}
    assert not (tmp_path / "w/quarantine/shout-00001.json").exists()
    assert not (tmp_path / "w/rejects/shout-00001.parquet").exists()


def test_quarantine_removes_what_an_earlier_run_wrote_and_names_the_keys(tmp_path):
    table = pa.table({"key": ["a", "b"]})
    pq.write_table(table, tmp_path / "in.parquet")
    tasks = [engine.Task("00000", (tmp_path / "in.parquet",)), *make_tasks(tmp_path / "in", "xyz")]
    tasks = [engine.Task(f"{n:05d}", task.inputs) for n, task in enumerate(tasks)]
    work = engine.Engine(tmp_path / "w", failure_budget=0.25)
    work.map_shards("keyed", keyed, tasks, {"fail": False})
    assert (tmp_path / "w/keyed/00000.txt").exists()
    work.map_shards("keyed", keyed, tasks, {"fail": True})
    assert not (tmp_path / "w/keyed/00000.txt").exists()
    rejects = pq.read_table(tmp_path / "w/rejects/keyed-00000.parquet").to_pylist()
    assert [row["key"] for row in rejects] == ["a", "b"]


def keyed(task, outputs, settings):
    if settings["fail"] and task.inputs[0].endswith(".parquet"):
        raise ValueError("unreadable")
    outputs.path(f"keyed/{task.name}.txt").write_text(task.name)
    return {"rows": 1}


def test_a_full_disk_is_told_at_once_and_finished_shards_stay(tmp_path):
    """A limit on the size of files stands for the full disk: writing fails in the same call."""
    script = textwrap.dedent(f"""
        import pathlib, resource
        from data_prep import engine
        from tests import test_engine_faults
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        from mofi_jax.common import errors, processes
        tasks = test_engine_faults.make_tasks(pathlib.Path({str(tmp_path / "in")!r}), ["a", "b"])
        work = engine.Engine({str(tmp_path / "w")!r}, failure_budget=0.9)
        work.map_shards("loud", test_engine_faults.loud, tasks[:1], {{"bytes": 1000}})
        try:
            work.map_shards("loud2", test_engine_faults.loud, tasks, {{"bytes": 1_000_000}})
        except errors.BadInput as error:
            print(error)
    """)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "takes no more data" in ran.stdout
    assert "make room" in ran.stdout
    assert [m["shard"] for m in engine.read_manifests(tmp_path / "w", "loud")] == ["00000"]
    assert not engine.read_manifests(tmp_path / "w", "loud2")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_killed_worker_costs_its_shard_alone(tmp_path):
    words = ["slow", "slow", *(f"word {n}" for n in range(6))]
    tasks = make_tasks(tmp_path / "in", words)
    work = engine.Engine(tmp_path / "w", 2)

    def kill():
        while not (begun := list((tmp_path / "w").glob("begun-*"))):
            time.sleep(0.01)
        os.kill(int(begun[0].name.removeprefix("begun-")), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    manifests = work.map_shards("shout", shout, tasks, {})
    killer.join()
    work.close()
    assert len(manifests) == 8
    clean = engine.Engine(tmp_path / "clean")
    assert [m["outputs"] for m in clean.map_shards("shout", shout, tasks, {})] == [
        m["outputs"] for m in manifests
    ]


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_worker_that_dies_as_it_starts_costs_its_shard(tmp_path, monkeypatch, accelerator):
    monkeypatch.setattr(processes, "begin_worker", functools.partial(os._exit, 1))
    tasks = make_tasks(tmp_path, ["one"])
    work = engine.Engine(tmp_path / "w", workers=2)
    with work, pytest.raises(engine.ShardError, match="shard 00000: its worker process died twice"):
        work.map_shards("shout", shout, tasks, {}, accelerator=accelerator)


def test_seconds_of_stages(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["one", "slow"]), engine.Engine(tmp_path / "w")
    work.map_shards("shout", shout, tasks, {})
    work.map_shards("loud", loud, tasks[:1], {"bytes": 10})
    found = engine.stage_seconds(work.workdir)
    assert list(found) == ["shout", "loud"]
    assert found["shout"]["shards"] == 2
    assert found["shout"]["seconds"] > 0.9
    work.map_shards("shout", shout, tasks, {})  # nothing to do: the times of the first run stay
    assert engine.stage_seconds(work.workdir) == found


def test_a_disk_that_is_full_when_the_manifest_is_written_is_told_too(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tasks, work = make_tasks(tmp_path / "in", ["one"]), engine.Engine(tmp_path / "w")
    monkeypatch.setattr(manifests.Ledger, "_append", full)
    monkeypatch.setattr(manifests.Ledger, "_tidy", full)
    with pytest.raises(errors.BadInput, match=r"^stage shout: .* takes no more data: make room"):
        work.map_shards("shout", shout, tasks, {})


_OUTPUT = {"path": "shout/00000.txt", "bytes": 4, "sha256": "0" * 64}
_MANIFEST = {"stage": "shout", "shard": "00000", "settings": {}, "inputs": [], "counts": {}}


@pytest.mark.parametrize(
    "line",
    [
        *(json.dumps(value) for value in (5, [1], "text", {}, None)),
        "[" * 100_000,
        '{"stage": "shout", "shard": "00000", "outputs"',
        *(
            json.dumps({**_MANIFEST, "outputs": [{**_OUTPUT, "path": path}]})
            for path in ("../victim", "/etc/passwd", "shout/../../victim", "./x", "", "..")
        ),
        json.dumps({**_MANIFEST, "outputs": [{**_OUTPUT, "bytes": "4"}]}),
        json.dumps({**_MANIFEST, "outputs": [5]}),
        json.dumps({**_MANIFEST, "outputs": [], "counts": {"rows": [1]}}),
        json.dumps({**_MANIFEST, "outputs": [], "stage": "other"}),
        json.dumps({"removed": [1]}),
    ],
)
def test_what_is_no_manifest_is_passed_over_and_deletes_nothing(tmp_path, line):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "w/shout").mkdir(parents=True)
    (tmp_path / "w/shout/manifests.jsonl").write_text(f"{line}\n")
    (tmp_path / "w/shout/.times.json").write_text("[" * 100_000)
    tasks, work = make_tasks(tmp_path / "in", ["one"]), engine.Engine(tmp_path / "w")
    assert engine.total_counts(work.map_shards("shout", shout, tasks, {})) != {}
    work.map_shards("shout", shout, [], {})
    assert (tmp_path / "victim").read_text() == "mine"


def spread(task, outputs, settings):
    for name in settings["names"][task.name]:
        outputs.path(f"spread/{name}.txt").write_text(f"{name} {settings['round']}")
    return {"files": 1}


@pytest.mark.parametrize("order", [("0", "1", "2"), ("2", "1", "0")])
def test_an_output_that_another_shard_takes_over_stays(tmp_path, order):
    work = engine.Engine(tmp_path)
    rounds = (
        {"0": "c", "1": "d", "2": "ab"},
        {"0": "d", "1": "a", "2": "bc"},
        {"0": "abc", "1": "d"},
    )
    for number, names in enumerate(rounds):
        tasks = [engine.Task(name, ()) for name in order if name in names]
        work.map_shards("spread", spread, tasks, {"names": names, "round": number})
        files = {path.name: path.read_text() for path in engine.listed(tmp_path / "spread", ".txt")}
        assert files == {f"{name}.txt": f"{name} {number}" for name in "abcd"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["rename", "removal"])
def test_after_a_kill_no_file_is_there_that_no_manifest_names(tmp_path, monkeypatch, moment):
    settings = {"names": {"0": "ab", "1": "c"}, "round": 0}
    tasks = [engine.Task(name, ()) for name in ("0", "1")]
    work = engine.Engine(tmp_path)
    if moment == "removal":
        work.map_shards("spread", spread, tasks, settings)
    left = [2]

    def die(original):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                raise Killed
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        patch.setattr(manifests.Ledger, "_tidy", lambda self: None)
        if moment == "rename":
            patch.setattr(os, "replace", die(os.replace))
            work.map_shards("spread", spread, tasks, settings)
        else:
            paths = type(work.workdir)
            patch.setattr(paths, "unlink", die(paths.unlink))
            work.map_shards("spread", spread, tasks[1:], settings)
    # The next run has other shards: what the first one left is not among their files.
    work.map_shards("spread", spread, tasks[1:], settings)
    assert [path.name for path in engine.listed(tmp_path / "spread", ".txt")] == ["c.txt"]
    work.map_shards("spread", spread, tasks, settings)
    assert len(engine.listed(tmp_path / "spread", ".txt")) == 3


def test_after_a_kill_an_older_file_of_the_same_size_is_made_again(tmp_path, monkeypatch):
    work = engine.Engine(tmp_path / "w")
    work.map_shards("shout", shout, make_tasks(tmp_path / "in", ["one"]), {})
    tasks = make_tasks(tmp_path / "in", ["two"])
    with monkeypatch.context() as patch:
        patch.setattr(manifests.Ledger, "_tidy", lambda self: None)
        patch.setattr(os, "replace", die_at_once)
        with pytest.raises(Killed):
            work.map_shards("shout", shout, tasks, {})
    work.map_shards("shout", shout, tasks, {})
    assert (tmp_path / "w/shout/00000.txt").read_text() == "TWO"


def die_at_once(*arguments):
    raise Killed


def test_a_manifest_that_a_kill_cut_in_the_middle_of_a_letter_costs_itself(tmp_path):
    tasks = make_tasks(tmp_path / "ü", ["one", "two"])
    engine.Engine(tmp_path / "w").map_shards("shout", shout, tasks[:1], {})
    path = tmp_path / "w/shout/manifests.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("ü".encode()) + 1])
    (tmp_path / "w/shout/.times.json").write_text('{"00000": {"files": 5}, "x": [], "y": 1}')
    (tmp_path / "w/quarantine").mkdir()
    (tmp_path / "w/quarantine/shout-x.json").write_text("[1]")
    made = engine.Engine(tmp_path / "w").map_shards("shout", shout, tasks, {})
    assert engine.read_manifests(tmp_path / "w", "shout") == made
    assert path.read_bytes().startswith(whole)
    assert engine.stage_seconds(tmp_path / "w")["shout"]["shards"] == 2
