"""The data card as HTML: report.json and thumbnails in, one self-contained page out.

Plain HTML, CSS and SVG: no script, no font and no picture from elsewhere, readable in twenty years.
Nothing is counted here; see `stage`. The page is page.html.j2, of what parts.html.j2 defines; below
is how they write numbers and captions.
"""

import os
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np

_FOLDER = os.path.dirname(__file__)
_BINS = 32  # of a histogram


def render(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """The page.

    Args:
      report: what report.json holds.
      thumbnails: JPEG in base64 by key; a picture without one is left out.
    """
    return fill(os.path.join(_FOLDER, "page.html.j2"), {**report, "thumbnails": thumbnails})


def fill(template: str, values: Mapping) -> str:
    """A page in the look of the data card; all values are text, which is escaped.

    Args:
      template: the path of a Jinja template, which may extend and import those of this folder.
      values: its variables.
    """
    folder, name = os.path.split(template)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (count, decimal, doubling, even_top, flat, histogram, percent, pieces)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name).render(values)


def count(number: float) -> str:
    """A whole number with thin spaces between thousands: no comma or point to mistake."""
    return f"{round(number):,}".replace(",", "\u2009")


def decimal(number: float) -> str:
    """A number of at most three digits with a true minus sign."""
    return f"{number:.3g}".replace("-", "\u2212")


def percent(part: float, whole: float) -> str:
    """A share as people write it; never 0.0 % of something nor 100.0 % of less than everything."""
    share = 100 * part / (whole or 1)
    if 0 < share < 0.1:
        return "<\u20090.1 %"
    if 99.9 < share < 100:
        return ">\u200999.9 %"
    return f"{share:.1f} %" if whole else "–"


def pieces(picture: Mapping) -> list[tuple[str, bool]]:
    """A caption's pieces, and which are mentions; of overlapping ones the first and longest is."""
    text, found, position = picture["text"], [], 0
    for start, end, _ in sorted(picture["mentions"], key=lambda m: (m[0], -m[1])):
        if start >= position and end > start:  # an entity that was given stands nowhere
            found += [(text[position:start], False), (text[start:end], True)]
            position = end
    return [*found, (text[position:], False)]


def flat(config: Mapping, prefix: str = "") -> list[tuple[str, object]]:
    """Keys as they are written on the command line, with their values."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        else:
            words = isinstance(value, list | tuple)
            found.append((prefix + key, ", ".join(map(str, value)) if words else value))
    return found


def even_top(value: int) -> int:
    """An even whole number of two digits and zeros, not below `value`."""
    step = 2 * 10 ** max(0, len(str(value)) - 2)
    return max(2, -(-value // step) * step)


def doubling(bins: Sequence[Mapping], what: str) -> list[tuple[str, int]]:
    """Columns of bins that double, named by range; of many only some, by where they start."""

    def short(number: int) -> str:
        return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.0f}k"

    names = [[str(n) if n < 10_000 else short(n) for n in (b["from"], b["to"])] for b in bins]
    every = 1 + len(bins) // 12
    names = [
        ("" if i % every else name[0]) if len(bins) > 7 else "–".join(dict.fromkeys(name))
        for i, name in enumerate(names)
    ]
    return [(name, b[what]) for name, b in zip(names, bins, strict=True)]


def histogram(bins: Sequence[Mapping], width: float, threshold: float) -> dict:
    """Chosen candidates below the others: `rows`, and where the threshold lies among them.

    At most about `_BINS` equal bins, empty ones too. What lies in the outermost thousandth at
    either end joins the outermost bins.
    """
    if not bins:
        return {"rows": [], "mark": None}
    heights = np.array([(b["chosen"], b["others"]) for b in bins])
    places = np.array([round(b["from"] / width) for b in bins])
    reached = np.cumsum(heights.sum(1))
    spare = reached[-1] // 1000
    ends = np.searchsorted(reached, (spare, reached[-1] - spare - 1), side="right")
    joined = 1 + int(np.ptp(places[ends])) // _BINS
    low, high = (places[ends] // joined).tolist()
    columns = np.zeros((high - low + 1, 2), int)
    np.add.at(columns, np.clip(places // joined, low, high) - low, heights)
    every, width = 1 + (high - low) // 8, width * joined
    # Names at round values where these are bins: counted from zero.
    names = ["" if i % every else decimal(i * width) for i in range(low, high + 1)]
    mark = threshold / width - low
    rows = [(name, *column) for name, column in zip(names, columns.tolist(), strict=True)]
    return {"rows": rows, "mark": mark if 0 <= mark <= len(rows) else None}
