"""Tables: parquet through pyarrow and DuckDB, and the three ways in which rows change shards.

    aggregate    SQL over parquet files, out of core
    scatter      SQL whose rows say which bucket they go to
    gather       a later stage reads the rows of a run of buckets with `read_buckets`

Names of files are names: DuckDB would take `[ ] * ?` in them for patterns and folders called
NAME=VALUE for columns. So all SQL goes through `ask`, and all reading of tables through
`read_table`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from data_prep.engine.jobs import Outputs, Task

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_FILES = re.compile(r"read_parquet\(\s*\$(\w+)")
_PATTERN = re.compile(r"[\[*?]")
_BATCH = 1 << 16  # rows
_FILES_PER_RUN, _MOST_RUNS = 4, 256
MOST_BUCKETS = 512
# Of what DuckDB would take for itself (four fifths of the machine's memory): Arrow needs some too.
_MEMORY_SHARE = 0.75


def listed(folder: str | os.PathLike[str], suffix: str = ".parquet") -> list[epath.Path]:
    """The files of a folder whose names end in `suffix`, hidden ones excepted, sorted by name."""
    if not os.path.isdir(folder):
        return []
    names = sorted(os.listdir(folder))
    return [epath.Path(folder) / n for n in names if n.endswith(suffix) and n[0] != "."]


def aligned(workdir: epath.Path, *stages: str) -> list[tuple[epath.Path, ...]]:
    """Of each shard its tables in all of the stages; not of one that some stage left out."""
    found = [(folder, listed(workdir / folder)) for folder in stages]
    names = set.intersection(*({path.name for path in paths} for _, paths in found))
    return [tuple(workdir / stage / name for stage in stages) for name in sorted(names)]


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some of its columns."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(os.fspath(path)) as file:
        return file.read(columns=None if columns is None else list(columns))


def connect(outputs: Outputs) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that spills into the shard's temporary folder when memory runs short.

    It has one thread and the process's share of the memory: others run beside it.
    """
    import duckdb

    spill = outputs.temporary("duckdb")
    spill.parent.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"threads": 1, "temp_directory": os.fspath(spill)})
    # "18.8 GiB", which minds the limits of containers.
    [(limit,)] = connection.execute("SELECT current_setting('memory_limit')").fetchall()
    amount, unit = limit.split()
    amount = float(amount) * _MEMORY_SHARE / outputs.processes
    connection.execute(f"SET memory_limit = '{amount:.3f} {unit}'")
    connection.execute("SET enable_progress_bar = false")
    return connection


def ask(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Mapping[str, typing.Any] | None = None,
) -> duckdb.DuckDBPyRelation | None:
    """Runs SQL in which `read_parquet($NAME, ...)` reads the files of that name, and no others.

    Args:
      connection: where to ask.
      sql: one statement.
      parameters: what $NAMEs stand for; those that the SQL does not mention are passed over.

    Returns:
      The rows of a query, computed when they are fetched; None for other statements.
    """
    used = {k: v for k, v in (parameters or {}).items() if re.search(rf"\${k}\b", sql)}
    for name in {*_FILES.findall(sql)} & {*used}:
        files = [used[name]] if isinstance(used[name], str | os.PathLike) else used[name]
        used[name] = [_PATTERN.sub(lambda m: f"[{m.group()}]", os.fspath(path)) for path in files]
    sql = _FILES.sub(r"read_parquet($\1, hive_partitioning = false", sql)
    return connection.sql(sql, params=used or None)


# --------------------------------------------------------------------------------------- aggregate


def aggregate(task: Task, outputs: Outputs, settings: dict) -> dict[str, int]:
    """A stage function; see `Engine.aggregate`."""
    parameters, first = dict(settings["parameters"]), 0
    for name, count in settings["tables"].items():
        parameters[name] = list(task.inputs[first : first + count])
        first += count
    counts = {}
    with connect(outputs) as connection:
        for output, sql in settings["queries"].items():
            reader = ask(connection, sql, parameters).to_arrow_reader(_BATCH)
            counts[os.path.splitext(output)[0]] = _write_batches(outputs.path(output), reader)
    return counts


def _write_batches(path: epath.Path, reader: pa.RecordBatchReader) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with pq.ParquetWriter(os.fspath(path), reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += len(batch)
    return rows


# ------------------------------------------------------------------------------ scatter and gather


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Rows in buckets: files with one row group for each bucket."""

    files: tuple[str, ...]
    buckets: int

    def bucket_rows(self) -> np.ndarray:
        """int64 [buckets]: the rows of each bucket, from the files' footers."""
        import pyarrow.parquet as pq

        total = np.zeros(self.buckets, np.int64)
        for path in self.files:
            footer = pq.read_metadata(path)
            total += [footer.row_group(bucket).num_rows for bucket in range(self.buckets)]
        return total


def read_buckets(files: Sequence[str], first: int, last: int) -> pa.Table:
    """The rows of the buckets [first, last) in all files, in the order of the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for path in files:
        with pq.ParquetFile(path) as file:
            parts.append(file.read_row_groups(list(range(first, last)), use_threads=False))
    return pa.concat_tables(parts)


def split_evenly(count: int, most: int) -> list[range]:
    """Cuts range(count) into at most `most` runs of equal length, up to the last one's.

    Scatter tasks and gather tasks are few, because each of the latter opens a file of each of the
    former.
    """
    size = max(1, -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def run_tasks(*tables: Sequence[str | os.PathLike[str]]) -> list[Task]:
    """Tasks of runs of files, of each table (all of one length) the same, one after the other.

    Runs depend on the number of files alone, so that what is summed up by run is always the same.
    """
    count = len(tables[0]) if tables else 0
    most = min(_MOST_RUNS, -(-count // _FILES_PER_RUN))
    return [
        Task(
            f"{number:05d}", tuple(path for table in tables for path in table[run.start : run.stop])
        )
        for number, run in enumerate(split_evenly(count, max(1, most)))
    ]


def bucket_of(column: str) -> str:
    """SQL of the bucket, of $buckets, of a column of text: by the leading bits of its md5."""
    return f"('0x' || left(md5({column}), 8))::UBIGINT * $buckets // 4294967296"


def group_shards(
    tables: Sequence[str | os.PathLike[str]], buckets: int
) -> list[list[str | os.PathLike[str]]]:
    """The tables of shards by the `bucket_of` their names."""
    groups: list[list[str | os.PathLike[str]]] = [[] for _ in range(buckets)]
    for path in tables:
        digest = hashlib.md5(epath.Path(path).stem.encode()).hexdigest()
        groups[int(digest[:8], 16) * buckets >> 32].append(path)
    return groups


def gather_shards(task: Task, settings: dict) -> Iterator[tuple[str, pa.Table]]:
    """Of each shard of a task of `Engine.to_shards` its name and its rows, by their `row`."""
    import pyarrow.compute as pc

    spills, tables = task.inputs[: settings["spills"]], task.inputs[settings["spills"] :]
    bucket = int(task.name)
    table = read_buckets(spills, bucket, bucket + 1)
    of, row, table = table["shard"], table["row"].to_numpy(), table.drop_columns(["shard"])
    for path in tables:
        shard = epath.Path(path).stem
        own = np.flatnonzero(pc.equal(of, shard).to_numpy())
        # Copied once, and held by the caller alone.
        yield shard, table.take(own[np.argsort(row[own])]).combine_chunks()


def find_repeated(task: Task, outputs: Outputs, settings: dict) -> dict[str, int]:
    """A stage function; see `Engine.repeated`."""
    import pyarrow.compute as pc

    bucket = int(task.name)
    table = read_buckets(task.inputs, bucket, bucket + 1)
    table = table.sort_by([(name, "ascending") for name in ("value", *settings["order"])])
    values = table["value"].combine_chunks()
    repeated = np.zeros(len(table), bool)
    repeated[1:] = pc.equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    first = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(table))))
    found = table.select(["shard", "row", "key"]).append_column("first", table["key"].take(first))
    found = found.filter(repeated)
    outputs.write_table(f"{outputs.stage}/{task.name}.parquet", found)
    return {"rows": len(found)}


def scatter(task: Task, outputs: Outputs, settings: dict) -> dict[str, int]:
    """A stage function; see `Engine.scatter`."""
    import pyarrow.parquet as pq

    buckets = settings["buckets"]
    parameters = dict(settings["parameters"])
    part = len(task.inputs) // len(settings["tables"])
    for number, name in enumerate(settings["tables"]):
        parameters[name] = list(task.inputs[number * part : (number + 1) * part])
    with connect(outputs) as connection:
        table = ask(connection, settings["sql"], parameters).to_arrow_table()
    bucket = table["bucket"].to_numpy().astype(np.int64)
    if len(bucket) and not 0 <= bucket.min() <= bucket.max() < buckets:
        raise ValueError(f"buckets {bucket.min()} to {bucket.max()} are not in [0, {buckets})")
    # Stable: within a bucket rows keep the order of the SQL.
    table = table.drop_columns(["bucket"]).take(np.argsort(bucket, kind="stable"))
    starts = np.searchsorted(np.sort(bucket), np.arange(buckets + 1))
    path = os.fspath(outputs.path(f"{outputs.stage}/{task.name}.parquet"))
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for start, end in itertools.pairwise(starts):
            # An empty bucket is a row group too: the bucket's number is the group's.
            writer.write_table(table.slice(start, end - start), row_group_size=max(1, end - start))
    return {"rows": len(table)}
