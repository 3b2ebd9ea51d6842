"""Entity classification: is the class table's nearest row the entity of the picture?

Works on a picture set whose classes are entities of the vocabulary, by cosine to the rows of the
class table.  Pictures of things outside the vocabulary cannot be right and are left out;
``coverage`` says how many were not.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import pictures as picture_sets

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

    def __init__(self, towers: Any, *, images: epath.PathLike, classes: epath.PathLike):
        self.towers = towers
        self.pictures = picture_sets.read_set(images)
        table = picture_sets.read_classes(classes, self.pictures)
        if not any(entry.qid for entry in table.values()):
            raise BadInput(
                f"The class table {classes} names no entities: give each line an `id`, the "
                "knowledge base's identifier of the class."
            )
        ids = {qid: i for i, qid in enumerate(towers.entities.qids)}
        self.labels = np.array([ids.get(table[int(c)].qid, -1) for c in self.pictures.classes])

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields the following, all within 0..1; all but ``coverage`` concern covered pictures.

        ``coverage``: share of the pictures whose entity is in the vocabulary; if 0, nothing else.
        ``top1``, ``top5``: share of pictures with their entity first, or among the first five.
        ``entity_macro``: mean over the entities of their top-1.
        ``top1_{bucket}``: top-1 of the pictures whose entity had so many training pictures
        (`BUCKETS`), for buckets with pictures in them.
        """
        covered = np.flatnonzero(self.labels >= 0)
        yield "coverage", len(covered) / len(self.labels)
        if not len(covered):
            return
        features, labels = embedder.pictures(self.pictures).take(covered), self.labels[covered]
        k = min(5, len(self.towers.entities))
        nearest, _ = self.towers.nearest_entities(embedder.params, features, k)
        right = nearest == labels[:, None]
        top1 = right[:, 0].astype(np.float64)
        yield "top1", float(top1.mean())
        yield "top5", float(right.any(1).mean())
        _, inverse = np.unique(labels, return_inverse=True)
        yield "entity_macro", float(np.mean(np.bincount(inverse, top1) / np.bincount(inverse)))
        starts = [start for _, start in BUCKETS]
        bucket = np.searchsorted(starts, self.towers.entities.counts[labels], side="right") - 1
        for i, (name, _) in enumerate(BUCKETS):
            if (bucket == i).any():
                yield f"top1_{name}", float(top1[bucket == i].mean())

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "entity top-k by cosine to the class table, covered pictures only",
            **embedding.picture_card(self.towers, self.pictures),
            "entities": len(self.towers.entities),
            "covered_pictures": int((self.labels >= 0).sum()),
            "ties": "the lower entity id comes first",
        }
