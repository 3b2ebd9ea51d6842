"""Pictures that occur more than once among the candidates, byte for byte. pairs/ -> copies/.

copies/   NNNNN.parquet  key, first: the smallest key of those with this picture, which stays
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

from data_prep import engine

if typing.TYPE_CHECKING:
    import pyarrow as pa

_SQL = """
    WITH candidates AS (
        SELECT key, unhex(sha256) AS digest, filename
        FROM read_parquet($pairs, filename = true) {which}
    ), copied AS (
        SELECT digest, min(key) AS first FROM candidates GROUP BY digest HAVING count(*) > 1
    )
    SELECT key, first, filename FROM candidates JOIN copied USING (digest)
    WHERE key <> first ORDER BY filename, key
"""
_LABELLED = "SEMI JOIN (SELECT key FROM read_parquet($labels) WHERE reason IS NULL) USING (key)"
_NOT_GONE = "ANTI JOIN (SELECT key FROM read_parquet($gone)) USING (key)"


def run(work: engine.Engine, shards: Sequence[str], labelled: bool, gone: Sequence[str]) -> None:
    """Writes copies/: every candidate but the one with the smallest key, for each sha256.

    Args:
      work: the engine; its work directory holds pairs/.
      shards: names of the shards.
      labelled: only pairs with a label in labels/ are candidates.
      gone: stages with a column `key` of pairs that are no candidates any more, so that no picture
        is lost by being a copy of one that goes for another reason.
    """
    folders = ["pairs", *(["labels"] if labelled else []), *gone]
    paths = [work.workdir / f"{folder}/{shard}.parquet" for folder in folders for shard in shards]
    settings = {"shards": list(shards), "labelled": labelled}
    work.map_shards("copies", _find, [engine.Task("all", tuple(paths))], settings, keys=None)


def _find(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Out of core: DuckDB spills the groups, and rows come back in the order of the shards."""
    count = len(settings["shards"])
    groups = [list(task.inputs[i : i + count]) for i in range(0, len(task.inputs), count)]
    files, which = {"pairs": groups.pop(0)}, ""
    if settings["labelled"]:
        files["labels"], which = groups.pop(0), _LABELLED
    if groups:
        files["gone"] = [path for group in groups for path in group]
        which = f"{which} {_NOT_GONE}"
    with engine.connect(outputs) as connection:
        relation = engine.ask(connection, _SQL.format(which=which), files)
        reader = relation.to_arrow_reader(1 << 16)
        shard_of = dict(zip(files["pairs"], settings["shards"], strict=True))
        return {"copies": _write_by_shard(outputs, reader, shard_of)}


def _write_by_shard(
    outputs: engine.Outputs, reader: pa.RecordBatchReader, shard_of: dict[str, str]
) -> int:
    """Cuts rows that are sorted by `filename` into a file for each shard, an empty one where none.

    Args:
      shard_of: the shard of each file name, sorted by file name.

    Returns:
      How many rows there were.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = reader.schema.remove(reader.schema.get_field_index("filename"))
    rows = 0
    unread = iter(reader)
    batch = next(unread, None)
    for path, shard in shard_of.items():
        target = os.fspath(outputs.path(f"{outputs.stage}/{shard}.parquet"))
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            while batch is not None:
                # The rest of the batch is of this file and of later ones.
                length = pc.sum(pc.equal(batch["filename"], path)).as_py() or 0
                writer.write_batch(batch.slice(0, length).drop_columns(["filename"]))
                rows += length
                if length < len(batch):
                    batch = batch.slice(length)
                    break
                batch = next(unread, None)
    return rows
