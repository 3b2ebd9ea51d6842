"""What a model finds near to what: queries at even distances, the worst ones, confused classes."""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from mofi_jax.evaluators.features import neighbours
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.evaluators.sets.pictures import PictureSet

QUERIES = 6  # shown of each kind
NEIGHBOURS = 8  # shown of a query
ASKED = 4096  # of many queries those that are looked at, evenly spaced
DEPTH = 50  # neighbours looked through for a right one


class Search(NamedTuple):
    """What an evaluator looks for, where, and what is right; the same for every model."""

    title: str
    queries: PictureSet | None  # None for texts
    query_words: Sequence[str]  # of each query: the text itself, or what is said of the picture
    index: PictureSet
    index_words: Sequence[str]
    leave_out: Int[np.ndarray, "q m"]  # rows that a query may not find, with `neighbours.NO_ROW`
    # Of the queries with these numbers, whether these rows are right.
    right: Callable[[Int[np.ndarray, " m"], Int[np.ndarray, "m k"]], Bool[np.ndarray, "m k"]]
    relevant: Int[np.ndarray, " q"]  # how many rows are right for each query
    # Where the queries are the index: their classes, and the names of what colours the map.
    classes: Int[np.ndarray, " n"] | None = None
    groups: Int[np.ndarray, " n"] | None = None
    group_names: Sequence[str] = ()


class Query(NamedTuple):
    """A query and what is nearest to it, by their numbers."""

    number: int
    nearest: list[tuple[int, float, bool]]  # row of the index, cosine, whether it is right
    first_right: int  # place of the first right one, from 1; 0: not among the looked at


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


def look(search: Search, queries: Features | Float[np.ndarray, "q d"], index: Features) -> Gallery:
    """Looks at what a model finds; every host calls it, and gathers only the queries' features.

    The even ones are chosen by position alone, so that they are no better than the model.  The
    worst are those whose first right neighbour is the furthest, of equals those whose wrong
    neighbour is the nearest; a query with nothing to find is none of them.
    """
    asked = evenly(len(queries), ASKED)
    nearest, cosines = neighbours.top_k(
        queries.take(asked) if isinstance(queries, Features) else queries[asked],
        index,
        min(DEPTH, len(index) - (search.classes is not None)),
        leave_out=search.leave_out[asked],
    )
    right = search.right(asked, nearest) & (nearest != neighbours.NO_ROW)
    first_right = np.where(right.any(1), right.argmax(1) + 1, 0)

    def query(i: np.integer) -> Query:
        shown = zip(nearest[i].tolist(), cosines[i].tolist(), right[i].tolist(), strict=True)
        shown = [of for of in shown if of[0] != neighbours.NO_ROW]
        return Query(int(asked[i]), shown[:NEIGHBOURS], int(first_right[i]))

    far = np.where(first_right > 0, first_right, nearest.shape[1] + 1)
    wrong = np.flatnonzero((far > 1) & (search.relevant[asked] > 0))
    worst = wrong[np.lexsort((-cosines[wrong, 0], -far[wrong]))]
    confused = []
    if search.classes is not None:
        confused = _confused(search.classes, asked, nearest[:, 0], cosines[:, 0])
    return Gallery(
        len(asked),
        nearest.shape[1],
        [query(i) for i in evenly(len(asked), QUERIES)],
        [query(i) for i in worst[:QUERIES]],
        confused,
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
