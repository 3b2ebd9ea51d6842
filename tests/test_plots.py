"""Drawings in the look of the pages: what is in them, and that they follow light and dark."""

import re
import xml.etree.ElementTree

import cv2
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends import backend_agg

from mofi_jax.common.pages import plots

ROWS = [
    plots.Estimate("contrastive, raw <alt-text> & more", 0.3014, 0.29, 0.312, (0.295, 0.31)),
    plots.Estimate("multi-task", 0.404, 0.394, 0.414, bold=True),
]


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def ticks(figure):
    figure.canvas.draw()
    return [tick.get_text() for tick in figure.axes[0].get_xticklabels()]


def test_intervals_show_each_row_with_its_mean_in_figures():
    figure = plots.intervals({"unseen": ROWS, "seen": ROWS[1:]})
    assert [axes.get_title("left") for axes in figure.axes] == ["unseen", "seen"]
    assert words(figure) == ["0.301", "0.404", "0.404"]
    axes = figure.axes[0]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == [row.name for row in ROWS]
    assert [tuple(line.get_xdata()) for line in axes.lines[:2]] == [(0.29, 0.312), (0.295, 0.31)]
    steps = set(np.diff([float(tick) for tick in ticks(figure)]).round(6).tolist())
    assert len(steps) == 1
    assert f"{steps.pop():e}"[0] in "125"
    assert len({len(tick) for tick in ticks(figure)}) == 1  # as many digits each


def test_long_titles_and_names_stay_inside():
    title = "multi-task on the chosen labels, minus contrastive on the captions of all pairs"
    row = plots.Estimate("a name that is longer than what one line of the drawing holds", 1, 0, 2)
    figure = plots.intervals({title: [row], "seen": ROWS})
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    # Of an x axis some ticks lie beyond its ends, and are not drawn.
    ticks = {text for axes in figure.axes for text in axes.xaxis.findobj(mpl.text.Text)}
    texts = {text for text in figure.findobj(mpl.text.Text) if text.get_text()} - ticks
    assert title in {text.get_text().replace("\n", " ") for text in texts}
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text


def test_small_differences_keep_digits_and_their_sign():
    rows = [plots.Estimate("a", -0.00012, -0.0002, 0.0001), plots.Estimate("b", 0.0, np.nan, 1e-4)]
    figure = plots.intervals({"difference": rows}, mark=0.0)
    assert words(figure) == ["\u22120.0001", "0.0000"]
    assert figure.axes[0].get_xlim()[0] < -0.0002
    assert plots.intervals({"none": []}).axes


def test_svg_has_text_as_text_and_the_colours_of_the_page():
    drawn = plots.svg(plots.intervals({"mAP": ROWS}))
    root = xml.etree.ElementTree.fromstring(drawn)
    assert "viewBox" in root.attrib
    text = "".join(root.itertext())
    assert "<alt-text>" in text
    assert "prefers-color-scheme: dark" in text
    assert "DejaVu" not in drawn
    # No colour but by its name, so that none stays behind in the dark.
    drawing = drawn.partition("</style>")[2]
    assert not re.search(r"(?<!, )#[0-9a-f]{6}", drawing)
    inside = plots.svg(plots.intervals({"mAP": ROWS}), alone=False)
    assert "prefers-color-scheme" not in inside
    assert drawing.count("var(--ink, #1d2733)") == inside.count("var(--ink, #1d2733)") > 0


@pytest.mark.parametrize("dpi", [50, 100])
def test_png_has_a_background_of_its_own(dpi):
    data = np.frombuffer(plots.png(plots.intervals({"mAP": ROWS}), dpi), np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    assert picture.shape[1] == pytest.approx(4.6 * dpi, abs=1)
    assert (picture[0, 0] == 255).all()
