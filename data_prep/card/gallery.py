"""The sections of the data card that show pictures."""

import html
from collections.abc import Mapping

from data_prep.card.html import Markup, escape, image, panel, short
from data_prep.card.svg import count

_GROUPS = {
    "changed": ("The picture changed the choice", "Text alone would have chosen other entities."),
    "agreed": ("Picture and text agree", "Text alone would have chosen the same entities."),
    "rejected": ("Rejected", "No candidate fits the picture well enough."),
}
_REASONS = {
    "below_min_z_score": "z-score below the threshold",
    "below_min_score": "cosine below the floor",
}
_SHOWN_CANDIDATES = 6


def entities(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """The largest entities and some of the rarest, each with a strip of pictures."""
    parts = [
        "<h2>Entities</h2><p>With pictures chosen by the hash of their key, not by looks.</p>",
        _strips("Largest", report["top_entities"], thumbnails),
    ]
    if report["rare_entities"]:
        parts.append(_strips("Some of the rarest", report["rare_entities"], thumbnails, "pairwise"))
    return "".join(parts)


def _strips(
    title: str, found: list[Mapping], thumbnails: Mapping[str, str], layout: str = "single"
) -> str:
    rows = []
    for entity in found:
        description = escape(short(entity["description"].partition(";")[0], 90))
        pictures = "".join(image(thumbnails, key, entity["name"]) for key in entity["keys"])
        unit = "picture" if entity["images"] == 1 else "pictures"
        rows.append(
            f'<div class="entity"><div><b>{escape(entity["name"])}</b> <span class="soft">'
            f"{count(entity['images'])} {unit}, {escape(entity['qid'])}</span>"
            f'<div class="soft">{description}</div></div>'
            f'<div class="strip">{pictures}</div></div>'
        )
    return panel(f'<div class="{layout}">{"".join(rows)}</div>', title)


def gallery(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """Pictures with their captions and candidates, by what happened to them."""
    if not report["gallery"]:
        return ""
    parts = [
        "<h2>Pictures</h2><p>What the caption says, which entities it may mean, which were chosen."
        ' Underlined: mentions. <span class="tag">text</span> what the prior alone would choose.'
        "</p>"
    ]
    for group, (title, words) in _GROUPS.items():
        pictures = [p for p in report["gallery"] if p["group"] == group]
        if pictures:
            cards = "".join(_card(picture, thumbnails) for picture in pictures)
            parts.append(f'<h3>{title}</h3><p>{words}</p><div class="gallery">{cards}</div>')
    return "".join(parts)


def _card(picture: Mapping, thumbnails: Mapping[str, str]) -> str:
    reason = picture["reason"]
    why = f' <span class="tag no">{escape(_REASONS.get(reason, reason))}</span>' if reason else ""
    return (
        f'<div class="panel picture">{image(thumbnails, picture["key"], picture["text"])}<div>'
        f'<div class="caption">{_caption(picture)}{why}</div>{_candidates(picture)}</div></div>'
    )


def _candidates(picture: Mapping) -> str:
    with_z_score = any("z_score" in candidate for candidate in picture["candidates"])
    head = ("prior", "cosine", "z-score") if with_z_score else ("prior",)
    # Best first; what was chosen is always among those that are shown.
    ranked = sorted(
        picture["candidates"], key=lambda c: (not c["chosen"], -c.get("z_score", 0), -c["prior"])
    )
    rows = []
    for candidate in ranked[:_SHOWN_CANDIDATES]:
        numbers = [f"{candidate['prior']:.2f}"]
        if with_z_score:
            numbers += [f"{candidate['score']:.2f}", f"{candidate['z_score']:+.2f}"]
        tag = ' <span class="tag">text</span>' if candidate["by_text"] else ""
        tick = "✓ " if candidate["chosen"] else ""
        description = escape(short(candidate["description"].partition(";")[0], 46))
        rows.append(
            f"<tr{' class=chosen' if candidate['chosen'] else ''}><td><b>{tick}"
            f'{escape(candidate["name"])}</b>{tag} <span class="soft">{description}</span></td>'
            + "".join(f'<td class="number">{number}</td>' for number in numbers)
            + "</tr>"
        )
    more = len(picture["candidates"]) - len(rows)
    if more > 0:
        rows.append(f'<tr><td class="soft" colspan="{1 + len(head)}">and {more} more</td></tr>')
    columns = "".join(f'<th scope="col" class="number">{name}</th>' for name in head)
    return (
        f'<table class="candidates"><tr><th scope="col" class="soft">candidate</th>{columns}</tr>'
        f"{''.join(rows)}</table>"
    )


def _caption(picture: Mapping) -> Markup:
    """The caption with its mentions marked; of overlapping ones the first and longest."""
    text, parts, position = picture["text"], [], 0
    for start, end, _ in sorted(picture["mentions"], key=lambda m: (m[0], -m[1])):
        if start < position:
            continue
        parts.append(html.escape(text[position:start]))
        parts.append(f"<mark>{html.escape(text[start:end])}</mark>")
        position = end
    return Markup("".join(parts) + html.escape(text[position:]))
