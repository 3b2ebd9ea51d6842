"""What the finished runs say: result.json, claim.md, and claim.svg and claim.png."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from experiments.claim import runs, statistics
from experiments.claim.statistics import Interval
from mofi_jax.common import files
from mofi_jax.common.pages import plots

BASELINE = "raw_pixels"
HEADLINE = "unseen_no_self"
# Metrics of the two tables, in their order, and their heads.
RETRIEVAL = {
    "unseen_no_self": "unseen mAP, without self",
    "unseen": "unseen mAP",
    "seen_no_self": "seen mAP, without self",
    "seen": "seen mAP",
}
OTHERS = {
    "knn_unseen/dino_best": "k-NN, unseen",
    "zeroshot_seen/top1": "zero-shot, seen",
    "entity_seen/top1": "entity",
    "entity_seen/top1_5_to_19": "entity, 5 pictures or more",
    "entity_seen/top1_under_5": "entity, fewer",
}
METRICS = RETRIEVAL | OTHERS
SAYS = {BASELINE: "raw pixels"} | {
    name: run.says for part in runs.PARTS.values() for name, run in part.items()
}
Lines = Mapping[tuple[str, int], dict]


def write(out: epath.Path, lines: Lines, classes: Mapping[str, Int[np.ndarray, " q"]]) -> str:
    """Writes the files of the runs that are finished; returns the tables."""
    seeds = {}
    for name, seed in sorted(lines):
        seeds.setdefault(name, []).append(seed)
    scores = {
        name: {
            metric: statistics.over_seeds(np.array(values))
            for metric in METRICS
            if (values := [v for s in own if (v := score(lines[name, s], metric)) is not None])
        }
        for name, own in seeds.items()
    }
    compared = [
        *runs.COMPARED,
        *(
            (f"multitask@{share:g}", f"{other}@{share:g}")
            for share in runs.SHARES
            for other in ("clip", "multitask_text")
        ),
        *((name, default_of(name)) for name in runs.ABLATIONS),
    ]
    differences = {
        f"{more} - {less}": difference(lines, more, less, both, classes["unseen"])
        for more, less in compared
        if (both := sorted({*seeds.get(more, ())} & {*seeds.get(less, ())}))
    }
    files.write_json(
        out / "result.json",
        {
            "devices": sorted({line["device"] for line in lines.values()}),
            "minutes": round(sum(line["seconds"] for line in lines.values()) / 60, 1),
            "labels": {k: line["labels"] for (k, _), line in sorted(lines.items())},
            "seeds": seeds,
            "scores": {k: {m: [*i] for m, i in v.items()} for k, v in scores.items()},
            "differences": differences,
        },
    )
    text = "\n\n".join(filter(None, tables(seeds, scores, differences)))
    files.write_text(out / "claim.md", text + "\n")
    figure = plots.intervals(panels(lines, scores, differences))
    files.write_text(out / "claim.svg", plots.svg(figure))
    (out / "claim.png").write_bytes(plots.png(figure))
    return text


def default_of(name: str) -> str:
    """The run that an ablation changes one thing of."""
    return "supervised" if runs.ABLATIONS[name].losses == runs.SUPERVISED else "multitask"


def score(line: Mapping[str, Any], metric: str) -> float | None:
    """One metric of one run, None where the run has not got it."""
    if metric in line["precision"]:
        return float(np.nanmean(precision(line, metric)))
    return line["scores"].get(metric)


def precision(line: Mapping[str, Any], metric: str) -> Float[np.ndarray, " q"]:
    return np.array(line["precision"][metric], np.float64)


def difference(
    lines: Lines, more: str, less: str, seeds: Sequence[int], classes: Int[np.ndarray, " q"]
) -> dict[str, Any]:
    """Of the headline metric: mean, interval over classes and seeds, t test over seeds, wins."""
    by_query = np.array(
        [precision(lines[more, s], HEADLINE) - precision(lines[less, s], HEADLINE) for s in seeds]
    )
    by_seed = np.nanmean(by_query, axis=1)
    return {
        "interval": [*statistics.bootstrap(by_query, classes)],
        "p": statistics.p_value(by_seed),
        "seeds": len(seeds),
        "seeds_ahead": int((by_seed > 0).sum()),
    }


def panels(
    lines: Lines,
    scores: Mapping[str, Mapping[str, Interval]],
    differences: Mapping[str, Mapping[str, Any]],
) -> dict[str, list[plots.Estimate]]:
    """The drawing: the main runs with their seeds, and what the labels bring where captions err."""
    drawn = {
        METRICS[HEADLINE]: [
            plots.Estimate(
                SAYS[name],
                *scores[name][HEADLINE],
                single=[score(line, HEADLINE) for (of, _), line in lines.items() if of == name],
                bold=name == "multitask",
            )
            for name in (BASELINE, *runs.MAIN)
            if name in scores
        ]
    }
    for other in ("clip", "multitask_text"):
        rows = [
            plots.Estimate(f"{100 * share:.0f} % wrong", *differences[pair]["interval"], bold=True)
            for share in runs.SHARES
            if (pair := f"multitask@{share:g} - {other}@{share:g}") in differences
        ]
        if rows:
            title = f"{SAYS['multitask']}, minus {SAYS[other]}, by share of wrong captions"
            drawn[title] = rows
    return drawn


def tables(
    seeds: Mapping[str, Sequence[int]],
    scores: Mapping[str, Mapping[str, Interval]],
    differences: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Markdown: the main runs, first retrieval, what differs, noise, ablations."""

    def of(names: Sequence[str], metrics: Sequence[str]) -> str:
        present = [name for name in names if name in scores]
        if not present:
            return ""
        rows = [["", "seeds", *(METRICS[m] for m in metrics)]]
        for name in present:
            cells = [show(scores[name].get(m)) for m in metrics]
            rows.append([SAYS[name], str(len(seeds[name])), *cells])
        return markdown(rows)

    def compare(head: str, pairs: Sequence[tuple[str, str]]) -> str:
        shown = [(m, o, differences[f"{m} - {o}"]) for m, o in pairs if f"{m} - {o}" in differences]
        rows = [[head, "unseen mAP without self", "p", "seeds ahead"]]
        rows += [[f"{SAYS[m]} − {SAYS[o]}", *show_difference(of)] for m, o, of in shown]
        return markdown(rows) if shown else ""

    main, others = (of((BASELINE, *runs.MAIN), tuple(part)) for part in (RETRIEVAL, OTHERS))
    told = compare("difference [95 % interval]", runs.COMPARED)
    ablations = compare(
        "difference [95 % interval] on the same seeds",
        [(name, default_of(name)) for name in runs.ABLATIONS],
    )
    noise = ""
    shares = [f"{share:g}" for share in runs.SHARES if f"clip@{share:g}" in scores]
    if shares:
        rows = [["wrong captions", *(f"{100 * float(share):.0f} %" for share in shares)]]
        for name in ("clip", "multitask_text", "multitask"):
            at = [scores.get(f"{name}@{share}", {}).get(HEADLINE) for share in shares]
            rows.append([SAYS[name], *map(show, at)])
        for other in ("clip", "multitask_text"):
            pairs = [f"multitask@{s} - {other}@{s}" for s in shares]
            at = [show_difference(differences[p])[0] if p in differences else "" for p in pairs]
            rows.append([f"multi-task, I2E − {SAYS[other]}", *at])
        noise = markdown(rows)
    return [main, others, told, noise, ablations]


def show(interval: Interval | None) -> str:
    if interval is None:
        return ""
    half = interval.high - interval.mean
    return f"{interval.mean:.3f} ± {half:.3f}" if half else f"{interval.mean:.3f}"


def show_difference(of: Mapping[str, Any]) -> list[str]:
    mean, low, high = of["interval"]
    p = "" if of["seeds"] < 2 else "< 0.001" if of["p"] < 0.001 else f"{of['p']:.3f}"
    return [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", p, f"{of['seeds_ahead']} of {of['seeds']}"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
