"""What a model finds near to what: queries at even distances, the worst ones, confused classes."""

import collections
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from mofi_jax.evaluators.features import neighbours
from mofi_jax.evaluators.features.embedding import Features

QUERIES = 6  # shown of each kind
NEIGHBOURS = 8  # shown of a query
ASKED = 4096  # pictures of a large set that are queries here, evenly spaced
DEPTH = 50  # neighbours looked through for one of the class


class Query(NamedTuple):
    """A picture and those nearest to it, by their numbers in the set."""

    picture: int
    nearest: list[tuple[int, float, bool]]  # number, cosine, whether of the same class
    first_right: int  # place of the first of the same class, from 1; 0: not among the looked at


class Confusion(NamedTuple):
    """Pictures of a class whose nearest picture is of another one."""

    of: int  # class numbers
    taken_for: int
    queries: int
    asked: int  # pictures of the class that were queries
    example: tuple[int, int]  # the query and its neighbour of the highest cosine


class Gallery(NamedTuple):
    """What a page shows of a model on a set."""

    asked: int
    depth: int  # how many neighbours were looked through
    even: list[Query]
    worst: list[Query]
    confused: list[Confusion]


def look(features: Features, classes: Int[np.ndarray, " n"]) -> Gallery:
    """Looks at a picture set; every host calls it, and of the features only queries are gathered.

    The even ones are chosen by position alone, so that they are no better than the model.  The
    worst are those whose first neighbour of the same class is the furthest, of equals those whose
    wrong neighbour is the nearest; a picture alone in its class is none of them.
    """
    asked = evenly(len(features), ASKED)
    nearest, cosines = neighbours.top_k(
        features.take(asked),
        features,
        min(DEPTH, len(features) - 1),
        leave_out=asked[:, None],
    )
    right = (classes[nearest] == classes[asked][:, None]) & (nearest != neighbours.NO_ROW)
    first_right = np.where(right.any(1), right.argmax(1) + 1, 0)

    def query(i: np.integer) -> Query:
        shown = zip(nearest[i].tolist(), cosines[i].tolist(), right[i].tolist(), strict=True)
        return Query(int(asked[i]), list(shown)[:NEIGHBOURS], int(first_right[i]))

    _, inverse, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    far = np.where(first_right > 0, first_right, nearest.shape[1] + 1)
    wrong = np.flatnonzero((far > 1) & (sizes[inverse[asked]] > 1))
    worst = wrong[np.lexsort((-cosines[wrong, 0], -far[wrong]))]
    return Gallery(
        len(asked),
        nearest.shape[1],
        [query(i) for i in evenly(len(asked), QUERIES)],
        [query(i) for i in worst[:QUERIES]],
        _confused(classes, asked, nearest[:, 0], cosines[:, 0]),
    )


def evenly(size: int, most: int) -> Int[np.ndarray, " m"]:
    """At most so many numbers below `size`, at even distances from the ends and one another."""
    count = min(size, most)
    return ((np.arange(count) + 0.5) * size / max(count, 1)).astype(np.int64)


def _confused(
    classes: Int[np.ndarray, " n"],
    asked: Int[np.ndarray, " q"],
    nearest: Int[np.ndarray, " q"],
    cosines: Float32[np.ndarray, " q"],
) -> list[Confusion]:
    """The pairs of classes that are confused most often."""
    of, taken_for = classes[asked], classes[nearest]
    totals = collections.Counter(of.tolist())
    pairs: dict[Any, list[int]] = collections.defaultdict(list)
    for i in np.flatnonzero(of != taken_for):
        pairs[int(of[i]), int(taken_for[i])].append(i)
    found = []
    # Of equals the pair of the lower class numbers.
    for pair in sorted(pairs, key=lambda pair: (-len(pairs[pair]), pair))[:QUERIES]:
        example = max(pairs[pair], key=lambda i: cosines[i])
        shown = int(asked[example]), int(nearest[example])
        found.append(Confusion(*pair, len(pairs[pair]), totals[pair[0]], shown))
    return found
