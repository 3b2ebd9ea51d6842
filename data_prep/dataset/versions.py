"""A published version of a data set: its metadata, its shards, and where each record is.

Reads the folder that `data_prep.dataset.shards` wrote and nothing else; nothing here changes it.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging
from etils import epath

from data_prep import engine
from mofi_jax.common import errors
from mofi_jax.data import records

_READ = 256  # records at a time


class Info(NamedTuple):
    """What dataset_info.json says."""

    name: str
    version: str
    split: str
    shard_lengths: list[int]
    num_bytes: int
    description: str

    def shard(self, folder: epath.Path, number: int) -> epath.Path:
        count = len(self.shard_lengths)
        return folder / records.shard_name(self.name, self.split, number, count)


def read_info(folder: epath.Path) -> Info:
    """Reads the metadata of a version.

    Raises:
      BadInput: there is none, or it is not as `data_prep.build_i2e` writes it.
    """
    path = folder / "dataset_info.json"
    if not path.exists():
        raise errors.BadInput(
            f"--dataset={folder} is no finished version of a data set (it has no"
            " dataset_info.json): name a folder such as W/i2e/1.0.0."
        )
    try:
        found = json.loads(path.read_text())
        [split] = found["splits"]
        info = Info(
            name=found["name"],
            version=found["version"],
            split=split["name"],
            shard_lengths=[int(length) for length in split["shardLengths"]],
            num_bytes=int(split["numBytes"]),
            description=found.get("description", ""),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise errors.BadInput(
            f"{path} does not describe one split in shards ({error!r}): restore the file that"
            " data_prep.build_i2e wrote."
        ) from error
    for number in range(len(info.shard_lengths)):
        if not info.shard(folder, number).exists():
            raise errors.BadInput(f"{info.shard(folder, number)} is missing: copy it again.")
    return info


def others(folder: epath.Path) -> list[epath.Path]:
    """The versions beside that of `folder`."""
    found = [path for path in folder.parent.iterdir() if re.fullmatch(r"\d+(\.\d+)+", path.name)]
    return sorted(path for path in found if path.name != folder.name)


def index_keys(source: epath.Path, info: Info, folder: epath.Path) -> epath.Path:
    """keys.parquet of the data set, or one made in `folder` by reading all shards.

    Raises:
      BadInput: keys.parquet is damaged or of another data set; or a shard is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = source / records.KEYS_FILE
    if path.exists():
        try:
            rows = pq.read_metadata(os.fspath(path)).num_rows
        except (pa.ArrowException, OSError):
            rows = None
        if rows != sum(info.shard_lengths):
            raise errors.BadInput(
                f"{path} is damaged or does not list the {sum(info.shard_lengths)} records of the"
                " data set: remove it, and the shards are searched instead."
            )
        return path
    logging.info("%s has no %s: reading all shards", source, records.KEYS_FILE)
    schema = pa.schema([("key", pa.string()), ("shard", pa.int32()), ("index", pa.int32())])
    path = folder / ".keys.parquet"
    with pq.ParquetWriter(os.fspath(path), schema, compression="zstd") as writer:
        for number, length in enumerate(info.shard_lengths):
            found = [
                records.parse(r)["key"] for r in read_shard(info.shard(source, number), length)
            ]
            columns = {"key": found, "shard": [number] * length, "index": range(length)}
            writer.write_table(pa.table(columns, schema=schema))
    return path


def find_keys(index: epath.Path, wanted: Sequence[str]) -> dict[int, dict[int, str]]:
    """Of each shard that holds wanted keys, these by their positions in it."""
    import duckdb
    import pyarrow as pa

    with duckdb.connect() as connection:
        connection.register("wanted", pa.table({"key": pa.array(wanted, pa.string())}))
        rows = engine.ask(
            connection,
            'SELECT shard, "index", key FROM read_parquet($index) SEMI JOIN wanted USING (key)'
            " ORDER BY ALL",
            {"index": os.fspath(index)},
        ).fetchall()
    found: dict[int, dict[int, str]] = {}
    for shard, position, key in rows:
        found.setdefault(shard, {})[position] = key
    return found


def read_shard(path: epath.Path, length: int) -> Iterator[bytes]:
    """The records of a shard.

    Raises:
      BadInput: it is damaged, or not of this length.
    """
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    # On a file cut short the reader reports no records and raises nothing.
    if not reader.ok() or reader.num_records() != length:
        raise errors.BadInput(
            f"Shard {path} is cut short or damaged: dataset_info.json promises {length} records;"
            " copy it again."
        )
    with contextlib.closing(reader):
        for start in range(0, length, _READ):
            yield from reader.read(start, min(start + _READ, length))
