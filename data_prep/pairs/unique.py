"""Of pairs with the same key the first one stays, by shard and place. indexed/ -> pairs/.

unique/     NAME.parquet   the rows of each shard of indexed/ whose key came before, if any
pairs/      NAME.parquet   shards of about `rows_per_shard` rows, each of a run of indexed/'s
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from data_prep import engine

_MOST = 4  # times `rows_per_shard`: a run of shards ends here whatever their names

COUNTS = b"counts"  # of a shard of indexed/, in the metadata of its rejects

_KEYS = """
    SELECT key AS value, key, parse_filename(filename, true) AS shard, file_row_number AS "row"
    FROM read_parquet($files, filename = true, file_row_number = true)
"""


def run(indexed: Sequence[dict], work: engine.Engine, rows_per_shard: int) -> list[dict]:
    """Writes pairs/ without the pairs whose key came before, and the rejects of both stages.

    Args:
      indexed: the manifests of indexed/.
      work: the engine.
      rows_per_shard: about as many rows has a shard of pairs/.

    Returns:
      The manifests; counts `pairs`, `rejected`, `duplicate_keys` and those of indexed/.
    """
    rows = {manifest["shard"]: manifest["counts"]["usable"] for manifest in indexed}
    repeated = _find_repeated(rows, work) if rows else set()
    tasks = []
    for names in runs_of(rows, rows_per_shard):
        files = []
        for name in names:
            files += [f"indexed/{name}{end}" for end in (".parquet", "-rejects.parquet")]
        files += [f"unique/{name}.parquet" for name in names if name in repeated]
        tasks.append(engine.Task(names[0], tuple(work.workdir / file for file in files)))
    return work.map_shards("pairs", _keep_first, tasks, {"version": 3}, keys=_keys_of_pairs)


def runs_of(rows: Mapping[str, int], size: int) -> list[list[str]]:
    """Cuts shards, sorted by name, into runs of about `size` rows.

    Whether a run ends with a shard depends on that shard's name and rows alone, so that one more
    shard changes its own run and no other; only runs of `_MOST` times the size end anyway.

    Args:
      rows: of each shard.
      size: rows of a run.
    """
    runs, run, total = [], [], 0
    for name, count in sorted(rows.items()):
        run.append(name)
        total += count
        draw = int(hashlib.md5(name.encode()).hexdigest()[:8], 16) / 2**32
        if draw < count / size or total >= _MOST * size:
            runs.append(run)
            run, total = [], 0
    return [*runs, run] if run else runs


# ------------------------------------------------------------------------------------ repeated keys


def _find_repeated(rows: Mapping[str, int], work: engine.Engine) -> set[str]:
    """Writes unique/; returns the shards that it has a file of."""
    files = [work.workdir / f"indexed/{name}.parquet" for name in sorted(rows)]
    tasks, settings = work.repeated("key", _KEYS, {"files": files}, ["shard", "row"])
    settings["version"] = 4
    # Nothing is lost with a key that is not looked at, but that it is unique.
    written = work.map_shards("unique", _write_repeated, tasks, settings, keys=None)
    return {epath.Path(o["path"]).stem for manifest in written for o in manifest["outputs"]}


def _write_repeated(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    total = 0
    for shard, table in engine.gather_shards(task, settings):
        if len(table):
            outputs.write_table(f"unique/{shard}.parquet", table)
            total += len(table)
    return {"duplicate_keys": total}


# -------------------------------------------------------------------------------------------- pairs


def _parts(task: engine.Task) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """Of each shard of indexed/: its table, its rejects, and which rows stay."""
    import pyarrow.parquet as pq

    repeated = {epath.Path(p).stem: p for p in task.inputs if epath.Path(p).parent.name == "unique"}
    indexed = task.inputs[: len(task.inputs) - len(repeated)]
    for table, rejects in zip(indexed[::2], indexed[1::2], strict=True):
        keep, path = None, repeated.get(epath.Path(table).stem)
        if path is not None:
            keep = np.ones(pq.read_metadata(table).num_rows, bool)
            keep[engine.read_table(path, ["row"])["row"].to_numpy()] = False
        yield table, rejects, keep


def _keys_of_pairs(task: engine.Task) -> Iterator:
    """Both kinds of samples, without repeated keys; see `engine.Engine.map_shards`."""
    import pyarrow.compute as pc

    for path, rejects, keep in _parts(task):
        keys = engine.read_table(path, ["key"])["key"]
        yield keys if keep is None else keys.filter(keep)
        table = engine.read_table(rejects)
        yield table.filter(pc.not_equal(table["reason"], engine.DUPLICATE_KEY))["key"]


def _keep_first(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A shard of pairs/ without the rows that unique/ names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts, rejects, found = list(_parts(task)), [], []
    for _, path, _ in parts:
        table = engine.read_table(path)
        found.append({"counts": json.loads(table.schema.metadata[COUNTS])})
        rejects += [(row["key"], row["reason"]) for row in table.to_pylist()]
    counts = engine.total_counts(found)
    counts.pop("usable")
    target = os.fspath(outputs.path(f"pairs/{task.name}.parquet"))
    if len(parts) == 1 and parts[0][2] is None:
        try:
            os.link(parts[0][0], target)  # for a billion pairs a copy is 200 GB
        except OSError:  # a file system without links
            shutil.copyfile(parts[0][0], target)
    else:
        with pq.ParquetWriter(target, pq.read_schema(parts[0][0]), compression="zstd") as writer:
            for path, _, keep in parts:
                table = engine.read_table(path)
                if keep is not None:
                    gone = table["key"].filter(pa.array(~keep)).to_pylist()
                    rejects += [(key, engine.DUPLICATE_KEY) for key in gone]
                    table = table.filter(keep)
                if len(table):
                    writer.write_table(table)
    outputs.write_rejects(rejects)
    duplicates = sum(reason == engine.DUPLICATE_KEY for _, reason in rejects)
    pairs = pq.read_metadata(target).num_rows
    return {"pairs": pairs, "rejected": len(rejects), "duplicate_keys": duplicates, **counts}
