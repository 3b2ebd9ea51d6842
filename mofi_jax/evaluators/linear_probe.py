"""Linear probes: a linear classifier trained on features, in one of two published forms.

Their numbers do not compare, so each bears the name of its form.

``clip_lbfgs``: CLIP's (arXiv 2103.00020, A.3): scikit-learn's logistic regression, whose strength C
    is searched on held-out pictures, then trained again with these.
``clip_benchmark_adamw``: LAION-AI/CLIP_benchmark's (metrics/linear_probe.py): 20 epochs of AdamW,
    whose weight decay is searched in the same manner.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features import adamw, embedding, linear, logistic
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import split


class Form(NamedTuple):
    """One way to train a probe: its grid, the first step of the search, and what it is called."""

    trainer: Callable[..., Any]  # (features, labels, classes) -> (strength) -> (weights, bias)
    strength: str
    grid: tuple[float, ...]  # 97 values, every 16th of which is tried first
    card: dict[str, Any]


FORMS = {
    "clip_lbfgs": Form(
        logistic.Trainer,
        "C",
        tuple(np.logspace(-6, 6, 97)),
        {
            "protocol": "linear probe of CLIP (arXiv 2103.00020, A.3)",
            "objective": "scikit-learn LogisticRegression: C * sum of losses + |weights|^2 / 2",
            "optimizer": f"L-BFGS, at most {logistic.MAX_STEPS} iterations, whitened, from the "
            "solutions for other C",
            "stop": f"within about {logistic.GAP:g} nats of the least mean loss",
            "unlike_clip": "features after the projection and L2-normalised, which asks for a "
            "larger C",
        },
    ),
    "clip_benchmark_adamw": Form(
        adamw.Trainer,
        "weight_decay",
        tuple(np.logspace(-6, 2, 97)),
        {
            "protocol": "linear probe of LAION-AI/CLIP_benchmark (metrics/linear_probe.py)",
            "optimizer": f"AdamW, {adamw.EPOCHS} epochs, batch {adamw.BATCH}, learning rate "
            f"{adamw.LEARNING_RATE} with cosine decay, no warm-up",
            "unlike_clip_benchmark": "float32 and no mixed precision",
        },
    ),
}
FIRST_STEP = 16


class Evaluator:
    """Accuracy on a picture set of a linear classifier trained on another.

    Args:
      train, images: the training and the test set (`split.read_split`).
      form: one of `FORMS`.
      held_out: share of the training pictures of each class on which the strength is searched.
      seed: draws the held-out pictures, and AdamW's start and batches.

    Raises BadInput: unusable sets, an unknown form, or a share that holds out nothing or all.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        train: epath.PathLike,
        images: epath.PathLike,
        form: str = "clip_lbfgs",
        held_out: float = 0.2,
        seed: int = 0,
    ):
        self.towers, self.name, self.held_out, self.seed = towers, form, held_out, seed
        if form not in FORMS:
            raise BadInput(f"There is no linear probe {form!r}: choose from {', '.join(FORMS)}.")
        self.form = FORMS[form]
        self.split = split.read_split(train, images)
        self.validation = hold_out(self.split.train_labels, held_out, seed)
        if not self.validation.any() or self.validation.all():
            raise BadInput(
                f"`held_out` {held_out} of the {len(self.validation)} pictures of {train} leaves "
                f"{self.validation.sum()} to search {self.form.strength} on: give more pictures or "
                "a share between 0 and 1."
            )
        self.strength: float | None = None  # found by the last run

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields the following, named after the form.

        ``{form}_top1``, ``{form}_mean_per_class``: 0..1, on the test set.
        ``{form}_validation``: top-1 on the held-out pictures of the best strength.
        ``{form}_C`` or ``{form}_weight_decay``: the strength.
        """
        train, test = (embedder.pictures(p) for p in (self.split.train, self.split.test))
        labels, classes = self.split.train_labels, self.split.classes
        kept = np.where(self.validation, linear.NO_LABEL, labels)
        fit = self.form.trainer(train, classes, seed=self.seed)

        def validate(place: int) -> float:
            answers = linear.answers(train, *fit(kept, self.form.grid[place]))
            return float((answers == labels)[self.validation].mean())

        best, score = find_peak(validate, len(self.form.grid))
        strength = self.form.grid[best]
        answers = linear.answers(test, *fit(labels, strength))
        right = answers == self.split.test_labels
        yield f"{self.name}_top1", Estimate.mean(right)
        yield f"{self.name}_mean_per_class", Estimate.macro(right, self.split.test_labels)
        yield f"{self.name}_validation", score
        yield f"{self.name}_{self.form.strength}", strength

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hashes of the pictures."""
        return {
            **self.form.card,
            "train": embedding.picture_card(self.towers, self.split.train),
            "test": embedding.picture_card(self.towers, self.split.test),
            "sweep": f"{self.form.strength}: {len(self.form.grid)} log steps from "
            f"{self.form.grid[0]:g} to {self.form.grid[-1]:g}, every {FIRST_STEP}th, then around "
            "the best in halved steps",
            "held_out": self.held_out,
            "retrained": "on all training pictures",
            "seed": self.seed,
        }


def hold_out(labels: Int[np.ndarray, " n"], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """A random `share` of the rows of each class, rounded down: a class keeps what it can."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    within = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(len(labels), bool)
    held[order] = within < np.floor(share * sizes)[labels[order]]
    return held


def find_peak(score: Callable[[int], float], size: int) -> tuple[int, float]:
    """The place in range(size) of the highest score, and that, by CLIP's coarse-to-fine search.

    Every 16th place first, then the neighbours of the best in steps of 8, 4, 2 and 1.  Of equals
    the lowest place wins, as in CLIP_benchmark.
    """
    scores: dict[int, float] = {}

    def best_of(places: list[int]) -> int:
        for place in places:
            if place not in scores:
                scores[place] = score(place)
        return max(places, key=scores.__getitem__)

    best, step = best_of(list(range(0, size, FIRST_STEP))), FIRST_STEP // 2
    while step:
        best = best_of([max(best - step, 0), best, min(best + step, size - 1)])
        step //= 2
    return best, scores[best]
