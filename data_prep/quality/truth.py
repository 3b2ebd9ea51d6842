"""Ground truth: what each picture shows, and what its caption names.

A file of JSON lines, a picture each: {"key", "qid", "says", "kind"}: the id of its entity, a list
of the entities that its caption names, and optionally "wrong" where the caption is that of another
picture. "wnid" may stand for "qid". With a file of classes the lines hold "class" in place of the
id, and classes hold {"class", "id", "synsets", "sure"}: the entity of the class or, where "sure" is
false, any of "synsets".
"""

from __future__ import annotations

import gzip
import json
import os
import typing
import zlib
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from etils import epath

from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa


class Truth(NamedTuple):
    """One picture.

    Attributes:
      right: the entities that count as right.
      says: those that its caption names.
      wrong_caption: whether the caption is another picture's.
      entity: the one that is the likeliest of `right`.
    """

    right: frozenset[str]
    says: frozenset[str]
    wrong_caption: bool
    entity: str = ""

    @property
    def named(self) -> bool:
        """Whether the caption names what the picture shows."""
        return bool(self.right & self.says)


def read(truth: epath.PathLike, classes: epath.PathLike | None = None) -> dict[str, Truth]:
    """The truth of each picture, by key; see the docstring of this file.

    Raises:
      BadInput: a file is missing or empty, a line lacks a field, or the files do not fit together.
    """
    accepted = {}
    if classes is not None:
        for row in _read_jsonl(classes, ("class", "id", "synsets", "sure")):
            others = [] if row["sure"] else row["synsets"]
            accepted[row["class"]] = (row["id"], frozenset([row["id"], *others]))
    found = {}
    for row in _read_jsonl(truth, ("key", "qid" if classes is None else "class", "says")):
        says = frozenset(row["says"])
        if classes is None:
            entity, right = row["qid"], frozenset([row["qid"]])
        elif row["class"] in accepted:
            entity, right = accepted[row["class"]]
        else:
            raise errors.BadInput(
                f"--truth={os.fspath(truth)} has class {row['class']!r}, which"
                f" --classes={os.fspath(classes)} does not list: give files that belong together."
            )
        # Of a class whose sense is not sure, the caption names the thing where it names its id.
        says = says - right if entity not in says else says
        found[row["key"]] = Truth(right, says, row.get("kind") == "wrong", entity)
    return found


def above(entities: pa.Table, wanted: Set[str]) -> dict[str, set[str]]:
    """What entities are a kind of, near and far.

    Args:
      entities: columns qid, types and hypernyms, of a knowledge base.
      wanted: the entities that are asked for.

    Returns:
      Of each one the ids above it, itself not among them; empty where the base does not tell.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    parents: dict[str, set[str]] = {}
    new = set(wanted)
    while new:
        rows = entities.filter(pc.is_in(entities["qid"], pa.array(sorted(new), pa.string())))
        columns = (rows[name].to_pylist() for name in ("qid", "types", "hypernyms"))
        parents |= {entity: set() for entity in new}
        parents |= {qid: {*(t or ()), *(h or ())} for qid, t, h in zip(*columns, strict=True)}
        new = set().union(*(parents[qid] for qid in new)) - parents.keys()
    found = {}
    for entity in wanted:
        seen, todo = {entity}, [entity]
        while todo:
            todo += (near := parents[todo.pop()] - seen)
            seen |= near
        found[entity] = seen - {entity}
    return found


def _read_jsonl(path: epath.PathLike, fields: tuple[str, ...]) -> Iterator[dict]:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise errors.BadInput(f"{path} does not exist: name a .jsonl or .jsonl.gz file.")
    number = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            if "qid" in fields:
                row.setdefault("qid", row.get("wnid"))
            missing = [field for field in fields if not _is_usable(field, row.get(field))]
        except (ValueError, AttributeError):
            missing = list(fields)
        if missing:
            hint = ", or name the --classes that it goes with" if "qid" in missing else ""
            raise errors.BadInput(
                f"{path}, line {number}: {missing[0]!r} cannot be read: give JSON objects with"
                f" {', '.join(fields)}{hint}."
            )
        yield row
    if not number:
        raise errors.BadInput(f"{path} is empty: name the file with the truth.")


def _lines(path: str) -> Iterator[bytes]:
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise errors.BadInput(f"{path} is damaged ({error}): fetch it again.") from error


def _is_usable(field: str, value: Any) -> bool:
    """Whether a field holds what it should: ids are texts, `class` may be a number."""
    if field in ("says", "synsets"):
        return isinstance(value, list) and all(isinstance(entity, str) for entity in value)
    return isinstance(value, bool if field == "sure" else str | int if field == "class" else str)
