"""What a sweep found: its points ranked by one score, as JSON and Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput


def write(
    workdir: epath.Path, names: Sequence[str], points: Sequence[Mapping[str, Any]], metric: str
) -> str:
    """Writes sweep.json and sweep.md.

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

    keys = list(dict.fromkeys(key for point in points for key in point))
    lines = [[*keys, metric, "state", "folder"], ["---"] * (len(keys) + 3)]
    for r in ranked:
        score = "" if r["score"] is None else f"{r['score']:.4f}"
        values = [str(r["values"].get(key, "")) for key in keys]
        lines.append([*values, score, r["state"], r["name"]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    files.write_text(workdir / "sweep.md", table + "\n")
    return table


def row(folder: epath.Path, point: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One point: what it is, how far it is, what it scored."""
    state = state_of(folder)
    values = {"name": folder.name, "values": dict(point), "state": state, "score": None}
    if state == "finished":
        path, remedy = folder / "result.json", "delete it, and the sweep runs this point again"
        result = files.read_json_object(path, remedy)
        if not isinstance(result.get("scores"), dict) or not {"steps", "seconds"} <= result.keys():
            raise BadInput(f"{path} is not the result of a training: {remedy}.")
        values |= {key: result[key] for key in ("scores", "steps", "seconds")}
        values["score"] = result["scores"].get(metric)
    return values


def state_of(folder: epath.Path) -> str:
    """finished, failed, started or waiting."""
    files = (("result.json", "finished"), ("failed.json", "failed"), ("model.json", "started"))
    return next((state for file, state in files if (folder / file).exists()), "waiting")
