"""Of pairs with the same key the first one stays. indexed/ -> unique/, pairs/."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence

from etils import epath

from data_prep import engine

# Grouped by hash first: eight bytes of each key are sorted out of core, and only the few keys whose
# hash occurs twice are compared in full.
_REPEATED = """
    WITH hashes AS (
        SELECT hash(key) AS h FROM read_parquet($files) GROUP BY h HAVING count(*) > 1
    )
    SELECT shard, place, key FROM (
        SELECT filename AS shard, file_row_number AS place, key,
               row_number() OVER (PARTITION BY key ORDER BY filename, file_row_number) AS occurrence
        FROM read_parquet($files, filename=true, file_row_number=true)
        WHERE hash(key) IN (SELECT h FROM hashes)
    )
    WHERE occurrence > 1 ORDER BY shard, place
"""


def run(indexed: Sequence[dict], work: engine.Engine) -> list[dict]:
    """Writes pairs/ without the pairs whose key came before, and the rejects of both stages.

    Args:
      indexed: the manifests of indexed/.
      work: the engine.

    Returns:
      The manifests; counts `pairs`, `rejected`, `duplicate_keys` and those of indexed/.
    """
    repeated = _find_repeated(indexed, work)
    tasks = []
    for manifest in indexed:
        name = manifest["shard"]
        files = [f"indexed/{name}{end}" for end in (".parquet", "-rejects.parquet", ".json")]
        if f"unique/{name}.parquet" in repeated:
            files.append(f"unique/{name}.parquet")
        tasks.append(engine.Task(name, tuple(os.fspath(work.workdir / file) for file in files)))
    return work.map_shards("pairs", _keep_first, tasks, {"version": 2}, keys=_keys_of_pairs)


def _find_repeated(indexed: Sequence[dict], work: engine.Engine) -> set[str]:
    """Writes unique/; returns the files that it consists of."""
    files = tuple(os.fspath(work.workdir / f"indexed/{m['shard']}.parquet") for m in indexed)
    if not files:
        return set()
    task = engine.Task("keys", files)
    manifests = work.map_shards("unique", _repeated, [task], {"version": 2}, keys=None)
    return {output["path"] for manifest in manifests for output in manifest["outputs"]}


def _repeated(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """unique/NNNNN.parquet: the rows of a shard (`place`) whose key came before, in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total, shard, writer = 0, None, None
    with engine.connect(outputs) as connection:
        query = engine.ask(connection, _REPEATED, {"files": list(task.inputs)})
        for batch in query.to_arrow_reader(1 << 16):
            table = pa.Table.from_batches([batch])
            ends = [*_changes(table["shard"].to_pylist()), len(table)]
            for start, end in itertools.pairwise([0, *ends]):
                if start == end:
                    continue
                name = os.path.basename(table["shard"][start].as_py())
                if name != shard:
                    if writer is not None:
                        writer.close()
                    shard, path = name, os.fspath(outputs.path(f"unique/{name}"))
                    writer = pq.ParquetWriter(path, table.drop_columns("shard").schema)
                writer.write_table(table.slice(start, end - start).drop_columns("shard"))
            total += len(table)
    if writer is not None:
        writer.close()
    return {"duplicate_keys": total}


def _changes(values: Sequence[str]) -> list[int]:
    return [i for i in range(1, len(values)) if values[i] != values[i - 1]]


def _keys_of_pairs(task: engine.Task) -> Iterator:
    """What a shard is without repeated keys; see `engine.Engine.map_shards`."""
    import numpy as np
    import pyarrow.compute as pc

    indexed, rejects, _, *repeated = task.inputs
    keys = engine.read_table(indexed, ["key"])["key"]
    for path in repeated:
        keep = np.ones(len(keys), bool)
        keep[engine.read_table(path, ["place"])["place"].to_numpy()] = False
        keys = keys.filter(keep)
    yield keys
    table = engine.read_table(rejects)
    yield table.filter(pc.not_equal(table["reason"], engine.DUPLICATE_KEY))["key"]


def _keep_first(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A shard of pairs/ without the rows that unique/ names."""
    import numpy as np
    import pyarrow.parquet as pq

    indexed, rejects_path, manifest, *repeated = task.inputs
    counts = json.loads(epath.Path(manifest).read_text())["counts"]
    rejects = [(row["key"], row["reason"]) for row in engine.read_table(rejects_path).to_pylist()]
    name = f"pairs/{task.name}.parquet"
    if repeated:
        table, drop = engine.read_table(indexed), engine.read_table(repeated[0])
        keep = np.ones(len(table), bool)
        keep[drop["place"].to_numpy()] = False
        outputs.write_table(name, table.filter(keep))
        rejects += [(key, engine.DUPLICATE_KEY) for key in drop["key"].to_pylist()]
        pairs = int(keep.sum())
    else:
        pairs = pq.read_metadata(indexed).num_rows
        try:
            os.link(indexed, outputs.path(name))  # for a billion pairs a copy is 200 GB
        except OSError:  # a file system without links
            shutil.copyfile(indexed, outputs.path(name))
    outputs.write_rejects(rejects)
    duplicates = sum(reason == engine.DUPLICATE_KEY for _, reason in rejects)
    return {"pairs": pairs, "rejected": len(rejects), "duplicate_keys": duplicates, **counts}
