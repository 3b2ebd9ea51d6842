"""A part of a knowledge base: what a worker makes of a chunk of lines, as parquet files.

    PATH.names.parquet      index (row of the entity), form, weight, case, how, languages
    PATH.classes.parquet    child, parent: what lies above entities, those that are dropped, too
    PATH.entities.parquet   line, and the columns of entities.parquet; written last

The metadata of the latter hold under "part" what the part was made of, its counts and its rejects.
"""

from __future__ import annotations

import io
import json
import typing

from etils import epath

from data_prep import engine
from data_prep.kb import forms
from data_prep.kb.sources import rows as kb_rows

if typing.TYPE_CHECKING:
    import pyarrow as pa


LAST = ".entities.parquet"


class Part:
    """The rows of a chunk: collected, then written."""

    def __init__(self):
        self._entities: list[tuple] = []
        self._names: list[tuple] = []
        self._classes: list[tuple[str, str]] = []
        self._rejects: list[tuple[int, str]] = []
        self._counts: dict[str, int] = {"empty_names": 0}

    def reject(self, line: int, reason: str) -> None:
        self._rejects.append((line, reason))

    def drop(self, dropped: kb_rows.Dropped) -> None:
        key = f"dropped_{dropped}"
        self._counts[key] = self._counts.get(key, 0) + 1
        self._classes += [(dropped.qid, parent) for parent in dropped.above]

    def add(self, line: int, row: kb_rows.Row, alias_factor: float) -> None:
        """Adds an entity and its names."""
        index = len(self._entities)
        self._entities.append((line, *row[:-2]))
        self._classes += [(row.qid, parent) for parent in row.above]
        found, empty = forms.names_of(row.label, row.names, alias_factor)
        self._counts["empty_names"] += empty
        self._names += [(index, *name) for name in found]

    def write(self, path: str, made_of: dict) -> None:
        """Writes the files, PATH.entities.parquet last, which makes it a whole part."""
        note = {"made_of": made_of, "counts": self._counts, "rejects": self._rejects}
        write(f"{path}.names.parquet", table(self._names, names_schema()))
        write(f"{path}.classes.parquet", table(self._classes, classes_schema()))
        write(f"{path}{LAST}", table(self._entities, part_schema()), note)


def read(path: str) -> dict | None:
    """The note in a file: what a part was made of, and more; None where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return json.loads(metadata[b"part"]) if b"part" in metadata else None


def table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    """Rows as a table."""
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    return pa.table(list(map(list, columns)), schema=schema)


def write(path: str, rows: pa.Table, note: dict | None = None) -> None:
    """Writes a file of a part, perhaps with a note."""
    import pyarrow.parquet as pq

    if note:
        rows = rows.replace_schema_metadata({"part": json.dumps(note)})
    file = io.BytesIO()
    pq.write_table(rows, file, compression="zstd")
    engine.write_durably(epath.Path(path), file.getvalue())


def entities_schema() -> pa.Schema:
    """The columns of entities.parquet."""
    import pyarrow as pa

    strings = pa.list_(pa.string())
    return pa.schema(
        {
            "qid": pa.string(),
            "label": pa.string(),
            "aliases": strings,
            "description": pa.string(),
            "hypernyms": strings,
            "types": strings,
            "sitelinks": pa.int32(),
            "image": pa.string(),
            "title": pa.string(),
            "kind": pa.string(),
            "kind_from": pa.string(),
        }
    )


def part_schema() -> pa.Schema:
    """The columns of PATH.entities.parquet."""
    import pyarrow as pa

    return pa.schema([pa.field("line", pa.int64()), *entities_schema()])


def names_schema() -> pa.Schema:
    """The columns of PATH.names.parquet."""
    import pyarrow as pa

    return pa.schema(
        {
            "index": pa.int32(),
            "form": pa.string(),
            "weight": pa.float64(),
            "case": pa.uint8(),
            "how": pa.uint8(),
            "languages": pa.uint16(),
        }
    )


def numbered_schema() -> pa.Schema:
    """The same with the rows of the base in the place of those of the part: entity."""
    import pyarrow as pa

    return names_schema().set(0, pa.field("entity", pa.int32()))


def classes_schema() -> pa.Schema:
    """The columns of PATH.classes.parquet."""
    import pyarrow as pa

    return pa.schema({"child": pa.string(), "parent": pa.string()})
