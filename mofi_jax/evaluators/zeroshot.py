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
from mofi_jax.evaluators import common, neighbours


class Evaluator:
    """Top-1 and top-5 by class names on a picture set, among the classes that occur in it.

    Args:
      towers: the functions of a model with a text tower.
      images: folder or .tar in GPR1200 naming.
      classes: class table that gives each class number its label (`common.read_classes`).
      templates: prompts, ``{}`` where the label goes.
      features: embeddings shared with other evaluators.

    Raises:
      BadInput: unusable set or class table, no template, or one without its ``{}``.
    """

    needs = ("tokenizer",)

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike,
        templates: Sequence[str] = ("{}",),
        features: common.FeatureCache | None = None,
    ):
        self.towers = towers
        self.features = features or common.FeatureCache()
        self.pictures = common.read_set(images)
        table = common.read_classes(classes)
        common.require_classes(self.pictures, table, classes)
        numbers, self.labels = np.unique(self.pictures.classes, return_inverse=True)
        self.names = [table[int(number)].label for number in numbers]
        self.templates = tuple(templates)
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise BadInput(
                f"`templates` is {list(self.templates)}: give prompts with one {{}} each, such as "
                '"a photo of a {}".'
            )

    def run(self, params: Any) -> Iterator[tuple[str, float]]:
        """Yields ``top1`` and ``top5``: shares of pictures, 0..1."""
        features = self.features.embed(self.towers, params, self.pictures)
        index = neighbours.build_index(self.embed_classes(params), mesh=self.towers.mesh)
        found, _ = neighbours.top_k(index, features, min(5, len(self.names)))
        right = found == self.labels[:, None]
        yield "top1", float(right[:, 0].mean())
        yield "top5", float(right.any(1).mean())

    def embed_classes(self, params: Any) -> Float[np.ndarray, "c d"]:
        """One unit vector per class, in ascending order of class numbers."""
        prompts = [t.replace("{}", name) for name in self.names for t in self.templates]
        texts = _unit(self.towers.embed_texts(params, prompts).astype(np.float32))
        return _unit(texts.reshape(len(self.names), len(self.templates), -1).mean(1))

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "zero-shot: prompts normalised, averaged, normalised again; cosine",
            **common.picture_card(self.towers, self.pictures),
            "templates": list(self.templates),
            "ties": "the lower class number comes first",
        }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
