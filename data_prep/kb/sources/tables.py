"""Tables that a user adds to a knowledge base: parquet, or tab-separated without a header."""

from __future__ import annotations

import gzip
import os
import typing
from collections.abc import Iterator, Mapping

from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".tsv", ".tsv.gz")
_BATCH = 100_000  # rows


def check(path: str | None, key: str) -> None:
    """Raises BadInput unless there is no path or a file with a known suffix."""
    if not path:
        return
    if not os.path.isfile(path):
        raise errors.BadInput(f"config.{key}: {path} does not exist: name a table of {key}.")
    if not path.endswith(_SUFFIXES):
        raise errors.BadInput(
            f"config.{key}: {path} has an unknown suffix: give a .parquet, .tsv or .tsv.gz file."
        )


def read(
    path: str, key: str, columns: Mapping[str, pa.DataType], optional: str | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a table.

    Args:
      path: a file that `check` lets pass.
      key: of the configuration, which errors name.
      columns: names and types; in tab-separated files they come in this order.
      optional: the last of the columns where it may be missing: then it is null.

    Raises:
      BadInput: the table is damaged or has other columns.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    names = list(columns)
    try:
        if path.endswith(".parquet"):
            file = pq.ParquetFile(path)
            names = [n for n in names if n != optional or n in file.schema_arrow.names]
            batches = file.iter_batches(_BATCH, columns=names)
        else:
            if optional and _width(path) < len(columns):
                names.remove(optional)
            batches = pyarrow.csv.open_csv(
                path,
                pyarrow.csv.ReadOptions(column_names=names),
                pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                pyarrow.csv.ConvertOptions(column_types=columns, strings_can_be_null=False),
            )
        schema = pa.schema({name: columns[name] for name in names})
        for batch in batches:
            batch = batch.select(names).cast(schema)
            if len(names) < len(columns):
                nothing = pa.nulls(batch.num_rows, columns[optional])
                batch = batch.append_column(optional, nothing)
            yield batch
    except (pa.ArrowException, KeyError, EOFError, OSError) as error:
        told = [name for name in columns if name != optional]
        raise errors.BadInput(
            f"config.{key}: {path} cannot be read ({' '.join(str(error).split())[:200]}): give the"
            f" columns {', '.join(told[:-1])} and {told[-1]}."
        ) from error


def _width(path: str) -> int:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        return file.readline(1 << 20).count(b"\t") + 1
