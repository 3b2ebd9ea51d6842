"""An evaluation as one self-contained HTML file: its scores, galleries, maps and protocols."""

import base64
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Float, Float32

from mofi_jax.common.pages import page
from mofi_jax.data import ops
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.evaluators.pages import feature_map, gallery, table
from mofi_jax.evaluators.sets.pictures import PictureSet

_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html.j2")
_THUMBNAIL = 168  # pixels, twice what is shown: screens have more than one pixel for each


class Look(NamedTuple):
    """What is shown of one model in one search."""

    gallery: gallery.Gallery
    chosen: feature_map.Chosen | None  # for the map, where there is one
    features: Float32[np.ndarray, "m d"]  # of what is chosen


class Shown(NamedTuple):
    """A search, and what is shown of each model in it."""

    search: gallery.Search
    looks: dict[str, Look]  # by model


def look(
    search: gallery.Search, queries: Features | Float[np.ndarray, "q d"], index: Features
) -> Look:
    """Every host calls it."""
    chosen, features = None, np.zeros((0, index.rows.shape[1]), np.float32)
    if search.groups is not None:
        chosen = feature_map.choose(search.groups, search.group_names)
        features = index.take(chosen.rows)
    return Look(gallery.look(search, queries, index), chosen, features)


def render(result: Mapping[str, Any], shown: Sequence[Shown]) -> str:
    """The page.

    Args:
      result: what result.json holds.
    """
    models = result["models"]
    names = [model["model"] for model in models]
    searches, thumbnails = [], _Thumbnails()
    # Each map takes seconds.
    for of in tqdm.tqdm(shown, desc="page", unit="set", leave=False, delay=2, disable=None):
        galleries = [one.gallery for one in of.looks.values()]
        keys = {"index": thumbnails.add(of.search.index, _rows(galleries))}
        if of.search.queries is not None:
            numbers = {query.number for one in galleries for query in (*one.even, *one.worst)}
            keys["queries"] = thumbnails.add(of.search.queries, numbers)
        looks = [
            {"model": model, "points": _points(one, of.search)} | one._asdict()
            for model, one in of.looks.items()
        ]
        searches.append({"of": of.search, "looks": looks, **keys})
    values = {
        "models": models,
        "labels": dict(zip(names, table.labels(names), strict=True)),
        "rows": table.rows(models),
        "notes": table.notes(models),
        "versions": result["versions"],
        "searches": searches,
        "thumbnails": thumbnails.found,
    }
    return page.fill(_TEMPLATE, values)


def _points(one: Look, search: gallery.Search) -> list[tuple[float, float, int, str]]:
    """(x, y, group, words) of the map, those in colour on top; none where they are too few."""
    if len(one.features) < feature_map.LEAST:
        return []
    places = feature_map.place(one.features)
    words = [search.index_words[row] for row in one.chosen.rows]
    points = [
        (x, y, group, word)
        for (x, y), group, word in zip(
            places.tolist(), one.chosen.groups.tolist(), words, strict=True
        )
    ]
    return sorted(points, key=lambda point: point[2] >= 0)


def _rows(galleries: Sequence[gallery.Gallery]) -> set[int]:
    """What of an index is seen."""
    queries = [query for one in galleries for query in (*one.even, *one.worst)]
    near = {row for query in queries for row, _, _ in query.nearest}
    return near | {row for one in galleries for pair in one.confused for row in pair.example}


class _Thumbnails:
    """Pictures of a page by their sets and rows, each read once for however many models."""

    def __init__(self):
        self.found: dict[str, str] = {}  # JPEG in base64
        self._sets: dict[Any, int] = {}

    def add(self, pictures: PictureSet, rows: set[int]) -> str:
        """What the keys of this set's pictures begin with; their row numbers follow."""
        prefix = f"p{self._sets.setdefault(pictures.key, len(self._sets))}-"
        new = {row for row in rows if f"{prefix}{row}" not in self.found}
        self.found |= {f"{prefix}{row}": jpeg for row, jpeg in _thumbnails(pictures, new)}
        return prefix


def _thumbnails(pictures: PictureSet, rows: set[int]) -> list[tuple[int, str]]:
    """JPEG in base64 of the middle of each picture, which is what models look at."""
    found = []
    for row in sorted(rows):
        # One that was read before and is gone now is left out: the scores stand without it.
        with contextlib.suppress(ops.UndecodableImage, OSError):
            rgb = ops.decode_rgb(pictures.read(row))
            size = min(_THUMBNAIL, *rgb.shape[:2])
            square = ops.apply(f"resize_short({size})|center_crop({size})", rgb)
            found.append((row, base64.b64encode(ops.encode_jpeg(square, 88)).decode()))
    return found
