"""Results that threads make ahead of need: order, how far, exceptions, a clean end."""

import threading

import pytest

from data_prep.pairs import ahead


def test_results_come_in_order_and_no_more_are_made_than_allowed():
    asked = []
    found = ahead.results(lambda n: n * n, (asked.append(n) or n for n in range(20)), 3, most=5)
    assert asked == []
    for number in range(20):
        assert next(found) == number * number
        assert len(asked) == min(number + 6, 20)
    assert next(found, None) is None


def test_threads_work_side_by_side():
    together = threading.Barrier(3)
    assert list(ahead.results(lambda n: together.wait(60) >= 0, range(6), 3, most=3)) == [True] * 6


def test_an_exception_comes_in_its_place_and_ends_all():
    asked = []

    def invert(number):
        asked.append(number)
        return 1 / (2 - number)

    found = ahead.results(invert, range(1000), 2, most=2)
    assert [next(found), next(found)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert len(asked) <= 5
