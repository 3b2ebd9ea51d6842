"""The data card as HTML: report.json and thumbnails in, one self-contained page out.

Plain HTML, CSS and SVG: no script, no font and no picture from elsewhere, readable in twenty years.
Nothing is counted here; see `report`.
"""

import html
from collections.abc import Mapping, Sequence

from data_prep.card import charts as card_charts
from data_prep.card import gallery as card_gallery
from data_prep.card import svg
from data_prep.card.html import Bar, Markup, bars, code, escape, panel, percent, size, table
from data_prep.card.style import STYLE
from data_prep.card.svg import count

_STEPS = {
    "read": "pairs read",
    "valid": "valid: picture decodes, caption is text",
    "with_mention": "caption names something",
    "with_candidate": "the knowledge base knows it",
    "labelled": "labelled",
}
# What pairs were removed for once they had a label, said as what is left.
_LEFT = {
    "removed": "not on the removal list",
    "duplicate": "first of its copies",
    "eval_duplicate": "not in an evaluation set",
    "unsafe_score": "scored as safe",
    "unsafe_column": "not marked as unsafe",
    "blocked_domain": "not from a blocked domain",
    "blocked_hash": "not on a list of blocked pictures",
    "over_cap": "within the cap of its entities",
    "rare_entity": "enough pictures of the entity",
    "quarantined": "shard not in quarantine",
}
_STAGES = {
    "download": "before reading",
    "pairs": "reading",
    "links": "linking",
    "labels": "selection",
    "labels_final": "filters",
}
_LISTED = 20  # inputs and shards on the page; report.json has all


def render(report: Mapping, thumbnails: Mapping[str, str]) -> str:
    """The page.

    Args:
      report: what report.json holds.
      thumbnails: JPEG in base64 by key; a picture without one is left out.
    """
    sections = (
        _head,
        _funnel,
        card_charts.distributions,
        card_charts.thresholds,
        _types,
        _captions,
    )
    body = "".join(section(report) for section in sections)
    body += card_gallery.entities(report, thumbnails) + card_gallery.gallery(report, thumbnails)
    body += _rates(report) + _lineage(report)
    return document(f"Data card: {report['name']}", body)


def document(title: str, body: str) -> str:
    """A whole page about `body`, in the look of the data card."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------------------------------- sections


def _head(report: Mapping) -> str:
    funnel, per_picture = report["funnel"], report["labels_per_picture"]
    labels = sum(int(k) * number for k, number in per_picture.items())
    shards = report["lineage"]["shards"]
    figures = (
        (count(funnel["final"]), "labelled pictures"),
        (count(funnel["entities"]), "entities"),
        (f"{labels / max(funnel['final'], 1):.2f}", "labels per picture"),
        (size(sum(shard["bytes"] for shard in shards)), f"in {_many(len(shards), 'shard')}"),
    )
    cells = "".join(
        f'<div class="panel figure"><b>{n}</b><span>{t}</span></div>' for n, t in figures
    )
    how = {
        "clip": "a picture keeps those of its caption’s entities that it shows",
        "text": "a picture gets the likeliest entity of each name in its caption",
    }[report["config"]["labels"]]
    return (
        f"<h1>Data card: {escape(report['name'])}</h1>"
        f"<p>Image-to-entities labels from noisy image-text pairs: {how}.</p>"
        f'<div class="figures">{cells}</div>'
    )


def _funnel(report: Mapping) -> str:
    funnel = report["funnel"]
    steps = [(words, funnel[name]) for name, words in _STEPS.items()]
    for row in funnel["removed"]:
        words = _LEFT.get(row["reason"], f"without {row['reason']}".replace("_", " "))
        steps.append(("(lost without a reject)" if row["reason"] is None else words, row["left"]))
    steps[-1] = (f"final: {steps[-1][0]}", steps[-1][1])
    tried = funnel["read"] + funnel["not_downloaded"]
    if funnel["not_downloaded"]:
        steps.insert(0, ("pairs asked for", tried))
    rows = [
        Bar(words, left / max(tried, 1), count(left), percent(left, tried), kind)
        for (words, left), kind in zip(steps, [""] * (len(steps) - 1) + ["accent"], strict=True)
    ]
    lost = [("download", status, n) for status, n in report["failed_downloads"].items()]
    lost += [(r["stage"], r["reason"], r["count"]) for r in report["rejects"]]
    reasons = [
        (_STAGES.get(stage, stage.replace("_", " ")), reason.replace("_", " "), count(n))
        for stage, reason, n in lost
    ]
    panels = [panel(f'<div class="wide">{bars(rows)}</div>')]
    if len(report["sources"]) > 1:
        names = ("valid", "with_mention", "with_candidate", "labelled", "final")
        head = ("source", *(f"#{name.replace('_', ' ')}" for name in names), "#final of valid")
        rows = [
            (row["source"], *(count(row[n]) for n in names), percent(row["final"], row["valid"]))
            for row in report["sources"]
        ]
        panels.append(panel(table(head, rows), "By source"))
    if reasons:
        panels.append(panel(table(("stage", "reason", "#pairs"), reasons), "What was left out"))
    return (
        "<h2>From pairs to labels</h2><p>Nothing disappears silently: every pair ends in a shard or"
        f" in <code>rejects/</code> with a reason.</p>{''.join(panels)}"
    )


def _types(report: Mapping) -> str:
    found = report["entity_types"]
    if not found["types"]:
        return ""

    most = max(1, found["untyped"]["labels"], *(entry["labels"] for entry in found["types"]))

    def row(name: Markup, numbers: Mapping, kind: str) -> tuple:
        return (
            name,
            count(numbers["entities"]),
            count(numbers["labels"]),
            percent(numbers["labels"], found["labels"]),
            percent(numbers["text_labels"], found["text_labels"]),
            Markup(svg.bar(numbers["labels"] / most, kind)),
        )

    rows = []
    for entry in found["types"]:
        unnamed = entry["name"] == entry["type"]
        qid = "" if unnamed else f' <span class="soft">{escape(entry["type"])}</span>'
        rows.append(row(Markup(escape(entry["name"]) + qid), entry, "accent"))
    rows.append(row(Markup('<span class="soft">no type</span>'), found["untyped"], ""))
    head = ("type", "#entities", "#labels", "#share", "#by text", "")
    more = f" {count(found['others'])} further types are not shown." if found["others"] else ""
    return (
        "<h2>Types of entities</h2><p>Shares of the final labels beside those that text alone would"
        " have given: what choosing and filtering favour shows here. An entity of several types"
        f" counts for each.{more}</p>{panel(table(head, rows))}"
    )


def _captions(report: Mapping) -> str:
    captions, duplicates = report["captions"], report["duplicates"]
    sampled = captions["sampled"]
    rows = [
        Bar(row["script"], row["captions"] / max(sampled, 1), percent(row["captions"], sampled))
        for row in captions["scripts"]
    ]
    note = f"Of {count(sampled)} captions chosen by the hash of their key."
    again = []
    if duplicates["repeated"] is not None:
        share = percent(duplicates["repeated"], report["funnel"]["valid"])
        again.append(("pictures that occur again, byte for byte", duplicates["repeated"], share))
    for row in duplicates["evaluation"]:
        found = ", ".join(f"{layer} {count(n)}" for layer, n in row["by_layer"].items())
        words = f"removed: near one of {row['set']}" + (f" (found by {found})" if found else "")
        share = percent(row["removed"], report["funnel"]["labelled"])
        again.append((words, row["removed"], share))
    again = [(words, count(number), share) for words, number, share in again]
    return (
        '<h2>Captions and duplicates</h2><div class="halves">'
        + panel(bars(rows), "Script of captions", note)
        + (panel(table(("", "#pictures", "#share"), again), "Duplicates") if again else "")
        + "</div>"
    )


def _rates(report: Mapping) -> str:
    if not report["rates"]:
        return ""
    rows = [
        (
            row["stage"],
            count(row["shards"]),
            f"{count(row['rows'])} {row['unit'].replace('_', ' ')}" if row["unit"] else "–",
            f"{row['seconds']:,.1f}",
            count(row["rows"] / row["seconds"]) if row["rows"] and row["seconds"] else "–",
        )
        for row in report["rates"]
    ]
    head = ("stage", "#shards", "#rows", "#seconds", "#rows per second")
    return (
        "<h2>Work</h2><p>Seconds of all workers together, of the run in which each shard was made;"
        f" the only numbers here that differ from run to run.</p>{panel(table(head, rows))}"
    )


def _lineage(report: Mapping) -> str:
    lineage = report["lineage"]
    inputs = [
        (code(i["path"]), size(i["bytes"]), code(i["sha256"][:16])) for i in lineage["inputs"]
    ]
    shards = [
        (code(s["path"]), count(s["records"]), size(s["bytes"]), code(s["sha256"][:16]))
        for s in lineage["shards"]
    ]
    config = [
        (code(key), code("–" if value is None else value)) for key, value in _flat(report["config"])
    ]
    return (
        "<h2>Lineage and licence</h2><p>The shards are a function of these inputs and this"
        " configuration alone; the first 16 digits of each sha256 are shown, the rest is in"
        " <code>report.json</code>. Pictures and captions keep the licences of their sources:"
        " labels add no right to use them.</p>"
        + _folded(_many(len(inputs), "input"), ("input", "#bytes", "sha256"), inputs[:_LISTED])
        + _folded(
            _many(len(shards), "shard"), ("shard", "#records", "#bytes", "sha256"), shards[:_LISTED]
        )
        + _folded("Configuration", ("key", "value"), config)
    )


def _flat(config: Mapping, prefix: str = "") -> list[tuple[str, object]]:
    """Keys as they are written on the command line, with their values."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            words = isinstance(value, list | tuple)
            found.append((prefix + key, ", ".join(map(str, value)) if words else value))
    return found


def _folded(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return panel(f"<details><summary>{title}</summary>{table(head, rows)}</details>")


def _many(number: int, word: str) -> str:
    return f"{count(number)} {word}{'' if number == 1 else 's'}"
