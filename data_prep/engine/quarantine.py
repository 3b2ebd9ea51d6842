"""Quarantine: shards that could not be made, whose pairs the run goes on without.

    quarantine/STAGE-NAME.json         why, from which inputs, and how many pairs are lost
    rejects/STAGE-NAME.parquet         the keys of these pairs, with the reason "quarantined"

Every pair that goes stands in rejects/ once. What is lost with a shard are the pairs of its inputs
that no stage of this run rejected before. The next run tries the shard again.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import logging
from etils import epath

from data_prep.engine import manifests, relational
from data_prep.engine.jobs import Job, Task, rejects_name, rejects_table

if typing.TYPE_CHECKING:
    import pyarrow as pa

REASON = "quarantined"
# Another pair of this key is still there.
DUPLICATE_KEY = "duplicate_key"

# The keys of a task, a piece at a time; a key may come twice.
Keys = Callable[[Task], Iterator["pa.ChunkedArray"]]


def keys_of_inputs(task: Task) -> Iterator[pa.ChunkedArray]:
    """The column `key` of all inputs that have one."""
    import pyarrow.parquet as pq

    for path in task.inputs:
        try:
            if path.endswith(".parquet") and "key" in pq.read_schema(path).names:
                yield relational.read_table(path, ["key"])["key"]
        except (OSError, ValueError) as error:  # it may be what cannot be read
            logging.warning("%s: its keys cannot be read (%s)", path, error)


def put(job: Job, error: Exception, keys: Keys, rejects: list[str]) -> int:
    """Puts a shard into quarantine.

    Args:
      job: what failed.
      error: why.
      keys: of its task.
      rejects: files of rejects of this run; gets this shard's.

    Returns:
      How many pairs are lost.
    """
    import pyarrow.parquet as pq

    stage, shard, workdir = job.stage, job.task.name, epath.Path(job.workdir)
    path = workdir / rejects_name(stage, shard)
    lost = _lost(job.task, keys, [other for other in rejects if other != os.fspath(path)])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rejects_table(stage, [(key, REASON) for key in lost])
    pq.write_table(table, os.fspath(path), compression="zstd")
    rejects.append(os.fspath(path))
    logging.warning("%s/%s is left out with %d pairs: %s", stage, shard, len(lost), error)
    note = {"stage": stage, "shard": shard, "error": str(error), "pairs": len(lost)}
    note["inputs"] = list(job.task.inputs)
    note_path = _note(workdir, stage, shard)
    note_path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(note, indent=1, ensure_ascii=False) + "\n"
    manifests.write_durably(note_path, text.encode())
    return len(lost)


def _lost(task: Task, keys: Keys, rejects: Sequence[str]) -> list[str]:
    """The keys of a task that are not in `rejects`, in order, each once."""
    import pyarrow.compute as pc

    found, known = dict[str, None](), False
    try:
        for column in keys(task):
            found.update(dict.fromkeys(column.to_pylist()))
            known = True
    except Exception as error:  # noqa: BLE001  the same of a stage's own keys
        logging.warning("%s: its keys cannot be read (%s)", task.name, error)
        known = False
    if not found and not known:  # whatever it holds: its name at least
        found = dict.fromkeys(os.path.basename(path) for path in task.inputs[:1])
    for path in rejects:
        table = relational.read_table(path, ["key", "reason"])
        table = table.filter(pc.not_equal(table["reason"], DUPLICATE_KEY))
        for key in table["key"].filter(pc.is_in(table["key"], _array(found))).to_pylist():
            found.pop(key, None)
    return list(found)


def _array(keys: dict[str, None]):
    import pyarrow as pa

    return pa.array(list(keys), pa.string())


def release(workdir: epath.Path, manifest: dict) -> None:
    """Forgets that an earlier run had put a shard, now made, into quarantine."""
    stage, shard = manifest["stage"], manifest["shard"]
    rejects = rejects_name(stage, shard)
    kept = rejects in [output["path"] for output in manifest["outputs"]]
    _forget(workdir, stage, shard, None if kept else rejects)


def forget_strays(workdir: epath.Path, stage: str, names: set[str]) -> None:
    """Forgets shards in quarantine that a stage does not have any more."""
    for path in relational.listed(workdir / "quarantine", ".json"):
        note = manifests.read_json(path) or {}
        if note.get("stage") == stage and note.get("shard") not in names:
            shard = path.stem.removeprefix(f"{stage}-")
            _forget(workdir, stage, shard, rejects_name(stage, shard))


def _forget(workdir: epath.Path, stage: str, shard: str, rejects: str | None) -> None:
    note = _note(workdir, stage, shard)
    if note.exists():
        note.unlink()
        if rejects:
            (workdir / rejects).unlink(missing_ok=True)


def _note(workdir: epath.Path, stage: str, shard: str) -> epath.Path:
    return workdir / "quarantine" / f"{stage}-{shard}.json"
