"""Texts of pictures, in one layout of our own: JSON lines beside a picture set.

    {"image": "COCO_val2014_000000391895.jpg", "captions": ["A man with a red helmet ...", ...]}
    {"class": 3, "captions": ["Eiffel Tower", "wrought-iron lattice tower in Paris"]}

A line is about one picture, by its name in the set, or about all pictures of a class; all lines of
a file are of one kind, and every picture of the set has its line. ``metadata.csv`` and
``metadata.jsonl`` of an ImageFolder (`sets.tables`) will do as well.
"""

import dataclasses
import json
import posixpath
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import tables
from mofi_jax.evaluators.sets.pictures import PictureSet

FIRST = 5  # captions of a picture that count: some of COCO's have six (Karpathy's protocol)


@dataclasses.dataclass(frozen=True)
class Captions:
    """Texts and pictures; they belong together where their things are the same."""

    texts: tuple[str, ...]
    text_things: Int[np.ndarray, " t"]
    picture_things: Int[np.ndarray, " n"]  # of each picture of the set, in its order


def _lines(path: epath.Path) -> Iterator[dict[str, Any] | None]:
    if path.name in tables.FILES:
        for row in tables.read(path):
            texts = tables.value(row, tables.TEXTS)
            texts = [texts] if isinstance(texts, str) else texts
            yield {"image": posixpath.normpath(row[tables.FILE]), "captions": texts}
        return
    # Not splitlines, which also breaks at what texts may hold.
    for line in path.read_text(encoding="utf-8").split("\n"):
        yield json.loads(line) if line.strip() else None


def read_captions(path: epath.PathLike, pictures: PictureSet) -> Captions:
    """Reads the texts of a picture set; of each line the first `FIRST`.

    Raises:
      BadInput: missing file, a line that is not as described, a picture or class that has no line,
        two lines, or one although the set lacks it.
    """
    path = files.local_input(path, "the captions")
    if not path.is_file():
        raise BadInput(f"There are no captions at {path}: correct `captions` (JSON lines).")
    texts, number, by = {}, 0, set()
    try:
        for row in _lines(path):
            number += 1
            if row is None:
                continue
            thing = int(row["class"]) if "class" in row else str(row["image"])
            by.add("class" if "class" in row else "image")
            captions = row["captions"]
            whole = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
            if not (whole and captions):
                raise ValueError("`captions` is no list of texts")
            if thing in texts or len(by) > 1:
                raise ValueError("a second line of one thing, or image and class in one file")
            texts[thing] = captions[:FIRST]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadInput(
            f"Line {number} of the captions {path} cannot be read ({error!r}): write lines such as "
            '{"image": "1.jpg", "captions": ["a dog"]}.'
        ) from None
    owners = pictures.classes.tolist() if by == {"class"} else list(pictures.names)
    for missing, place in (
        (set(owners) - set(texts), f"the captions {path}"),
        (set(texts) - set(owners), f"the picture set {pictures.path}"),
    ):
        if missing:
            raise BadInput(
                f"{min(missing)} is not in {place} ({len(missing)} missing): give the captions "
                "that belong to the pictures."
            )
    numbers = {thing: i for i, thing in enumerate(texts)}
    things = [numbers[thing] for thing, captions in texts.items() for _ in captions]
    return Captions(
        tuple(caption for captions in texts.values() for caption in captions),
        np.array(things),
        np.array([numbers[owner] for owner in owners]),
    )
