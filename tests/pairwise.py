"""Cases of several parameters: the fewest that show every pair of values, the others slow."""

import itertools

import pytest


def pairs(case: tuple) -> set:
    """Every two of a case's values, with their places."""
    return set(itertools.combinations(enumerate(case), 2))


def covering(product: list[tuple]) -> list[tuple]:
    """Cases of a product that together hold all its pairs: each time that with the most new."""
    chosen, missing = [], set().union(*map(pairs, product))
    while missing:
        chosen.append(max(product, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def product(*values: list) -> list:
    """What parametrize takes: the full product, of which `make test` runs a covering."""
    cases = list(itertools.product(*values))
    kept = covering(cases)
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
