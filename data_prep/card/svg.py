"""The charts of the data card: plain SVG and HTML without script. Knows nothing of data.

Colours are the page's CSS variables, so that charts follow its light and dark look. A chart is an
image to a screen reader; its `label` says what it shows.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 440, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 10, 430, 26, 188  # of the area in which columns stand
_WIDEST = 64  # of a column


class Point(NamedTuple):
    """One point of a line chart."""

    x: float
    y: float


def columns(
    label: str,
    names: Sequence[str],
    series: Sequence[Sequence[int]],
    *,
    mark: float | None = None,
    shares: Sequence[float] = (),
) -> str:
    """A column chart.

    Args:
      label: what it shows, for those who do not see it.
      names: below the columns; "" leaves one without.
      series: one or two lists of heights, stacked, the first at the bottom and in colour.
      mark: where to draw a dashed vertical line, in columns from the left.
      shares: in [0, 1], one for each column, drawn as a line over them.
    """
    totals = [sum(values) for values in zip(*series, strict=True)]
    top, step = max([*totals, 1]), (_RIGHT - _LEFT) / max(len(names), 1)
    colours = ("var(--bar)",) if len(series) == 1 else ("var(--accent)", "var(--bar)")
    high, width = _BOTTOM - _TOP, min(0.84 * step, _WIDEST)
    parts = []
    for i, name in enumerate(names):
        middle, y = _LEFT + step * (i + 0.5), float(_BOTTOM)
        for values, colour in zip(series, colours, strict=True):
            height = high * values[i] / top
            # What is there is seen: a column of one in a million still has a line.
            height = max(height, 0.8) if values[i] else 0.0
            y -= height
            parts.append(
                f'<rect x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}" fill="{colour}"/>'
            )
        if name:
            parts.append(_text(middle, _BOTTOM + 18, name))
        if len(names) <= 12 and totals[i]:
            parts.append(_text(middle, y - 5, count(totals[i]), "value"))
    if shares:
        places = [
            (_LEFT + step * (i + 0.5), _BOTTOM - high * share) for i, share in enumerate(shares)
        ]
        parts.append(_polyline(places, "var(--accent)"))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot"/>' for x, y in places]
    if mark is not None:
        parts.append(_dashed(_LEFT + step * mark, _TOP - 10, _BOTTOM))
    parts.append(_axis(_LEFT, _RIGHT, _BOTTOM + 0.5))
    return _svg(label, parts)


def line(label: str, points: Sequence[Point], *, mark: int | None, names: Sequence[str]) -> str:
    """A line chart from zero up.

    Args:
      label: what it shows, for those who do not see it.
      points: by x, at least one.
      mark: the point that is in force: a dashed line, a dot and its value.
      names: below the points; "" leaves one without.
    """
    left = 52
    low, span = points[0].x, (points[-1].x - points[0].x) or 1.0
    top = nice_top(max(point.y for point in points))

    def place(point: Point) -> tuple[float, float]:
        x = left + (_RIGHT - 14 - left) * (point.x - low) / span
        return x, _BOTTOM - (_BOTTOM - _TOP) * point.y / top

    parts = []
    for fraction in (0.5, 1.0):
        y = _BOTTOM - (_BOTTOM - _TOP) * fraction
        parts.append(_axis(left, _RIGHT, y))
        parts.append(_text(left - 8, y + 4, count(top * fraction), anchor="end"))
    parts.append(_axis(left, _RIGHT, _BOTTOM + 0.5))
    parts.append(_text(left - 8, _BOTTOM + 4, "0", anchor="end"))
    parts += [
        _text(place(point)[0], _BOTTOM + 18, name)
        for point, name in zip(points, names, strict=True)
        if name
    ]
    parts.append(_polyline([place(point) for point in points], "var(--accent)"))
    if mark is not None:
        x, y = place(points[mark])
        right = x < (left + _RIGHT) / 2
        parts.append(_dashed(x, _TOP - 10, _BOTTOM))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="dot"/>')
        parts.append(
            _text(
                x + (9 if right else -9),
                y - 8 if y > _TOP + 24 else y + 20,
                count(points[mark].y),
                "value",
                "start" if right else "end",
            )
        )
    return _svg(label, parts)


def bar(share: float, kind: str = "") -> str:
    """A horizontal bar in a track that stands for 1; kind "accent" colours it."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<span class="track"><span class="fill {kind}" style="width:{width:.2f}%"></span></span>'
    )


def count(number: float) -> str:
    """A whole number with thin spaces between thousands: no comma or point to mistake."""
    return f"{round(number):,}".replace(",", "\u2009")


def decimal(number: float) -> str:
    """A number of at most three digits with a true minus sign."""
    return f"{number:.3g}".replace("-", "\u2212")


def nice_top(value: float) -> int:
    """An even whole number not below `value` that is easy on the eye."""
    if value <= 2:
        return 2
    power = 10 ** math.floor(math.log10(value))
    for factor in (1, 1.2, 1.4, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10):
        top = round(factor * power)
        if top >= value and top % 2 == 0:
            return top
    return 2 * math.ceil(value / 2)


def _svg(label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _axis(left: float, right: float, y: float) -> str:
    return f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'


def _dashed(x: float, top: float, bottom: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="var(--red)" '
        'stroke-dasharray="4 3" stroke-width="1.5"/>'
    )


def _polyline(places: Sequence[tuple[float, float]], colour: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
