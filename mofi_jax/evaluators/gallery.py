"""A picture of retrieval: evenly spaced queries, each with its nearest others."""

from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from mofi_jax.data import ops
from mofi_jax.evaluators.sets.pictures import Class, PictureSet

QUERIES = 6
NEIGHBOURS = 6
GREEN, RED, _INK, _GREY = "#2a9d4e", "#d1383d", "#1f2328", "#6e7781"
_CELL = 1.32  # inches


def write(
    path: epath.PathLike,
    features: Float[np.ndarray, "n d"],
    pictures: PictureSet,
    classes: dict[int, Class],
) -> None:
    """Writes a PNG.

    The queries are chosen by position alone, so a gallery is no better than the model.

    Features are float32 and L2-normalised; captions come from `classes`, {} if unknown.
    """
    count = min(QUERIES, len(features))
    queries = ((np.arange(count) + 0.5) * len(features) / count).astype(np.int32)
    scores = features[queries] @ features.T
    scores[np.arange(count), queries] = -np.inf
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(features) - 1)]
    hits = pictures.classes[nearest] == pictures.classes[queries][:, None]
    same = (pictures.classes == pictures.classes[queries][:, None]).sum(1) - 1
    legend = (
        f"left the query, then the pictures nearest to it among {len(pictures):,}, itself left "
        f"out; green: the same class ({hits.sum()} of the "
        f"{np.minimum(same, nearest.shape[1]).sum()} possible), red: another; cosine in the corner"
    )

    # Not pyplot: its global state and windows have no place in a training loop.
    from matplotlib.figure import Figure

    columns = 1 + nearest.shape[1]
    width, height = columns * _CELL + 0.5, count * (_CELL + 0.24) + 0.9
    figure = Figure(figsize=(width, height), facecolor="white")
    edges = {"left": 0.2 / width, "right": 1 - 0.2 / width}
    edges |= {"top": 1 - 0.88 / height, "bottom": 0.12 / height}
    # The empty second column sets the query apart.
    ratios = [1, 0.12] + [1] * (columns - 1)
    grid = figure.add_gridspec(
        count, columns + 1, width_ratios=ratios, wspace=0.12, hspace=0.2, **edges
    )

    def show(cell: Any, row: int, frame: str, **style: Any) -> Any:
        axes = figure.add_subplot(cell)
        axes.imshow(ops.decode_rgb(pictures.read(row)))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=2.4)
        number = int(pictures.classes[row])
        name = classes[number].label if number in classes else f"class {number}"
        name = name if len(name) <= 22 else name[:21].rstrip() + "…"
        axes.set_title(name, fontsize=7.5, pad=3.5, **style)
        return axes

    for line, query in enumerate(queries):
        show(grid[line, 0], int(query), _INK, color=_INK, fontweight="bold")
        for column, row in enumerate(nearest[line]):
            frame = GREEN if hits[line, column] else RED
            axes = show(grid[line, column + 2], int(row), frame, color=_GREY)
            # The cosine in the corner, on white: pictures have any colour.
            box = {"boxstyle": "round,pad=0.18", "fc": "white", "ec": "none", "alpha": 0.8}
            place = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
            cosine = f"{scores[line, row]:.2f}"
            axes.text(0.97, 0.03, cosine, fontsize=6.5, color=_INK, bbox=box, **place)
    title = f"Nearest neighbours in {pictures.path.name}"
    style = {"fontsize": 13, "fontweight": "bold", "color": _INK, "va": "center"}
    figure.text(0.2 / width, 1 - 0.28 / height, title, **style)
    style = {"fontsize": 7.5, "color": _GREY, "va": "center"}
    figure.text(0.2 / width, 1 - 0.52 / height, legend, **style)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        # No date and no version inside: the same features give the same bytes.
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
