"""The pieces that the data card's page is put together from. Whatever comes in is escaped here."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_prep.card import svg


class Markup(str):
    """Text that is HTML already and goes into the page as it is."""


def escape(text: object) -> str:
    """Text for the page; `Markup` stays."""
    return text if isinstance(text, Markup) else html.escape(str(text))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> Markup:
    """A table.

    Args:
      head: names of the columns; one that begins with # holds numbers, which stand right.
      rows: cells, text or `Markup`.
      caption: above the table.
    """
    kinds = [' class="number"' if name.startswith("#") else "" for name in head]
    top = "".join(
        f'<th scope="col"{kind}>{escape(name.removeprefix("#"))}</th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Markup(f'<div class="scroll"><table>{caption}<tr>{top}</tr>{body}</table></div>')


class Bar(NamedTuple):
    """A line of `bars`."""

    name: str
    share: float  # of the full width
    number: str
    remark: str = ""
    kind: str = ""  # "accent": in colour


def bars(rows: Sequence[Bar]) -> Markup:
    """A list of labelled horizontal bars."""
    items = "".join(
        f'<li><span class="name">{escape(row.name)}</span>{svg.bar(row.share, row.kind)}'
        f'<span class="value">{escape(row.number)}</span>'
        f'<span class="soft">{escape(row.remark)}</span></li>'
        for row in rows
    )
    return Markup(f'<ul class="bars">{items}</ul>')


def panel(content: str, title: str = "", note: str = "") -> Markup:
    """A framed part of the page; title and note are text or `Markup`."""
    title = f"<h3>{escape(title)}</h3>" if title else ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(f'<div class="panel">{title}{content}{note}</div>')


def image(thumbnails: Mapping[str, str], key: str, alt: str) -> Markup:
    """The picture of a key; nothing where there is no thumbnail."""
    if key not in thumbnails:
        return Markup("")
    return Markup(
        f'<img alt="{html.escape(alt)}" title="{html.escape(key)}" loading="lazy" '
        f'src="data:image/jpeg;base64,{thumbnails[key]}">'
    )


def code(text: object) -> Markup:
    """Text as it stands in a file."""
    return Markup(f"<code>{html.escape(str(text))}</code>")


def short(text: str, length: int) -> str:
    """At most about `length` characters, cut between words."""
    if len(text) <= length:
        return text
    return text[:length].rsplit(" ", 1)[0].rstrip(",;") + " …"


def percent(part: float, whole: float) -> str:
    """A share as people write it; never 0.0 % of something nor 100.0 % of less than everything."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "<\u20090.1 %"
    if 99.9 < share < 100:
        return ">\u200999.9 %"
    return f"{share:.1f} %"


def size(number: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
