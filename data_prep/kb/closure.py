"""What lies nearest along the edges of a graph: types over their superclasses, redirects.

DuckDB keeps the tables, on disk where memory is short; the graph may have circles.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Iterator, Sequence

from absl import logging

from data_prep import engine
from data_prep.kb import kinds
from data_prep.kb.sources import guess, tables

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


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
        [(added,)] = connection.execute(
            f"INSERT INTO {reached} SELECT child, min(root), {step + 1}"
            f" FROM {edges} JOIN {reached} ON parent = id WHERE steps = {step}"
            f" AND child NOT IN (SELECT id FROM {reached}) GROUP BY child"
        ).fetchall()
        step += 1


# Of an entity of Wikidata, as its query service writes it: the id is what is wanted.
_ADDRESS = "^<?https?://www[.]wikidata[.]org/entity/([^>]*)>?$"


def write_redirects(
    connection: duckdb.DuckDBPyConnection, table: str | None, entities: str, path: str
) -> int:
    """Writes redirects.parquet: `qid`, which is none of the base, and `entity`, where it leads to.

    Args:
      connection: where to ask.
      table: columns from and to, see `tables`; ids, or their addresses in Wikidata; perhaps none.
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
            ids = (f"regexp_replace({name}, '{_ADDRESS}', '\\1')" for name in ('"from"', '"to"'))
            connection.execute(f"INSERT INTO redirects SELECT {', '.join(ids)} FROM batch")
        connection.unregister("batch")
        engine.ask(
            connection,
            "CREATE TEMP TABLE ends AS SELECT qid AS id, file_row_number::INT AS root"
            " FROM read_parquet($entities, file_row_number = true) WHERE qid IN"
            " (SELECT child FROM redirects UNION ALL SELECT parent FROM redirects)",
            {"entities": entities},
        )
        spread(connection, "redirects", "ends", "redirected")
        found = engine.ask(
            connection,
            "SELECT id AS qid, root AS entity FROM redirected WHERE steps > 0 ORDER BY qid",
        ).to_arrow_table()
    if table and not found.num_rows:
        logging.warning(
            "config.redirects: no row of %s leads to an entity of the base: its columns are to be"
            " from and to, ids as the base has them",
            table,
        )
    pq.write_table(found.cast(schema), path, compression="zstd")
    return found.num_rows


_LEARNED = 1_000_000  # entities whose labels are learned from
_TOLD = 5  # classes that a warning names
_PARTS = 200  # parts that are asked for at a time, of 5,000 entities each


class Kinds:
    """The kinds of the entities of all parts.

    Where a row has none, the root of its types that is the fewest steps away gives it, else that of
    what lies above the row itself; else it is guessed.

    Roots that a base does not have, or, where it is `english`, under another name, are told.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        parts: Sequence[str],
        english: bool = True,
    ):
        import pyarrow as pa

        self._expected = kinds.LABELS if english else {}
        self._connection, self._parts = connection, parts
        said = [(root, kind) for root, kind in kinds.ROOTS if kind]
        meta = [root for root, kind in kinds.ROOTS if not kind]
        # In this order: classes that make a kind, rows whose kind is given, classes of classes.
        self._kinds = [kind for _, kind in said] + list(kinds.KINDS)
        ids = [root for root, _ in said] + meta
        numbers = [*range(len(said)), *range(len(self._kinds), len(self._kinds) + len(meta))]
        connection.register("listed", pa.table({"id": ids, "root": numbers}))
        codes = {"kind": list(kinds.KINDS), "root": range(len(said), len(self._kinds))}
        connection.register("codes", pa.table(codes))
        engine.ask(
            connection,
            "CREATE TEMP TABLE classes AS SELECT DISTINCT child, parent FROM read_parquet($parts)",
            {"parts": [f"{path}.classes.parquet" for path in parts]},
        )
        engine.ask(
            connection,
            "CREATE TEMP TABLE roots AS SELECT id, root FROM listed UNION ALL"
            " SELECT qid, root FROM read_parquet($parts) JOIN codes USING (kind)",
            {"parts": [f"{path}.entities.parquet" for path in parts]},
        )
        spread(connection, "classes", "roots", "reached")
        ends = " UNION ".join(
            f"SELECT id FROM classes JOIN listed ON id = {end}" for end in ("child", "parent")
        )
        _tell_absent({name for (name,) in connection.execute(ends).fetchall()})
        connection.execute("DROP TABLE classes; DROP TABLE roots")
        connection.execute(f"DELETE FROM reached WHERE root >= {len(self._kinds)}")
        self._labels = guess.Labels()
        self._learn()

    def _known(self) -> Iterator[tuple[pa.Table, list[tuple[str | None, str | None]]]]:
        """The parts with the kinds that are given or told by descriptions."""
        for first in range(0, len(self._parts), _PARTS):
            files = [f"{path}.entities.parquet" for path in self._parts[first : first + _PARTS]]
            roots = self._roots(files)
            for file in files:
                table = engine.read_table(file)
                columns = (table[name].to_pylist() for name in ("kind", "label", "description"))
                yield table, [self._kind(*row) for row in zip(*columns, roots, strict=False)]

    def _kind(
        self, kind: str | None, label: str, description: str, root: int | None
    ) -> tuple[str | None, str | None]:
        """The kind of an entity, and where it is from."""
        kind = kind or (None if root is None else self._kinds[root])
        if kind:
            return kind, kinds.GIVEN
        kind = guess.from_row(label, description)
        return kind, kinds.GUESSED if kind else None

    def _roots(self, files: Sequence[str]) -> Iterator[int | None]:
        """The roots of the rows of some parts, in their order."""
        table = engine.ask(
            self._connection,
            "WITH rows AS (SELECT filename, file_row_number AS row, qid, types"
            "  FROM read_parquet($parts, filename = true, file_row_number = true)),"
            " typed AS (SELECT filename, row, min(steps * 1000 + root) % 1000 AS root"
            "  FROM (SELECT filename, row, unnest(types) AS id FROM rows) JOIN reached USING (id)"
            "  GROUP BY filename, row)"
            " SELECT coalesce(typed.root, own.root) AS root FROM rows"
            " LEFT JOIN typed USING (filename, row) LEFT JOIN reached own ON own.id = qid"
            " ORDER BY filename, row",
            {"parts": files},
        ).to_arrow_table()
        return iter(table["root"].to_pylist())

    def _learn(self) -> None:
        """Learns labels of known kinds, then those that look like people by what was learned."""
        for known in (True, False):
            rows = (
                (label, kind)
                for table, found in self._known()
                for label, (kind, _) in zip(table["label"].to_pylist(), found, strict=True)
            )
            for label, kind in itertools.islice(rows, _LEARNED):
                if known and kind:
                    self._labels.learn(label, kind == "person")
                elif not known and not kind and self._labels.is_person(label):
                    self._labels.learn(label, True)

    def tables(self) -> Iterator[pa.Table]:
        """The entities of each part with the columns kind and kind_from."""
        import pyarrow as pa
        import pyarrow.compute as pc

        roots, other = pa.array(self._expected, pa.string()), []
        for table, found in self._known():
            columns = ["qid", "label", "aliases"]
            rows = table.select(columns).filter(pc.is_in(table["qid"], value_set=roots))
            other += (row for row in rows.to_pylist() if not _is_meant(**row))
            labels = table["label"].to_pylist()
            for i, (kind, _) in enumerate(found):
                if not kind and self._labels.is_person(labels[i]):
                    found[i] = ("person", kinds.GUESSED)
            for name, values in zip(("kind", "kind_from"), zip(*found, strict=True), strict=False):
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, pa.array(values, pa.string()))
            yield table
        if other:
            logging.warning(
                "knowledge_base: %d classes by which kinds are told are others here than in"
                " data_prep/kb/kinds.py, so that kinds below them may be wrong: %s",
                len(other),
                _some(
                    f"{row['qid']} is {row['label']!r}, not {kinds.LABELS[row['qid']]!r}"
                    for row in other
                ),
            )


def _is_meant(qid: str, label: str, aliases: Sequence[str] | None) -> bool:
    """Whether a row with the id of a root is the class that is meant by it."""
    return kinds.LABELS[qid].casefold() in map(str.casefold, (label, *(aliases or ())))


def _tell_absent(found: set[str]) -> None:
    """Warns of roots that no class has to do with, where most are there, as in a full dump."""
    for scheme in ("Q", "n"):
        roots = [root for root in kinds.LABELS if root.startswith(scheme)]
        absent = [root for root in roots if root not in found]
        if 0 < 2 * len(absent) < len(roots):
            logging.warning(
                "knowledge_base: %d of %d classes by which kinds are told are not here, perhaps"
                " merged into others, so that kinds may be missing: %s",
                len(absent),
                len(roots),
                _some(f"{root} {kinds.LABELS[root]}" for root in absent),
            )


def _some(told: Iterable[str]) -> str:
    """The first few of what is to be told, and dots where there is more."""
    told = list(told)
    return ", ".join(told[:_TOLD]) + (", ..." if len(told) > _TOLD else "")
