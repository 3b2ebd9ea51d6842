"""Ranking metrics, each of one query at a time, from the ranks of what is relevant to it.

Ranks are 1-based and come in any order, [q, r] with NaN as padding.  Their ties are decided before:
`features.neighbours.ranks` gives equal scores their mean rank, so that formulas take halves;
`features.neighbours.top_k` puts the lower row first.  Where only the first k places are known
(`hits`), what was not found has no rank, and `relevant` says how much there is to find.

A query with nothing relevant has the value NaN; the protocols leave such queries out.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

Ranks = Float[np.ndarray, "q r"]
Values = Float[np.ndarray, " q"]


def hits(found: Bool[np.ndarray, "q k"]) -> Float[np.ndarray, "q k"]:
    """Ranks from the first k places: whether what stands there is relevant."""
    return np.where(found, np.arange(1.0, found.shape[1] + 1), np.nan)


def average_precision(ranks: Ranks) -> Values:
    """AP in rank form, (1/R) sum_i i / r_i over all R relevant (GPR1200's eval/utils.py)."""
    return average_precision_at(ranks, _count(ranks), None)


def average_precision_at(ranks: Ranks, relevant: Int[np.ndarray, " q"], k: int | None) -> Values:
    """AP@k, (1/min(R, k)) sum i / r_i over those with r_i <= k; k None for all places.

    As for GLDv2 (k 100), ILIAS (1,000) and INQUIRE (50): scikit-learn's average precision of the
    first k places, times the share found of the min(R, k) that could be.
    """
    ordered = np.sort(ranks, axis=1)  # NaN goes last
    places = np.where(ordered <= (k or np.inf), np.arange(1, ordered.shape[1] + 1) / ordered, 0)
    return _over(places.sum(1), np.minimum(relevant, k or np.inf))


def trapezoid_precision(ranks: Ranks) -> Values:
    """AP of Revisited Oxford and Paris, the area under trapezoids (revisitop's python/evaluate.py).

    With s_j the rank counted from 0 of the j-th of R relevant, j from 0:
    (1/2R) sum_j (p_j + (j + 1) / (s_j + 1)), p_j = j / s_j, or 1 where s_j = 0.
    """
    ordered = np.sort(ranks, axis=1) - 1
    j = np.arange(ordered.shape[1])
    before = np.where(ordered == 0, 1.0, j / np.where(ordered == 0, 1.0, ordered))
    return _over(np.nansum(before + (j + 1) / (ordered + 1), axis=1) / 2, _count(ranks))


def recall_at(ranks: Ranks, relevant: Int[np.ndarray, " q"], k: int) -> Values:
    """R@k as in metric learning and CLIP: 1 if anything relevant is among the first k, else 0."""
    return _over((ranks <= k).any(1), np.minimum(relevant, 1))


def precision_at(ranks: Ranks, k: int) -> Values:
    """P@k of Revisited Oxford and Paris: the share of relevant ones among the first k.

    As in revisitop's python/evaluate.py, k is no more than the rank of the last relevant one: all
    of three found in the first three places is a P@10 of 1.
    """
    last = np.max(np.where(np.isnan(ranks), 0, ranks), axis=1, initial=0)
    limit = np.minimum(last, k)
    return _over((ranks <= limit[:, None]).sum(1), limit)


def possible_precision_at(ranks: Ranks, relevant: Int[np.ndarray, " q"], k: int) -> Values:
    """mMP@k of UnED before its mean: the share of relevant ones among the first n = min(R, k)."""
    limit = np.minimum(relevant, k)
    return _over((ranks <= limit[:, None]).sum(1), limit)


def global_average_precision(
    confidence: Float[np.ndarray, " q"], right: Bool[np.ndarray, " q"], labelled: int
) -> float:
    """GAP of one prediction per query: (1/M) sum_i P(i) [the i-th is right] by falling confidence.

    M = `labelled`: the queries that have a label; predictions for others are wrong and count in the
    precision alone (nikosips/met).  Of equal confidences all come before P is taken, so that the
    order of queries decides nothing.  NaN where none has a label.
    """
    if not labelled:
        return np.nan
    order = np.argsort(-confidence, kind="stable")
    falling, found = -confidence[order], np.cumsum(right[order])
    upto = np.searchsorted(falling, falling, side="right")  # of the i-th, with all its equals
    return float((found[upto - 1] / upto)[right[order]].sum() / labelled)


def _count(ranks: Ranks) -> Int[np.ndarray, " q"]:
    return np.isfinite(ranks).sum(1)


def _over(total: np.ndarray, count: np.ndarray) -> Values:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
