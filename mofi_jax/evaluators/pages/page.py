"""An evaluation as one self-contained HTML file: its scores, galleries, maps and protocols.

Each picture is in it once, however often and for however many models it is shown.
"""

import base64
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Float32

from mofi_jax.common.pages import page
from mofi_jax.data import ops
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.evaluators.pages import feature_map, gallery, table
from mofi_jax.evaluators.sets.pictures import PictureSet

_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html.j2")
_THUMBNAIL = 168  # pixels, twice what is shown: screens have more than one pixel for each


class Look(NamedTuple):
    """What is shown of one model on one set."""

    gallery: gallery.Gallery
    chosen: feature_map.Chosen
    features: Float32[np.ndarray, "m d"]  # of what is chosen


class Shown(NamedTuple):
    """A picture set, and what is shown of each model on it."""

    title: str
    pictures: PictureSet
    names: Mapping[int, str]  # of its classes
    looks: dict[str, Look]  # by model


def look(
    features: Features, pictures: PictureSet, names: Mapping[int, str], domains: Sequence[str] = ()
) -> Look:
    """Every host calls it.

    Args:
      domains: names of equally large runs of the class numbers, by which the map is coloured;
        without any it is coloured by class.
    """
    groups, of_groups = pictures.classes, names
    if domains:
        numbers, inverse = np.unique(pictures.classes, return_inverse=True)
        groups = inverse * len(domains) // len(numbers)
        of_groups = dict(enumerate(domains))
    chosen = feature_map.choose(groups, of_groups)
    return Look(gallery.look(features, pictures.classes), chosen, features.take(chosen.rows))


def render(result: Mapping[str, Any], shown: Sequence[Shown]) -> str:
    """The page.

    Args:
      result: what result.json holds.
    """
    models = result["models"]
    names = [model["model"] for model in models]
    sets, thumbnails = [], {}
    # Each map takes seconds.
    bar = tqdm.tqdm(shown, desc="page", unit="set", leave=False, delay=2, disable=None)
    for number, of in enumerate(bar):
        seen = {row for one in of.looks.values() for row in _pictures_of(one.gallery)}
        thumbnails |= {f"p{number}-{row}": jpeg for row, jpeg in _thumbnails(of.pictures, seen)}
        looks = [
            {
                "model": model,
                "gallery": one.gallery,
                "names": one.chosen.names,
                "points": _points(one, of),
            }
            for model, one in of.looks.items()
        ]
        sets.append({"number": number, "of": of, "looks": looks})
    values = {
        "models": models,
        "labels": dict(zip(names, table.labels(names), strict=True)),
        "rows": table.rows(models),
        "left_out": table.left_out(models),
        "versions": result["versions"],
        "sets": sets,
        "thumbnails": thumbnails,
    }
    return page.fill(_TEMPLATE, values)


def _points(one: Look, of: Shown) -> list[tuple[float, float, int, str]]:
    """(x, y, group, class) of the map, those in colour on top; none where they are too few."""
    if len(one.features) < feature_map.LEAST:
        return []
    places = feature_map.place(one.features)
    classes = of.pictures.classes[one.chosen.rows]
    rows = zip(places.tolist(), one.chosen.groups.tolist(), classes.tolist(), strict=True)
    points = [(x, y, group, of.names[number]) for (x, y), group, number in rows]
    return sorted(points, key=lambda point: point[2] >= 0)


def _pictures_of(found: gallery.Gallery) -> list[int]:
    queries = [*found.even, *found.worst]
    near = [row for query in queries for row, _, _ in query.nearest]
    pairs = [row for pair in found.confused for row in pair.example]
    return [query.picture for query in queries] + near + pairs


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
