"""Every ranking metric against its definition, walked through place by place, and scikit-learn."""

import warnings

import numpy as np
import pytest
from sklearn import metrics

from mofi_jax.evaluators.scores import intervals, ranking

QUERIES, INDEX = 60, 40


@pytest.fixture(scope="module")
def ranked():
    """Lists of relevant (True) and other places; ranks NaN-padded, shuffled within a line.

    The first query finds nothing, the second nothing but relevant ones, the third all at the end.
    """
    rng = np.random.default_rng(0)
    places = rng.random((QUERIES, INDEX)) < rng.choice([0.03, 0.2, 0.7], (QUERIES, 1))
    places[:3] = [[False] * 40, [True] * 40, [False] * 37 + [True] * 3]
    ranks = np.where(places, np.arange(1.0, INDEX + 1), np.nan)
    return places, rng.permuted(ranks, axis=1), places.sum(1)


def walk(places, k=None):
    """(number found, number seen) at every relevant place of the first k."""
    found = 0
    for seen, relevant in enumerate(places[:k], start=1):
        if relevant:
            found += 1
            yield found, seen


def by_hand(metric, places):
    return np.array([metric(list(line)) if any(line) else np.nan for line in places])


def test_average_precision(ranked):
    places, ranks, _ = ranked
    expected = by_hand(lambda line: np.mean([i / r for i, r in walk(line)]), places)
    np.testing.assert_allclose(ranking.average_precision(ranks), expected, atol=1e-12)
    scores = -np.arange(INDEX)
    expected = by_hand(lambda line: metrics.average_precision_score(line, scores), places)
    np.testing.assert_allclose(ranking.average_precision(ranks), expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 30, 1000])
def test_metrics_of_the_first_k_places(ranked, k):
    places, ranks, relevant = ranked

    def scikit_learn(line):  # as INQUIRE and ILIAS write it
        first = np.array(line[:k])
        if not first.any():
            return 0.0
        found = metrics.average_precision_score(first, -np.arange(len(first)))
        return found * first.sum() / min(k, sum(line))

    def revisited(line):
        limit = min(max(r for _, r in walk(line)), k)
        return sum(line[:limit]) / limit

    for given in (ranks, ranking.hits(places[:, :k])):
        for name, expected in (
            ("average_precision_at", scikit_learn),
            ("recall_at", lambda line: float(any(line[:k]))),
            ("possible_precision_at", lambda line: np.mean(line[: min(k, sum(line))])),
        ):
            value = getattr(ranking, name)(given, relevant, k)
            np.testing.assert_allclose(value, by_hand(expected, places), atol=1e-12)
    np.testing.assert_allclose(
        ranking.precision_at(ranks, k), by_hand(revisited, places), atol=1e-12
    )


def test_trapezoid_precision(ranked):
    """The area under the broken line through (recall, precision) before and after each find."""
    places, ranks, _ = ranked

    def area(line):
        recall, precision, total = 0.0, 1.0, 0.0
        for seen, relevant in enumerate(line, start=1):
            before = precision
            found = sum(line[:seen])
            precision = found / seen
            if relevant:
                total += (found / sum(line) - recall) * (before + precision) / 2
                recall = found / sum(line)
        return total

    np.testing.assert_allclose(
        ranking.trapezoid_precision(ranks), by_hand(area, places), atol=1e-12
    )
    # All equal: the mean rank gives neither more than 1 nor a reward.
    np.testing.assert_allclose(ranking.trapezoid_precision(np.full((1, 4), 2.5)), [1.0])


def test_published_examples():
    """Found at places 1, 3 and 6 of three: by the two rules of AP."""
    ranks = np.array([[6.0, 1.0, 3.0]])
    assert ranking.average_precision(ranks)[0] == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    expected = (1 + 1 + 1 / 2 + 2 / 3 + 2 / 5 + 3 / 6) / 6
    assert ranking.trapezoid_precision(ranks)[0] == pytest.approx(expected)


def test_global_average_precision():
    rng = np.random.default_rng(1)
    right, labelled = rng.random(200) < 0.4, 120
    for confidence in (rng.random(200), rng.integers(0, 9, 200) / 9.0, np.ones(200)):
        # scikit-learn divides by the number that is right, and takes equals together.
        expected = metrics.average_precision_score(right, confidence) * right.sum() / labelled
        value = ranking.global_average_precision(confidence, right, labelled)
        assert value == pytest.approx(expected, abs=1e-12)
    # The definition, without ties.
    order = np.argsort(-(confidence := rng.permutation(200) / 200))
    precision = np.cumsum(right[order]) / np.arange(1, 201)
    expected = sum(p for p, hit in zip(precision, right[order], strict=True) if hit) / labelled
    value = ranking.global_average_precision(confidence, right, labelled)
    assert value == pytest.approx(expected, abs=1e-12)
    assert ranking.global_average_precision(np.ones(3), np.zeros(3, bool), 2) == 0
    with warnings.catch_warnings(action="error"):
        assert np.isnan(ranking.global_average_precision(np.ones(3), np.zeros(3, bool), 0))


def test_intervals():
    """As wide as the standard error says, wider with clusters, narrower in strata; repeatable."""
    rng = np.random.default_rng(2)
    values = rng.normal(0.5, 0.1, 400)
    values[7] = np.nan  # left out
    estimate = intervals.Estimate.mean(values)
    assert estimate == pytest.approx(np.nanmean(values))
    low, high = estimate.interval()
    assert (low, high) == estimate.interval()
    error = 1.96 * np.nanstd(values) / np.sqrt(399)
    assert low == pytest.approx(estimate - error, abs=0.15 * error)
    assert high == pytest.approx(estimate + error, abs=0.15 * error)
    # Ten copies of each of 40 values say no more than the 40.
    few = rng.normal(0.5, 0.1, 40)
    copies = intervals.Estimate.mean(np.repeat(few, 10), np.repeat(np.arange(40), 10))
    assert copies.interval() == pytest.approx(intervals.Estimate.mean(few).interval(), abs=1e-9)
    assert intervals.Estimate.macro(np.array([1.0, 0, np.nan, 1]), np.array([0, 0, 1, 2])) == 0.75
    # Any score of what is drawn, from one sample or several.
    resampled = intervals.Estimate.resampled(lambda drawn: few[drawn].mean(), len(few))
    assert resampled == few.mean()
    assert resampled.interval() == pytest.approx(intervals.Estimate.mean(few).interval(), abs=1e-12)
    two = intervals.Estimate.resampled(lambda a, b: a.mean() - b.mean(), 50, 70)
    error = 1.96 * np.sqrt(50 / 12 + 70 / 12)
    assert two.interval() == pytest.approx((two - error, two + error), abs=0.2 * error)
    # Domains of constant values: their difference is no uncertainty.
    parts = [intervals.Estimate.mean(np.full(5, v)) for v in (0.0, 1.0)]
    assert intervals.Estimate.average(parts) == 0.5
    assert intervals.Estimate.average(parts).interval() == (0.5, 0.5)
    nothing = intervals.Estimate.mean(np.full(3, np.nan))
    assert np.isnan([nothing, *nothing.interval()]).all()
