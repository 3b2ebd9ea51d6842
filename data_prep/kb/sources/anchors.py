"""Link anchors: how often a text links to an entity, joined to the names of a knowledge base.

The table has the columns anchor, qid, count and perhaps seen; see `tables`. Where it knows a name,
the counts c of its n entities decide, with `smoothing` further links shared out by the weights w
that the names have otherwise:

    p(entity | name)  ~  c + smoothing * w / sum of w

so that an entity nobody linked to by this name keeps a chance. A text that is no name of an entity
becomes one from `min_links` links on; rarer ones are slips and are passed over. `seen` says how
often the text stands in articles, linked or not: the links of a name, to whatever they lead,
divided by that are its link probability.
"""

from __future__ import annotations

import os
import typing
from typing import NamedTuple

from data_prep import engine
from data_prep.kb import forms, names
from data_prep.kb.sources import tables

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class Anchors(NamedTuple):
    """A table of anchors.

    Attributes:
      path: .parquet, .tsv or .tsv.gz; None: there is no table.
      entities: entities.parquet; an entity is its row number.
      redirects: redirects.parquet; further ids.
      min_links: so many make a name.
      scratch: a folder for the table with normal forms.
    """

    path: str | None
    entities: str
    redirects: str
    min_links: int
    scratch: str


def sorted_names(
    connection: duckdb.DuckDBPyConnection, own: pa.RecordBatchReader, anchors: Anchors
) -> pa.RecordBatchReader:
    """All names, sorted by form and then entity; sorted on disk where memory is short.

    Args:
      connection: with limits of memory and threads.
      own: form, entity, weight, case, how, languages; no form twice for an entity.
      anchors: the table, perhaps none.

    Returns:
      The columns of `own`, links, int64, and linked, float32, the link probability of the name or
      NaN; one row for each form and entity.

    Raises:
      BadInput: the table is damaged or has other columns.
    """
    connection.register("own", own)
    if not anchors.path:
        query = "SELECT *, 0::BIGINT AS links, 'nan'::FLOAT AS linked FROM own"
    else:
        # A file between: an error inside DuckDB would not come out as what it is.
        written = os.path.join(anchors.scratch, "anchors.parquet")
        _write_forms(anchors.path, written)
        paths = {"forms": written, "path": anchors.entities, "redirects": anchors.redirects}
        engine.ask(
            connection,
            "CREATE TEMP TABLE linked AS"
            ' SELECT form, e.entity, sum(links)::BIGINT AS links, min("case") AS "case"'
            " FROM read_parquet($forms) JOIN (SELECT qid, file_row_number::INT AS entity"
            " FROM read_parquet($path, file_row_number = true)"
            " UNION ALL SELECT qid, entity FROM read_parquet($redirects)) e USING (qid)"
            " GROUP BY form, e.entity",
            paths,
        )
        engine.ask(
            connection,
            "CREATE TEMP TABLE rates AS SELECT form,"
            " least(sum(links) / sum(greatest(seen, links)), 1)::FLOAT AS linked FROM ("
            "  SELECT form, anchor, sum(links) AS links, max(seen) AS seen"
            "  FROM read_parquet($forms) GROUP BY form, anchor HAVING max(seen) IS NOT NULL)"
            " GROUP BY form",
            paths,
        )
        # How a name is written is told by the entity's own spellings where it has any.
        query = (
            "SELECT names.*, coalesce(linked, 'nan'::FLOAT) AS linked FROM ("
            "  SELECT form, entity, max(weight) AS weight,"
            '  coalesce(min("case") FILTER (weight > 0), min("case"))::UTINYINT AS "case",'
            "  min(how) AS how, max(languages) AS languages, sum(links)::BIGINT AS links FROM ("
            '   SELECT form, entity, weight, "case", how, languages, 0 AS links FROM own'
            f'   UNION ALL SELECT form, entity, 0, "case", {forms.EXACT}, {forms.ANY}, links'
            "   FROM linked)"
            "  GROUP BY form, entity"
            f"  HAVING max(weight) > 0 OR sum(links) >= {anchors.min_links}) names"
            " LEFT JOIN rates USING (form)"
        )
    return connection.sql(f"{query} ORDER BY form, entity").to_arrow_reader(100_000)


def _write_forms(path: str, target: str) -> None:
    """Writes the table with normal forms: form, anchor, qid, links, case, seen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    wanted = {"anchor": text, "qid": text, "count": number, "seen": number}
    schema = {"form": text, "anchor": text, "qid": text, "links": number}
    schema = pa.schema(schema | {"case": pa.uint8(), "seen": number})
    with pq.ParquetWriter(target, schema) as writer:
        for batch in tables.read(path, "anchors", wanted, "seen"):
            rows = []
            for anchor, qid, count, seen in zip(
                *(c.to_pylist() for c in batch.columns), strict=True
            ):
                form = names.normalize(anchor or "")
                if form and qid and count and count > 0:
                    rows.append((form, anchor, qid, count, forms.case_of(anchor), seen))
            if rows:
                columns = [list(column) for column in zip(*rows, strict=True)]
                writer.write_table(pa.table(columns, schema=schema))
