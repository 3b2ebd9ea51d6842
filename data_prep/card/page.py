"""The data card as HTML: report.json and thumbnails in, one self-contained page out.

Plain HTML, CSS and SVG: no script, no font and no picture from elsewhere, readable in twenty years.
Nothing is counted here; see `stage`. The page is page.html.j2, in the look of
`mofi_jax.common.pages`; below is how it writes captions and bins.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from mofi_jax.common.pages import numbers, page

_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html.j2")
_BINS = 32  # of a histogram


def render(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """The page.

    Args:
      report: what report.json holds.
      thumbnails: JPEG in base64 by key; a picture without one is left out.
    """
    values = {**report, "thumbnails": thumbnails}
    return page.fill(_TEMPLATE, values, at, doubling, histogram, pieces)


def at(point: Mapping, what: str) -> tuple[float, float]:
    """A threshold that was tried, and how many of `what` it would leave."""
    return point["value"], point[what]


def pieces(picture: Mapping) -> list[tuple[str, bool]]:
    """A caption's pieces, and which are mentions; of overlapping ones the first and longest is."""
    text, found, position = picture["text"], [], 0
    for start, end, _ in sorted(picture["mentions"], key=lambda m: (m[0], -m[1])):
        if start >= position and end > start:  # an entity that was given stands nowhere
            found += [(text[position:start], False), (text[start:end], True)]
            position = end
    return [*found, (text[position:], False)]


def doubling(bins: Sequence[Mapping], what: str) -> list[tuple[str, int]]:
    """Columns of bins that double, named by range; of many only some, by where they start."""

    names = [[numbers.short(b["from"]), numbers.short(b["to"])] for b in bins]
    every = 1 + len(bins) // 12
    names = [
        ("" if i % every else name[0]) if len(bins) > 7 else "–".join(dict.fromkeys(name))
        for i, name in enumerate(names)
    ]
    return [(name, b[what]) for name, b in zip(names, bins, strict=True)]


def histogram(bins: Sequence[Mapping], width: float, threshold: float) -> dict:
    """Chosen candidates below the others: `rows`, their `axis`, the threshold's place among them.

    At most about `_BINS` equal bins, empty ones too. What lies in the outermost thousandth at
    either end joins the outermost bins.
    """
    if not bins:
        return {"rows": [], "axis": None, "mark": None}
    heights = np.array([(b["chosen"], b["others"]) for b in bins])
    places = np.array([round(b["from"] / width) for b in bins])
    reached = np.cumsum(heights.sum(1))
    spare = reached[-1] // 1000
    ends = np.searchsorted(reached, (spare, reached[-1] - spare - 1), side="right")
    joined = 1 + int(np.ptp(places[ends])) // _BINS
    low, high = (places[ends] // joined).tolist()
    columns = np.zeros((high - low + 1, 2), int)
    np.add.at(columns, np.clip(places // joined, low, high) - low, heights)
    width *= joined
    mark = threshold / width - low
    return {
        "rows": [("", *column) for column in columns.tolist()],
        "axis": numbers.scale((low * width, (high + 1) * width), "tight"),
        "mark": mark if 0 <= mark <= len(columns) else None,
    }
