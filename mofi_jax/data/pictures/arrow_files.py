"""Arrow files as `datasets.Dataset.save_to_disk` writes them, read as parquet files are.

A batch of rows takes the place of a row group. Files are mapped into memory, where batches that are
not packed lie as they are; each is checked when it is used, as strangers' files may lie about where
in a column their values are.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

SUFFIX = ".arrow"
# What `datasets` keeps beside them for itself: results of maps and filters, orders of rows.
_CACHES = ("cache-", "indices")
_MAGIC = b"ARROW1"  # of the file format; `datasets` writes the stream format


def is_data(name: str) -> bool:
    """Whether a file's name is one of rows."""
    return name.endswith(SUFFIX) and not name.startswith(_CACHES)


class _Group(NamedTuple):
    num_rows: int
    total_byte_size: int  # that reading it takes: mapped, none


class ArrowFile:
    """The part of `pyarrow.parquet.ParquetFile` that is used here; pyarrow's errors where none."""

    def __init__(self, path: os.PathLike[str] | str):
        import pyarrow as pa

        source = pa.memory_map(os.fspath(path))
        if source.read(len(_MAGIC)) == _MAGIC:
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        self._batches, size = [], 0
        for batch in batches:
            self._batches.append(batch)
            size += batch.nbytes
            if size > source.size():
                raise pa.ArrowInvalid("it is packed: write it without compression, or as parquet")
        self.schema_arrow = reader.schema
        self.metadata = self  # of which the next three are asked
        self.num_row_groups = len(self._batches)
        self.num_rows = sum(batch.num_rows for batch in self._batches)

    def row_group(self, i: int) -> _Group:
        return _Group(self._batches[i].num_rows, 0)

    def read_row_group(self, i: int, columns: Sequence[str]) -> Any:
        """A table of whole columns, of which `struct.member` names one too."""
        import pyarrow as pa

        tops = {name.partition(".")[0] for name in columns}
        batch = self._batches[i]
        batch = batch.select([n for n in batch.schema.names if n in columns or n in tops])
        batch.validate(full=True)
        return pa.table(batch)

    def read(self, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        tables = [self.read_row_group(i, columns) for i in range(self.num_row_groups)]
        return pa.concat_tables(tables) if tables else self.schema_arrow.empty_table()

    def iter_batches(
        self, batch_size: int, *, row_groups: Iterable[int], columns: Sequence[str]
    ) -> Iterator[Any]:
        for i in row_groups:
            yield from self.read_row_group(i, columns).to_batches(max_chunksize=batch_size)

    def __enter__(self) -> "ArrowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches = []  # the file closes with the last array
