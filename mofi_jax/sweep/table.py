"""What a sweep found: its points ranked by one score, as JSON, Markdown and a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def write(
    workdir: epath.Path, names: Sequence[str], points: Sequence[Mapping[str, Any]], metric: str
) -> str:
    """Writes sweep.json, sweep.md and, where something numeric is swept, sweep.png.

    Args:
      workdir: folder of the sweep, with the folders ``names``.
      points: {dotted config key: value} of each.
      metric: a score of result.json; higher is better.

    Returns:
      The Markdown table.
    """
    rows = [row(workdir / name, point, metric) for name, point in zip(names, points, strict=True)]
    ranked = sorted(rows, key=lambda r: (r["score"] is None, -(r["score"] or 0.0)))
    best = ranked[0]["name"] if ranked[0]["score"] is not None else None
    files.write_json(workdir / "sweep.json", {"metric": metric, "best": best, "points": ranked})
    table = markdown(ranked, metric)
    files.write_text(workdir / "sweep.md", table + "\n")
    plot(workdir / "sweep.png", [r for r in rows if r["score"] is not None], metric)
    return table


def row(folder: epath.Path, point: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One point: what it is, how far it is, what it scored."""
    found: dict[str, Any] = {
        "name": folder.name,
        "values": dict(point),
        "state": state_of(folder),
        "score": None,
    }
    if found["state"] == "finished":
        path, remedy = folder / "result.json", "delete it, and the sweep runs this point again"
        result = files.read_json_object(path, remedy)
        if not isinstance(result.get("scores"), dict) or not {"steps", "seconds"} <= result.keys():
            raise BadInput(f"{path} is not the result of a training: {remedy}.")
        found["score"] = result["scores"].get(metric)
        found |= {key: result[key] for key in ("scores", "steps", "seconds")}
    return found


def state_of(folder: epath.Path) -> str:
    """finished, failed, started or waiting."""
    files = (("result.json", "finished"), ("failed.json", "failed"), ("model.json", "started"))
    return next((state for file, state in files if (folder / file).exists()), "waiting")


def short_key(key: str, keys: Mapping[str, Any] | Sequence[str]) -> str:
    """The end of a dotted key that tells it from the others."""
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        short = ".".join(parts[start:])
        if not any(other != key and f".{other}".endswith(f".{short}") for other in keys):
            return short
    return key


def markdown(ranked: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The points as a table, in the given order."""
    keys = list(dict.fromkeys(key for r in ranked for key in r["values"]))
    lines = [
        " | ".join(["", *(short_key(key, keys) for key in keys), metric, "state", "folder", ""]),
        "|---" * (len(keys) + 3) + "|",
    ]
    for r in ranked:
        score = "" if r["score"] is None else f"{r['score']:.4f}"
        values = [str(r["values"].get(key, "")) for key in keys]
        lines.append(" | ".join(["", *values, score, r["state"], r["name"], ""]))
    return "\n".join(line.strip() for line in lines)


def plot(path: epath.Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """The score over the swept number with the most values, a line for each rest of the point."""

    def numbers(key: str) -> set[int | float]:
        return {
            r["values"].get(key)
            for r in rows
            if isinstance(r["values"].get(key), (int, float))
            and not isinstance(r["values"][key], bool)
        }

    keys = list(dict.fromkeys(key for r in rows for key in r["values"]))
    axis = max(keys, key=lambda key: len(numbers(key)), default=None)
    if axis is None or len(numbers(axis)) < 2:
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["values"].get(axis) in numbers(axis):
            rest = {key: value for key, value in r["values"].items() if key != axis}
            label = ", ".join(f"{short_key(key, keys)} {value}" for key, value in rest.items())
            lines.setdefault(label, []).append((r["values"][axis], r["score"]))
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for label, pairs in lines.items():
        axes.plot(*zip(*sorted(pairs), strict=True), marker="o", label=label or None)
    if min(numbers(axis)) > 0 and max(numbers(axis)) >= 10 * min(numbers(axis)):
        axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(metric)
    if any(lines):
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(str(path), dpi=120)
    plt.close(figure)
