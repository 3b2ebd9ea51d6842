"""Retrieval sets whose queries are not their index, in one layout of our own.

An index is a picture set (`pictures.read_set`).  Its queries are JSON lines, one a query, in the
order in which they are reported:

    {"image": "all_souls_000013.jpg", "box": [136.5, 34.1, 648.5, 955.7],
     "positives": {"easy": ["all_souls_000026.jpg"], "hard": []}, "junk": {"easy": ["x.jpg"]}}
    {"image": "17_a.jpg", "classes": [17], "junk": ["17_a.jpg"], "domain": "sop"}
    {"text": "a hermit crab using plastic as a shell", "positives": ["1.jpg"], "split": "test"}

image or text: what is looked for; all lines of a file have the one or all have the other.  An image
  is a name in the set of query pictures.
box: x0, y0, x1, y1 in pixels of the picture as a viewer shows it; the query is what lies in it.
positives: names of pictures of the index, or such lists by setup (ROxford's easy, medium, hard).
junk: likewise, the pictures that are taken out before ranks are given, such as the query itself
  where it is in the index; a list is for every setup; may be left out.
classes: in place of positives: class numbers of the index, whose pictures are the positives; []
  for a query that nothing in the index shows (Met's distractors).
domain, split: optional; `mofi_jax.evaluators.query_index` averages over domains, and reports
  splits apart.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int
from PIL import Image

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.evaluators.sets.pictures import PictureSet

NO_ROW = -1  # pads lists of rows and of classes
_KEYS = {"image", "text", "box", "positives", "junk", "classes", "domain", "split"}


@dataclasses.dataclass(frozen=True)
class Queries:
    """What is looked for in an index, and what is to be found; `read_queries` makes it.

    Row numbers are those of the index; lists of them are padded with `NO_ROW`.
    """

    path: epath.Path
    names: tuple[str, ...]  # pictures or texts
    texts: bool
    boxes: tuple[tuple[float, ...] | None, ...]
    positives: dict[str, Int[np.ndarray, "q _"]]  # by setup, "" where there is one; {} with classes
    junk: dict[str, Int[np.ndarray, "q _"]]  # by setup
    classes: Int[np.ndarray, "q _"] | None  # in place of positives
    domains: tuple[str, ...]  # of each query; "" where none is given
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def query_pictures(queries: Queries, pictures: PictureSet) -> PictureSet:
    """The pictures of `queries` among `pictures`, cut to their boxes, whose corners are rounded.

    `pictures` itself where the queries are all of it, in its order: then others share its features.

    Raises BadInput: one that is not there; when it is read, a box that holds nothing of it.
    """
    rows = _rows(pictures)
    for line, name in enumerate(queries.names, start=1):
        if name not in rows:
            raise _missing(queries.path, line, name, pictures)
    if queries.names == pictures.names and not any(queries.boxes):
        return pictures
    chosen = [rows[name] for name in queries.names]

    def read(i: int) -> bytes:
        data, box = pictures.read(chosen[i]), queries.boxes[i]
        if box is None:
            return data
        left, top, right, bottom = (max(round(side), 0) for side in box)
        picture = ops.decode_rgb(data)[top:bottom, left:right]
        if not picture.size:
            raise BadInput(
                f"The box {list(box)} of {queries.names[i]} in {queries.path} holds nothing of "
                "that picture: give x0, y0, x1, y1 in its pixels."
            )
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG", compress_level=1)
        return png.getvalue()

    sources = (pictures.path, *pictures.sources)
    classes = pictures.classes[chosen]
    return PictureSet(queries.path, queries.names, classes, read, sources=sources)


def with_distractors(index: PictureSet, distractors: Sequence[PictureSet]) -> PictureSet:
    """An index with further pictures behind it, which are of no class (`NO_ROW`).

    Raises BadInput: two pictures of one name.
    """
    if not distractors:
        return index
    parts = [index, *distractors]
    ends = np.cumsum([len(part) for part in parts])
    names = tuple(name for part in parts for name in part.names)
    if len(set(names)) < len(names):
        where = ", ".join(str(part.path) for part in parts)
        raise BadInput(f"The index and its distractors ({where}) share a name: rename pictures.")

    def read(i: int) -> bytes:
        part = int(np.searchsorted(ends, i, side="right"))
        return parts[part].read(i - int(ends[part]) + len(parts[part]))

    nothing = np.full(len(names) - len(index), NO_ROW, np.int64)
    classes = np.concatenate([index.classes, nothing])
    sources = tuple(part.path for part in parts)
    return PictureSet(index.path, names, classes, read, index.labels, sources)


def read_queries(path: epath.PathLike, index: PictureSet) -> Queries:
    """Reads the queries of an index, as described above.

    Raises:
      BadInput: missing file, a line that is not as described, names a picture that the index lacks,
        or has other keys or setups than the first one; no query; or none with anything to find.
    """
    path = files.local_input(path, "the queries")
    if not path.is_file():
        raise BadInput(f"There are no queries at {path}: correct `queries` (JSON lines).")
    number, rows, lines = 0, _rows(index), []
    try:
        # Not splitlines, which also breaks at what texts may hold.
        for text in path.read_text(encoding="utf-8").split("\n"):
            number += 1
            if text.strip():
                lines.append((number, _query(json.loads(text))))
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadInput(
            f"Line {number} of the queries {path} cannot be read ({error}): write lines such as "
            '{"image": "q.jpg", "positives": ["a.jpg"]}.'
        ) from None
    if not lines:
        raise BadInput(f"The queries {path} hold no query: write one JSON object a line.")
    first = lines[0][1]
    for number, query in lines:
        if _form(query) != _form(first):
            raise BadInput(
                f"Line {number} of the queries {path} is of another form than the first one: give "
                "all queries of a file image or text, positives (of the same setups) or classes."
            )
        for name in (*_listed(query["positives"]), *_listed(query["junk"])):
            if name not in rows:
                raise _missing(path, number, name, index)
    made = [query for _, query in lines]
    setups = list(first["positives"]) or [""]

    def padded(key: str, setup: str) -> Int[np.ndarray, "q _"]:
        lists = [query[key].get(setup, query[key].get("", ())) for query in made]
        return _padded([[rows[name] for name in names] for names in lists])

    if not any(query["classes"] or any(query["positives"].values()) for query in made):
        raise BadInput(f"None of the queries {path} has anything to find: give positives.")
    return Queries(
        path,
        names=tuple(query["name"] for query in made),
        texts=first["text"],
        boxes=tuple(query["box"] for query in made),
        positives={s: padded("positives", s) for s in setups} if first["positives"] else {},
        junk={setup: padded("junk", setup) for setup in setups},
        classes=None if first["positives"] else _padded([query["classes"] for query in made]),
        domains=tuple(query["domain"] for query in made),
        splits=tuple(query["split"] for query in made),
    )


def _query(line: Any) -> dict[str, Any]:
    """A line in one form; ValueError or the like where it is not as described."""
    if unknown := set(line) - _KEYS:
        raise ValueError(f"unknown key {min(unknown)!r}")
    if ("image" in line) == ("text" in line):
        raise ValueError("needs image or text")
    if ("positives" in line) == ("classes" in line):
        raise ValueError("needs positives or classes")
    box = line.get("box")
    if box is not None:
        box = tuple(float(side) for side in box)
        if len(box) != 4 or not np.isfinite(box).all() or "text" in line:
            raise ValueError("box needs a picture and four numbers")
    classes = line.get("classes", [])
    if not isinstance(classes, list):
        raise ValueError("classes is a list of numbers")
    positives, junk = (_by_setup(line.get(key, {})) for key in ("positives", "junk"))
    if unknown := set(junk) - set(positives) - {""}:
        raise ValueError(f"junk of the setup {min(unknown)!r}, which has no positives")
    return {
        "name": str(line["text" if "text" in line else "image"]),
        "text": "text" in line,
        "box": box,
        "positives": positives,
        "junk": junk,
        "classes": np.unique(np.array([int(number) for number in classes], np.int64)).tolist(),
        "domain": str(line.get("domain", "")),
        "split": str(line.get("split", "")),
    }


def _by_setup(names: Any) -> dict[str, list[str]]:
    lists = names if isinstance(names, Mapping) else {"": names}
    if not all(isinstance(n, list) and all(isinstance(x, str) for x in n) for n in lists.values()):
        raise ValueError("positives and junk are lists of names, or such lists by setup")
    return {setup: list(dict.fromkeys(each)) for setup, each in lists.items()}


def _form(query: Mapping[str, Any]) -> tuple[bool, frozenset[str]]:
    """What all queries of a file have in common."""
    return query["text"], frozenset(query["positives"])


def _listed(by_setup: Mapping[str, list[str]]) -> Iterator[str]:
    return itertools.chain.from_iterable(by_setup.values())


def _rows(pictures: PictureSet) -> dict[str, int]:
    return {name: row for row, name in enumerate(pictures.names)}


def _missing(path: epath.Path, number: int, name: str, pictures: PictureSet) -> BadInput:
    return BadInput(
        f"Line {number} of the queries {path} names {name}, which is not in {pictures.path}: give "
        "the pictures that belong to the queries, since scores are comparable only on all of them."
    )


def _padded(lists: list[list[int]]) -> Int[np.ndarray, "q _"]:
    padded = np.full((len(lists), max(map(len, lists))), NO_ROW, np.int64)
    for line, numbers in zip(padded, lists, strict=True):
        line[: len(numbers)] = numbers
    return padded
