"""The cases that `make test` keeps of a product."""

import itertools

from tests import pairwise


def test_every_pair_of_values_is_kept():
    values = [["a", "b", "c", "d"], [1, 3], [0.0, 0.15, 0.4], [(20.0, True), (100.0, False)]]
    cases = pairwise.product(*values)
    kept = [case for case in cases if not hasattr(case, "marks")]
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        for a, b in itertools.product(first, second):
            assert any(case[i] == a and case[j] == b for case in kept), (a, b)
    assert len(cases) == 48
    assert len(kept) <= 14  # 12 is the least: four values times three


def test_the_others_are_marked_slow():
    cases = pairwise.product([1, 2], [3, 4], [5, 6])
    slow = [case for case in cases if hasattr(case, "marks")]
    assert len(slow) == 4
    assert all([mark.name for mark in case.marks] == ["slow"] for case in slow)
    assert {tuple(getattr(case, "values", case)) for case in cases} == set(
        itertools.product([1, 2], [3, 4], [5, 6])
    )
