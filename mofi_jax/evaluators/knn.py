"""k-nearest-neighbour classification by DINO's protocol.

facebookresearch/dino eval_knn.py and dinov2/eval/knn.py: the k training pictures with the highest
cosine s vote for their class, each with weight exp(s / 0.07).  DINOv2 turns the weights into a
softmax over its longest list of neighbours, which changes no argmax.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import split

_VOTES = 2**24  # held at a time


class Evaluator:
    """Accuracy on a picture set of the votes of its nearest training pictures.

    Args:
      train, images: the training and the test set (`split.read_split`).
      k: numbers of neighbours; of a smaller training set all pictures vote.
      temperature: divides the cosines.

    Raises BadInput: unusable sets, no k, or a k or temperature that is not above 0.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        train: epath.PathLike,
        images: epath.PathLike,
        k: int | Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
    ):
        self.towers, self.k, self.temperature = towers, np.atleast_1d(k).tolist(), temperature
        whole = all(type(number) is int and number > 0 for number in self.k)
        if not (self.k and whole and temperature > 0):
            raise BadInput(
                f"`k` is {self.k} and `temperature` {temperature}: give numbers of "
                "neighbours from 1 on and a temperature above 0."
            )
        self.split = split.read_split(train, images)

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields ``dino_k{k}`` for each k, and ``dino_best``, their maximum: top-1, 0..1."""
        train, test = (embedder.pictures(p) for p in (self.split.train, self.split.test))
        rows, cosines = neighbours.top_k(test, train, max(self.k))
        scores = []
        for k in self.k:
            answers = self._vote(rows[:, :k], cosines[:, :k])
            scores.append(Estimate.mean(answers == self.split.test_labels))
            yield f"dino_k{k}", scores[-1]
        yield "dino_best", max(scores)

    def _vote(
        self, rows: Int[np.ndarray, "q k"], cosines: Float[np.ndarray, "q k"]
    ) -> Int[np.ndarray, " q"]:
        """The class with most votes for each query; `neighbours.NO_ROW` has weight 0."""
        classes = self.split.classes
        labels = self.split.train_labels[rows]
        weights = np.exp(cosines.astype(np.float64) / self.temperature)
        answers = np.empty(len(rows), np.int64)
        block = max(1, _VOTES // classes)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            count = len(labels[part])
            places = np.arange(count)[:, None] * classes + labels[part]
            votes = np.bincount(places.ravel(), weights[part].ravel(), minlength=count * classes)
            answers[part] = votes.reshape(count, classes).argmax(1)
        return answers

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hashes of the pictures."""
        return {
            "protocol": "k-NN (facebookresearch/dino eval_knn.py): votes weighted by exp(cosine/T)",
            "train": embedding.picture_card(self.towers, self.split.train),
            "test": embedding.picture_card(self.towers, self.split.test),
            "k": self.k,
            "temperature": self.temperature,
            "best": "of the k, chosen on the test set, as published",
            "ties": "votes: the lower class; neighbours: the lower row",
        }
