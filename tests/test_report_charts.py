"""The data card's charts and words: what a reader sees of numbers."""

import re

import hypothesis
import pytest

from data_prep.card import page as card_page
from mofi_jax.common.pages import page


@pytest.fixture
def draw(tmp_path):
    """Fills in one of the charts of parts.html.j2."""

    def draw(chart, *values, **named):
        path = tmp_path / "chart.html.j2"
        path.write_text(
            f'{{% from "parts.html.j2" import {chart} %}}{{{{ {chart}(*values, **named) }}}}'
        )
        return page.fill(str(path), {"values": values, "named": named})

    return draw


def heights(svg):
    return [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]


def test_columns_are_as_high_as_their_numbers(draw):
    svg = draw("columns", "label", [("a", 10, 0), ("b", 40, 10)], mark=1, shares=[1.0, 0.5])
    found = heights(svg)
    assert found[0] == pytest.approx(found[2] / 4, abs=0.1)
    assert found[1] == 0
    assert found[3] == pytest.approx(found[2] / 4, abs=0.1)
    assert 'aria-label="label"' in svg
    assert svg.count('class="mark"') == 1
    assert len(re.search('points="(.*?)"', svg, re.S).group(1).split()) == 2


def test_one_in_a_million_is_seen(draw):
    found = heights(draw("columns", "label", [("a", 1_000_000), ("b", 1), ("c", 0)]))
    assert found[1] == 0.8
    assert found[2] == 0


@pytest.mark.parametrize("numbers", [[0], [0, 0], [5, 10**9]])
def test_lines_stay_inside_their_chart(draw, numbers):
    points = [{"value": i, "n": n, "configured": not i} for i, n in enumerate(numbers)]
    svg = draw("line", "label", points, "n")
    places = re.findall(r"([\d.-]+),([\d.-]+)", re.search('points="(.*?)"', svg, re.S).group(1))
    assert len(places) == len(numbers)
    for x, y in places:
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 216


def test_labels_of_charts_are_escaped(draw):
    svg = draw("columns", '"><script>', [("<b>", 1)])
    assert "<script" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("value", "top"),
    [(0, 2), (1, 2), (3, 4), (7, 8), (381, 400), (1536, 1600), (10**6, 10**6)],
)
def test_even_top(value, top):
    assert page.even_top(value) == top


@hypothesis.given(hypothesis.strategies.integers(0, 10**12))
def test_even_top_is_even_and_not_far_above(value):
    top = page.even_top(value)
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
    assert page.percent(part, whole) == words


def test_bins_that_double_are_named_by_range_and_where_there_are_many_by_some_starts():
    bins = [{"from": 2**i, "to": 2 ** (i + 1) - 1, "n": i} for i in range(24)]
    assert card_page.doubling(bins[:3], "n") == [("1", 0), ("2–3", 1), ("4–7", 2)]
    names, numbers = zip(*card_page.doubling(bins, "n"), strict=True)
    assert " ".join(filter(None, names)) == "1 8 64 512 4096 33k 262k 2.1M"
    assert numbers == tuple(range(24))


def test_histograms_are_of_few_equal_bins_and_lose_nothing():
    bins = [{"from": round(i * 0.02, 4), "chosen": abs(i), "others": 1} for i in range(-50, 50, 3)]
    rows = card_page.histogram(bins, 0.02, 0)["rows"]
    assert len(rows) <= card_page._BINS + 1
    assert sum(chosen for _, chosen, _ in rows) == sum(b["chosen"] for b in bins)
    assert sum(others for _, _, others in rows) == len(bins)


def test_a_lonely_outlier_does_not_squeeze_a_histogram():
    bins = [{"from": -500.0, "chosen": 0, "others": 1}]
    bins += [{"from": i / 4, "chosen": 600, "others": 0} for i in range(4)]
    assert card_page.histogram(bins, 0.25, 0.5) == {
        "rows": [("0", 600, 1), ("0.25", 600, 0), ("0.5", 600, 0), ("0.75", 600, 0)],
        "mark": 2,
    }
    assert card_page.histogram(bins, 0.25, 1.5)["mark"] is None


def test_nothing_to_show_is_no_error(draw):
    assert card_page.histogram([], 0.25, 0) == {"rows": [], "mark": None}
    assert "<svg" in draw("columns", "empty", [])
