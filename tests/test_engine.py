"""The engine: resume, manifests, failures, kill -9, and bytes that do not depend on the workers."""

import hashlib
import multiprocessing.process
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types

import pytest

from data_prep import engine
from data_prep.engine import executors, manifests
from mofi_jax.common import errors

SETTINGS = {"version": 1, "suffix": "!"}


def shout(task, outputs, settings):
    """Upper-cases a text file; counts its calls in a file that is no output."""
    with open(outputs.workdir / "calls.txt", "a") as calls:
        calls.write(task.name + "\n")
    text = pathlib.Path(task.inputs[0]).read_text()
    if text == "broken":
        raise KeyError("no such word")
    if text == "bad":
        raise errors.BadInput("word.txt holds the word bad: write another.")
    if text == "die":
        os._exit(9)
    outputs.path(f"shout/{task.name}.txt").write_text(text.upper() + settings["suffix"])
    if text == "two":
        outputs.path(f"shout/{task.name}.extra").write_text("extra")
    outputs.write_rejects([(text, "too_loud")])
    return {"words": 1, "letters": len(text)}


def make_tasks(folder, words):
    folder.mkdir(exist_ok=True)
    tasks = []
    for number, word in enumerate(words):
        path = folder / f"{number}.txt"
        if not path.exists() or path.read_text() != word:
            path.write_text(word)
        tasks.append(engine.Task(f"{number:05d}", (path,)))
    return tasks


def calls(workdir):
    path = workdir / "calls.txt"
    names = sorted(path.read_text().split()) if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def digests(workdir, pattern="**/*"):
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workdir.glob(pattern))
        if path.is_file() and path.name not in ("calls.txt", ".lock", ".times.json")
    }


def test_outputs_manifest_and_counts(tmp_path):
    tasks = make_tasks(tmp_path / "in", ["one", "two"])
    work = tmp_path / "work"
    manifests = engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert (work / "shout/00001.txt").read_text() == "TWO!"
    assert engine.total_counts(manifests) == {"words": 2, "letters": 6}
    on_disk = engine.read_manifests(work, "shout")
    assert on_disk == manifests
    [on_disk, _] = on_disk
    assert on_disk["inputs"][0]["sha256"] == hashlib.sha256(b"one").hexdigest()
    for entry in on_disk["outputs"]:
        assert engine.sha256(work / entry["path"]) == entry["sha256"]
    assert not list(work.glob("shout/.tmp/*"))


def lengthen(task, outputs, settings):
    kept = outputs.kept("longer/0.txt", task.inputs[0])
    outputs.path("longer/0.txt").write_text((kept.read_text() if kept else "") + "x")
    return {}


def test_what_is_taken_over_depends_on_settings_inputs_that_are_named_and_itself(tmp_path):
    work, found = engine.Engine(tmp_path / "w"), []
    for model, rows, version in ("aa1", "ab1", "ac1", "ad2", "bd2", "be2", "bf2"):
        model, _ = make_tasks(tmp_path / "in", [model, rows])
        task = engine.Task("0", (*model.inputs, tmp_path / "in/1.txt"))
        if rows == "f":
            (tmp_path / "w/longer/0.txt").write_text("xy")
        work.map_shards("longer", lengthen, [task], {"version": version})
        found.append((tmp_path / "w/longer/0.txt").read_text())
    assert found == ["x", "xx", "xxx", "x", "x", "xx", "x"]


def test_finished_shards_are_skipped_and_changes_redone(tmp_path):
    words = ["one", "two", "three"]
    tasks, work = make_tasks(tmp_path / "in", words), tmp_path / "work"
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert calls(work) == ["00000", "00001", "00002"]
    first = digests(work)
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert calls(work) == []

    # Touched but equal: hashed, kept.
    os.utime(tmp_path / "in" / "0.txt", (1, 1))
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert calls(work) == []
    assert digests(work) == first

    # A changed input, a changed output of the same size, a lost output, other settings.
    tasks = make_tasks(tmp_path / "in", ["one", "TWO", "three"])
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert calls(work) == ["00001"]
    assert not (work / "shout/00001.extra").exists(), "an output no longer written is removed"
    (work / "shout/00002.txt").write_text("THREE?")
    (work / "shout/00000.txt").unlink()
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    assert calls(work) == ["00000", "00002"]
    assert (work / "shout/00002.txt").read_text() == "THREE!"
    engine.Engine(work).map_shards("shout", shout, tasks, {**SETTINGS, "suffix": "?"})
    assert calls(work) == ["00000", "00001", "00002"]


def test_shards_without_a_task_are_removed(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["one", "two"]), tmp_path / "work"
    engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)
    (work / "shout/notes.json").write_text('{"mine": 1}')
    engine.Engine(work).map_shards("shout", shout, tasks[:1], SETTINGS)
    left = set(digests(work))
    assert left == {
        "shout/00000.txt",
        "shout/manifests.jsonl",
        "shout/notes.json",
        "rejects/shout-00000.parquet",
    }


def test_workers_do_not_change_a_byte(tmp_path):
    words = ["one", "two", "three", "four", "five"]
    tasks = make_tasks(tmp_path / "in", words)
    for workers in (1, 2):
        engine.Engine(tmp_path / f"w{workers}", workers).map_shards("shout", shout, tasks, SETTINGS)
    assert digests(tmp_path / "w1") == digests(tmp_path / "w2")
    assert len(calls(tmp_path / "w2")) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_names_stage_and_shard_and_keeps_the_rest(tmp_path, workers):
    tasks, work = make_tasks(tmp_path / "in", ["one", "broken"]), tmp_path / "work"
    with pytest.raises(engine.ShardError, match=r"stage shout, shard 00001: KeyError.*such word"):
        engine.Engine(work, workers).map_shards("shout", shout, tasks, SETTINGS)
    assert [m["shard"] for m in engine.read_manifests(work, "shout")] in (["00000"], [])
    calls(work)
    tasks = make_tasks(tmp_path / "in", ["one", "fixed"])
    engine.Engine(work, workers).map_shards("shout", shout, tasks, SETTINGS)
    assert "00001" in calls(work)
    assert (work / "shout/00001.txt").read_text() == "FIXED!"


def test_bad_input_passes_through_processes(tmp_path):
    tasks = make_tasks(tmp_path / "in", ["one", "bad"])
    with pytest.raises(errors.BadInput, match=r"word\.txt holds the word bad"):
        engine.Engine(tmp_path / "work", 2).map_shards("shout", shout, tasks, SETTINGS)


def name_process(task, outputs, settings):
    outputs.path(f"{outputs.stage}/{task.name}.txt").write_text(str(os.getpid()))
    return {"rows": 1}


def test_one_other_process_owns_the_accelerator_and_keeps_its_model(tmp_path, monkeypatch):
    # A socket there could not have a name: those end at 107 bytes.
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(os.environ, "TMPDIR", str(long))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    tasks = [engine.Task(f"{number}", ()) for number in range(3)]
    with engine.Engine(tmp_path, 2) as work:
        for stage in ("model", "other", "model2"):
            work.map_shards(stage, name_process, tasks, {}, accelerator=stage != "other")
    owners = {p.read_text() for s in ("model", "model2") for p in (tmp_path / s).glob("*.txt")}
    workers = {path.read_text() for path in (tmp_path / "other").glob("*.txt")}
    assert len(owners) == 1
    assert not owners & workers
    assert str(os.getpid()) not in owners | workers


_TOGETHER = threading.Barrier(2)


def wait_for_another(task, outputs, settings):
    _TOGETHER.wait(60)
    return name_process(task, outputs, settings)


def test_the_owner_of_the_accelerator_works_on_two_shards_at_once(tmp_path):
    tasks = [engine.Task(f"{number}", ()) for number in range(4)]
    with engine.Engine(tmp_path, 2) as work:
        work.map_shards("model", wait_for_another, tasks, {}, accelerator=True)
    assert len({path.read_text() for path in (tmp_path / "model").glob("*.txt")}) == 1


def hang_or_fail(task, outputs, settings):
    if task.name == "hangs":
        threading.Event().wait(600)
    raise errors.BadInput("It fails.")


def test_what_ends_a_run_does_not_wait_for_the_accelerator(tmp_path):
    tasks = [engine.Task(name, ()) for name in ("hangs", "fails")]
    with engine.Engine(tmp_path, 2) as work, pytest.raises(errors.BadInput, match="It fails"):
        work.map_shards("model", hang_or_fail, tasks, {}, accelerator=True)


def test_a_single_shard_leaves_the_driver_alone_too(tmp_path):
    with engine.Engine(tmp_path, 2) as work:
        work.map_shards("alone", name_process, [engine.Task("0", ())], {})
    assert (tmp_path / "alone/0.txt").read_text() != str(os.getpid())


def test_jobs_go_to_whoever_is_idle():
    """Two senders, the second of which never ends before the first has done all it got."""
    sent = []

    class Cluster:
        exceptions = types.SimpleNamespace(RayError=RuntimeError)

        def wait(self, references, num_returns):
            quick = [name for name in references if name[0] == "quick"]
            return (quick or references)[:1], []

        def get(self, reference):
            return {"done": reference}

    def sender(name):
        return lambda job: sent.append((name, job)) or (name, job)

    ray = object.__new__(executors.Ray)
    ray._ray = Cluster()
    done = list(ray._collect(range(10), [sender("quick"), sender("slow")], each=2))
    assert sorted(job for job, _ in done) == list(range(10))
    assert [name for name, _ in sent].count("slow") == 2


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_worker_that_dies_is_told(tmp_path, accelerator):
    tasks = make_tasks(tmp_path / "in", ["die", "die"])
    with pytest.raises(
        engine.ShardError, match=r"shout, shard 0000\d: its worker process died twice"
    ):
        engine.Engine(tmp_path / "work", 2).map_shards(
            "shout", shout, tasks, SETTINGS, accelerator=accelerator
        )


def test_a_missing_input_is_told(tmp_path):
    tasks = make_tasks(tmp_path / "in", ["one"])
    (tmp_path / "in" / "0.txt").unlink()
    with pytest.raises(errors.BadInput, match=r"shard 00000: the file .*0\.txt is missing"):
        engine.Engine(tmp_path / "work").map_shards("shout", shout, tasks, SETTINGS)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    tasks, work = make_tasks(tmp_path / "in", ["one"]), tmp_path / "work"
    (work / "shout").mkdir(parents=True)
    with (
        manifests.locked(work / "shout"),
        pytest.raises(errors.BadInput, match="in use by another run: wait for it"),
    ):
        engine.Engine(work).map_shards("shout", shout, tasks, SETTINGS)


def dawdle(task, outputs, settings):
    """Writes its output in three pieces with a pause between them."""
    with open(outputs.path(f"dawdle/{task.name}.txt"), "w") as file:
        for piece in ("a", "b", "c"):
            file.write(piece * 1000)
            file.flush()
            time.sleep(0.05)
    outputs.path(f"dawdle/{task.name}.second").write_text(task.name)
    return {"files": 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_the_same_command_ends_in_the_same_bytes(tmp_path, workers):
    tasks = make_tasks(tmp_path / "in", [str(number) for number in range(6)])
    engine.Engine(tmp_path / "whole").map_shards("dawdle", dawdle, tasks, SETTINGS)
    here = pathlib.Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(here.parent), str(here)]}
        import test_engine
        from data_prep import engine
        import pathlib
        if __name__ == "__main__":
            tasks = test_engine.make_tasks(pathlib.Path({str(tmp_path / "in")!r}), list("012345"))
            work = engine.Engine({str(tmp_path / "killed")!r}, {workers})
            work.map_shards("dawdle", test_engine.dawdle, tasks, {SETTINGS})
        """)
    )
    work = tmp_path / "killed"
    for goal in (1, 3):  # kill in the middle of the first shard, and when some are finished
        process = subprocess.Popen(
            [sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            started = len(list(work.glob("dawdle/.tmp/*/dawdle/*.txt")))
            if started and started + len(engine.read_manifests(work, "dawdle")) >= goal:
                break
            time.sleep(0.005)
        assert process.poll() is None, "finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        # The workers of the dead process end by themselves.
        while _members(process.pid):
            time.sleep(0.02)
    assert len(engine.read_manifests(work, "dawdle")) < 6
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert digests(work) == digests(tmp_path / "whole")


def _members(session: int) -> list[int]:
    """The processes, other than zombies, of a session."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
