"""Runs a stage over shards: local processes, manifests, resume. Knows nothing of any stage.

A stage is a module-level function

    function(task: Task, outputs: Outputs, settings: dict) -> dict[str, int]

that reads `task.inputs`, writes every file under the name that `outputs.path("folder/name")` gives,
and returns its counts. Its output bytes may depend on the inputs and the settings alone: no clock,
no worker id, no `hash()`. The engine does the rest, shard by shard:

    temporary names -> fsync -> rename -> manifest `W/STAGE/NAME.json`, written last

so that a kill at any moment leaves either a finished shard or one that is done again. A manifest
holds the sha256 of all inputs and outputs, the settings and the counts; a shard whose manifest
matches is skipped. Beside it lies `.NAME.stat.json` with sizes and modification times: while these
are unchanged nothing is hashed again, so that a finished stage run again costs a few stat calls. A
shard whose files were touched or copied is hashed and, where the bytes are the same, kept.

The work directory is on a local or mounted file system: rename and flock have to work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import tqdm
from absl import logging
from etils import epath

from mofi_jax import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

# A file as last seen: size in bytes, modification time in ns, sha256 in hex.
_Seen = tuple[int, int, str]


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard of a stage: its name (`"00000"`) and all files that its outputs depend on.

    Inputs are paths as strings; those inside the work directory are recorded relative to it.
    """

    name: str
    inputs: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(os.fspath(path) for path in self.inputs))


class Outputs:
    """Where a stage function writes: temporary names inside the work directory."""

    def __init__(self, workdir: epath.Path, stage: str, shard: str):
        self.workdir = epath.Path(workdir)
        self.stage = stage
        self.shard = shard
        self._folder = self.workdir / stage / ".tmp" / f"{shard}-{os.getpid()}"
        self.names: list[str] = []

    def path(self, name: str) -> epath.Path:
        """The temporary path of the output `name`, relative to the work directory."""
        if name not in self.names:
            self.names.append(name)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes the parquet file `name` (zstd)."""
        import pyarrow.parquet as pq

        pq.write_table(table, os.fspath(self.path(name)), compression="zstd")

    def write_rejects(self, rows: Sequence[tuple[str, str]]) -> None:
        """Writes `rejects/STAGE-SHARD.parquet` from rows (key, reason), also from none."""
        import pyarrow as pa

        table = pa.table(
            {
                "key": pa.array([key for key, _ in rows], pa.string()),
                "stage": pa.array([self.stage] * len(rows), pa.string()),
                "reason": pa.array([reason for _, reason in rows], pa.string()),
            }
        )
        self.write_table(f"rejects/{self.stage}-{self.shard}.parquet", table)

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def temporary(self, name: str) -> epath.Path:
        return self._folder / name


StageFunction = Callable[[Task, Outputs, dict], Mapping[str, int]]


class ShardError(RuntimeError):
    """A stage function failed; the message names the stage and the shard."""


class Engine:
    """Runs stages in one work directory.

    Attributes:
      workdir: the work directory, absolute.
      workers: processes for the stages that may run in several; never part of any output.
    """

    def __init__(self, workdir: epath.PathLike, workers: int = 1):
        self.workdir = epath.Path(os.path.abspath(os.fspath(workdir)))
        self.workers = workers

    def map_shards(
        self,
        stage: str,
        function: StageFunction,
        tasks: Sequence[Task],
        settings: Mapping[str, typing.Any],
        *,
        here: bool = False,
    ) -> list[dict]:
        """See `map_shards`; with `here`, in this process whatever the number of workers."""
        return map_shards(
            stage, function, tasks, self.workdir, settings, 1 if here else self.workers
        )


def map_shards(
    stage: str,
    function: StageFunction,
    tasks: Sequence[Task],
    workdir: str | os.PathLike[str],
    settings: Mapping[str, typing.Any],
    workers: int = 1,
) -> list[dict]:
    """Runs `function` on every task that is not finished yet.

    Args:
      stage: name of the stage; manifests are written to `workdir/STAGE/`.
      function: module-level function, see the docstring of this module.
      tasks: the shards, with distinct names. Shards that an earlier run finished and that are not
        among them are removed with their outputs, so that a reader may take all files it finds.
      workdir: the work directory.
      settings: everything besides the inputs that the output depends on, as plain JSON values. A
        stage that changes what it writes raises a `version` in it.
      workers: processes; 1 runs in this process. Never part of the output.

    Returns:
      The manifests in the order of the tasks: stage, shard, settings, inputs and outputs (path,
      bytes, sha256) and counts.

    Raises:
      BadInput: an input is missing, or another run uses the work directory.
      ShardError: the function failed; names stage and shard.
    """
    workdir = epath.Path(workdir)
    settings = json.loads(json.dumps(dict(settings), sort_keys=True))
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"stage {stage}: two tasks of one name in {names}")
    (workdir / stage).mkdir(parents=True, exist_ok=True)
    with _locked(workdir / stage):
        shutil.rmtree(workdir / stage / ".tmp", ignore_errors=True)
        _remove_strays(workdir, stage, set(names))
        manifests: dict[str, dict] = {}
        jobs = []
        for task in tasks:
            seen = _look_up(task.inputs)
            manifest = _finished(workdir, stage, task, settings, hash_changed=False)
            if manifest is None:
                jobs.append(_Job(os.fspath(workdir), stage, function, task, settings, seen))
            else:
                manifests[task.name] = manifest
        if tasks and not jobs:
            logging.info("%s: all %d shards are done already", stage, len(tasks))
        for name, manifest in _execute(jobs, stage, workers, done=len(manifests)):
            manifests[name] = manifest
        for manifest in manifests.values():
            _remember(workdir, stage, manifest)
    return [manifests[name] for name in names]


def total_counts(manifests: Sequence[dict]) -> dict[str, int]:
    """The sum of the counts of all shards, keys in order of first appearance."""
    totals: dict[str, int] = {}
    for manifest in manifests:
        for key, value in manifest["counts"].items():
            totals[key] = totals.get(key, 0) + value
    return totals


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: epath.Path, data: bytes) -> None:
    """Writes a file so that after a kill or power cut it is there in full or not at all."""
    temporary = path.parent / f".{path.name}.tmp"  # one name: a kill leaves nothing behind for long
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


# ------------------------------------------------------------------------------------- one shard


@dataclasses.dataclass(frozen=True)
class _Job:
    workdir: str
    stage: str
    function: StageFunction
    task: Task
    settings: dict
    seen: dict[str, _Seen]


def _run_job(job: _Job) -> dict:
    """Runs in a worker: hashes, runs the function, renames its outputs, writes the manifest."""
    workdir = epath.Path(job.workdir)
    _known.update(job.seen)
    kept = _finished(workdir, job.stage, job.task, job.settings, hash_changed=True)
    if kept is not None:
        return kept
    where = f"stage {job.stage}, shard {job.task.name}"
    inputs = [_describe(workdir, path, path, where) for path in job.task.inputs]
    before = _read_json(workdir / job.stage / f"{job.task.name}.json") or {}
    outputs = Outputs(workdir, job.stage, job.task.name)
    try:
        counts = job.function(job.task, outputs, job.settings)
        described = []
        for name in outputs.names:
            described.append(_describe(workdir, outputs.temporary(name), workdir / name, where))
        for name in outputs.names:
            _publish(outputs.temporary(name), workdir / name)
    except errors.BadInput:
        raise
    except Exception as error:
        raise ShardError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        outputs.discard()
    manifest = {
        "stage": job.stage,
        "shard": job.task.name,
        "settings": job.settings,
        "inputs": inputs,
        "outputs": described,
        "counts": {key: int(value) for key, value in counts.items()},
    }
    for old in before.get("outputs", []):
        if old["path"] not in outputs.names:
            (workdir / old["path"]).unlink(missing_ok=True)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_durably(workdir / job.stage / f"{job.task.name}.json", text.encode())
    _remember(workdir, job.stage, manifest)
    return manifest


def _publish(temporary: epath.Path, final: epath.Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def _sync_folder(folder: epath.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------- what is finished already

# Hashes known to this process, by absolute path. Outputs of one stage are inputs of the next: with
# this no file is hashed twice in one run.
_known: dict[str, _Seen] = {}


def _stat(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _look_up(paths: Sequence[str]) -> dict[str, _Seen]:
    absolute = (os.path.abspath(path) for path in paths)
    return {path: _known[path] for path in absolute if path in _known}


def _hash(path: str | os.PathLike[str]) -> str | None:
    """The sha256 of a file, not read again while size and time are as known; None: no file."""
    absolute = os.path.abspath(path)
    status = _stat(absolute)
    if status is None:
        return None
    known = _known.get(absolute)
    if known is None or known[:2] != status:
        known = _known[absolute] = (*status, sha256(absolute))
    return known[2]


def _record_path(workdir: epath.Path, path: str | os.PathLike[str]) -> str:
    absolute, root = os.path.abspath(path), os.path.abspath(workdir)
    return os.path.relpath(absolute, root) if absolute.startswith(root + os.sep) else absolute


def _describe(
    workdir: epath.Path, path: str | os.PathLike[str], name: str | os.PathLike[str], where: str
) -> dict:
    digest = _hash(path)
    if digest is None:
        raise errors.BadInput(
            f"{where}: the file {os.fspath(path)} is missing: restore it, or run the stage that"
            " writes it again."
        )
    size, _ = _stat(path)
    return {"path": _record_path(workdir, name), "bytes": size, "sha256": digest}


def _finished(
    workdir: epath.Path, stage: str, task: Task, settings: dict, hash_changed: bool
) -> dict | None:
    """The manifest of a shard whose inputs, settings and outputs are unchanged, or None."""
    manifest = _read_json(workdir / stage / f"{task.name}.json")
    if manifest is None or manifest.get("settings") != settings:
        return None
    if [entry["path"] for entry in manifest["inputs"]] != [
        _record_path(workdir, path) for path in task.inputs
    ]:
        return None
    stats = _read_json(workdir / stage / f".{task.name}.stat.json") or {}
    for entry in (*manifest["inputs"], *manifest["outputs"]):
        path = os.path.abspath(workdir / entry["path"])
        status = _stat(path)
        if status is None or status[0] != entry["bytes"]:
            return None
        if stats.get(entry["path"]) == list(status):
            _known[path] = (*status, entry["sha256"])
        known = _known.get(path)
        if (known is None or known[:2] != status) and not hash_changed:
            return None
        if _hash(path) != entry["sha256"]:
            return None
    return manifest


def _remember(workdir: epath.Path, stage: str, manifest: dict) -> None:
    """Notes sizes and times beside a manifest whose hashes were just verified."""
    stats = {}
    for entry in (*manifest["inputs"], *manifest["outputs"]):
        path = os.path.abspath(workdir / entry["path"])
        status = _stat(path)
        if status is not None:
            stats[entry["path"]] = status
            _known[path] = (*status, entry["sha256"])
    path = workdir / stage / f".{manifest['shard']}.stat.json"
    text = json.dumps(stats, sort_keys=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _read_json(path: epath.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # a stat note cut short by a kill: hashing tells whether the shard is good
        return None


def _remove_strays(workdir: epath.Path, stage: str, names: set[str]) -> None:
    for path in sorted((workdir / stage).glob("*.json")):
        if path.name.startswith(".") or path.stem in names:
            continue
        manifest = _read_json(path)
        if manifest is None or manifest.get("stage") != stage:
            continue
        logging.info("%s: removing shard %s, which has no input any more", stage, path.stem)
        path.unlink()  # first: without a manifest the outputs are nobody's
        (workdir / stage / f".{path.stem}.stat.json").unlink(missing_ok=True)
        for entry in manifest["outputs"]:
            (workdir / entry["path"]).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.BadInput(
                f"The folder {os.fspath(folder)} is in use by another run: wait for it, or name"
                " another --workdir."
            ) from error
        yield


def _execute(
    jobs: Sequence[_Job], stage: str, workers: int, done: int
) -> Iterator[tuple[str, dict]]:
    if not jobs:
        return
    progress = tqdm.tqdm(total=done + len(jobs), initial=done, desc=stage, unit="shard")
    with progress:
        if min(workers, len(jobs)) <= 1:
            for job in jobs:
                yield job.task.name, _run_job(job)
                progress.update()
            return
        futures: dict[concurrent.futures.Future, str] = {}
        try:
            futures |= {_pool(workers).submit(_run_job, job): job.task.name for job in jobs}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
                progress.update()
        except concurrent.futures.process.BrokenProcessPool as error:
            close_pool()
            raise ShardError(
                f"stage {stage}: a worker process died, most likely for want of memory: run again"
                " with fewer workers; finished shards are kept."
            ) from error
        finally:
            for future in futures:
                future.cancel()
            concurrent.futures.wait(futures)


_pools: dict[int, concurrent.futures.ProcessPoolExecutor] = {}  # one at most, by its size


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """The worker processes, kept from stage to stage: starting one costs a second.

    Spawned, because forking a process that holds threads (jax, grain, pyarrow) can deadlock.
    """
    if workers not in _pools:
        close_pool()
        _pools[workers] = concurrent.futures.ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_die_with_parent,
        )
    return _pools[workers]


def close_pool() -> None:
    """Ends the worker processes and gives back their memory; the next stage starts new ones."""
    while _pools:
        _pools.popitem()[1].shutdown()


def _die_with_parent() -> None:
    """Ends this worker when the parent is gone.

    A worker waits on a queue whose writing end it holds itself, so after kill -9 of the parent it
    would wait for ever.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
