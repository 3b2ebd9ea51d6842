"""Precision over recall for every threshold tried, and the calibration, as a picture."""

from collections.abc import Mapping

from etils import epath


def draw(result: Mapping, path: epath.Path) -> None:
    """Draws what `data_prep.label_quality` measured.

    Args:
      result: what label_quality.json holds, with a sweep.
      path: of the PNG.
    """
    from matplotlib.figure import Figure

    calibration = result["calibration"]
    figure = Figure(figsize=(12 if calibration else 7, 5), layout="constrained")
    axes = figure.subplots(1, 2 if calibration else 1, squeeze=False)[0]
    _draw_sweep(axes[0], result)
    if calibration:
        _draw_calibration(axes[1], calibration)
    for one in axes:
        one.set(xlim=(0, 1.02), ylim=(0, 1.02))
        one.grid(color="#e3e7ec", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False, loc="best")
    with path.open("wb") as file:
        # No version inside: the same labels give the same bytes.
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def _draw_sweep(axes, result: Mapping) -> None:
    colours = ("#0b7285", "#c77700", "#6741a5")
    for (name, rows), colour in zip(result["sweep"].items(), colours, strict=False):
        points = [p for p in rows if p["precision"] is not None]
        axes.plot(
            [p["recall"] or 0 for p in points],
            [p["precision"] for p in points],
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.5,
            label=f"other values of {name}",
        )
    marks = (("selected", "*", 260, "#b42b3a"), ("text_only", "s", 70, "#1d2733"))
    for name, marker, size, colour in marks:
        point = result[name]
        if point["precision"] is None:
            continue
        text = f"{name.replace('_', ' ')}: {point['precision']:.3f} / {point['recall'] or 0:.3f}"
        place = (point["recall"] or 0, point["precision"])
        axes.scatter(*place, marker=marker, s=size, color=colour, zorder=3, label=text)
    if result["ceiling"]:
        axes.axvline(result["ceiling"], color="#9aa7b4", linestyle="--", linewidth=1)
        axes.annotate(
            "ceiling",
            (result["ceiling"], 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            color="#5d6975",
        )
    axes.set(xlabel="recall", ylabel="precision")
    axes.set_title("Labels against truth: precision / recall", loc="left")


def _draw_calibration(axes, calibration: Mapping) -> None:
    axes.plot([0, 1], [0, 1], color="#9aa7b4", linestyle="--", linewidth=1, label="calibrated")
    bins = calibration["bins"]
    x, y = ([b[name] for b in bins] for name in ("probability", "precision"))
    most = max(b["labels"] for b in bins)
    axes.plot(x, y, color="#0b7285", linewidth=1.5)
    sizes = [20 + 180 * b["labels"] / most for b in bins]
    axes.scatter(x, y, sizes, color="#0b7285", zorder=3, label="labels, by their number")
    axes.set(xlabel="probability of a label", ylabel="share that is right")
    error = calibration["error"]
    axes.set_title(f"Calibration: {error:.3f} off on average", loc="left")
