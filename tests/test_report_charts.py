"""The data card's charts and words: what a reader sees of numbers."""

import re

import hypothesis
import pytest

from data_prep.card import page as card_page
from mofi_jax.common.pages import numbers, page


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


@pytest.mark.parametrize("kind", ["whole", "zero", "tight", "log"])
@pytest.mark.parametrize("found", [[], [0.0], [0, 0], [3e-4, 1e-3, 3e-3], [5, 10**9], [-2.5, 7]])
def test_lines_and_ticks_stay_inside_their_chart(draw, found, kind):
    points = [(max(n, 1e-9), max(n, 1e-9) if kind == "log" else n) for n in found]
    x, y = (
        numbers.scale([x for x, _ in points], "tight"),
        numbers.scale([y for _, y in points], kind),
    )
    svg = draw("chart", "label", [("<a>", points)], x, y)
    places = re.findall(r"([\d.-]+),([\d.-]+)", re.search('points="(.*?)"', svg, re.S).group(1))
    assert len(places) == len(found)
    for x, y in places:
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 216
    for x, y, anchor, words in re.findall(
        r'x="(.*?)" y="(.*?)" text-anchor="(.*?)">\s*(.*?)</', svg
    ):
        half = sum(2.5 if c in "\u2009.·⁰¹⁴⁵⁶⁷⁸⁹⁻" else 4.5 for c in words)  # as on a phone
        ends = {"middle": (half, half), "end": (2 * half, 0)}[anchor]
        assert float(x) - ends[0] >= -4
        assert float(x) + ends[1] <= 440
        assert 12 <= float(y) <= 212


def test_labels_of_charts_are_escaped(draw):
    svg = draw("columns", '"><script>', [("<b>", 1)])
    assert "<script" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ([0.0, 8.45], "zero", "0 2 4 6 8 10"),
        ([0.22, 0.60], "whole", "0.2 0.3 0.4 0.5 0.6"),
        ([0.0, 850.0], "tight", "0 200 400 600 800"),
        ([0, 1595], "zero", "0 500 1 000 1 500 2 000"),
        ([0, 48_000], "zero", "0 10k 20k 30k 40k 50k"),
        ([3e-4, 1e-3, 3e-3], "log", "5·10⁻⁴ 0.001 0.002"),
        ([1e-4, 1e-1], "log", "10⁻⁴ 0.001 0.01 0.1"),
        ([7.0], "whole", "0 2 4 6 8"),
        ([-0.04, 0.1], "whole", "−0.05 0.00 0.05 0.10"),
    ],
)
def test_ticks_are_at_steps_of_1_2_or_5_with_as_many_digits_each(values, kind, words):
    assert " ".join(words for _, words in numbers.scale(values, kind).ticks) == words


@hypothesis.given(
    hypothesis.strategies.lists(hypothesis.strategies.floats(-1e9, 1e9), min_size=1),
    hypothesis.strategies.sampled_from(["whole", "zero", "tight"]),
)
@hypothesis.example([5e-324], "whole")
@hypothesis.example([-5e-324, 0.0], "tight")
@hypothesis.example([1e9, 1e9 + 1.2e-7], "whole")
def test_axes_hold_all_values_and_few_ticks(values, kind):
    axis = numbers.scale(values, kind)
    for value in (*values, *(tick for tick, _ in axis.ticks)):
        assert -1e-6 <= axis.at(value) <= 1 + 1e-6
    assert len(axis.ticks) <= 8


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-1.5, "−1.5"),
        (1234.4, "1 234"),
        (3e-4, "3·10⁻⁴"),
        (1e-6, "10⁻⁶"),
        (-1.234e12, "−1.23·10¹²"),
        (float("nan"), "nan"),
    ],
)
def test_decimals(value, words):
    assert numbers.decimal(value) == words


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
    assert numbers.percent(part, whole) == words


def test_bins_that_double_are_named_by_range_and_where_there_are_many_by_some_starts():
    bins = [{"from": 2**i, "to": 2 ** (i + 1) - 1, "n": i} for i in range(24)]
    assert card_page.doubling(bins[:3], "n") == [("1", 0), ("2–3", 1), ("4–7", 2)]
    names, numbers = zip(*card_page.doubling(bins, "n"), strict=True)
    assert " ".join(filter(None, names)) == "1 8 64 512 4\u2009096 33k 262k 2.1M"
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
    shown = card_page.histogram(bins, 0.25, 0.5)
    assert shown["rows"] == [("", 600, 1), ("", 600, 0), ("", 600, 0), ("", 600, 0)]
    assert shown["mark"] == 2
    # The threshold stands at its own place on the axis.
    assert shown["axis"].at(0.5) == shown["mark"] / len(shown["rows"])
    assert card_page.histogram(bins, 0.25, 1.5)["mark"] is None


def test_nothing_to_show_is_no_error(draw):
    assert card_page.histogram([], 0.25, 0) == {"rows": [], "axis": None, "mark": None}
    assert "<svg" in draw("columns", "empty", [])
