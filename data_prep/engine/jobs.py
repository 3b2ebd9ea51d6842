"""One shard of one stage, run in whatever process: outputs, retries, and what can go wrong.

    here    temporary names -> fsync
    engine  manifest -> rename

so that a kill at any moment leaves either a finished shard or one that is done again, and two
processes that run the same shard at once write the same bytes to the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import time
import traceback
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from data_prep.engine import manifests
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

# Reading from a network file system fails now and then, and mostly works a second later.
ATTEMPTS = 3
FIRST_PAUSE = 0.5  # seconds, then twice as long

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READERS = ("pyarrow", "duckdb", "_duckdb")  # whose errors are mostly about a user's tables
# What no waiting changes.
_PERMANENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, *_FULL)


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

    def __init__(
        self,
        workdir: epath.Path,
        stage: str,
        shard: str,
        processes: int = 1,
        before: Mapping | None = None,
    ):
        """
        Args:
          workdir, stage, shard: whose outputs these are.
          processes: how many share this machine and its memory.
          before: the manifest of this shard, if it was made before with the same settings.
        """
        self.processes = processes
        self._before = before or {"inputs": [], "outputs": []}
        self.workdir = epath.Path(workdir)
        self.stage = stage
        self.shard = shard
        # Of its own for every attempt, also when two machines run the same shard.
        self._folder = self.workdir / stage / ".tmp" / f"{shard}-{uuid.uuid4().hex[:12]}"
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
        self.write_table(rejects_name(self.stage, self.shard), rejects_table(self.stage, rows))

    def kept(self, name: str, *inputs: str) -> epath.Path | None:
        """The output `name` of an earlier run of this shard, to take over what is in it.

        Args:
          name: relative to the work directory.
          inputs: those of the task that what is taken over depends on, beside the settings.

        Returns:
          None where the settings or one of `inputs` have changed, or the output has.
        """
        path = self.workdir / name
        entries = [*self._before["inputs"], *self._before["outputs"]]
        wanted = (*inputs, path)
        same = path.exists() and all(
            manifests.describe(self.workdir, file, file, self.stage) in entries for file in wanted
        )
        return path if same else None

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def temporary(self, name: str) -> epath.Path:
        return self._folder / name


def rejects_name(stage: str, shard: str) -> str:
    """The file of a shard's rejects, relative to the work directory."""
    return f"rejects/{stage}-{shard}.parquet"


def rejects_table(stage: str, rows: Sequence[tuple[str, str]]) -> pa.Table:
    """Rows (key, reason) as a table key, stage, reason."""
    import pyarrow as pa

    return pa.table(
        {
            "key": pa.array([key for key, _ in rows], pa.string()),
            "stage": pa.array([stage] * len(rows), pa.string()),
            "reason": pa.array([reason for _, reason in rows], pa.string()),
        }
    )


StageFunction = Callable[[Task, Outputs, dict], Mapping[str, int]]


def kept(read: Callable) -> Callable:
    """Makes read(files, ...) keep its last result in this process, until a file changes."""

    @functools.lru_cache(maxsize=1)
    def once(seen: tuple[tuple[int, int], ...], *arguments):
        return read(*arguments)

    @functools.wraps(read)
    def wrapped(files: Sequence[str], *arguments):
        seen = tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, files))
        return once(seen, tuple(files), *arguments)

    return wrapped


class ShardError(RuntimeError):
    """A stage function failed; the message names the stage and the shard."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task with all that another process needs to run it.

    Attributes:
      seen: what is known of the inputs' bytes.
      before: the manifest of an earlier run, and `times` when its files were as it says.
      processes: how many run jobs side by side on a machine, 0 for as many as it has processors; no
        output depends on it.
      cpus, memory: what it needs of a machine, memory in GiB.
    """

    workdir: str
    stage: str
    function: StageFunction
    task: Task
    settings: dict
    seen: dict[str, manifests.Seen]
    before: dict | None = None
    times: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    processes: int = 1
    cpus: int = 1
    memory: int = 2

    @property
    def where(self) -> str:
        return f"stage {self.stage}, shard {self.task.name}"


class Made(typing.NamedTuple):
    """A shard's manifest, how long it took, and the folder where its outputs wait for their names.

    There is no folder where an earlier run's outputs are still right.
    """

    manifest: dict
    seconds: float
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a shard could not be made.

    Attributes:
      error: what to raise: BadInput, or ShardError.
      of_shard: the shard is at fault, so that others may go on without it; not so where the disk
        is full or an input has gone.
      traceback: where in the stage function it happened, for the log.
    """

    error: Exception
    of_shard: bool
    traceback: str = ""


def attempt(job: Job) -> Made | Failure:
    """Runs a job, again a few times where reading or writing failed.

    Returns:
      The manifest, or what went wrong: exceptions cross process borders as values, because not
      every exception survives being pickled.
    """
    pause = FIRST_PAUSE
    for left in reversed(range(ATTEMPTS)):
        try:
            return _run(job)
        except _Missing as missing:
            return Failure(errors.BadInput(str(missing)), of_shard=False)
        except errors.BadInput as error:
            return Failure(errors.BadInput(str(error)), of_shard=True)
        except OSError as error:
            if _is_full(error):
                return Failure(_disk_full(job.where, job.workdir), of_shard=False)
            if error.errno in _PERMANENT or not left:
                return _told(job, error)
        except Exception as error:  # noqa: BLE001  a stage function may raise anything
            if _is_full(error):
                return Failure(_disk_full(job.where, job.workdir), of_shard=False)
            return _told(job, error)
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


class _Missing(Exception):
    pass


def _told(job: Job, error: Exception) -> Failure:
    inside, kind = job.workdir + os.sep, type(error)
    given = [path for path in job.task.inputs if not path.startswith(inside)]
    tables = [path for path in given if path.endswith(".parquet")]
    told: Exception = ShardError(f"{job.where}: {kind.__name__}: {error}")
    if tables and kind.__module__.partition(".")[0] in _READERS and "Memory" not in kind.__name__:
        why = " ".join(str(error).split())[:200]
        told = errors.BadInput(
            f"{job.where}: {' or '.join(tables[:3])} cannot be read ({why}): restore it from a"
            " copy, or name another one."
        )
    return Failure(told, of_shard=True, traceback=traceback.format_exc())


def _is_full(error: Exception) -> bool:
    """Whether the disk takes no more; libraries in C++ tell it in words of their own exceptions."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(code) in str(error) for code in _FULL)


@contextlib.contextmanager
def full_disk_told(where: str, workdir: epath.Path) -> Iterator[None]:
    """Raises BadInput in place of what says that the disk takes no more."""
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        raise _disk_full(where, os.fspath(workdir)) from error


def _disk_full(where: str, workdir: str) -> errors.BadInput:
    return errors.BadInput(
        f"{where}: {workdir} takes no more data: make room, or use a --workdir on a larger"
        " disk, and run the same command again; finished shards are kept."
    )


def _run(job: Job) -> Made:
    """Hashes, runs the function, brings its outputs to the disk."""
    import pyarrow as pa

    started = time.monotonic()
    workdir, task = epath.Path(job.workdir), job.task
    manifests.learn(job.seen)
    if manifests.unchanged(
        workdir, job.before, task.inputs, job.settings, job.times, hash_changed=True
    ):
        return Made(job.before, 0.0)
    with _missing_inputs():
        inputs = [manifests.describe(workdir, path, path, job.where) for path in task.inputs]
    before = job.before or {}
    same = before if before.get("settings") == job.settings else None
    outputs = Outputs(workdir, job.stage, task.name, job.processes or os.cpu_count() or 1, same)
    try:
        counts = job.function(task, outputs, job.settings)
        described = [
            manifests.describe(workdir, outputs.temporary(name), workdir / name, job.where)
            for name in outputs.names
        ]
        for name in outputs.names:
            manifests.sync(outputs.temporary(name))
    except BaseException:
        outputs.discard()
        raise
    pa.default_memory_pool().release_unused()  # it would keep a stage's peak for the next one
    manifest = {
        "stage": job.stage,
        "shard": task.name,
        "settings": job.settings,
        "inputs": inputs,
        "outputs": described,
        "counts": {key: int(value) for key, value in counts.items()},
    }
    return Made(manifest, time.monotonic() - started, os.fspath(outputs.temporary("")))


@contextlib.contextmanager
def _missing_inputs() -> Iterator[None]:
    try:
        yield
    except errors.BadInput as error:
        raise _Missing(str(error)) from None
