"""How sure a mean over queries is: bootstrap intervals, the same every time."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int


class Estimate(float):
    """A score that is a mean over queries: a float, which can also tell its interval.

    The interval is made when it is asked for, so that a training loop pays nothing for it.
    """

    _parts: tuple[tuple[np.ndarray, np.ndarray], ...]  # (sums, counts) by cluster, for each mean

    @classmethod
    def mean(
        cls, values: Float[np.ndarray, " q"], clusters: Int[np.ndarray, " q"] | None = None
    ) -> "Estimate":
        """The mean of values, without NaN; NaN of none.

        clusters: whose queries belong together, such as their classes, where queries of one class
          share what makes them easy; by default each query stands for itself.
        """
        kept = np.isfinite(values)
        values = values[kept].astype(np.float64)
        if clusters is None:
            part = values, np.ones(len(values))
        else:
            _, number = np.unique(clusters[kept], return_inverse=True)
            part = np.bincount(number, values), np.bincount(number).astype(np.float64)
        made = cls(values.mean() if len(values) else np.nan)
        made._parts = (part,)
        return made

    @classmethod
    def macro(cls, values: Float[np.ndarray, " q"], clusters: Int[np.ndarray, " q"]) -> "Estimate":
        """The mean over clusters of their means, without NaN."""
        kept = np.isfinite(values)
        _, number = np.unique(clusters[kept], return_inverse=True)
        return cls.mean(np.bincount(number, values[kept]) / np.bincount(number))

    @classmethod
    def average(cls, estimates: Iterable["Estimate"]) -> "Estimate":
        """The mean of means, each of which counts the same, as over the domains of a benchmark."""
        estimates = list(estimates)
        made = cls(np.mean(estimates))
        made._parts = tuple(part for estimate in estimates for part in estimate._parts)
        return made

    def interval(
        self, level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """(low, high): the percentile bootstrap, clusters drawn with replacement in each mean."""
        if np.isnan(self):
            return np.nan, np.nan
        rng = np.random.default_rng(seed)
        total = np.zeros(draws)
        for sums, counts in self._parts:
            for draw in range(draws):
                drawn = rng.integers(len(sums), size=len(sums))
                total[draw] += sums[drawn].sum() / counts[drawn].sum()
        outside = (1 - level) / 2
        low, high = np.quantile(total / len(self._parts), [outside, 1 - outside])
        return float(low), float(high)
