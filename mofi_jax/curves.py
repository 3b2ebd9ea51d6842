"""Draws the curves of one run, or of several over each other.

    mofi curves W
    mofi curves W W2 W3 --out curves.html

Without ``--out`` the picture is ``W/curves.png``.  A name that ends in ``.html`` gives one page,
which needs no other file: the same curves, and a table of the latest values.  Noisy curves are
smoothed, with the raw values faint behind them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mofi_jax import telemetry
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import numbers, plots
from mofi_jax.common.pages import page as pages

# (pattern, title): metrics of one run that share a panel, by title.  What is learned comes first; a
# metric belongs to the first pattern that fits.
_GROUPS = (
    (r"loss(_.+)?", "loss"),
    (r".+_accuracy", "accuracy on the batch"),
    (r"(?!speed/|memory/|goodput/|learning_rate/|gradient_norm/).+/(.+)", r"\1"),  # evaluators'
    (r"learning_rate.*", "learning rate"),
    (r"gradient_norm.*", "gradient norm"),
    (r".*cosine", "cosine"),
    (r"memory/.+", "memory (GiB)"),
    (r"goodput/.+", "goodput: share of the wall time so far"),
    (r"(?!speed/(tokens|step|compile)_).+", r"\g<0>"),
)
_FROM_ZERO = re.compile("speed/|memory/|goodput/|learning_rate")
_LOGARITHMIC = re.compile("(gradient|update)_norm")
# Most are Okabe and Ito's, which people with any colour vision tell apart.
_COLOURS = (plots.ACCENT, "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#888888")
_PANEL_INCHES = (4.2, 2.7)


@dataclasses.dataclass(frozen=True)
class Run:
    """The lines of a metrics file, under a name that no other run has."""

    name: str
    lines: Sequence[dict[str, Any]]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64 [n] each, of the lines that have the metric; inf is nan."""
        rows = [(line["step"], line[metric]) for line in self.lines if metric in line]
        steps, values = np.array(rows, np.float64).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    @property
    def heading(self) -> str:
        return f"{self.name}: {numbers.count(self.lines[-1]['step'])} steps"


def main(*workdirs: str, out: str = "") -> None:
    """Draws the runs of `workdirs` to the file `out`.

    Args:
      workdirs: folders of training runs, one or more.
      out: the picture, .png, or page, .html; by default curves.png in the first of them.
    """
    path = files.output_file(out or epath.Path(workdirs[0]) / "curves.png", "--out")
    if path.suffix not in (".png", ".html"):
        raise BadInput(f"--out={out} must end in .png or .html: rename it.")
    runs = read_runs(workdirs)
    if not path.parent.exists():
        raise BadInput(f"--out={out} lies in a folder that does not exist: create {path.parent}.")
    with mpl.rc_context(plots.STYLE):
        if path.suffix == ".html":
            files.write_text(path, page(runs))
        else:
            path.write_bytes(plots.png(draw(runs), dpi=150))
    print(path)


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """The metrics of every folder; BadInput for one that has none, or is given twice."""
    folders = [files.input_folder(workdir, "workdir") for workdir in workdirs]
    folders = [path if files.is_remote(path) else path.resolve() for path in folders]
    for path, given in zip(folders, workdirs, strict=True):
        if folders.count(path) > 1:
            raise BadInput(f"{given} is given twice: name each run once.")
    # As much of the path as tells the runs apart.
    depth = 1
    while len({path.parts[-depth:] for path in folders}) < len(folders):
        depth += 1
    runs = []
    for path, given in zip(folders, workdirs, strict=True):
        lines = telemetry.read_metrics(path)
        if not lines:
            raise BadInput(
                f"There is no metric in {given}/{telemetry.METRICS_FILE}: name the --workdir of a "
                "training run."
            )
        runs.append(Run("/".join(path.parts[-depth:]), lines))
    names = _as_points([run.name for run in runs])
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _as_points(names: Sequence[str]) -> list[str]:
    """Of points of a sweep, 000-KEY=VALUE,..., what tells them apart; else the names."""
    points = [re.fullmatch(r"(?:.*/)?\d{3,}-(.+=.+)", name) for name in names]
    if len(names) < 2 or not all(points):
        return list(names)
    # Of a key only its last part.
    values = [
        [re.sub(r"^[\w.]*\.(?=\w+=)", "", part) for part in re.split(r",(?=[\w.]+=)", point[1])]
        for point in points
    ]
    common = set(values[0]).intersection(*values)
    short = [", ".join(part for part in of if part not in common) for of in values]
    return short if len(set(short)) == len(names) else list(names)


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """All metrics, in the order in which they first appear."""
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    return [name for name in names if name not in ("step", "time")]


def panels(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{title: metrics}: groups of metrics for one run; for several, a panel for each metric."""
    left, result = metrics_of(runs), {}
    for pattern, title in _GROUPS:
        for match in filter(None, [re.fullmatch(pattern, name) for name in left]):
            left.remove(match[0])
            # What is 0 throughout, such as a phase of the wall time that never came, is left out.
            if any(run.series(match[0])[1].any() for run in runs):
                key = match.expand(title) if len(runs) == 1 else match[0]
                result.setdefault(key, []).append(match[0])
    return result


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average over a 25th of the points to each side, float64 [n] of float64 [n].

    Leaves nan out; nan where nothing else is near.
    """
    kernel = np.exp(-0.5 * np.linspace(-3, 3, 2 * (len(values) // 25) + 1) ** 2)
    weights = np.convolve(np.isfinite(values), kernel, "same")
    sums = np.convolve(np.nan_to_num(values), kernel, "same")
    return np.divide(sums, weights, out=np.full_like(values, np.nan), where=weights > 1e-9)


def draw_panel(axes: Axes, title: str, metrics: Sequence[str], runs: Sequence[Run]) -> None:
    """One panel: colours tell the runs apart or, in a single run, the metrics."""
    shown = [np.zeros(0)]
    colours = _colours(len(runs) * len(metrics))
    for i, (run, metric) in enumerate((run, metric) for run in runs for metric in metrics):
        steps, values = run.series(metric)
        if not np.isfinite(values).any():
            continue
        colour = colours[i]
        # A hiccup far outside must neither bend the curve nor flatten the rest.
        usual = np.clip(values, *np.nanpercentile(values, (1, 99)))
        # Smoothed is what goes up and down so often that its course is hard to see.
        travel = np.nansum(np.abs(np.diff(usual)))
        if len(values) >= 60 and travel > 6 * (np.nanmax(usual) - np.nanmin(usual)):
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
            values = smooth(usual)
            shown.append(usual)
        shown.append(values)
        marker = "o" if len(values) <= 25 else ""
        axes.plot(steps, values, color=colour, marker=marker, markersize=3, label=metric)
    axes.set(title=title if len(metrics) > 1 else metrics[0], xlabel="step")
    plots.scale(axes.xaxis, 5)
    shown = np.concatenate(shown)
    if _LOGARITHMIC.match(metrics[0]):
        axes.set_yscale("log", nonpositive="mask")
        plots.log_scale(axes.yaxis)
    elif len(shown):
        plots.scale(axes.yaxis, 5)
        low, high = np.nanmin(shown), np.nanmax(shown)
        margin = 0.06 * (high - low or abs(high) or 1.0)
        axes.set_ylim(0 if _FROM_ZERO.match(metrics[0]) else low - margin, high + margin)
    if len(metrics) > 1:
        axes.legend(handlelength=1.2)


def draw(runs: Sequence[Run]) -> Figure:
    """All panels in one figure."""
    chosen = panels(runs)
    rows = math.ceil(len(chosen) / 3)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(3 * width, rows * height + 0.5), layout="constrained")
    for i, (title, metrics) in enumerate(chosen.items(), 1):
        draw_panel(figure.add_subplot(rows, 3, i), title, metrics, runs)
    if len(runs) == 1:
        figure.suptitle(runs[0].heading, x=0.01, ha="left")
        return figure
    lines = [Line2D([], [], color=colour) for colour in _colours(len(runs))]
    headings = [run.heading for run in runs]
    # As many columns as have room for the longest name.
    columns = max(1, min(len(runs), 130 // (max(map(len, headings)) + 6)))
    figure.legend(lines, headings, loc="outside upper left", ncols=columns)
    return figure


def _colours(number: int) -> list[str]:
    """Of so many lines; of more than there are names for, from dark to light in their order."""
    if number <= len(_COLOURS):
        return list(_COLOURS[:number])
    return [to_hex(mpl.colormaps["viridis"](i / number)) for i in range(number)]


def page(runs: Sequence[Run]) -> str:
    """One page with the curves as vector graphics and a table of the latest values."""
    drawings = []
    for title, metrics in panels(runs).items():
        figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw_panel(axes, title, metrics, runs)
        axes.set(title="", xlabel="")  # said on the page, as text
        heading = title if len(metrics) > 1 else metrics[0]
        drawings.append((heading, plots.svg(figure, alone=False)))
    colours = _colours(len(runs))
    values = {
        "title": runs[0].heading if len(runs) == 1 else f"{len(runs)} training runs",
        "runs": [
            {"name": run.name, "heading": run.heading, "colour": plots.named(colour)}
            for run, colour in zip(runs, colours, strict=True)
        ],
        "drawings": drawings,
        "table": table(runs),
    }
    return pages.fill(os.path.join(os.path.dirname(__file__), "curves.html.j2"), values)


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Of every metric its last value and the step at which it was taken, run by run."""
    rows = []
    for name in metrics_of(runs):
        cells = []
        for run in runs:
            steps, values = run.series(name)
            known = len(values) > 0
            cells += [numbers.decimal(values[-1]), numbers.count(steps[-1])] if known else ["", ""]
        rows.append((name, cells))
    return rows


if __name__ == "__main__":
    cli.run(main)
