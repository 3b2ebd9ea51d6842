"""The data card's charts and words: what a reader sees of numbers."""

import itertools
import re

import hypothesis
import pytest

from data_prep.card import charts as card_charts
from data_prep.card import html as card_html
from data_prep.card import svg as card_svg


def test_columns_are_as_high_as_their_numbers():
    svg = card_svg.columns("label", ["a", "b"], [[10, 40], [0, 10]], mark=1, shares=[1.0, 0.5])
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert heights[0] == pytest.approx(heights[2] / 4, abs=0.1)
    assert heights[1] == 0
    assert heights[3] == pytest.approx(heights[2] / 4, abs=0.1)
    assert 'aria-label="label"' in svg
    assert svg.count("stroke-dasharray") == 1
    assert svg.count("<circle") == 2


def test_one_in_a_million_is_seen():
    svg = card_svg.columns("label", ["a", "b", "c"], [[1_000_000, 1, 0]])
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert heights[1] == 0.8
    assert heights[2] == 0


@pytest.mark.parametrize("points", [[(0, 0)], [(0, 0), (1, 0)], [(0, 5), (1, 1e9)]])
def test_lines_stay_inside_their_chart(points):
    line = [card_svg.Point(*point) for point in points]
    svg = card_svg.line("label", line, mark=0, names=["n"] * len(line))
    for x, y in re.findall(r"([\d.-]+),([\d.-]+)", re.search('points="(.*?)"', svg).group(1)):
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 216


def test_labels_of_charts_are_escaped():
    svg = card_svg.columns('"><script>', ["<b>"], [[1]])
    assert "<script" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("value", "top"),
    [(0, 2), (1, 2), (3, 4), (7, 8), (381, 400), (1536, 1600), (10**6, 10**6)],
)
def test_nice_top(value, top):
    assert card_svg.nice_top(value) == top


@hypothesis.given(hypothesis.strategies.integers(0, 10**12))
def test_nice_top_is_even_and_not_far_above(value):
    top = card_svg.nice_top(value)
    assert value <= top <= max(2, 2 * value)
    assert top % 2 == 0


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [
        (1, 3, "33.3 %"),
        (0, 5, "0.0 %"),
        (5, 5, "100.0 %"),
        (1, 10_000, "<\u20090.1 %"),
        (9_999_999, 10_000_000, ">\u200999.9 %"),
        (0, 0, "–"),
    ],
)
def test_percent(part, whole, words):
    assert card_html.percent(part, whole) == words


def test_histograms_are_of_few_equal_bins_and_lose_nothing():
    bins = [{"from": round(i * 0.02, 4), "chosen": abs(i), "others": 1} for i in range(-50, 50, 3)]
    shown, width = card_charts._for_eyes(bins, 0.02)
    assert len(shown) <= card_charts._BINS + 1
    assert sum(b["chosen"] for b in shown) == sum(b["chosen"] for b in bins)
    assert sum(b["others"] for b in shown) == len(bins)
    steps = {round(b["from"] - a["from"], 4) for a, b in itertools.pairwise(shown)}
    assert steps == {round(width, 4)}


def test_a_lonely_outlier_does_not_squeeze_a_histogram():
    bins = [{"from": -500.0, "chosen": 0, "others": 1}]
    bins += [{"from": i / 4, "chosen": 600, "others": 0} for i in range(4)]
    shown, width = card_charts._for_eyes(bins, 0.25)
    assert [b["from"] for b in shown] == [0.0, 0.25, 0.5, 0.75]
    assert shown[0] == {"from": 0.0, "chosen": 600, "others": 1}
    assert width == 0.25


def test_nothing_to_show_is_no_error():
    assert card_charts._for_eyes([], 0.25) == ([], 0.25)
    assert "<svg" in card_svg.columns("empty", [], [[]])
