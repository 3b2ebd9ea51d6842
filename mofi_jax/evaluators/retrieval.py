"""Retrieval within one picture set: every picture is looked for among the others of its class.

``protocol="gpr1200"``: every picture queries the whole set, itself included and relevant
(Visual-Computing/GPR1200, eval/GPR1200.py and eval/utils.py).  With the R pictures of a query's
class at ranks r_1 < ... < r_R

    AP = (1/R) sum_i i / r_i        mAP = mean of AP over all queries.

By this rule the query finds itself, so AP is at least 1/R, and random features reach 0.102 on
GPR1200 (1,200 x 10).  Without the query in the index (`map_no_self`) it is another metric, 0.0015
at random.

``protocol="leave_one_out"``: R@k of metric learning (SOP, CUB, Cars, iNaturalist), the share of
pictures with one of their class among the k nearest others.  The picture itself is left out by its
number, not as the first that is found: a copy of it may come before it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.pages import gallery
from mofi_jax.evaluators.scores import ranking
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import pictures as picture_sets

PROTOCOLS = ("gpr1200", "leave_one_out")
# Domains of GPR1200, 200 consecutive class numbers (2,000 queries) each.  The table
# published with the data set prints its columns in another order.
DOMAINS = ("landmarks", "inaturalist", "sketch", "instre", "sop", "faces")
PLACES = (1, 10, 100)  # k of R@k
_RANKS = 2**24  # held at a time


def same_class(
    wanted: Int[np.ndarray, " q"], classes: Int[np.ndarray, " n"]
) -> Int[np.ndarray, "q r"]:
    """Numbers of the rows of each class that is wanted, filled up with `neighbours.NO_ROW`.

    classes: of every row, in any order; r is the size of the largest class wanted.
    """
    order = np.argsort(classes, kind="stable")
    first = np.searchsorted(classes, wanted, side="left", sorter=order)
    last = np.searchsorted(classes, wanted, side="right", sorter=order)
    places = first[:, None] + np.arange((last - first).max())
    rows = order[np.minimum(places, len(order) - 1)]
    return np.where(places < last[:, None], rows, neighbours.NO_ROW).astype(np.int32)


class Evaluator:
    """mAP or R@k of a picture set.

    Args:
      images: a picture set (`sets.pictures.read_set`); classes may differ in size.
      classes: class table for the captions of the gallery (`sets.pictures.read_classes`), or "".
      protocol: one of `PROTOCOLS`.

    Raises BadInput: unusable set, unknown protocol.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike = "",
        protocol: str = PROTOCOLS[0],
    ):
        if protocol not in PROTOCOLS:
            raise BadInput(f"Unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}.")
        self.towers, self.protocol = towers, protocol
        self.pictures = picture_sets.read_set(images)
        self.classes = picture_sets.read_classes(classes) if classes else {}
        _, inverse, sizes = np.unique(
            self.pictures.classes, return_inverse=True, return_counts=True
        )
        if sizes.max() < 2:
            raise BadInput(
                f"Every class of {images} has a single picture, so there is nothing to retrieve: "
                "name pictures of one thing with one class number."
            )
        self.sizes, self.numbers = sizes[inverse], inverse  # of every picture's class
        self.alone = int((sizes == 1).sum())
        # The set is known by its shape.
        self.domains = DOMAINS if len(sizes) == 1200 and np.all(sizes == 10) else ()

    @property
    def _domain(self) -> Int[np.ndarray, " n"]:
        """The position in `domains` of every picture's."""
        return self.numbers * len(self.domains) // (self.numbers.max() + 1)

    def precisions(
        self, embedder: embedding.Embedder
    ) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " q"]]:
        """AP of every picture as a query: among all, and among all but itself (NaN if alone)."""
        (features, _), classes = self.features(embedder), self.pictures.classes
        # All ranks of large classes would fill the host: n x r numbers.
        step = max(_RANKS // int(self.sizes.max()), 1)
        parts = []
        for start in range(0, len(classes), step):
            rows = np.arange(start, min(start + step, len(classes)))
            relevant = same_class(classes[rows], classes)
            queries = features if len(rows) == len(classes) else features.take(rows)
            ranks = neighbours.ranks(queries, features, relevant)
            itself = relevant == rows[:, None]
            own = ranks[itself][:, None]
            # Without the query, what it was ahead of or equal to moves up.
            others = np.where(itself, np.nan, ranks - (own < ranks) - 0.5 * (own == ranks))
            parts.append([ranking.average_precision(r) for r in (ranks, others)])
        among_all, among_others = np.concatenate(parts, axis=1)
        return among_all, among_others

    def recalls(self, embedder: embedding.Embedder) -> dict[int, Float[np.ndarray, " q"]]:
        """R@k of every picture as a query among the others, by k; NaN if alone in its class."""
        (features, _), classes = self.features(embedder), self.pictures.classes
        rows, _ = neighbours.top_k(
            features, features, max(PLACES), leave_out=np.arange(len(classes))[:, None]
        )
        found = ranking.hits((rows != neighbours.NO_ROW) & (classes[rows] == classes[:, None]))
        return {k: ranking.recall_at(found, self.sizes - 1, k) for k in PLACES}

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields values within 0..1, not rounded, as means over pictures with intervals by class.

        gpr1200: ``map``, ``map_no_self`` and, for GPR1200, ``map_{domain}`` and
        ``map_no_self_{domain}``.  A picture alone in its class counts for ``map`` (the official
        rule gives it 1).  For ``map_no_self`` it has nothing to find and is left out, neither right
        nor wrong; then ``left_out_no_self`` is their number.

        leave_one_out: ``recall_at_{1,10,100}``, and ``left_out`` likewise.

        Where classes differ in size, ``{metric}_macro`` is the mean over classes of their means.
        """
        if self.protocol == "gpr1200":
            among_all, among_others = self.precisions(embedder)
            values = {"map": among_all, "map_no_self": among_others}
            left_out = "left_out_no_self"
        else:
            values = {f"recall_at_{k}": v for k, v in self.recalls(embedder).items()}
            left_out = "left_out"
        classes = self.pictures.classes
        for name, each in values.items():
            yield name, Estimate.mean(each, classes)
        if self.alone:
            yield left_out, float(self.alone)
        if self.sizes.min() < self.sizes.max():
            for name, each in values.items():
                yield f"{name}_macro", Estimate.macro(each, classes)
        for name, each in values.items():
            for i, title in enumerate(self.domains):
                own = self._domain == i
                yield f"{name}_{title}", Estimate.mean(each[own], classes[own])

    def features(
        self, embedder: embedding.Embedder
    ) -> tuple[embedding.Features, embedding.Features]:
        """Of the queries and of the index."""
        return (embedder.pictures(self.pictures),) * 2

    def search(self, title: str) -> gallery.Search:
        """What a page shows; the map is coloured by domain, or else by class."""
        classes = self.pictures.classes
        known = {number: of.label for number, of in self.classes.items()} or self.pictures.labels
        names = [known.get(int(n), f"class {n}") for n in np.unique(classes)]
        words = [names[number] for number in self.numbers]
        groups, group_names = self.numbers, names
        if self.domains:
            groups, group_names = self._domain, self.domains
        return gallery.Search(
            title,
            *(self.pictures, words) * 2,
            leave_out=np.arange(len(classes))[:, None],
            right=lambda asked, rows: classes[rows] == classes[asked][:, None],
            relevant=self.sizes - 1,
            classes=classes,
            groups=groups,
            group_names=group_names,
        )

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        if self.protocol == "gpr1200":
            protocol = {
                "protocol": "GPR1200 (Visual-Computing/GPR1200 eval/utils.py), full ranking",
                "self": "map: the query is in the index and relevant; map_no_self: it is not there",
                "ties": "mean",
            }
        else:
            protocol = {
                "protocol": "R@k: any of the k nearest others is of the query's class",
                "self": "left out by its number",
                "ties": "the lower row comes first",
            }
        return {
            **protocol,
            **embedding.picture_card(self.towers, self.pictures),
            "score": "dot product, float32",
            "domains": [[name, 2000] for name in self.domains],
        }
