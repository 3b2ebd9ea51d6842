"""The data card as HTML: report.json and thumbnails in, one self-contained page out.

Plain HTML, CSS and SVG: no script, no font and no picture from elsewhere, readable in twenty years.
Nothing is counted here; see `report`.
"""

import html
from collections.abc import Mapping, Sequence

_STEPS = {
    "read": "pairs read",
    "valid": "valid: picture decodes, caption is text",
    "with_mention": "caption names something",
    "with_candidate": "the knowledge base knows it",
    "labelled": "labelled: the picture shows it",
    "final": "kept: enough pictures of the entity",
}
_GROUPS = {
    "changed": ("The picture changed the choice", "Text alone would have chosen other entities."),
    "agreed": ("Picture and text agree", "Text alone would have chosen the same entities."),
    "rejected": ("Rejected", "No candidate fits the picture well enough."),
}
_REASONS = {"below_min_fit": "fit below the threshold", "below_min_score": "cosine below the floor"}

STYLE = """
:root { --ink: #1d2733; --soft: #66727f; --line: #e3e7ec; --card: #fff; --page: #f5f7f9;
  --accent: #0b7285; --accent-soft: #d9eff2; --amber: #b35c00; --amber-soft: #fdeed9;
  --red: #b42b3a; --red-soft: #fbe4e6; --bar: #b9c4cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #93a0ad; --line: #2c3641;
  --card: #1a222b; --page: #12181f; --accent: #4cc3d6; --accent-soft: #123b43; --amber: #f0a95a;
  --amber-soft: #43300f; --red: #f1808c; --red-soft: #451d22; --bar: #46525f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -.02em; }
h2 { font-size: 20px; margin: 52px 0 4px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 30px 0 0; }
p { margin: 0 0 16px; color: var(--soft); max-width: 76ch; }
.panel, .picture { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.panel { padding: 20px 22px; }
.panel + .panel { margin-top: 14px; }
.figures .panel, .halves .panel { margin-top: 0; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 24px; }
.figure b { display: block; font-size: 28px; letter-spacing: -.02em; line-height: 1.2; }
.figure span { color: var(--soft); font-size: 13px; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-top: 14px; }
.halves h3 { margin: 0 0 10px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .value { fill: var(--ink); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.entity { display: grid; grid-template-columns: 270px 1fr; gap: 18px; padding: 10px 0;
  border-bottom: 1px solid var(--line); align-items: center; }
.entity:last-child { border-bottom: 0; }
.entity .soft { font-size: 13px; line-height: 1.35; }
.strip { display: flex; gap: 6px; flex-wrap: wrap; }
.strip img { width: 84px; height: 84px; object-fit: cover; border-radius: 6px; background: #fff; }
.gallery { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-top: 10px; }
.picture { display: grid; grid-template-columns: 112px 1fr; gap: 16px; padding: 14px; }
.picture > img { width: 112px; height: 112px; object-fit: contain; border-radius: 6px;
  background: #fff; }
.caption { font-size: 14px; margin: 0 0 8px; color: var(--ink); overflow-wrap: anywhere; }
.caption mark { background: none; color: inherit; border-bottom: 2px solid var(--bar); }
.candidates td, .candidates th { font-size: 12px; padding: 3px 6px; border: 0; }
.candidates .number { padding-right: 6px; }
.candidates td:first-child { border-radius: 5px 0 0 5px; width: 100%; line-height: 1.35; }
.candidates td:last-child { border-radius: 0 5px 5px 0; }
.candidates .chosen td { background: var(--accent-soft); }
.candidates .chosen b { color: var(--accent); }
.tag { font-size: 11px; padding: 0 6px; border-radius: 8px; white-space: nowrap;
  background: var(--amber-soft); color: var(--amber); }
.tag.no { background: var(--red-soft); color: var(--red); }
@media (max-width: 820px) { .gallery, .halves { grid-template-columns: 1fr; }
  .figures { grid-template-columns: 1fr 1fr; } .entity { grid-template-columns: 1fr; } }
"""


def render(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """The page.

    Args:
      report: what report.json holds.
      thumbnails: JPEG in base64 by key; a picture without one is left out.
    """
    body = "".join(
        section(report, thumbnails)
        for section in (_head, _funnel, _distributions, _entities, _gallery, _lineage)
    )
    return document(f"Data card: {report['config']['source']}", body)


def document(title: str, body: str) -> str:
    """A whole page about `body`, in the look of the data card."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------------------------------- sections


def _head(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    funnel, per_picture = report["funnel"], report["labels_per_picture"]
    labels = sum(int(k) * count for k, count in per_picture.items())
    size = sum(shard["bytes"] for shard in report["lineage"]["shards"])
    figures = (
        (_count(funnel["final"]), "labelled pictures"),
        (_count(funnel["entities"]), "entities"),
        (f"{labels / max(funnel['final'], 1):.2f}", "labels per picture"),
        (_bytes(size), f"in {len(report['lineage']['shards'])} shards"),
    )
    cells = "".join(
        f'<div class="panel figure"><b>{n}</b><span>{t}</span></div>' for n, t in figures
    )
    how = {
        "clip": "a picture keeps those of its caption’s entities that it shows",
        "text": "a picture gets the likeliest entity of each name in its caption",
    }[report["config"]["labels"]]
    return (
        f"<h1>Data card: {html.escape(str(report['config']['source']))}</h1>"
        f"<p>Image-to-entities labels from noisy image-text pairs: {how}.</p>"
        f'<div class="figures">{cells}</div>'
    )


def _funnel(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    funnel = report["funnel"]
    total = max(funnel["read"], 1)
    rows = []
    for i, (step, words) in enumerate(_STEPS.items()):
        y, width = 6 + 34 * i, 560 * funnel[step] / total
        fill = "var(--accent)" if step == "final" else "var(--bar)"
        rows.append(
            f'<text x="306" y="{y + 17}" text-anchor="end">{words}</text>'
            f'<rect x="318" y="{y}" width="{width:.1f}" height="24" rx="4" fill="{fill}"/>'
            f'<text class="value" x="{326 + width:.1f}" y="{y + 17}">{_count(funnel[step])}'
            f'<tspan class="soft" font-weight="400" dx="6">{100 * funnel[step] / total:.1f} %'
            "</tspan></text>"
        )
    chart = f'<svg viewBox="0 0 1030 210" role="img">{"".join(rows)}</svg>'
    stages = {"pairs": "reading", "labels": "selection", "labels_final": "minimum images"}
    table = _table(
        ("stage", "reason", "#pairs"),
        [
            (stages[r["stage"]], r["reason"].replace("_", " "), _count(r["count"]))
            for r in report["rejects"]
        ],
    )
    return (
        "<h2>From pairs to labels</h2><p>Nothing disappears silently: every pair ends in a shard or"
        " in <code>rejects/</code> with a reason.</p>"
        f'<div class="panel">{chart}</div><div class="panel">{table}</div>'
    )


def _distributions(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    bins = report["images_per_entity"]
    names = [str(b["from"]) if b["from"] == b["to"] else f"{b['from']}–{b['to']}" for b in bins]
    panels = [
        (
            "Pictures per entity (entities in each bin)",
            _columns(names, [[b["entities"] for b in bins]]),
        )
    ]
    if report["fits"]:
        fits = _clip_tails(report["fits"]["bins"])
        marks = [b["from"] == round(4 * report["fits"]["threshold"]) / 4 for b in fits]
        chart = _columns(
            [f"{b['from']:g}" if b["from"] == int(b["from"]) else "" for b in fits],
            [[b["chosen"] for b in fits], [b["others"] for b in fits]],
            marks.index(True) if any(marks) else None,
        )
        title = (
            "Fit of candidates, in standard deviations: <span style='color:var(--accent)'>chosen"
        )
        panels.append((f"{title}</span> and others; dashed: min_fit", chart))
    else:
        counts = report["labels_per_picture"]
        panels.append(("Labels per picture", _columns(list(counts), [list(counts.values())])))
    halves = "".join(f'<div class="panel"><h3>{t}</h3>{chart}</div>' for t, chart in panels)
    return f'<h2>Distributions</h2><div class="halves">{halves}</div>'


def _clip_tails(bins: Sequence[Mapping], low: float = -3.0, high: float = 4.0) -> list[dict]:
    """All bins between `low` and `high`, also empty ones; what lies beyond joins the outermost."""
    found = {
        i / 4: {"from": i / 4, "chosen": 0, "others": 0} for i in range(int(4 * low), int(4 * high))
    }
    for b in bins:
        target = found[min(max(b["from"], low), high - 0.25)]
        target["chosen"] += b["chosen"]
        target["others"] += b["others"]
    return list(found.values())


def _entities(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    rows = []
    for entity in report["top_entities"]:
        description = html.escape(_short(entity["description"].partition(";")[0], 90))
        strip = "".join(_image(thumbnails, key) for key in entity["keys"])
        rows.append(
            f'<div class="entity"><div><b>{html.escape(entity["name"])}</b> <span class="soft">'
            f"{_count(entity['images'])} pictures, {html.escape(entity['qid'])}</span>"
            f'<div class="soft">{description}</div></div>'
            f'<div class="strip">{strip}</div></div>'
        )
    return (
        "<h2>Largest entities</h2><p>With pictures chosen by the hash of their key, not by looks."
        f'</p><div class="panel">{"".join(rows)}</div>'
    )


def _gallery(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    parts = [
        "<h2>Pictures</h2><p>What the caption says, which entities it may mean, which were chosen."
        ' Underlined: mentions. <span class="tag">text</span>: what the prior alone would choose.'
        "</p>"
    ]
    for group, (title, words) in _GROUPS.items():
        pictures = [p for p in report["gallery"] if p["group"] == group]
        if pictures:
            cards = "".join(_card(picture, thumbnails) for picture in pictures)
            parts.append(f'<h3>{title}</h3><p>{words}</p><div class="gallery">{cards}</div>')
    return "".join(parts)


def _card(picture: Mapping, thumbnails: Mapping[str, str]) -> str:
    with_fit = any("fit" in candidate for candidate in picture["candidates"])
    head = ("prior", "cosine", "fit") if with_fit else ("prior",)
    # Best first; what was chosen is always among the six that are shown.
    ranked = sorted(
        picture["candidates"], key=lambda c: (not c["chosen"], -c.get("fit", 0), -c["prior"])
    )
    rows = []
    for candidate in ranked[:6]:
        numbers = [f"{candidate['prior']:.2f}"]
        if with_fit:
            numbers += [f"{candidate['score']:.2f}", f"{candidate['fit']:+.2f}"]
        tag = ' <span class="tag">text</span>' if candidate["by_text"] else ""
        tick = "✓ " if candidate["chosen"] else ""
        description = html.escape(_short(candidate["description"].partition(";")[0], 46))
        rows.append(
            f"<tr{' class=chosen' if candidate['chosen'] else ''}><td><b>{tick}"
            f'{html.escape(candidate["name"])}</b>{tag} <span class="soft">{description}</span>'
            "</td>" + "".join(f'<td class="number">{number}</td>' for number in numbers) + "</tr>"
        )
    more = len(picture["candidates"]) - len(rows)
    if more > 0:
        rows.append(f'<tr><td class="soft">and {more} more</td></tr>')
    reason = picture["reason"]
    why = (
        f' <span class="tag no">{html.escape(_REASONS.get(reason, reason))}</span>'
        if reason
        else ""
    )
    columns = "".join(f'<th class="number">{name}</th>' for name in head)
    return (
        f'<div class="picture">{_image(thumbnails, picture["key"])}<div>'
        f'<div class="caption">{_caption(picture)}{why}</div>'
        f'<table class="candidates"><tr><th></th>{columns}</tr>{"".join(rows)}</table></div></div>'
    )


def _caption(picture: Mapping) -> str:
    """The caption with its mentions marked; of overlapping ones the first and longest."""
    text, parts, position = picture["text"], [], 0
    for start, end, _ in sorted(picture["mentions"], key=lambda m: (m[0], -m[1])):
        if start < position:
            continue
        parts.append(html.escape(text[position:start]))
        parts.append(f"<mark>{html.escape(text[start:end])}</mark>")
        position = end
    return "".join(parts) + html.escape(text[position:])


def _lineage(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    lineage = report["lineage"]
    inputs = _table(
        ("input", "#bytes", "sha256"),
        [
            (_code(i["path"]), _bytes(i["bytes"]), _code(i["sha256"][:16]))
            for i in lineage["inputs"]
        ],
    )
    written = _table(
        ("shard", "#records", "#bytes", "sha256"),
        [
            (_code(s["path"]), _count(s["records"]), _bytes(s["bytes"]), _code(s["sha256"][:16]))
            for s in lineage["shards"]
        ],
    )
    config = _table(
        ("key", "value"),
        [(_code(key), _code(str(value))) for key, value in report["config"].items()],
    )
    return (
        "<h2>Lineage and licence</h2><p>The shards are a function of these inputs and this"
        " configuration alone; the first 16 digits of each sha256 are shown, the rest is in"
        " <code>report.json</code>. Pictures and captions keep the licences of their sources:"
        " labels add no right to use them.</p>"
        f'<div class="panel">{inputs}</div><div class="panel">{written}</div>'
        f'<div class="panel">{config}</div>'
    )


# ------------------------------------------------------------------------------------------- pieces


def _columns(names: Sequence[str], series: Sequence[Sequence[int]], mark: int | None = None) -> str:
    """A column chart; several series are stacked, the first at the bottom and in colour."""
    totals = [sum(values) for values in zip(*series, strict=True)]
    top, step = max([*totals, 1]), 480 / len(names)
    colours = ("var(--accent)", "var(--bar)")
    parts = []
    for i, name in enumerate(names):
        x, y = 10 + step * i, 200.0
        for values, colour in zip(series, colours, strict=False):
            height = 170 * values[i] / top
            y -= height
            parts.append(
                f'<rect x="{x + step * 0.08:.1f}" y="{y:.1f}" width="{step * 0.84:.1f}" '
                f'height="{height:.1f}" fill="{colour}"/>'
            )
        middle = x + step / 2
        parts.append(f'<text x="{middle:.1f}" y="218" text-anchor="middle">{name}</text>')
        if len(names) <= 12 and totals[i]:
            parts.append(
                f'<text class="value" x="{middle:.1f}" y="{y - 5:.1f}" text-anchor="middle">'
                f"{_count(totals[i])}</text>"
            )
    if mark is not None:
        x = 10 + step * mark
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="200" stroke="var(--red)" '
            'stroke-dasharray="4 3" stroke-width="1.5"/>'
        )
    parts.append('<line x1="10" x2="490" y1="200.5" y2="200.5" stroke="var(--line)"/>')
    return f'<svg viewBox="0 0 500 226" role="img">{"".join(parts)}</svg>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready-made cells; columns whose head begins with # hold numbers."""
    classes = [' class="number"' if name.startswith("#") else "" for name in head]
    top = "".join(
        f"<th{c}>{name.removeprefix('#')}</th>" for c, name in zip(classes, head, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _image(thumbnails: Mapping[str, str], key: str) -> str:
    if key not in thumbnails:
        return ""
    return f'<img alt="" title="{html.escape(key)}" src="data:image/jpeg;base64,{thumbnails[key]}">'


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")  # a thin space: no comma or point to mistake


def _bytes(number: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
