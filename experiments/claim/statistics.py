"""Means over seeds with 95 % intervals, and differences of runs pair by pair."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

DRAWS = 10_000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Float[np.ndarray, " s"]) -> Interval:
    """Student's t interval of the mean over seeds; of one seed, or equal ones, the mean alone."""
    mean = float(np.mean(values))
    if len(values) < 2 or not np.ptp(values):
        return Interval(mean, mean, mean)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Interval(mean, mean - half, mean + half)


def p_value(differences: Float[np.ndarray, " s"]) -> float:
    """Two-sided paired t test over seeds, that the mean difference is 0; 1 for one seed."""
    if len(differences) < 2 or not np.ptp(differences):
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def bootstrap(differences: Float[np.ndarray, "s q"], classes: Int[np.ndarray, " q"]) -> Interval:
    """Mean of the differences of seeds and queries, and its 95 % interval.

    Seeds and classes are drawn with replacement, each as often as there are of them; the queries of
    a class stay together, because they find one another.  NaN is no query, and a class without any
    is none.  `classes` ascend.
    """
    firsts = np.unique(classes, return_index=True)[1]
    valid = np.isfinite(differences)
    totals = np.add.reduceat(np.where(valid, differences, 0.0), firsts, axis=1)
    counts = np.add.reduceat(valid.astype(float), firsts, axis=1)
    totals, counts = totals[:, counts.any(0)], counts[:, counts.any(0)]
    rng = np.random.default_rng(0)
    seeds, drawn = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in totals.shape)
    means = (seeds @ totals * drawn).sum(1) / (seeds @ counts * drawn).sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(totals.sum() / counts.sum()), float(low), float(high))
