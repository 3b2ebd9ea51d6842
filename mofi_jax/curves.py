"""Draws the curves of one run, or of several over each other, from their metrics files.

    python -m mofi_jax.curves W [W2 ...] [--out curves.png]

Without ``--out`` the picture is ``W/curves.png``.  A name that ends in ``.html`` gives one page,
which needs no other file: the same curves, and a table of the latest values.  Noisy curves are
smoothed, with the raw values faint behind them.  Metrics that a run does not have take no place.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mofi_jax import telemetry
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput

SUFFIXES = (".png", ".html")

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TASKS = {"total": 0, "entity": 1, "contrastive": 2}  # of one colour in every panel
_PHASE_COLOURS = dict(
    zip(
        telemetry.PHASES,
        (
            "#BBBBBB",
            "#E69F00",
            "#D55E00",
            "#009E73",
            "#56B4E9",
            "#CC79A7",
            "#F0E442",
            "#882255",
            "#444444",
        ),
        strict=True,
    )
)
_PALE = ("start", "compile", "eval")
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}
_COLUMNS = 3
_PANEL_INCHES = (4.2, 2.7)
_DPI = 150
_NOISY = 60  # points from which a curve is smoothed
_USUAL = (1, 99)  # percentiles of a noisy curve that its axis must show
_DRAWN = 1200  # points of a raw curve at most


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes: name, unique among the runs; lines, those of the metrics file."""

    name: str
    lines: list[dict[str, Any]]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, float64 [n] each, of the lines that have the metric."""
        found = [(line["step"], line[metric]) for line in self.lines if metric in line]
        return tuple(np.array(found, np.float64).reshape(-1, 2).T)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
      title: with the unit.
      metrics: drawn in it, name -> what the legend says.
      log: logarithmic axis.
      factor: that the values are multiplied by.
      from_zero: whether the axis begins at 0.
    """

    title: str
    metrics: dict[str, str]
    log: bool = False
    factor: float = 1.0
    from_zero: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Metrics that share a panel in the picture of one run.

    Attributes:
      pattern: of their names.
      title: of the panel they share; empty for evaluators, which share a panel by metric.
      alone: title of the panel of one of them, with a place for its label.
      options: of `Panel`.
    """

    pattern: str
    title: str
    alone: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# In this order: what is learned, how, and at what price.  A pattern takes what no earlier one took.
_FAMILIES = (
    Family(r"loss(_.+)?", "Loss", "Loss: {}"),
    Family(r".+_accuracy", "Accuracy on the batch", "Accuracy on the batch: {}"),
    Family(r"(?!speed/|memory/|goodput/|learning_rate/|gradient_norm/).+/.+", "", ""),
    Family(r"learning_rate.*", "Learning rates", "{}", {"from_zero": True}),
    Family(r"(gradient|update)_norm.*", "Norms", "{}", {"log": True}),
    Family(r".*cosine.*", "Cosines", "{}"),
    Family(r".*_scale", "Scales of the logits", "{}"),
    Family(r"speed/images_per_second", "", "{}", {"from_zero": True}),
    Family(
        r"speed/(data_wait|mfu)",
        "Data wait and MFU (%)",
        "{} (%)",
        {"factor": 100.0, "from_zero": True},
    ),
    Family(r"memory/.+", "Memory (GiB)", "Memory of the {} (GiB)", {"from_zero": True}),
)
# Told by the table alone, or by the bar.
_NOT_DRAWN = re.compile(r"goodput/.+|speed/.+")
_LABELS = {
    "speed/mfu": "MFU",
    "map": "mAP",
    "map_no_self": "mAP without the query",
    "loss": "total",
    "gradient_norm/towers": "gradient norm of the towers",
    "gradient_norm/table": "gradient norm of the class table",
}


def main(*workdirs: str, out: str = "") -> None:
    """Draws the runs of `workdirs` to the file `out`."""
    path = files.output_file(out or epath.Path(workdirs[0]) / "curves.png", "--out")
    if path.suffix not in SUFFIXES:
        raise BadInput(f"--out={out} must end in {' or '.join(SUFFIXES)}: rename it.")
    runs = read_runs(workdirs)
    if not path.parent.exists():
        raise BadInput(f"--out={out} lies in a folder that does not exist: create {path.parent}.")
    if path.suffix == ".html":
        files.write_text(path, page(runs))
    else:
        picture = io.BytesIO()
        draw(runs).savefig(picture, format="png", dpi=_DPI)
        path.write_bytes(picture.getvalue())
    print(path)


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Reads the metrics of every folder.

    Raises:
      BadInput: a folder without metrics, or given twice.
    """
    folders = [epath.Path(workdir).resolve() for workdir in workdirs]
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


# ----------------------------------------------------------------------------------------- panels


def panels(runs: Sequence[Run]) -> list[Panel]:
    """What to draw: families of metrics for one run; for several, a panel for each metric."""
    names = list(dict.fromkeys(name for run in runs for line in run.lines for name in line))
    result, left = [], [n for n in names if n not in ("step", "time")]
    for family in _FAMILIES:
        members = [name for name in left if re.fullmatch(family.pattern, name)]
        left = [name for name in left if name not in members]
        if family.alone:
            groups = {family.title: {name: label(name) for name in members}}
        else:
            groups = {}
            for name in members:
                evaluator, _, metric = name.partition("/")
                groups.setdefault(label(metric), {})[name] = evaluator
        for title, group in groups.items():
            if len(runs) == 1 and len(group) > 1:
                result.append(Panel(title, group, **family.options))
                continue
            for name, text in group.items():
                alone = capital(family.alone.format(text)) if family.alone else f"{text}: {title}"
                result.append(Panel(alone, {name: text}, **family.options))
    # Whatever else there is; what never changes says as much in the table.
    for name in left:
        values = np.concatenate([run.series(name)[1] for run in runs])
        if not _NOT_DRAWN.fullmatch(name) and np.ptp(values) > 0:
            result.append(Panel(capital(label(name)), {name: label(name)}))
    return result


def label(name: str) -> str:
    """A metric's name for people."""
    if name in _LABELS:
        return _LABELS[name]
    text = name.rpartition("/")[2].removesuffix("_gib").removesuffix("_accuracy")
    return text.removeprefix("loss_").replace("_", " ")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------------------------- drawing


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average over a fortieth of the points to each side; what is not finite is left out.

    Args:
      values: float64 [n].

    Returns:
      float64 [n]; nan where nothing finite is near.
    """
    width = max(2.0, len(values) / 80)
    reach = min(math.ceil(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, kernel)[reach : reach + len(values)]

    weights = spread(finite.astype(np.float64))
    sums = spread(np.where(finite, values, 0.0))
    return np.divide(sums, weights, out=np.full(len(values), np.nan), where=weights > 1e-9)


def noisy(values: np.ndarray) -> bool:
    """Whether a curve goes up and down so often that its course is hard to see."""
    finite = values[np.isfinite(values)]
    if len(finite) < _NOISY:
        return False
    usual = np.clip(finite, *np.percentile(finite, _USUAL))
    return bool(np.abs(np.diff(usual)).sum() > 6 * np.ptp(usual))


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `_DRAWN` points: the lowest and the highest of each stretch."""
    if len(values) <= _DRAWN:
        return steps, values
    stretches = np.array_split(np.arange(len(values)), _DRAWN // 2)
    order = np.where(np.isfinite(values), values, np.nanmedian(values))
    kept = [i for s in stretches for i in sorted({s[order[s].argmin()], s[order[s].argmax()]})]
    return steps[kept], values[kept]


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """One panel: colours tell the runs apart, or, in a single run, the metrics."""
    shown = []
    for r, run in enumerate(runs):
        for m, (name, text) in enumerate(panel.metrics.items()):
            steps, values = run.series(name)
            if not len(values):
                continue
            values = values * panel.factor
            if panel.log:
                values = np.where(values > 0, values, np.nan)
            number = r if len(runs) > 1 else _TASKS.get(text, m)
            colour = _COLOURS[number % len(_COLOURS)]
            text = run.name if len(runs) > 1 else text
            if noisy(values):
                axes.plot(*thinned(steps, values), color=colour, alpha=0.22, linewidth=0.6)
                # A hiccup far outside must neither bend the curve nor flatten the rest.
                usual = np.percentile(values[np.isfinite(values)], _USUAL)
                values = np.clip(values, *usual)
                values = np.exp(smooth(np.log(values))) if panel.log else smooth(values)
                shown.append(usual)
            axes.plot(
                *thinned(steps, values),
                color=colour,
                linewidth=1.6,
                marker="o" if len(values) <= 25 else "",
                markersize=3,
                label=text,
            )
            shown.append(values[np.isfinite(values)])
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.margins(x=0.02)
    shown = np.concatenate(shown) if shown else np.zeros(0)
    if panel.log and len(shown):
        axes.set_yscale("log")
        if shown.max() / shown.min() < 20:  # less than a decade shows hardly any tick of its own
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    elif len(shown):
        low, high = shown.min(), shown.max()
        room = 0.06 * (high - low or abs(high) or 1.0)
        axes.set_ylim(0 if panel.from_zero else low - room, high + room)
    if len(runs) == 1 and len(panel.metrics) > 1:
        axes.legend(framealpha=0.8, edgecolor="none", handlelength=1.2)


def draw_goodput(axes: Axes, runs: Sequence[Run]) -> None:
    """A bar for each run: where its wall time went, in percent."""
    for row, run in enumerate(runs):
        split = goodput(run)
        left = 0.0
        for phase, share in split.items():
            axes.barh(row, share, left=left, color=_PHASE_COLOURS[phase], height=0.62)
            if share >= 4:
                axes.text(
                    *(left + share / 2, row, f"{phase}\n{share:.0f} %"),
                    ha="center",
                    va="center",
                    color="black" if phase in _PALE else "white",
                    fontsize=8,
                )
            left += share
    axes.set_title("Goodput: wall time since the first start (%)")
    axes.set_yticks(range(len(runs)), [run.name for run in runs] if len(runs) > 1 else [""])
    axes.set_xlim(0, 100)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    present = [p for p in telemetry.PHASES if any(goodput(run).get(p, 0) >= 0.05 for run in runs)]
    handles = [axes.barh(0, 0, color=_PHASE_COLOURS[phase]) for phase in present]
    axes.figure.legend(
        *(handles, present),
        ncols=len(present),
        loc="outside lower center",
        frameon=False,
        handlelength=1,
    )


def goodput(run: Run) -> dict[str, float]:
    """The last split of the wall time in percent, by phase; empty in a run that did not tell."""
    for line in reversed(run.lines):
        split = {p: 100 * line[f"goodput/{p}"] for p in telemetry.PHASES if f"goodput/{p}" in line}
        if split:
            return split
    return {}


def draw(runs: Sequence[Run]) -> Figure:
    """All panels in one figure."""
    import matplotlib as mpl

    chosen = panels(runs)
    rows = math.ceil(len(chosen) / _COLUMNS)
    told = any(goodput(run) for run in runs)
    heights = [_PANEL_INCHES[1]] * rows + [0.9 + 0.4 * len(runs)] * told
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(_COLUMNS * _PANEL_INCHES[0], sum(heights) + 0.6), layout="constrained"
        )
        grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
        for i, panel in enumerate(chosen):
            draw_panel(figure.add_subplot(grid[i // _COLUMNS, i % _COLUMNS]), panel, runs)
        if told:
            draw_goodput(figure.add_subplot(grid[-1, :]), runs)
        if len(runs) > 1:
            handles = [
                figure.axes[0].plot([], [], color=_COLOURS[r % len(_COLOURS)], linewidth=2)[0]
                for r in range(len(runs))
            ]
            figure.legend(
                handles, [r.name for r in runs], loc="outside upper left", ncols=4, frameon=False
            )
        else:
            figure.suptitle(heading(runs[0]), x=0.01, ha="left", fontsize=11)
        return figure


def heading(run: Run) -> str:
    return f"{run.name}: {run.lines[-1]['step']:,} steps"


# ------------------------------------------------------------------------------------------- page


def svg(figure: Figure) -> str:
    """A figure as an element of a page, as wide as its place."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Without a size of its own it takes that of its place.
    return re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem;
        max-width: 84rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
.panels {{ display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }}
svg {{ width: 100%; height: auto; display: block; }}
.wide, .table {{ overflow-x: auto; }} .wide svg {{ min-width: 36rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee; }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.runs span {{ display: inline-block; margin-right: 1.2rem; }}
.runs i {{ display: inline-block; width: 1em; height: .3em; margin-right: .4em;
           vertical-align: middle; }}
</style></head><body>
<h1>{title}</h1>
{runs}
<div class="panels">
{panels}
</div>
{goodput}
<h2>Latest values</h2>
<div class="table"><table>
{table}
</table></div>
</body></html>
"""


def page(runs: Sequence[Run]) -> str:
    """One page with the curves as vector graphics and a table of the latest values."""
    import matplotlib as mpl

    drawings, bar = [], ""
    with mpl.rc_context(_STYLE):
        for panel in panels(runs):
            figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
            draw_panel(figure.add_subplot(), panel, runs)
            drawings.append(f"<div>{svg(figure)}</div>")
        if any(goodput(run) for run in runs):
            figure = Figure(figsize=(12, 1.3 + 0.4 * len(runs)), layout="constrained")
            draw_goodput(figure.add_subplot(), runs)
            bar = f'<div class="wide">{svg(figure)}</div>'
    keys = "".join(
        f'<span><i style="background: {_COLOURS[r % len(_COLOURS)]}"></i>'
        f"{html.escape(heading(run))}</span>"
        for r, run in enumerate(runs)
    )
    single = len(runs) == 1
    return _PAGE.format(
        title=html.escape(heading(runs[0]) if single else f"{len(runs)} training runs"),
        runs="" if single else f'<p class="runs">{keys}</p>',
        panels="\n".join(drawings),
        goodput=bar,
        table=table(runs),
    )


def table(runs: Sequence[Run]) -> str:
    """Rows of a table: the last value of every metric and the step at which it was taken."""
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    heads = "".join(f"<th>{html.escape(run.name)}</th><th>at step</th>" for run in runs)
    rows = [f"<tr><th>metric</th>{heads}</tr>"]
    for name in names:
        if name in ("step", "time"):
            continue
        cells = []
        for run in runs:
            steps, values = run.series(name)
            cells.append(
                f"<td>{values[-1]:.5g}</td><td>{steps[-1]:,.0f}</td>"
                if len(values)
                else "<td></td><td></td>"
            )
        rows.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return "\n".join(rows)


if __name__ == "__main__":
    cli.run(main)
