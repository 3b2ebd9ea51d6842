"""Zero-shot classification: is the nearest class name the name of the picture's class?

CLIP's protocol (open_clip, LAION-AI/CLIP_benchmark): a class is the L2-normalised mean of the
L2-normalised embeddings of all its prompts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import pictures as picture_sets


class Evaluator:
    """Top-1 and top-5 by class names on a picture set, among the classes that occur in it.

    Args:
      images: folder or .tar in GPR1200 naming.
      classes: class table that gives each class number its label (`sets.pictures.read_classes`).
      templates: prompts, ``{}`` where the label goes.

    Raises BadInput: unusable set or class table, no template, or one without its ``{}``.
    """

    needs = ("tokenizer",)

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike,
        templates: Sequence[str] = ("{}",),
    ):
        self.towers = towers
        self.pictures = picture_sets.read_set(images)
        table = picture_sets.read_classes(classes, self.pictures)
        numbers, self.labels = np.unique(self.pictures.classes, return_inverse=True)
        self.names = [table[int(number)].label for number in numbers]
        self.templates = tuple(templates)
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise BadInput(
                f"`templates` is {list(self.templates)}: give prompts with one {{}} each, such as "
                '"a photo of a {}".'
            )

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields ``top1`` and ``top5``: shares of pictures, 0..1."""
        features, classes = embedder.pictures(self.pictures).numpy(), self.embed_classes(embedder)
        scores, labels = features @ classes.T, self.labels[:, None]
        right = np.take_along_axis(scores, labels, axis=1)
        tied_before = (scores == right) & (np.arange(len(classes)) < labels)
        ahead = ((scores > right) | tied_before).sum(1)  # classes that come before the right one
        yield "top1", float((ahead < 1).mean())
        yield "top5", float((ahead < 5).mean())

    def embed_classes(self, embedder: embedding.Embedder) -> Float[np.ndarray, "c d"]:
        """One unit vector per class, in ascending order of class numbers."""
        prompts = [t.replace("{}", name) for name in self.names for t in self.templates]
        texts = _unit(embedder.texts(prompts))
        return _unit(texts.reshape(len(self.names), len(self.templates), -1).mean(1))

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "zero-shot: prompts normalised, averaged, normalised again; cosine",
            **embedding.picture_card(self.towers, self.pictures),
            "templates": list(self.templates),
            "ties": "the lower class number comes first",
        }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
