"""Zero-shot classification: is the nearest class name the name of the picture's class?

CLIP's protocol (open_clip, LAION-AI/CLIP_benchmark): a class is the L2-normalised mean of the
L2-normalised embeddings of all its prompts.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import pictures, prompts

# The names of a class, from its label; scores by several names do not compare with those by one.
NAMES = {
    "label": lambda label: [label],  # open_clip: one name a class, as it is written
    "first": lambda label: [label.split(",")[0].strip()],  # big_vision: up to the first comma
    # big_vision with all aliases: each one's prompts are rows of the class, all in one mean.
    "aliases": lambda label: [name.strip() for name in label.split(",")],
}


class Evaluator:
    """Top-1 and top-5 by class names on a picture set, among the classes that occur in it.

    Args:
      images: a picture set (`pictures.read_set`).
      classes: class table that gives each class number its label (`pictures.read_classes`); ""
        for a set whose layout names its classes.
      templates: prompts, ``{}`` where the name goes, or the name of a set (`prompts.TEMPLATES`).
      names: what a label holds, one of `NAMES`.

    Raises BadInput: unusable set or class table, an unknown `names`, a class without a name, no
    template, or one without its ``{}``.
    """

    needs = ("tokenizer",)

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike = "",
        templates: str | Sequence[str] = ("{}",),
        names: str = "label",
    ):
        self.towers, self.naming = towers, names
        if names not in NAMES:
            raise BadInput(f"There is no way {names!r} of `names`: choose from {', '.join(NAMES)}.")
        self.templates = prompts.templates(templates)
        self.pictures = pictures.read_set(images)
        numbers, self.labels = np.unique(self.pictures.classes, return_inverse=True)
        if classes:
            table = pictures.read_classes(classes, self.pictures)
            labels = {number: entry.label for number, entry in table.items()}
        elif self.pictures.labels:
            labels = self.pictures.labels
        else:
            raise BadInput(
                f"The layout of {images} names no classes: give `classes`, a table of their labels."
            )
        self.names = [NAMES[names](labels[int(number)]) for number in numbers]
        nameless = [int(n) for n, own in zip(numbers, self.names, strict=True) if not all(own)]
        if nameless:
            raise BadInput(
                f"Class {nameless[0]} of {images} has an empty name ({len(nameless)} such "
                "classes): name it in its class table."
            )
        # OpenAI's own list for ImageNet has two of them.
        self.shared = [
            name
            for name, count in collections.Counter(
                n for own in self.names for n in set(own)
            ).items()
            if count > 1
        ]
        if self.shared:
            logging.warning(
                "%d names of %s belong to several classes (%s), of which only the lowest number "
                "can be right where nothing else tells them apart: name them apart.",
                *(len(self.shared), images, ", ".join(self.shared[:3])),
            )

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields ``top1``, ``top5`` (shares of pictures) and ``mean_per_class`` (of top1), 0..1."""
        classes = embedding.Features.of(self.embed_classes(embedder), self.towers.mesh)
        nearest, _ = neighbours.top_k(embedder.pictures(self.pictures), classes, 5)
        right = nearest == self.labels[:, None]
        yield "top1", Estimate.mean(right[:, 0])
        yield "top5", Estimate.mean(right.any(1))
        yield "mean_per_class", Estimate.macro(right[:, 0], self.labels)

    def embed_classes(self, embedder: embedding.Embedder) -> Float[np.ndarray, "c d"]:
        """One unit vector per class, in ascending order of class numbers."""
        texts = [
            t.replace("{}", name) for own in self.names for name in own for t in self.templates
        ]
        rows = _unit(embedder.texts(texts))
        counts = [len(own) * len(self.templates) for own in self.names]
        starts = np.cumsum([0, *counts[:-1]])
        return _unit(np.add.reduceat(rows, starts) / np.array(counts, np.float32)[:, None])

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "zero-shot: prompts normalised, averaged, normalised again; cosine",
            **embedding.picture_card(self.towers, self.pictures),
            "templates": list(self.templates),
            "names": self.naming,
            "shared_names": self.shared,
            "ties": "the lower class number comes first",
        }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
