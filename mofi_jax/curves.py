"""Draws the curves of one run, or of several over each other.

    mofi curves W
    mofi curves W W2 W3 --out curves.html

Without ``--out`` the picture is ``W/curves.png``.  A name that ends in ``.html`` gives one page,
which needs no other file: the same curves, and a table of the latest values.  Noisy curves are
smoothed, with the raw values faint behind them.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mofi_jax import telemetry
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput

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
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
_INK = "#333334"  # of text and axes; on a page that of its own text, which is light in a dark one
_STYLE = {
    **{"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "svg.fonttype": "none"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True},
    **{"grid.color": "#80808040", "legend.framealpha": 0.0, "legend.edgecolor": "none"},
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    "path.simplify_threshold": 0.5,  # pixels: a page of long runs stays small
}
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
        return f"{self.name}: {self.lines[-1]['step']:,} steps"


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
    with mpl.rc_context(_STYLE):
        if path.suffix == ".html":
            files.write_text(path, page(runs))
        else:
            picture = io.BytesIO()
            draw(runs).savefig(picture, format="png", dpi=150)
            path.write_bytes(picture.getvalue())
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
    return runs


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
    for i, (run, metric) in enumerate((run, metric) for run in runs for metric in metrics):
        steps, values = run.series(metric)
        if not np.isfinite(values).any():
            continue
        colour = _COLOURS[i % len(_COLOURS)]
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
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    shown = np.concatenate(shown)
    if _LOGARITHMIC.match(metrics[0]):
        axes.set_yscale("log", nonpositive="mask")
    elif len(shown):
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
    lines = [Line2D([], [], color=_COLOURS[r % len(_COLOURS)]) for r in range(len(runs))]
    headings = [run.heading for run in runs]
    figure.legend(lines, headings, loc="outside upper left", ncols=4)
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 84rem; }}
.panels {{ display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }}
svg {{ width: 100%; height: auto; }}
.table {{ overflow-x: auto; margin-top: 2rem; }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<p>{runs}</p>
<div class="panels">
{panels}
</div>
<div class="table"><table>
{table}
</table></div>
</body></html>
"""


def page(runs: Sequence[Run]) -> str:
    """One page with the curves as vector graphics and a table of the latest values."""
    drawings = []
    for title, metrics in panels(runs).items():
        figure, file = Figure(figsize=_PANEL_INCHES, layout="constrained"), io.StringIO()
        draw_panel(figure.add_subplot(), title, metrics, runs)
        figure.savefig(file, format="svg", transparent=True)
        svg = file.getvalue()
        drawings.append(svg[svg.index("<svg") :].replace(_INK, "currentColor"))
    keys = [
        f'<b style="color: {_COLOURS[r % len(_COLOURS)]}">&#9632;</b> {html.escape(run.heading)}'
        for r, run in enumerate(runs)
    ]
    return _PAGE.format(
        title=html.escape(runs[0].heading if len(runs) == 1 else f"{len(runs)} training runs"),
        runs="<br>".join(keys) if len(runs) > 1 else "",
        panels="\n".join(drawings),
        table=table(runs),
    )


def table(runs: Sequence[Run]) -> str:
    """Rows of a table: the last value of every metric and the step at which it was taken."""
    heads = "".join(f"<th>{html.escape(run.name)}</th><th>at step</th>" for run in runs)
    rows = [f"<tr><th>metric</th>{heads}</tr>"]
    for name in metrics_of(runs):
        cells = ""
        for run in runs:
            steps, values = run.series(name)
            latest = (f"{values[-1]:.5g}", f"{steps[-1]:,.0f}") if len(values) else ("", "")
            cells += "<td>{}</td><td>{}</td>".format(*latest)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "\n".join(rows)


if __name__ == "__main__":
    cli.run(main)
