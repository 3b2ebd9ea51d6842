"""Drawings by matplotlib in the look of the pages: their colours in a light and a dark version.

What it draws is a matplotlib Figure; `svg` and `png` make files of it.
"""

import io
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mofi_jax.common.pages import numbers

_COLOURS_FILE = os.path.join(os.path.dirname(__file__), "colours.css")
with open(_COLOURS_FILE, encoding="utf-8") as _file:
    _COLOURS = _file.read()
# In the light version; matplotlib writes them all in six digits.
_BY_NAME = {
    name: colour if len(colour) == 7 else "#" + "".join(digit * 2 for digit in colour[1:])
    for name, colour in re.findall(r"--([\w-]+): (#\w+);", _COLOURS.partition("@media")[0])
}
INK, SOFT, LINE, CARD = (_BY_NAME[name] for name in ("ink", "soft", "line", "card"))
ACCENT, RED = _BY_NAME["accent"], _BY_NAME["red"]
STYLE = {
    **{"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "svg.fonttype": "none"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"},
    **{"axes.grid": True, "grid.color": LINE, "axes.axisbelow": True, "axes.edgecolor": LINE},
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
    **{"legend.framealpha": 0.0, "legend.edgecolor": "none", "svg.hashsalt": "pages"},
    "path.simplify_threshold": 0.5,  # pixels: a page of long curves stays small
}
_NAME, _TITLE = 26, 34  # letters of a name and of a title in one line


class Estimate(NamedTuple):
    """A row of `intervals`: a mean, its interval and, where known, what it is the mean of."""

    name: str
    mean: float
    low: float
    high: float
    single: Sequence[float] = ()  # such as one score a seed: faint dots
    bold: bool = False  # in colour: what the drawing is about


def intervals(panels: Mapping[str, Sequence[Estimate]], mark: float | None = None) -> Figure:
    """Means as dots on their intervals, a panel below the other, each with a scale of its own.

        figure = plots.intervals({"mAP, unseen": [plots.Estimate("CLIP", 0.31, 0.29, 0.33)]})
        path.write_text(plots.svg(figure)); other.write_bytes(plots.png(figure))

    Each row has its mean in figures at the right edge, and its name on the left, which is broken
    into lines where it is long.  Ends of intervals that are not finite are left out.

    Args:
      panels: by their titles, rows from the top down.
      mark: a dashed line in every panel, such as 0 for differences.
    """
    rows = {title: list(of) for title, of in panels.items()}
    wide = max((len(one.name) for of in rows.values() for one in of), default=0) > _NAME
    row_inches = 0.36 if wide else 0.25
    heights = [0.45 + row_inches * len(of) for of in rows.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, sum(heights) + 0.1), layout="constrained")
        grid = figure.add_gridspec(len(rows), height_ratios=heights)
        for i, (title, estimates) in enumerate(rows.items()):
            axes = figure.add_subplot(grid[i])
            _draw_rows(axes, estimates, mark)
            axes.set_title(textwrap.fill(title, _TITLE))
    return figure


def _draw_rows(axes: Axes, rows: Sequence[Estimate], mark: float | None) -> None:
    ends = [value for one in rows for value in (one.mean, one.low, one.high, *one.single)]
    ends = [value for value in (*ends, *([] if mark is None else [mark])) if math.isfinite(value)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    margin = 0.08 * (high - low or abs(high) or 1.0)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Three digits, or as many more as it takes to see the width of the axis in them.
    digits = max(3, -math.floor(math.log10(2 * margin + high - low)))
    for y, one in enumerate(rows):
        colour = ACCENT if one.bold else SOFT
        if math.isfinite(one.low) and math.isfinite(one.high):
            axes.plot([one.low, one.high], [y, y], color=colour, linewidth=2, alpha=0.6)
        axes.plot(one.single, np.full(len(one.single), y), "|", color=colour, alpha=0.6, ms=7)
        axes.plot([one.mean], [y], "o", color=colour, markersize=6, markeredgecolor=CARD)
        axes.annotate(
            numbers.fixed(one.mean, digits),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color=ACCENT if one.bold else INK,
        )
    if mark is not None:
        axes.axvline(mark, color=RED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    names = [textwrap.fill(one.name, _NAME, break_on_hyphens=False) for one in rows]
    axes.set_yticks(range(len(rows)), names, color=INK)
    axes.tick_params(length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    scale(axes.xaxis, 5)


class _Words(ticker.Formatter):
    """Ticks as all pages write them."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return numbers.decimal(value)

    def format_ticks(self, values: np.ndarray | Sequence[float]) -> list[str]:
        values = [float(value) for value in values]
        evenly = np.allclose(np.diff(values, 2), 0.0)
        return numbers.words(values) if evenly else [numbers.short(value) for value in values]


def scale(axis: mpl.axis.Axis, most: int) -> None:
    """At most about so many ticks, at steps of 1, 2 or 5; written as everywhere on the pages."""
    axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(_Words())


def log_scale(axis: mpl.axis.Axis) -> None:
    """Few ticks on a logarithmic axis, at powers of ten or also between them."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=5))
    axis.set_major_formatter(_Words())
    axis.set_minor_formatter(ticker.NullFormatter())


def svg(figure: Figure, alone: bool = True) -> str:
    """The drawing as SVG, whose colours follow the reader's choice of light or dark.

    Args:
      alone: for a file of its own, which has its own background and definitions of the colours; not
        for a page, which has both.
    """
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", drawn)
    drawn = named(drawn)
    if alone:
        start = drawn.index(">") + 1
        style = f"<style>{_COLOURS} svg {{ background: var(--card); }}</style>"
        drawn = f"{drawn[:start]}\n{style}{drawn[start:]}"
    return drawn


def named(style: str) -> str:
    """A style with colours of the pages written by name, so that they follow light and dark."""
    for name, colour in _BY_NAME.items():
        style = re.sub(rf"{colour}\b", f"var(--{name}, {colour})", style)
    return style


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The drawing on its light background, which is readable on any page."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=dpi, facecolor=CARD)
    return file.getvalue()
