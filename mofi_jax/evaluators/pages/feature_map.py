"""Features of a picture set in the plane, by t-SNE: what lies together there was near before."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from mofi_jax.evaluators.pages import gallery

POINTS = 1000  # of a larger set
GROUPS = 8  # in colours of their own
LEAST = 10  # fewer points show nothing
_OF_GROUP = 60  # points of each group in colour, so that others have room


class Chosen(NamedTuple):
    """Which pictures a map shows."""

    rows: Int[np.ndarray, " m"]  # ascending
    groups: Int[np.ndarray, " m"]  # position in `names`, -1 for what has no colour
    names: list[str]  # of the groups


def choose(groups: Int[np.ndarray, " n"], names: Sequence[str]) -> Chosen:
    """Pictures at even distances, and of the groups in colour as many as have room.

    Args:
      groups: of each picture, such as its domain or its class, from 0; of more than `GROUPS` only
        some, at even distances, are in colour.
      names: of all groups.
    """
    coloured = gallery.evenly(len(names), GROUPS)
    position = np.full(len(groups), -1)
    for i, number in enumerate(coloured):
        position[groups == number] = i
    if len(names) > GROUPS:
        rows = [np.flatnonzero(position == i) for i in range(len(coloured))]
        rows = np.concatenate([of[gallery.evenly(len(of), _OF_GROUP)] for of in rows])
        others = np.flatnonzero(position < 0)
        rows = np.concatenate([rows, others[gallery.evenly(len(others), POINTS - len(rows))]])
        rows.sort()
    else:
        rows = gallery.evenly(len(groups), POINTS)
    return Chosen(rows, position[rows], [names[number] for number in coloured])


def place(features: Float32[np.ndarray, "m d"]) -> Float[np.ndarray, "m 2"]:
    """Coordinates in 0..1, the longer side of the map filled; the same for the same features."""
    import threadpoolctl
    from sklearn import manifold  # takes a second

    perplexity = min(30.0, (len(features) - 1) / 3)
    # Uncorrelated axes as a start give the same map each time, and keep what is far apart there.
    tsne = manifold.TSNE(perplexity=perplexity, init="pca", random_state=0)
    # One thread: sums in one order on every machine, and no turns on cores that others use.
    with threadpoolctl.threadpool_limits(1):
        found = tsne.fit_transform(np.asarray(features, np.float32)).astype(np.float64)
    low, high = found.min(0), found.max(0)
    return 0.5 + (found - (low + high) / 2) / max((high - low).max(), 1e-9)
