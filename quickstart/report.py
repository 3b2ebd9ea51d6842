"""What the quick start shows at the end: a table in the terminal and a page to look at."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mofi_jax.common.pages import page as pages

SETS = ("seen", "unseen")

ROWS = {
    "raw_pixels": "raw pixels",
    "untrained": "untrained tower",
    "contrastive_alt_text": "contrastive, raw alt-text",
    "supervised_entities": "supervised, chosen labels",
    "contrastive_entities": "contrastive, chosen labels",
    "multitask": "multi-task, chosen labels",
}


def table(result: Mapping[str, Any]) -> str:
    """What a person reads at the end."""
    labels, wide = result["labels"], max(map(len, ROWS.values()))
    text = [f"{'labels against the truth':<{wide}}  precision  recall"]
    for key, name in (("text_only", "text alone, best prior"), ("selected", "chosen by CLIP")):
        row = labels[key]
        text.append(f"{name:<{wide}}  {row['precision']:9.3f}  {row['recall']:6.3f}")
    text += ["", f"{'retrieval, mAP (GPR1200 protocol)':<{wide + 8}}  seen  unseen   without self"]
    for key, name in ROWS.items():
        if key in result["retrieval"]:
            row = result["retrieval"][key]
            text.append(
                f"{name:<{wide}}  {row['seen']:12.3f}  {row['unseen']:6.3f}"
                f"   {row['seen_no_self']:.3f}  {row['unseen_no_self']:.3f}"
            )
    return "\n".join(text)


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """What the figures do not show although the recipe is expected to: said, never hidden."""
    found, rows, labels = [], result["retrieval"], result["labels"]
    for name in SETS:
        best = max(rows, key=lambda key: rows[key][name])
        if best != "multitask":
            found.append(
                f"On {name} things {ROWS[best]} ({rows[best][name]:.3f}) is ahead of multi-task "
                f"({rows['multitask'][name]:.3f})."
            )
    gain = rows["multitask"]["unseen"] - rows["raw_pixels"]["unseen"]
    if gain < 0.1:
        found.append(f"Multi-task is {100 * gain:.1f} points above raw pixels on unseen, not 10.")
    gain = labels["selected"]["precision"] - labels["text_only"]["precision"]
    if gain < 0.1:
        found.append(f"The picture adds {100 * gain:.1f} points of precision, not 10.")
    loss = labels["text_only"]["recall"] - labels["selected"]["recall"]
    if loss > 0.1:
        found.append(f"Choosing by the picture costs {100 * loss:.1f} points of recall.")
    return found


# ------------------------------------------------------------------------------------- the page


def page(result: Mapping[str, Any], out: pathlib.Path) -> str:
    """The report as one HTML file, pictures included; `out` holds what the stages wrote."""
    lines = (out / "multitask/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    curves = {}
    for title, names in (
        ("Loss", {"entity": "loss_entity", "contrastive": "loss_contrastive"}),
        ("Retrieval mAP while training", {name: f"retrieval_{name}/map" for name in SETS}),
    ):
        series = {
            name: [(line["step"], line[key]) for line in metrics if key in line]
            for name, key in names.items()
        }
        curves[title] = [(name, line) for name, line in series.items() if line]
    template = pathlib.Path(__file__).with_name("report.html.j2")
    more = {"models": ROWS, "curves": curves}
    return pages.fill(str(template), {**result, **more})
