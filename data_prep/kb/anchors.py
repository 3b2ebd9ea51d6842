"""Link anchors: how often a text links to an entity, joined to the names of a knowledge base.

The table has the columns anchor, qid and count: parquet with these names, or tab-separated without
a header. Where it knows a name, the counts c of its n entities decide, with `smoothing` further
links shared out by the weights w that the names have otherwise:

    p(entity | name)  ~  c + smoothing * w / sum of w

so that an entity nobody linked to by this name keeps a chance. A text that is no name of an entity
becomes one from `min_links` links on; rarer ones are slips and are passed over.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from typing import NamedTuple

from data_prep import engine
from data_prep.kb import names
from data_prep.kb.sources import rows as kb_rows
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_SUFFIXES = (".parquet", ".tsv", ".tsv.gz")
_BATCH = 100_000  # rows


class Anchors(NamedTuple):
    """A table of anchors.

    Attributes:
      path: .parquet, .tsv or .tsv.gz; None: there is no table.
      entities: entities.parquet; an entity is its row number.
      min_links: so many make a name.
      scratch: a folder for the table with normal forms.
    """

    path: str | None
    entities: str
    min_links: int
    scratch: str


def check(path: str | None) -> None:
    """Raises BadInput unless there is no path or a file with a known suffix."""
    if not path:
        return
    if not os.path.isfile(path):
        raise errors.BadInput(f"config.anchors: {path} does not exist: name a table of anchors.")
    if not path.endswith(_SUFFIXES):
        raise errors.BadInput(
            f"config.anchors: {path} has an unknown suffix: give a .parquet, .tsv or .tsv.gz file."
        )


def sorted_names(
    connection: duckdb.DuckDBPyConnection, own: pa.RecordBatchReader, anchors: Anchors
) -> pa.RecordBatchReader:
    """All names, sorted by form and then entity; sorted on disk where memory is short.

    Args:
      connection: with limits of memory and threads.
      own: form, entity, weight, case, joined; no form twice for an entity.
      anchors: the table, perhaps none.

    Returns:
      The columns of `own`, and links, int64; one row for each form and entity.

    Raises:
      BadInput: the table is damaged or has other columns.
    """
    connection.register("own", own)
    if not anchors.path:
        query = "SELECT *, 0::BIGINT AS links FROM own"
    else:
        # A file between: an error inside DuckDB would not come out as what it is.
        forms = os.path.join(anchors.scratch, "anchors.parquet")
        _write_forms(anchors.path, forms)
        engine.ask(
            connection,
            "CREATE TEMP TABLE linked AS"
            ' SELECT form, e.entity, sum(links)::BIGINT AS links, min("case") AS "case"'
            " FROM read_parquet($forms) JOIN (SELECT qid, file_row_number::INT AS entity"
            " FROM read_parquet($path, file_row_number = true)) e USING (qid)"
            " GROUP BY form, e.entity",
            {"forms": forms, "path": anchors.entities},
        )
        # How a name is written is told by the entity's own spellings where it has any.
        query = (
            "SELECT form, entity, max(weight) AS weight,"
            ' coalesce(min("case") FILTER (weight > 0), min("case"))::UTINYINT AS "case",'
            " bool_and(joined) AS joined, sum(links)::BIGINT AS links FROM ("
            '  SELECT form, entity, weight, "case", joined, 0 AS links FROM own'
            '  UNION ALL SELECT form, entity, 0, "case", false, links FROM linked)'
            f" GROUP BY form, entity HAVING max(weight) > 0 OR sum(links) >= {anchors.min_links}"
        )
    return connection.sql(f"{query} ORDER BY form, entity").to_arrow_reader(100_000)


def _write_forms(path: str, target: str) -> None:
    """Writes the table with normal forms: form, qid, links, case."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"form": pa.string(), "qid": pa.string(), "links": pa.int64(), "case": pa.uint8()}
    )
    with pq.ParquetWriter(target, schema) as writer:
        for batch in _raw(path):
            rows = []
            for anchor, qid, count in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                form = names.normalize(anchor or "")
                if form and qid and count and count > 0:
                    rows.append((form, qid, count, kb_rows.case_of(anchor)))
            if rows:
                columns = [list(column) for column in zip(*rows, strict=True)]
                writer.write_table(pa.table(columns, schema=schema))


def _raw(path: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    wanted = {"anchor": pa.string(), "qid": pa.string(), "count": pa.int64()}
    try:
        if path.endswith(".parquet"):
            batches = pq.ParquetFile(path).iter_batches(_BATCH, columns=list(wanted))
        else:
            batches = pyarrow.csv.open_csv(
                path,
                pyarrow.csv.ReadOptions(column_names=list(wanted)),
                pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                pyarrow.csv.ConvertOptions(column_types=wanted, strings_can_be_null=False),
            )
        for batch in batches:
            yield batch.select(list(wanted)).cast(pa.schema(wanted))
    except (pa.ArrowException, KeyError, EOFError, OSError) as error:
        raise errors.BadInput(
            f"config.anchors: {path} cannot be read ({' '.join(str(error).split())[:200]}): give"
            " the columns anchor, qid and count."
        ) from error
