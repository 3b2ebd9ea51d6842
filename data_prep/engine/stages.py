"""Runs stages over shards. Knows nothing of any stage; `jobs` has what a stage function gets.

Three primitives, and nothing else moves data from stage to stage:

    map_shards   function(task: Task, outputs: Outputs, settings: dict) -> counts, for each shard
    aggregate    SQL over parquet files, out of core (DuckDB); where there are many rows, over what
                 `partial` has made of runs of the files
    scatter      SQL whose rows say which bucket they go to; a later map_shards gathers the rows of
                 a run of buckets with `read_buckets`: how rows change shards in bounded memory

A function is module-level and pure: it reads `task.inputs`, writes every file under the name that
`outputs.path("folder/name")` gives, and returns its counts. Its bytes may depend on inputs and
settings alone: no clock, no worker id, no `hash()`. A stage that changes what it writes raises a
`version` in its settings.

A finished shard is never done again (`manifests`). A shard that cannot be made (`jobs.Failure`) is
put into quarantine while the failure budget lasts: the others go on without it, its keys stand in
rejects/, the reason in `W/quarantine/`, and the next run tries it again.

The work directory is on a file system where rename and flock work, and which all machines see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import typing
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from data_prep.engine import executors, jobs, manifests, progress, quarantine, relational
from data_prep.engine.jobs import Job, Made, StageFunction, Task


class Engine:
    """Runs stages in one work directory.

    Attributes:
      workdir: the work directory, absolute.
      quarantined: how many pairs were lost with each shard, "STAGE/NAME", that this run left out.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        workers: int = 1,
        *,
        executor: executors.Executor | None = None,
        failure_budget: float = 0.0,
    ):
        """
        Args:
          workdir: the work directory.
          workers: processes on this machine; never part of any output.
          executor: where jobs run instead.
          failure_budget: the share of a stage's shards that may go into quarantine.
        """
        self.workdir = epath.Path(os.path.abspath(os.fspath(workdir)))
        self.quarantined: dict[str, int] = {}
        self._executor = executor or executors.Local(workers)
        self._failure_budget = failure_budget
        self._done = 0  # stages in a row that were finished
        self._rejects: list[str] = []  # files of this run, later stages of an earlier run excepted

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind, *error) -> None:
        # Workers end with this process; after Ctrl-C nobody waits for their shards.
        if kind is not KeyboardInterrupt:
            self._tell_done(finished=False)
            self.close()

    def forget_rejects(self) -> None:
        """What was rejected so far is no pair: the key of one may be that of a pair."""
        self._rejects.clear()

    def close(self) -> None:
        """Ends worker processes; the next stage would start new ones."""
        self._executor.close()

    def _tell_done(self, *, finished: bool) -> None:
        """Counts stages that an earlier run finished, and says so before one that it did not."""
        self._done += finished
        if self._done and not finished:
            stages = "1 stage is" if self._done == 1 else f"{self._done} stages are"
            logging.info("%s done already", stages)
            self._done = 0

    def map_shards(
        self,
        stage: str,
        function: StageFunction,
        tasks: Sequence[Task],
        settings: Mapping[str, typing.Any],
        *,
        keys: quarantine.Keys | None = quarantine.keys_of_inputs,
        accelerator: bool = False,
        cpus: int = 1,
        memory: int = 2,
    ) -> list[dict]:
        """Runs `function` on every task that is not finished yet.

        Args:
          stage: name of the stage; its manifests are in `workdir/STAGE/manifests.jsonl`.
          function: see the docstring of this module.
          tasks: the shards, with distinct names. Shards that an earlier run finished and that are
            not among them are removed with their outputs, so that a reader may take all files it
            finds.
          settings: everything besides the inputs that the output depends on, as JSON values.
          keys: which pairs are lost with a task that goes into quarantine; those that have been
            rejected before are not counted again. None: what the stage makes is about all pairs,
            so that no task can be left out.
          accelerator: run in the process that owns the accelerator of a machine.
          cpus, memory: what a shard needs of a cluster's machine, memory in GiB.

        Returns:
          The manifests of the shards that are not in quarantine, in the order of the tasks: stage,
          shard, settings, inputs and outputs (path, bytes, sha256) and counts.

        Raises:
          BadInput: an input is missing, the disk is full, another run uses the work directory, or
            the function found input that cannot be used and the failure budget is spent. A budget
            above 0 is at least one shard, and never all shards.
          ShardError: the function failed and the budget is spent; names stage and shard.
        """
        settings = json.loads(json.dumps(dict(settings), sort_keys=True))
        names = [task.name for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"stage {stage}: two tasks of one name in {names}")
        folder = self.workdir / stage
        with contextlib.ExitStack() as stack:
            stack.enter_context(jobs.full_disk_told(f"stage {stage}", self.workdir))
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(manifests.locked(folder))
            ledger = stack.enter_context(manifests.Ledger(self.workdir, stage))
            shutil.rmtree(folder / ".tmp", ignore_errors=True)
            ledger.remove_others(set(names))
            quarantine.forget_strays(self.workdir, stage, set(names))
            found: dict[str, dict] = {}
            todo, left_out = [], []
            for task in tasks:
                seen = manifests.look_up(task.inputs)
                before, times = ledger.get(task.name), ledger.times(task.name)
                if manifests.unchanged(
                    self.workdir, before, task.inputs, settings, times, hash_changed=False
                ):
                    found[task.name] = before
                    continue
                job = Job(os.fspath(self.workdir), stage, function, task, settings, seen)
                job = dataclasses.replace(job, before=before, times=times, cpus=cpus, memory=memory)
                todo.append(job)
            self._tell_done(finished=bool(tasks) and not todo)
            allowed = math.ceil(self._failure_budget * len(tasks))
            allowed = min(allowed, len(tasks) - 1) if keys else 0
            with progress.show(stage, len(tasks), len(found)) as advance:
                for job, outcome in self._executor.run(todo, accelerator):
                    if isinstance(outcome, Made):
                        found[job.task.name] = outcome.manifest
                        if outcome.folder:
                            ledger.add(*outcome)
                            shutil.rmtree(outcome.folder, ignore_errors=True)
                        quarantine.release(self.workdir, outcome.manifest)
                        advance(outcome.manifest["counts"])
                        continue
                    if outcome.traceback:
                        logging.error("%s\n%s", job.where, outcome.traceback)
                    if not outcome.of_shard or not allowed:
                        raise outcome.error
                    allowed -= 1
                    left_out.append((job, outcome.error))
            for manifest in found.values():
                ledger.remember(manifest["shard"])
                written = (self.workdir / output["path"] for output in manifest["outputs"])
                self._rejects += [os.fspath(p) for p in written if p.parent.name == "rejects"]
            # Now, as what the others rejected is known only now.
            for job, error in left_out:
                ledger.remove(job.task.name)
                lost = quarantine.put(job, error, keys, self._rejects)
                self.quarantined[f"{stage}/{job.task.name}"] = lost
        return [found[name] for name in names if name in found]

    def aggregate(
        self,
        stage: str,
        queries: Mapping[str, str],
        tables: Mapping[str, Sequence[str | os.PathLike[str]]],
        parameters: Mapping[str, typing.Any] | None = None,
    ) -> dict:
        """Writes the results of SQL over parquet files to parquet files, in one task, out of core.

        Args:
          stage: name of the stage.
          queries: output file, relative to the work directory, to the SQL of its rows; ORDER BY
            makes them the same every time.
          tables: what $NAME in the SQL stands for: files for `read_parquet($NAME)`.
          parameters: further $NAMEs.

        Returns:
          The manifest; counts are the rows of each output, by its path without suffix.
        """
        settings = {
            "queries": dict(queries),
            "tables": {name: len(files) for name, files in tables.items()},
            "parameters": dict(parameters or {}),
        }
        # By name, as settings are kept.
        task = Task("all", tuple(path for _, files in sorted(tables.items()) for path in files))
        [manifest] = self.map_shards(stage, relational.aggregate, [task], settings, keys=None)
        return manifest

    def scatter(
        self,
        stage: str,
        sql: str,
        tasks: Sequence[Task],
        buckets: int,
        parameters: Mapping[str, typing.Any] | None = None,
        tables: Sequence[str] = ("files",),
        keys: quarantine.Keys | None = quarantine.keys_of_inputs,
    ) -> relational.Scattered:
        """Sorts the rows of each task's files into buckets.

        Args:
          stage: name of the stage; its files are `workdir/STAGE/NNNNN.parquet`, one for each task,
            with one row group for each bucket.
          sql: rows with a column `bucket`, an integer in [0, buckets), which is not kept.
          tasks: the inputs.
          buckets: how many.
          parameters: what further $NAMEs in the SQL stand for.
          tables: the $NAMEs of equal parts of a task's inputs, files for `read_parquet($NAME)`.
          keys: see `map_shards`.

        Returns:
          What to gather from.
        """
        settings = {"sql": sql, "buckets": buckets, "parameters": dict(parameters or {})}
        settings["tables"] = list(tables)
        written = self.map_shards(stage, relational.scatter, tasks, settings, keys=keys)
        files = [self.workdir / output["path"] for m in written for output in m["outputs"]]
        return relational.Scattered(tuple(map(os.fspath, files)), buckets)

    def to_shards(
        self,
        stage: str,
        sql: str,
        tasks: Sequence[Task],
        shards: Sequence[str | os.PathLike[str]],
        tables: Sequence[str] = ("files",),
        keys: quarantine.Keys | None = quarantine.keys_of_inputs,
    ) -> tuple[list[Task], dict]:
        """Scatters rows with columns `shard`, the name of one, and `row`, their order in it.

        Args:
          stage: name of the stage.
          sql: the rows.
          tasks, tables, keys: see `scatter`.
          shards: a table of each shard, whose file name is that of the shard.

        Returns:
          Tasks and settings for a stage whose function reads with `gather_shards`.
        """
        # Few shards in a bucket, which is what a gatherer holds; the same while some are added.
        buckets = min(relational.MOST_BUCKETS, 1 << (2 * len(shards)).bit_length())
        sql = f"SELECT *, {relational.bucket_of('shard')} AS bucket FROM ({sql})"
        found = self.scatter(stage, sql, tasks, buckets, {"buckets": buckets}, tables, keys)
        groups = relational.group_shards(shards, buckets)
        gathers = [
            Task(f"{bucket:05d}", (*found.files, *map(os.fspath, group)))
            for bucket, group in enumerate(groups)
            if group
        ]
        return gathers, {"spills": len(found.files)}

    def repeated(
        self,
        stage: str,
        sql: str,
        tables: Mapping[str, Sequence[str | os.PathLike[str]]],
        order: Sequence[str],
    ) -> tuple[list[Task], dict]:
        """Finds the rows whose value another row has that comes before them.

        Args:
          stage: the stages are STAGE_rows (scattered by value), STAGE_found and STAGE_shards.
          sql: rows value (text), key, shard, row (see `to_shards`).
          tables: what $NAME in the SQL stands for, a file of each shard each.
          order: the columns by which rows of one value come before one another.

        Returns:
          Tasks and settings for a stage whose function reads with `gather_shards`: row, key, first
          (the key of the very first row of that value).
        """
        shards = next(iter(tables.values()))
        tasks = relational.run_tasks(*tables.values())
        buckets = max(1, min(relational.MOST_BUCKETS, len(tasks)))
        sql = f"SELECT *, {relational.bucket_of('value')} AS bucket FROM ({sql})"
        parameters = {"buckets": buckets}
        scattered = self.scatter(
            f"{stage}_rows", sql, tasks, buckets, parameters, tuple(tables), keys=None
        )
        tasks = [Task(f"{bucket:05d}", scattered.files) for bucket in range(buckets)]
        settings = {"order": list(order)}
        found = self.map_shards(
            f"{stage}_found", relational.find_repeated, tasks, settings, keys=None
        )
        tasks = relational.run_tasks([self.workdir / m["outputs"][0]["path"] for m in found])
        sql = "SELECT * FROM read_parquet($files)"
        return self.to_shards(f"{stage}_shards", sql, tasks, shards, keys=None)

    def partial(
        self,
        stage: str,
        sql: str,
        tables: Mapping[str, Sequence[str | os.PathLike[str]]],
        parameters: Mapping[str, typing.Any] | None = None,
    ) -> tuple[str, ...]:
        """The results of SQL over each of a few runs of files, for an `aggregate` to combine.

        Args:
          stage: name of the stage and of the folder of its files.
          sql: rows; sums of whole numbers, so that their order changes nothing.
          tables: what $NAME in the SQL stands for, as many files each.
          parameters: further $NAMEs.

        Returns:
          A file of each run.
        """
        tasks = relational.run_tasks(*tables.values())
        sql = f"SELECT *, 0 AS bucket FROM ({sql})"
        return self.scatter(stage, sql, tasks, 1, parameters, tuple(tables), keys=None).files

    def fingerprint(self, stage: str, files: Sequence[str | os.PathLike[str]]) -> epath.Path:
        """Writes STAGE/fingerprint.txt, which says what the files hold and not where they lie."""
        task = Task("files", tuple(map(os.fspath, files)))
        self.map_shards(stage, _fingerprint, [task], {}, keys=None)
        return self.workdir / stage / "fingerprint.txt"


def total_counts(found: Sequence[dict]) -> dict[str, int]:
    """The sum of the counts of all manifests, keys in order of first appearance."""
    totals: dict[str, int] = {}
    for manifest in found:
        for key, value in manifest["counts"].items():
            totals[key] = totals.get(key, 0) + value
    return totals


def _fingerprint(task: Task, outputs: Outputs, settings: dict) -> dict[str, int]:
    digests = sorted((os.path.basename(path), manifests.sha256(path)) for path in task.inputs)
    fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    outputs.path(f"{outputs.stage}/fingerprint.txt").write_text(fingerprint + "\n")
    return {"files": len(digests)}
