"""Which entities EntityNet's pictures were searched for, by the addresses of the pictures.

EntityNet-33M holds no pictures but tables: of each picture its `key`, the hashes of the queries
that found it (`qh`) and its addresses (`images_link`), in images_metadata/SPLIT-*.parquet; and of
each query (`query_hash`) its `entity`, a QID or `wordnet:dog.n.01`, in entitynet-queries.parquet
(as github.com/lmb-freiburg/entitynet reads them). Whoever downloads the pictures has pairs with a
`url`, or with EntityNet's keys as their own: by one of these they are joined, however large both
sides are.

    asked/         scattered by what is joined: value, entity
    addressed/     the same of the pairs: value, shard, row, key
    asked_found/   NNNNN.parquet  shard, row, key, entity
    asked_rows/    scattered by the shard
    asked_for/     NNNNN.parquet  row, key, entity: each once, of the pairs of a shard
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

from etils import epath

from data_prep import engine
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

QUERIES, PICTURES = "entitynet-queries.parquet", "images_metadata"
_COLUMNS = {  # and whether they are lists
    QUERIES: {"query_hash": False, "entity": False},
    PICTURES: {"key": False, "qh": True, "images_link": True},
}
# What is joined: here, and of the pairs, whose keys may begin with their source.
JOINS = {
    "url": ("unnest(images_link)::VARCHAR", "url"),
    "key": (
        "key::VARCHAR",
        "CASE WHEN starts_with(key, concat(source, '/')) THEN substr(key, len(source) + 2)"
        " ELSE key END",
    ),
}
_MOST_BUCKETS = 64  # one for each table of pictures: of EntityNet's 33 some million rows each

_ASKED = f"""
    SELECT value, entity, {engine.bucket_of("value")} AS bucket FROM (
        SELECT DISTINCT value, entity FROM (
            SELECT {{value}} AS value, query_hash
            FROM (SELECT *, unnest(qh)::VARCHAR AS query_hash FROM read_parquet($pictures))
        ) JOIN (
            SELECT query_hash::VARCHAR AS query_hash, entity::VARCHAR AS entity
            FROM read_parquet($queries)
        ) USING (query_hash)
    ) WHERE value IS NOT NULL AND entity IS NOT NULL ORDER BY value, entity
"""
_ADDRESSED = f"""
    SELECT value, shard, "row", key, {engine.bucket_of("value")} AS bucket FROM (
        SELECT {{value}} AS value, parse_filename(filename, true) AS shard,
               file_row_number AS "row", key
        FROM read_parquet($files, filename = true, file_row_number = true)
    ) WHERE value IS NOT NULL ORDER BY value, key
"""


def check(folder: str, join: str) -> None:
    """Checks `config.given.entitynet` and `config.given.join`.

    Raises:
      BadInput: an unknown join; tables that are not there or lack a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if join not in JOINS:
        raise errors.BadInput(
            f"config.given.join={join!r} cannot be used: choose {' or '.join(JOINS)}."
        )
    queries, pictures = _files(folder)
    for path, name in [(queries, QUERIES), *((path, PICTURES) for path in pictures)]:
        try:
            found = {field.name: field.type for field in pq.read_schema(path)}
        except (OSError, pa.ArrowException):
            found = {}
        if not all(_holds(found.get(column), many) for column, many in _COLUMNS[name].items()):
            wanted = [f"{column}{' (lists)' * many}" for column, many in _COLUMNS[name].items()]
            raise errors.BadInput(
                f"config.given.entitynet: {path} is no table with the columns"
                f" {', '.join(wanted)} of text: fetch it again (`git lfs pull` where it is a"
                " pointer)."
            )


def _holds(kind: pa.DataType | None, many: bool) -> bool:
    """Whether a column of this type holds what is text to DuckDB, or lists of it."""
    import pyarrow as pa

    if many:
        is_list = isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
        kind = kind.value_type if is_list else None
    return kind is not None and not pa.types.is_nested(kind)


def _files(folder: str) -> tuple[str, list[str]]:
    queries = os.path.join(folder, QUERIES)
    pictures = [os.fspath(path) for path in engine.listed(os.path.join(folder, PICTURES))]
    if not pictures or not os.path.exists(queries):
        raise errors.BadInput(
            f"config.given.entitynet={folder!r} cannot be used: name the folder that holds"
            f" {QUERIES} and {PICTURES}/."
        )
    return queries, pictures


def run(
    folder: str, join: str, work: engine.Engine, pairs: Sequence[epath.Path]
) -> list[epath.Path]:
    """Writes asked_for/NNNNN.parquet of each of `pairs`; returns those that could be made."""
    queries, pictures = _files(folder)
    here, there = JOINS[join]
    tasks = [engine.Task(epath.Path(path).stem, (path, queries)) for path in pictures]
    count = min(_MOST_BUCKETS, len(pictures))
    buckets = {"buckets": count}
    asked = work.scatter(
        *("asked", _ASKED.format(value=here), tasks, count, buckets),
        *(("pictures", "queries"), None),
    )
    tasks = engine.run_tasks(pairs)
    addressed = work.scatter("addressed", _ADDRESSED.format(value=there), tasks, count, buckets)
    tasks = [
        engine.Task(f"{bucket:05d}", (*asked.files, *addressed.files)) for bucket in range(count)
    ]
    settings = {"asked": len(asked.files)}
    found = work.map_shards("asked_found", _join, tasks, settings, keys=None)
    files = [work.workdir / output["path"] for m in found for output in m["outputs"]]
    sql = "SELECT * FROM read_parquet($files)"
    gathers, settings = work.to_shards("asked_rows", sql, engine.run_tasks(files), pairs)
    work.map_shards("asked_for", _gather, gathers, settings)
    return engine.listed(work.workdir / "asked_for")


def _join(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    bucket = int(task.name)
    asked, addressed = (
        engine.read_buckets(files, bucket, bucket + 1)
        for files in (task.inputs[: settings["asked"]], task.inputs[settings["asked"] :])
    )
    found = addressed.join(asked, "value", join_type="inner").drop_columns("value")
    # A picture may be in several tables.
    found = found.group_by(["shard", "row", "key", "entity"], use_threads=False).aggregate([])
    found = found.sort_by([(name, "ascending") for name in ("shard", "row", "entity")])
    outputs.write_table(f"asked_found/{task.name}.parquet", found)
    return {"entities": len(found)}


def _gather(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    entities = 0
    for shard, table in engine.gather_shards(task, settings):
        table = table.sort_by([("row", "ascending"), ("entity", "ascending")])
        outputs.write_table(f"asked_for/{shard}.parquet", table)
        entities += len(table)
    return {"entities": entities}
