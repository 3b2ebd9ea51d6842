"""The sections of the data card that are charts: distributions, and other thresholds."""

from collections.abc import Mapping, Sequence

from data_prep.card import svg
from data_prep.card.html import Markup, code, panel
from data_prep.card.svg import count

_BINS = 32  # of a histogram


def distributions(report: Mapping) -> str:
    """Histograms of entities, labels, evidence and picture sizes."""
    entities, sizes = report["images_per_entity"], report["picture_sizes"]
    bins, per_picture = entities["bins"], report["labels_per_picture"]
    held = [
        f"the largest {100 * head['part']:.0f} % ({count(head['entities'])}) hold"
        f" {100 * head['share']:.1f} %"
        for head in entities["head"]
    ]
    panels = [
        panel(
            svg.columns(
                "Column chart: number of entities by their number of pictures",
                _ranges(bins),
                [[b["entities"] for b in bins]],
                shares=[b["share"] for b in bins],
            ),
            "Entities by number of pictures",
            Markup(
                '<span class="key">Line</span>: share of all labels held by entities of this size'
                f" and larger. Of the entities, {'; '.join(held)} of the labels."
            ),
        ),
        panel(
            svg.columns(
                "Column chart: number of pictures by their number of labels",
                list(per_picture),
                [list(per_picture.values())],
            ),
            "Labels per picture",
        ),
    ]
    if report["z_scores"]:
        panels += [
            _histogram(
                report["z_scores"],
                "z-scores of candidates",
                "standard deviations",
                "min_z_score",
                0.25,
            ),
            _histogram(report["scores"], "Cosine of candidates", "", "min_score", 0.02),
        ]
    if sizes["bins"]:
        chart = svg.columns(
            "Column chart: number of pictures by pixels of their shorter side",
            _ranges(sizes["bins"]),
            [[b["pictures"] for b in sizes["bins"]]],
        )
        note = f"Of the pictures as read; median {count(sizes['median'])} px."
        panels.append(panel(chart, "Shorter side of pictures, px", note))
    return f'<h2>Distributions</h2><div class="halves">{"".join(panels)}</div>'


def _ranges(bins: Sequence[Mapping]) -> list[str]:
    """Names of bins that double; every second one where they would run into each other."""
    dense = len(bins) > 7

    def name(i: int, b: Mapping) -> str:
        if dense:
            return "" if i % (1 + len(bins) // 12) else _brief(b["from"])
        return str(b["from"]) if b["from"] == b["to"] else f"{_brief(b['from'])}–{_brief(b['to'])}"

    return [name(i, b) for i, b in enumerate(bins)]


def _brief(number: int) -> str:
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.3g}M"


def _histogram(found: Mapping, title: str, unit: str, threshold: str, width: float) -> str:
    """Chosen candidates below the others."""
    bins, width = _for_eyes(found["bins"], width)
    every = 1 + (len(bins) - 1) // 8
    # Labels at round values where these are bins: counted from zero.
    names = ["" if round(b["from"] / width) % every else svg.decimal(b["from"]) for b in bins]
    place = (found["threshold"] - bins[0]["from"]) / width if bins else -1
    inside = 0 <= place <= len(bins)
    value = f"{threshold} = {svg.decimal(found['threshold'])}"
    where = f"Dashed: {value}." if inside else f"{value} is outside."
    return panel(
        svg.columns(
            f"Histogram: {title.lower()}, chosen ones and others; {value}",
            names,
            [[b["chosen"] for b in bins], [b["others"] for b in bins]],
            mark=place if inside else None,
        ),
        f"{title}, {unit}" if unit else title,
        Markup(f'<span class="key">Chosen</span> and others. {where}'),
    )


def _for_eyes(bins: Sequence[Mapping], width: float) -> tuple[list[dict], float]:
    """At most `_BINS` equal bins and their width, empty ones too.

    What lies in the outermost thousandth at either end joins the outermost bins.
    """
    if not bins:
        return [], width
    totals = [b["chosen"] + b["others"] for b in bins]
    spare = sum(totals) // 1000
    first, last = 0, len(bins) - 1
    while sum(totals[: first + 1]) <= spare and first < last:
        first += 1
    while sum(totals[last:]) <= spare and last > first:
        last -= 1
    places = [round(b["from"] / width) for b in bins]
    joined = 1 + (places[last] - places[first]) // _BINS
    low, high = places[first] // joined, places[last] // joined
    found = [
        {"from": round(i * joined * width, 4), "chosen": 0, "others": 0}
        for i in range(low, high + 1)
    ]
    for place, b in zip(places, bins, strict=True):
        bin_ = found[min(max(place // joined, low), high) - low]
        bin_["chosen"] += b["chosen"]
        bin_["others"] += b["others"]
    return found, joined * width


def thresholds(report: Mapping) -> str:
    """What other thresholds would label; nothing where labels come from text alone."""
    if not report["sensitivity"]:
        return ""
    panels = []
    for threshold, points in report["sensitivity"].items():
        mark = next((i for i, point in enumerate(points) if point["configured"]), None)
        # A floor far below all cosines is off: it stands where the cosines begin.
        places = [point["value"] for point in points]
        if len(places) > 2:
            places[0] = max(places[0], 2 * places[1] - places[2])
        every = 1 + len(points) // 9
        start = (mark or 0) % every
        names = [
            "" if (i - start) % every else svg.decimal(point["value"])
            for i, point in enumerate(points)
        ]
        for what, words in (
            ("pictures", "pictures"),
            ("entities", "entities with enough pictures"),
        ):
            line = [svg.Point(x, p[what]) for x, p in zip(places, points, strict=True)]
            chart = svg.line(
                f"Line chart: labelled {words} by {threshold}", line, mark=mark, names=names
            )
            panels.append(panel(chart, Markup(f"{words.capitalize()} by {code(threshold)}")))
    return (
        "<h2>Other thresholds</h2><p>What would be labelled, from the evidence that is kept and"
        " before later filters; the other threshold as configured. Dashed: the one in force."
        f'</p><div class="halves">{"".join(panels)}</div>'
    )
