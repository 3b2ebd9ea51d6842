"""The order of a data set: which pair goes into which shard, at which place.

Pairs are ordered by (md5(seed/key), key), which depends on nothing but the seed and the keys: not
on input order, workers or machine. The plan of an output shard holds everything of its records but
the picture, of which it holds the pointer, so that picture bytes are moved once and never sorted.

    ordered-DATASET/  scattered by the leading bits of the hash
    planned-DATASET/  manifests of
    plan-DATASET/     NNNNN.parquet  rows of a run of output shards, in order; a row group each
"""

from __future__ import annotations

import functools
import itertools
import os
import typing
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.filters import stage as filters_stage
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

# See `engine.split_evenly`.
_ROWS_PER_BUCKET = 20_000
_ROWS_PER_PLAN = 100_000  # a file for each output shard would be most of a work directory's files
_MOST_BUCKETS = 512
_MOST_SPILLS = 256

_HASHED = """
    SELECT *, ('0x' || left(hash, 8))::UBIGINT * $buckets // 4294967296 AS bucket
    FROM (SELECT *, md5(concat($seed, '/', key)) AS hash FROM ({rows}))
"""
_ROWS = {
    "i2t": """
        SELECT key, text, source, path, "offset", length, sha256,
               []::INT[] AS entities, []::FLOAT[] AS scores
        FROM read_parquet($pairs)
    """,
    "i2e": """
        SELECT key, text, source, path, "offset", length, sha256, entities, scores
        FROM read_parquet($pairs) AS pairs JOIN read_parquet($labels) AS labels USING (key)
    """,
}
_NOT_DROPPED = " WHERE key NOT IN (SELECT key FROM read_parquet($dropped))"


class Plan(typing.NamedTuple):
    """Where the rows of an output shard are: a file that holds those of a run of shards."""

    shard: int
    path: epath.Path  # there is none of shards in quarantine
    row_group: int

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        return read(self.path, self.row_group, columns)


def read(path: str | epath.Path, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of an output shard, in order."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(os.fspath(path)) as file:
        return file.read_row_group(row_group, columns=columns)


def run(work: engine.Engine, dataset: str, seed: int, shard_examples: int) -> list[Plan]:
    """Writes plan-DATASET/: shards of equal size, up to one record.

    Args:
      work: the engine; its work directory holds pairs/ and, for i2e, labels_final/, for i2t perhaps
        dropped-i2t/.
      dataset: "i2t", all pairs without labels, or "i2e", the labelled ones.
      seed: of the order.
      shard_examples: records of a shard, at most.

    Returns:
      The plans, one for each output shard, in order.

    Raises:
      BadInput: there is no pair to write.
    """
    import pyarrow.parquet as pq

    files = {"pairs": engine.listed(work.workdir / "pairs")}
    rows = _ROWS[dataset]
    if dataset == "i2e":
        files["labels"] = engine.listed(work.workdir / "labels_final")
    elif dropped := engine.listed(work.workdir / "dropped-i2t"):
        files["dropped"] = dropped
        rows += _NOT_DROPPED
    # A shard that some stage put into quarantine is in none.
    whole = set.intersection(*({path.name for path in paths} for paths in files.values()))
    tables = [[path for path in paths if path.name in whole] for paths in files.values()]
    most = sum(pq.read_metadata(path).num_rows for path in files.get("labels", files["pairs"]))

    tasks = [
        engine.Task(f"{number:05d}", tuple(table[i] for table in tables for i in run))
        for number, run in enumerate(engine.split_evenly(len(whole), _MOST_SPILLS))
    ]
    buckets = max(1, min(_MOST_BUCKETS, -(-most // _ROWS_PER_BUCKET)))
    parameters = {"buckets": buckets, "seed": str(seed)}
    sql = _HASHED.format(rows=rows)
    scattered = work.scatter(f"ordered-{dataset}", sql, tasks, buckets, parameters, list(files))

    bucket_rows = scattered.bucket_rows()
    total = int(bucket_rows.sum())
    if not total:
        raise errors.BadInput(filters_stage.why_empty(work.workdir, dataset))
    shards = -(-total // shard_examples)
    # A row group for each output shard.
    groups = engine.split_evenly(shards, max(1, min(shards, -(-total // _ROWS_PER_PLAN))))
    tasks = [engine.Task(f"{number:05d}", scattered.files) for number in range(len(groups))]
    settings = {
        "version": 2,
        "dataset": dataset,
        "bucket_rows": bucket_rows.tolist(),
        "shards": shards,
        "shards_per_task": len(groups[0]),
    }
    keys = functools.partial(_keys_of, settings)
    work.map_shards(f"planned-{dataset}", _cut_into_shards, tasks, settings, keys=keys)
    return [
        Plan(shard, work.workdir / f"plan-{dataset}/{number:05d}.parquet", shard - group.start)
        for number, group in enumerate(groups)
        for shard in group
    ]


def _cut_into_shards(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Writes the plans of a run of shards."""
    import pyarrow.parquet as pq

    places, table = _rows_of(task, settings)
    path = os.fspath(outputs.path(f"plan-{settings['dataset']}/{task.name}.parquet"))
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for begin, end in itertools.pairwise(places):
            rows = table.slice(begin - places[0], end - begin)
            writer.write_table(rows, row_group_size=max(1, len(rows)))
    return {"records": places[-1] - places[0], "shards": len(places) - 1}


def _keys_of(settings: dict, task: engine.Task) -> Iterator:
    yield _rows_of(task, settings)[1]["key"]


def _rows_of(task: engine.Task, settings: dict) -> tuple[list[int], pa.Table]:
    """The places of a run of shards in the whole order, and their rows in order."""
    bounds = np.concatenate([[0], np.cumsum(settings["bucket_rows"])])
    most, longer = divmod(int(bounds[-1]), settings["shards"])
    first_shard = int(task.name) * settings["shards_per_task"]
    last_shard = min(first_shard + settings["shards_per_task"], settings["shards"])
    # Every shard's first place in the whole order: the longer ones, by one, come first.
    places = [shard * most + min(shard, longer) for shard in range(first_shard, last_shard + 1)]
    first = int(np.searchsorted(bounds, places[0], side="right")) - 1
    last = int(np.searchsorted(bounds, places[-1], side="left"))
    table = engine.read_buckets(task.inputs, first, last)
    table = table.sort_by([("hash", "ascending"), ("key", "ascending")]).drop_columns(["hash"])
    begin, end = places[0] - int(bounds[first]), places[-1] - int(bounds[first])
    return places, table.slice(begin, end - begin).combine_chunks()
