"""Retrieval by queries that are apart from the index: the published protocols, each by its letter.

revisited: Revisited Oxford and Paris (filipradenovic/revisitop).  By setup ``map``, the area under
  trapezoids, and ``mp_at_{1,5,10}``; junk is taken out before ranks are given.
gldv2, ilias, inquire: ``map_at_{100,1000,50}`` (`ranking.average_precision_at`).
uned: ``mmp_at_5`` and ``recall_at_1`` over the merged index (nikosips/Universal-Image-Embeddings).
met: ``gap``, ``gap_minus`` and ``accuracy`` of a k-NN classifier (nikosips/met), the latter two
  without queries that have no class.

A setup and a split are appended to a metric's name.  Where queries have domains, a metric is the
mean over them, and ``{metric}_{domain}`` are its parts.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.pages import gallery
from mofi_jax.evaluators.scores import ranking
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.evaluators.sets import query_index

# Places looked at.  Those of revisited are for P@k alone, its AP is over all.
PLACES = {"revisited": 10, "gldv2": 100, "ilias": 1000, "inquire": 50, "uned": 5, "met": 50}
TIES = {"revisited": "mean"}
# What nikosips/met tunes on the validation queries, in its order: neighbours, and what their
# cosines are multiplied by.
MET_NEIGHBOURS = (1, 2, 3, 5, 7, 10, 15, 20, 50)
MET_SCALES = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)
_SAME = 1 - 1e-5  # cosine of a picture with itself, in float32


class Evaluator:
    """Scores of queries, pictures or texts, against an index.

    Args:
      queries: what is looked for and what is to be found (`sets.query_index`).
      index: picture set that it is looked for in.
      protocol: one of `PLACES`.
      images: picture set of the queries; left out where they are texts.
      distractors: picture sets that nothing is looked for in, which stand in the index too, such as
        the 5 million of ILIAS or the million of Revisited Oxford and Paris.

    Raises BadInput: unusable sets or queries, unknown protocol, or one that needs what they lack.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        queries: epath.PathLike,
        index: epath.PathLike,
        protocol: str,
        images: epath.PathLike = "",
        distractors: Sequence[epath.PathLike] = (),
    ):
        if protocol not in PLACES:
            raise BadInput(f"Unknown protocol {protocol!r}: choose from {', '.join(PLACES)}.")
        self.towers, self.protocol = towers, protocol
        self.index = query_index.with_distractors(
            picture_sets.read_set(index), [picture_sets.read_set(path) for path in distractors]
        )
        self.queries = query_index.read_queries(queries, self.index)
        self.tuned: dict[str, float] = {}
        self.copies = 0.0  # share of query pictures that are in the index, found by the last run
        if bool(images) == self.queries.texts:
            raise BadInput(
                f"The queries {queries} are {'texts' if images else 'pictures'}: "
                f"{'leave `images` out' if images else 'name their set in `images`'}."
            )
        if self.queries.texts:
            self.needs = ("tokenizer",)
        else:
            pictures = picture_sets.read_set(images)
            self.pictures = query_index.query_pictures(self.queries, pictures)
        by_class = self.queries.classes is not None
        if protocol == "revisited" and by_class:
            raise BadInput(
                f"The protocol revisited needs `positives`, not `classes`, in {queries}."
            )
        if protocol == "met" and not (by_class and set(self.queries.splits) == {"val", "test"}):
            raise BadInput(
                f"The protocol met needs `classes` and the splits val and test in {queries}: it "
                "tunes its classifier on val."
            )
        for split in sorted(set(self.queries.splits)) if protocol == "met" else ():
            if not self._labelled[np.array(self.queries.splits) == split].any():
                raise BadInput(f"No query of the split {split} in {queries} has `classes`.")

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields the metrics of the protocol, 0..1; they are means over queries but for ``gap``.

        Queries with nothing to find are left out; then ``left_out`` is their number.
        """
        queries, index = self.features(embedder)
        for setup, junk in self.queries.junk.items():
            rows, scores = neighbours.top_k(queries, index, PLACES[self.protocol], leave_out=junk)
            self._tell_copies(scores)
            if self.protocol == "met":
                yield from self._classify(rows, scores)
                return
            found, relevant = ranking.hits(self._found(rows, setup)), self._relevant(setup)
            if self.protocol == "revisited":
                positives = self.queries.positives[setup]
                ranks = neighbours.ranks(queries, index, positives, leave_out=junk)
                values = {"map": ranking.trapezoid_precision(ranks)}
                values |= {f"mp_at_{k}": ranking.precision_at(ranks, k) for k in (1, 5, 10)}
            elif self.protocol == "uned":
                values = {
                    "mmp_at_5": ranking.possible_precision_at(found, relevant, 5),
                    "recall_at_1": ranking.recall_at(found, relevant, 1),
                }
            else:
                k = PLACES[self.protocol]
                values = {f"map_at_{k}": ranking.average_precision_at(found, relevant, k)}
            yield from self._means(values, relevant, setup)

    def features(
        self, embedder: embedding.Embedder
    ) -> tuple[embedding.Features | Float[np.ndarray, "q d"], embedding.Features]:
        """Of the queries and of the index."""
        index = embedder.pictures(self.index)
        if self.queries.texts:
            return embedder.texts(self.queries.names), index
        return embedder.pictures(self.pictures), index

    def search(self, title: str) -> gallery.Search:
        """What a page shows: of several setups the last, the hardest of those published."""
        setup = list(self.queries.junk)[-1]
        return gallery.Search(
            f"{title} ({setup})" if setup else title,
            queries=None if self.queries.texts else self.pictures,
            query_words=self.queries.names,
            index=self.index,
            index_words=self.index.names,
            leave_out=self.queries.junk[setup],
            right=lambda asked, rows: self._found(rows, setup, asked),
            relevant=self._relevant(setup),
        )

    def _means(
        self,
        values: dict[str, Float[np.ndarray, " q"]],
        relevant: Int[np.ndarray, " q"],
        setup: str,
    ) -> Iterator[tuple[str, float]]:
        """Metrics of every split and domain."""
        splits, domains = np.array(self.queries.splits), np.array(self.queries.domains)
        for split in np.unique(splits):
            suffix = "".join(f"_{part}" for part in (setup, split) if part)
            scored = (splits == split) & (relevant > 0)
            for name, each in values.items():
                parts = {
                    domain: Estimate.mean(each[scored & (domains == domain)])
                    for domain in np.unique(domains[scored])
                }
                if parts:
                    yield f"{name}{suffix}", Estimate.average(parts.values())
                for domain, part in parts.items():
                    if domain:
                        yield f"{name}{suffix}_{domain}", part
            if left_out := int(((splits == split) & (relevant == 0)).sum()):
                yield f"left_out{suffix}", float(left_out)

    def _found(
        self,
        rows: Int[np.ndarray, "m k"],
        setup: str,
        asked: Int[np.ndarray, " m"] | slice = slice(None),
    ) -> Bool[np.ndarray, "m k"]:
        """Whether these rows of the index are to be found, by all queries or those asked."""
        there = rows != neighbours.NO_ROW
        if self.queries.classes is not None:
            own = self.queries.classes[asked][:, None, :]
            same = (self.index.classes[rows][:, :, None] == own) & (own != neighbours.NO_ROW)
            return same.any(2) & there
        # A number for every pair of query and row.
        first = np.arange(len(rows))[:, None] * len(self.index)
        positives = self.queries.positives[setup][asked]
        return np.isin(first + rows, (first + positives)[positives != neighbours.NO_ROW]) & there

    @property
    def _labelled(self) -> Bool[np.ndarray, " q"]:
        return (self.queries.classes != neighbours.NO_ROW).any(1)

    def _relevant(self, setup: str) -> Int[np.ndarray, " q"]:
        """How many rows of the index are to be found, without junk."""
        if self.queries.classes is not None:
            numbers, sizes = np.unique(self.index.classes, return_counts=True)
            place = np.minimum(np.searchsorted(numbers, self.queries.classes), len(numbers) - 1)
            known = (numbers[place] == self.queries.classes) & (
                self.queries.classes != neighbours.NO_ROW
            )
            whole = np.where(known, sizes[place], 0).sum(1)
        else:
            whole = (self.queries.positives[setup] != neighbours.NO_ROW).sum(1)
        return whole - self._found(self.queries.junk[setup], setup).sum(1)

    def _classify(
        self, rows: Int[np.ndarray, "q k"], scores: Float[np.ndarray, "q k"]
    ) -> Iterator[tuple[str, float]]:
        """GAP of the test queries, by the neighbours and the scale that are best on val.

        A class has the score of its nearest picture; a query's class is so that of the nearest of
        all, and the confidence is its softmax among the classes of the index, of which those not
        among the k neighbours score 0.
        """
        classes = np.where(rows == neighbours.NO_ROW, -1, self.index.classes[rows])
        later = classes[:, :, None] == classes[:, None, :]
        nearest = ~np.tril(later, -1).any(2) & (classes >= 0)  # first picture of its class
        right = self._found(rows[:, :1], "")[:, 0]
        labelled = self._labelled
        total = len(np.unique(self.index.classes[self.index.classes != neighbours.NO_ROW]))
        splits = np.array(self.queries.splits)

        def gap(chosen: np.ndarray, k: int, scale: float) -> float:
            own = np.where(nearest[chosen, :k], np.maximum(scores[chosen, :k], 0), -np.inf)
            others = total - np.isfinite(own).sum(1)
            powers = np.exp(scale * own.astype(np.float64))
            confidence = powers[:, 0] / (powers.sum(1) + others)
            return ranking.global_average_precision(
                confidence, right[chosen], int(labelled[chosen].sum())
            )

        tried = itertools.product(MET_NEIGHBOURS, MET_SCALES)
        k, scale = max(tried, key=lambda pair: gap(splits == "val", *pair))  # the first of equals
        self.tuned = {"neighbours": k, "scale": scale}
        test = splits == "test"
        for name, chosen in (("gap", test), ("gap_minus", test & labelled)):
            numbers = np.flatnonzero(chosen)
            yield (
                name,
                Estimate.resampled(
                    lambda drawn, numbers=numbers: gap(numbers[drawn], k, scale), len(numbers)
                ),
            )
        yield "accuracy", Estimate.mean(right[test & labelled])

    def _tell_copies(self, scores: Float[np.ndarray, "q k"]) -> None:
        if self.queries.texts:
            return
        self.copies = float((scores[:, 0] > _SAME).mean())
        if self.copies > 0.5:
            logging.warning(
                "%.0f %% of the queries of %s find a picture of cosine 1: are they in the index? "
                "Then name each in its own `junk`.",
                100 * self.copies,
                self.queries.path,
            )

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hashes of the queries and of the pictures."""
        card = {
            "protocol": f"{self.protocol} (mofi_jax.evaluators.query_index)",
            "queries": len(self.queries),
            "queries_sha256": hashlib.sha256(self.queries.path.read_bytes()).hexdigest(),
            "index": embedding.picture_card(self.towers, self.index),
            "distractors": int((self.index.classes == neighbours.NO_ROW).sum()),
            "score": "dot product, float32",
            "self": "as any other picture, if it is in the index; the junk of a query is taken out",
            "ties": TIES.get(self.protocol, "the lower row comes first"),
        }
        if self.protocol == "met":
            card |= {"whitening": "none", "tuned_on_val": self.tuned}
        if self.queries.texts:
            card["prompt"] = "the text alone"
        else:
            card["query_pictures"] = embedding.picture_card(self.towers, self.pictures)
            card["boxes"] = sum(box is not None for box in self.queries.boxes)
            card["queries_with_a_copy"] = self.copies
        return card
