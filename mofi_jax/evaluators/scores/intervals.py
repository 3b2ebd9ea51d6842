"""How sure a score is: bootstrap intervals, the same every time."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


class Estimate(float):
    """A score over queries or pictures: a float, which can also tell its interval.

    The interval is made when it is asked for, so that a training loop pays nothing for it.
    """

    _draw: Callable[[np.random.Generator], float]  # the score of queries drawn with replacement

    @classmethod
    def _of(cls, value: Any, draw: Callable[[np.random.Generator], float]) -> "Estimate":
        made = cls(value)
        made._draw = draw
        return made

    @classmethod
    def resampled(cls, score: Callable[..., float], *sizes: int) -> "Estimate":
        """A score of one or several samples, given the numbers of what is in each."""

        def draw(rng: np.random.Generator) -> float:
            return score(*(rng.integers(size, size=size) for size in sizes))

        return cls._of(score(*map(np.arange, sizes)), draw)

    @classmethod
    def mean(
        cls,
        values: Float[np.ndarray, " q"] | Bool[np.ndarray, " q"],
        clusters: Int[np.ndarray, " q"] | None = None,
    ) -> "Estimate":
        """The mean of values, without NaN; NaN of none.

        clusters: whose queries belong together, such as their classes, where queries of one class
          share what makes them easy; by default each query stands for itself.
        """
        kept = np.isfinite(values)
        values = values[kept].astype(np.float64)
        sums, counts = values, np.ones(len(values))
        if clusters is not None:
            _, number = np.unique(clusters[kept], return_inverse=True)
            sums, counts = np.bincount(number, values), np.bincount(number).astype(np.float64)

        def draw(rng: np.random.Generator) -> float:
            drawn = rng.integers(len(sums), size=len(sums))
            return sums[drawn].sum() / counts[drawn].sum()

        return cls._of(values.mean() if len(values) else np.nan, draw)

    @classmethod
    def macro(
        cls,
        values: Float[np.ndarray, " q"] | Bool[np.ndarray, " q"],
        clusters: Int[np.ndarray, " q"],
    ) -> "Estimate":
        """The mean over clusters of their means, without NaN."""
        kept = np.isfinite(values)
        _, number = np.unique(clusters[kept], return_inverse=True)
        return cls.mean(np.bincount(number, values[kept]) / np.bincount(number))

    @classmethod
    def average(cls, estimates: Iterable["Estimate"]) -> "Estimate":
        """The mean of means, each of which counts the same, as over the domains of a benchmark."""
        estimates = list(estimates)
        return cls._of(
            np.mean(estimates), lambda rng: float(np.mean([e._draw(rng) for e in estimates]))
        )

    def interval(
        self, level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """(low, high): the percentile bootstrap."""
        if np.isnan(self):
            return np.nan, np.nan
        rng = np.random.default_rng(seed)
        outside = (1 - level) / 2
        # A draw without anything to score, such as none of few labelled queries, says nothing.
        low, high = np.nanquantile([self._draw(rng) for _ in range(draws)], [outside, 1 - outside])
        return float(low), float(high)
