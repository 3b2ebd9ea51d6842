"""Few-shot classification by a closed-form ridge regression, as big_vision measures it.

big_vision/evaluators/fewshot_lsr.py: a few pictures of each class, drawn at random; features
whitened by their own mean and deviation, a constant 100 beside them for the bias, which it leaves
all but unregularised; targets +1 for the class and -1 elsewhere.  One eigen-decomposition serves
all strengths of the ridge.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import embedding, linear
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import split

BIAS = 100.0
HEADLINE = 2.0**10  # big_vision's l2 in all its published configs
GRID = tuple(2.0**power for power in range(-10, 21, 5))


class Evaluator:
    """Accuracy on a picture set after a few pictures of each class.

    Args:
      train, images: the training and the test set (`split.read_split`).
      shots: pictures a class; a class that has fewer gives all it has.
      l2: strengths of the ridge; with several, the best is reported too.
      seeds: draws of the pictures, over which the mean is taken.

    Raises BadInput: unusable sets, or a number of shots, a strength or seeds that is not above 0.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        train: epath.PathLike,
        images: epath.PathLike,
        shots: int | Sequence[int] = (5, 10, 25),
        l2: float | Sequence[float] = GRID,
        seeds: int = 3,
    ):
        self.towers, self.seeds = towers, seeds
        self.shots, self.l2 = (np.atleast_1d(numbers).tolist() for numbers in (shots, l2))
        whole = all(type(number) is int for number in (*self.shots, seeds))
        if not (self.shots and self.l2 and whole and min(*self.shots, *self.l2, seeds) > 0):
            raise BadInput(
                f"`shots` is {self.shots}, `l2` {self.l2} and `seeds` {seeds}: give numbers above "
                "0, of shots and seeds whole ones."
            )
        self.split = split.read_split(train, images)

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields top-1, 0..1, as means over the seeds.

        ``big_vision_{shots}shot``: with the l2 nearest to 2^10, theirs.
        ``big_vision_{shots}shot_best``: with the best l2 of the grid, chosen on the test set.
        """
        train, test = (embedder.pictures(p) for p in (self.split.train, self.split.test))
        labels = self.split.train_labels
        headline = int(np.argmin(np.abs(np.log2(self.l2) - np.log2(HEADLINE))))
        for shots in self.shots:
            right = np.zeros((len(self.l2), len(self.split.test)))  # share of the seeds
            for seed in range(self.seeds):
                rows = draw(labels, shots, seed)
                solved = ridge(train.take(rows), labels[rows], self.split.classes, self.l2)
                for i, (weights, bias) in enumerate(solved):
                    found = linear.answers(test, weights, bias)
                    right[i] += (found == self.split.test_labels) / self.seeds
            yield f"big_vision_{shots}shot", Estimate.mean(right[headline])
            if len(self.l2) > 1:
                best = right.mean(1).argmax()
                yield f"big_vision_{shots}shot_best", Estimate.mean(right[best])

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hashes of the pictures."""
        sizes = np.bincount(self.split.train_labels)
        return {
            "protocol": "few-shot ridge regression (big_vision/evaluators/fewshot_lsr.py)",
            "train": embedding.picture_card(self.towers, self.split.train),
            "test": embedding.picture_card(self.towers, self.split.test),
            "shots": self.shots,
            "classes_with_fewer": {str(s): int((sizes < s).sum()) for s in self.shots},
            "l2": self.l2,
            "seeds": self.seeds,
            "bias_constant": BIAS,
            "unlike_big_vision": "features after the projection and L2-normalised",
        }


def draw(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int[np.ndarray, " m"]:
    """Rows of `shots` random pictures of each class, in the order of the classes."""
    generator = np.random.default_rng(seed)
    ordered = np.argsort(labels, kind="stable")
    classes = np.split(ordered, np.cumsum(np.bincount(labels))[:-1])
    return np.concatenate([generator.permutation(rows)[:shots] for rows in classes])


def ridge(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    strengths: Sequence[float],
) -> Iterator[tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]]:
    """Weights and bias, over the features as they came, of each strength of the ridge."""
    features = features.astype(np.float64)
    mean, deviation = features.mean(0), features.std(0) + 1e-5
    x = np.pad((features - mean) / deviation, ((0, 0), (0, 1)), constant_values=BIAS)
    y = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    # (x'x + l2)^-1 x'y = x'(xx' + l2)^-1 y: whichever of the two matrices is smaller.
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    for strength in strengths:
        solution = left @ (right / (values + strength)[:, None])
        weights = solution[:-1] / deviation[:, None]
        yield weights, BIAS * solution[-1] - mean @ weights
