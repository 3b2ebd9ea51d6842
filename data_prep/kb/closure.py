"""What lies nearest along the edges of a graph: types over their superclasses, redirects.

DuckDB keeps the tables, on disk where memory is short; the graph may have circles.
"""

from __future__ import annotations

import typing

from data_prep import engine
from data_prep.kb.sources import tables

if typing.TYPE_CHECKING:
    import duckdb


def spread(connection: duckdb.DuckDBPyConnection, edges: str, roots: str, reached: str) -> None:
    """Makes the table `reached` of all from which a root can be reached.

    Args:
      connection: where the tables are.
      edges: a table with the columns child and parent.
      roots: a table with the columns id and root.
      reached: its name; the columns are id, root (that of the fewest steps; of equally near ones
        the smallest) and steps.
    """
    connection.execute(
        f"CREATE TEMP TABLE {reached} AS"
        f" SELECT id, min(root) AS root, 0::INT AS steps FROM {roots} GROUP BY id"
    )
    step, added = 0, 1
    while added:
        (added,) = connection.execute(
            f"INSERT INTO {reached} SELECT child, min(root), {step + 1}"
            f" FROM {edges} JOIN {reached} ON parent = id WHERE steps = {step}"
            f" AND child NOT IN (SELECT id FROM {reached}) GROUP BY child"
        ).fetchone()
        step += 1


def write_redirects(
    connection: duckdb.DuckDBPyConnection, table: str | None, entities: str, path: str
) -> int:
    """Writes redirects.parquet: `qid`, which is none of the base, and `entity`, where it leads to.

    Args:
      connection: where to ask.
      table: columns from and to, see `tables`; perhaps none.
      entities: entities.parquet.
      path: the file to be written.

    Returns:
      How many there are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"qid": pa.string(), "entity": pa.int32()})
    found = schema.empty_table()
    if table:
        connection.execute("CREATE TEMP TABLE redirects (child VARCHAR, parent VARCHAR)")
        for batch in tables.read(table, "redirects", {"from": pa.string(), "to": pa.string()}):
            connection.register("batch", batch)
            connection.execute("INSERT INTO redirects SELECT * FROM batch")
        connection.unregister("batch")
        engine.ask(
            connection,
            "CREATE TEMP TABLE ends AS SELECT qid AS id, file_row_number::INT AS root"
            " FROM read_parquet($entities, file_row_number = true) WHERE qid IN"
            " (SELECT child FROM redirects UNION ALL SELECT parent FROM redirects)",
            {"entities": entities},
        )
        spread(connection, "redirects", "ends", "redirected")
        rows = connection.execute(
            "SELECT id AS qid, root AS entity FROM redirected WHERE steps > 0 ORDER BY qid"
        )
        found = rows.to_arrow_table().cast(schema)
    pq.write_table(found, path, compression="zstd")
    return found.num_rows
