"""Image retrieval by the GPR1200 protocol.

Every picture queries the whole set, itself included and relevant (Visual-Computing/GPR1200,
eval/GPR1200.py and eval/utils.py).  With the R pictures of a query's class at ranks r_1 < ... < r_R

    AP = (1/R) sum_i i / r_i        mAP = mean of AP over all queries.

By this rule the query finds itself, so AP is at least 1/R, and random features reach 0.102 on
GPR1200 (1,200 x 10).  Without the query in the index (`map_no_self`) it is another metric, 0.0015
at random.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators import gallery
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.sets import pictures as picture_sets

# Domains of GPR1200, 2,000 consecutive queries each in the order of its class numbers.  The table
# published with the data set prints its columns in another order.
DOMAINS = ("landmarks", "inaturalist", "sketch", "instre", "sop", "faces")


def average_precision(sorted_ranks: Float[np.ndarray, "q r"]) -> Float[np.ndarray, " q"]:
    """AP of each query from the ascending 1-based ranks of its relevant rows.

    NaN pads the ranks at the end of a line; a query without any relevant row has AP NaN.
    """
    count = np.isfinite(sorted_ranks).sum(1)
    total = np.nansum(np.arange(1, sorted_ranks.shape[1] + 1) / sorted_ranks, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def same_class(classes: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n r"]:
    """Row numbers of every row's class, itself included, filled up with `neighbours.NO_ROW`.

    `classes` comes ascending, as `sets.pictures.read_set` orders it; r is the size of the largest.
    """
    first = np.searchsorted(classes, classes, side="left")
    last = np.searchsorted(classes, classes, side="right")
    rows = first[:, None] + np.arange((last - first).max())
    return np.where(rows < last[:, None], rows, neighbours.NO_ROW).astype(np.int32)


class Evaluator:
    """mAP of a picture set.

    Args:
      images: folder or .tar in GPR1200 naming; classes may differ in size.
      classes: class table for the captions of the gallery (`sets.pictures.read_classes`), or "".

    Raises BadInput: unusable set.
    """

    needs = ()

    def __init__(self, towers: Any, *, images: epath.PathLike, classes: epath.PathLike = ""):
        self.towers = towers
        self.pictures = picture_sets.read_set(images)
        self.classes = picture_sets.read_classes(classes) if classes else {}
        sizes = np.unique(self.pictures.classes, return_counts=True)[1]
        if sizes.max() < 2:
            raise BadInput(
                f"Every class of {images} has a single picture, so there is nothing to retrieve: "
                "name pictures of one thing with one class number."
            )
        self.alone = int((sizes == 1).sum())
        # The set is known by its shape.
        self.domains = DOMAINS if len(sizes) == 1200 and np.all(sizes == 10) else ()

    def precisions(
        self, embedder: embedding.Embedder
    ) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " q"]]:
        """AP of every picture as a query: among all, and among all but itself (NaN if alone)."""
        features = embedder.pictures(self.pictures)
        relevant = same_class(self.pictures.classes)
        ranks = neighbours.ranks(features, features, relevant)
        itself = relevant == np.arange(len(relevant))[:, None]
        own = ranks[itself][:, None]
        # Without the query, what it was ahead of or equal to moves up.
        others = np.where(itself, np.nan, ranks - (own < ranks) - 0.5 * (own == ranks))
        return average_precision(np.sort(ranks)), average_precision(np.sort(others))

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields ``map``, ``map_no_self`` and ``map_{domain}``, all within 0..1 and not rounded.

        A picture alone in its class counts for ``map`` (the official rule gives it 1).  For
        ``map_no_self`` it has nothing to find and is left out, neither right nor wrong; then
        ``left_out_no_self`` is their number.
        """
        precision, among_others = self.precisions(embedder)
        yield "map", float(precision.mean())
        yield "map_no_self", float(np.nanmean(among_others))
        if self.alone:
            yield "left_out_no_self", float(self.alone)
        size = len(precision) // max(len(self.domains), 1)
        for i, name in enumerate(self.domains):
            yield f"map_{name}", float(precision[i * size : (i + 1) * size].mean())

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "GPR1200 (Visual-Computing/GPR1200 eval/utils.py), full ranking",
            **embedding.picture_card(self.towers, self.pictures),
            "score": "dot product, float32",
            "self": "map: the query is in the index and relevant; map_no_self: it is not there",
            "ties": "mean",
            "domains": [[name, 2000] for name in self.domains],
        }

    def gallery(self, embedder: embedding.Embedder, path: epath.PathLike) -> None:
        """Host 0 writes a PNG of queries and their neighbours; called on all (`gallery.write`)."""
        features = embedder.pictures(self.pictures).numpy()
        if jax.process_index() == 0:
            gallery.write(path, features, self.pictures, self.classes)
