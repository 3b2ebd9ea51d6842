"""Entity classification: is the class table's nearest row the entity of the picture?

Works on a picture set whose classes are entities of the vocabulary, by cosine to the rows of the
class table.  Pictures of things outside the vocabulary cannot be right and are left out;
``coverage`` says how many were not.

Also: how far the softmax of the loss, over the whole vocabulary, can be believed, and whether the
highest cosine tells things of the vocabulary from others.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.scores import classification as scores
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import pictures
from mofi_jax.model import mofi

# Training pictures per entity, lowest count first; each bucket ends where the next one begins.
BUCKETS = (("under_5", 0), ("5_to_19", 5), ("20_to_99", 20), ("100_to_999", 100), ("1000_up", 1000))


class Evaluator:
    """Top-1 and top-5 of the class table on a picture set.

    Args:
      images: folder or .tar in GPR1200 naming.
      classes: class table that gives each class number its qid (`sets.pictures.read_classes`).

    Raises BadInput: unusable set or class table, or a class table without qids.
    """

    needs = ("entities",)

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike,
        unseen: epath.PathLike = "",
        scale: float = 0.0,
    ):
        self.towers, self.scale = towers, scale
        self.pictures = pictures.read_set(images)
        self.unseen = pictures.read_set(unseen) if unseen else None
        table = pictures.read_classes(classes, self.pictures)
        if not any(entry.qid for entry in table.values()):
            raise BadInput(
                f"The class table {classes} names no entities: give each line an `id`, the "
                "knowledge base's identifier of the class."
            )
        ids = {qid: i for i, qid in enumerate(towers.entities.qids)}

        def entity(number: int) -> int:
            return ids.get(table[number].qid, -1) if number in table else -1

        self.labels = np.array([entity(c) for c in self.pictures.classes.tolist()])
        strangers = self.unseen.classes.tolist() if self.unseen else []
        self.strangers = np.flatnonzero([entity(c) < 0 for c in strangers])

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields the following, all within 0..1; all but ``coverage`` concern covered pictures.

        ``coverage``: share of the pictures whose entity is in the vocabulary; if 0, nothing else.
        ``top1``, ``top5``: share of pictures with their entity first, or among the first five.
        ``entity_macro``: mean over the entities of their top-1.
        ``top1_{bucket}``: top-1 of the pictures whose entity had so many training pictures
        (`BUCKETS`), for buckets with pictures in them.
        ``ece``: expected calibration error of the softmax's highest probability, by the scale.
        ``open_set_auroc``: of the highest cosine, covered pictures against `unseen`.
        """
        covered = np.flatnonzero(self.labels >= 0)
        yield "coverage", len(covered) / len(self.labels)
        if not len(covered):
            return
        params, labels = embedder.params, self.labels[covered]
        features = embedder.pictures(self.pictures).take(covered)
        k = min(5, len(self.towers.entities))
        nearest, cosines = self.towers.nearest_entities(params, features, k)
        right = nearest == labels[:, None]
        top1 = right[:, 0]
        yield "top1", Estimate.mean(top1)
        yield "top5", Estimate.mean(right.any(1))
        yield "entity_macro", Estimate.macro(top1, labels)
        starts = [start for _, start in BUCKETS]
        bucket = np.searchsorted(starts, self.towers.entities.counts[labels], side="right") - 1
        for i, (name, _) in enumerate(BUCKETS):
            if (bucket == i).any():
                yield f"top1_{name}", Estimate.mean(top1[bucket == i])
        learned = params.get("entity_log_scale")
        scale = self.scale if learned is None else float(mofi.capped_exp(learned))
        if scale:
            log_sum = self.towers.entity_log_sum(params, features, scale)
            confidence = np.exp(scale * cosines[:, 0].astype(np.float64) - log_sum)
            yield (
                "ece",
                Estimate.resampled(
                    lambda drawn: scores.calibration_error(confidence[drawn], top1[drawn]),
                    len(top1),
                ),
            )
        if len(self.strangers):
            others = embedder.pictures(self.unseen).take(self.strangers)
            _, unseen = self.towers.nearest_entities(params, others, 1)
            yield (
                "open_set_auroc",
                Estimate.resampled(
                    lambda *drawn: scores.auroc(cosines[drawn[0], 0], unseen[drawn[1], 0]),
                    *(len(cosines), len(unseen)),
                ),
            )

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "entity top-k by cosine to the class table, covered pictures only",
            **embedding.picture_card(self.towers, self.pictures),
            "entities": len(self.towers.entities),
            "covered_pictures": int((self.labels >= 0).sum()),
            "ties": "the lower entity id comes first",
            "calibration": "softmax over the whole vocabulary without margin, 15 equal bins",
            "scale": f"learned, else {self.scale:g}",
            "unseen": self.unseen and embedding.picture_card(self.towers, self.unseen),
            "unseen_pictures": len(self.strangers),
        }
