"""Image retrieval by the GPR1200 protocol, and a picture of it.

Every picture queries the whole set, itself included and relevant (Visual-Computing/GPR1200,
eval/GPR1200.py and eval/utils.py).  With the R pictures of a query's class at ranks r_1 < ... < r_R

    AP = (1/R) sum_i i / r_i        mAP = mean of AP over all queries.

By this rule the query finds itself, so AP is at least 1/R, and random features reach 0.102 on
GPR1200 (1,200 x 10).  Without the query in the index (`map_no_self`) it is another metric, 0.0015
at random.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.evaluators import common, neighbours

# Consecutive queries of GPR1200 in the order of its class numbers.  The table published with the
# data set prints its columns in another order.
GPR1200_DOMAINS = tuple(
    (name, 2000) for name in ("landmarks", "inaturalist", "sketch", "instre", "sop", "faces")
)

_GALLERY_QUERIES = 6
_GALLERY_NEIGHBOURS = 6
_GREEN, _RED, _INK, _GREY = "#2a9d4e", "#d1383d", "#1f2328", "#6e7781"


def average_precision(ranks: Float[np.ndarray, "q r"]) -> Float[np.ndarray, " q"]:
    """AP of each query from the ascending 1-based ranks of its relevant rows.

    NaN pads the ranks at the end of a line; a query without any relevant row has AP NaN.
    """
    count = np.isfinite(ranks).sum(1)
    total = np.nansum(np.arange(1, ranks.shape[1] + 1) / ranks, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def same_class(classes: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n r"]:
    """Row numbers of every row's class, itself included, filled up with `neighbours.NO_ROW`.

    `classes` comes ascending, as `common.read_set` orders it; r is the size of the largest class.
    """
    first = np.searchsorted(classes, classes, side="left")
    last = np.searchsorted(classes, classes, side="right")
    rows = first[:, None] + np.arange((last - first).max())
    return np.where(rows < last[:, None], rows, neighbours.NO_ROW).astype(np.int32)


class Evaluator:
    """mAP of a picture set.

    Args:
      towers: the functions of a model.
      images: folder or .tar in GPR1200 naming; classes may differ in size.
      classes: class table for the captions of the gallery (`common.read_classes`), or "".
      domains: pairs (name, number of consecutive queries) that cover the set, for a score each.
        Empty: the six of GPR1200 if the set has its shape (1,200 classes of 10), else none.
      ties: rank of equal scores, see `neighbours.RankCounts.ranks`.
      features: embeddings shared with other evaluators.

    Raises:
      BadInput: unusable set, domains that do not cover it, unknown tie policy.
    """

    needs = ()

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        classes: epath.PathLike = "",
        domains: Sequence[Sequence[Any]] = (),
        ties: str = "mean",
        features: common.FeatureCache | None = None,
    ):
        self.towers = towers
        self.features = features or common.FeatureCache()
        self.pictures = common.read_set(images)
        self.classes = common.read_classes(classes) if classes else {}
        self.ties = ties
        if ties not in neighbours.TIES:
            raise BadInput(f"Unknown tie policy ties={ties!r}: {', '.join(neighbours.TIES)}.")
        sizes = np.unique(self.pictures.classes, return_counts=True)[1]
        if sizes.max() < 2:
            raise BadInput(
                f"Every class of {images} has a single picture, so there is nothing to retrieve: "
                "name pictures of one thing with one class number."
            )
        self.alone = int((sizes == 1).sum())
        self.domains = tuple((str(name), int(size)) for name, size in domains)
        if not self.domains and len(sizes) == 1200 and np.all(sizes == 10):
            self.domains = GPR1200_DOMAINS
        covered = sum(size for _, size in self.domains)
        if self.domains and covered != len(self.pictures):
            raise BadInput(
                f"`domains` covers {covered} queries, {images} has {len(self.pictures)}: make the "
                "sizes add up to that number."
            )

    def run(self, params: Any) -> Iterator[tuple[str, float]]:
        """Yields ``map``, ``map_no_self`` and ``map_{domain}``, all within 0..1 and not rounded.

        A picture alone in its class counts for ``map`` (the official rule gives it 1).  For
        ``map_no_self`` it has nothing to find and is left out, neither right nor wrong; then
        ``left_out_no_self`` is their number.
        """
        features = self.features.embed(self.towers, params, self.pictures)
        index = neighbours.build_index(features, mesh=self.towers.mesh)
        counts = neighbours.count_ranks(index, features, same_class(self.pictures.classes))
        precision = average_precision(counts.ranks(self.ties))
        yield "map", float(precision.mean())
        others = counts.without(np.arange(len(features)))
        yield "map_no_self", float(np.nanmean(average_precision(others.ranks(self.ties))))
        if self.alone:
            yield "left_out_no_self", float(self.alone)
        start = 0
        for name, size in self.domains:
            yield f"map_{name}", float(precision[start : start + size].mean())
            start += size

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        return {
            "protocol": "GPR1200 (Visual-Computing/GPR1200 eval/utils.py), full ranking",
            **common.picture_card(self.towers, self.pictures),
            "score": "dot product, float32",
            "self": "map: the query is in the index and relevant; map_no_self: it is not there",
            "ties": self.ties,
            "domains": [list(domain) for domain in self.domains],
        }

    def gallery(self, params: Any, path: epath.PathLike) -> None:
        """Writes a PNG (host 0): evenly spaced queries, each with its nearest others.

        The queries are chosen by position alone, so a gallery is no better than the model.
        """
        features = self.features.embed(self.towers, params, self.pictures)
        total = len(features)
        shown = min(_GALLERY_QUERIES, total)
        queries = ((np.arange(shown) + 0.5) * total / shown).astype(np.int32)
        rows, scores = neighbours.top_k(
            neighbours.build_index(features, mesh=self.towers.mesh),
            features[queries],
            min(_GALLERY_NEIGHBOURS, total - 1),
            excluded=queries,
        )
        if jax.process_index() != 0:
            return
        figure = self._draw(queries, rows, scores)
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            # No date and no version inside: the same features give the same bytes.
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})

    def _draw(self, queries, rows, scores):
        # Not pyplot: its global state and windows have no place in a training loop.
        from matplotlib.figure import Figure

        columns = 1 + rows.shape[1]
        cell = 1.32
        width, height = columns * cell + 0.5, len(queries) * (cell + 0.24) + 0.9
        figure = Figure(figsize=(width, height), facecolor="white")
        grid = figure.add_gridspec(
            len(queries),
            columns + 1,
            # The empty second column sets the query apart.
            width_ratios=[1, 0.12] + [1] * (columns - 1),
            left=0.2 / width,
            right=1 - 0.2 / width,
            top=1 - 0.88 / height,
            bottom=0.12 / height,
            wspace=0.12,
            hspace=0.2,
        )
        hits = possible = 0
        for line, (query, found, cosines) in enumerate(zip(queries, rows, scores, strict=True)):
            same = int((self.pictures.classes == self.pictures.classes[query]).sum())
            possible += min(same - 1, len(found))
            axes = figure.add_subplot(grid[line, 0])
            self._show(axes, query, self._name(query), _INK, _INK, "bold")
            for column, (row, cosine) in enumerate(zip(found, cosines, strict=True)):
                hit = self.pictures.classes[row] == self.pictures.classes[query]
                hits += int(hit)
                axes = figure.add_subplot(grid[line, column + 2])
                colour = _GREEN if hit else _RED
                self._show(axes, row, self._name(row), colour, _GREY, "normal")
                # The cosine in the corner, on white: pictures have any colour.
                axes.text(
                    0.97, 0.03, f"{cosine:.2f}", transform=axes.transAxes, ha="right", va="bottom",
                    fontsize=6.5, color=_INK, bbox={"boxstyle": "round,pad=0.18", "fc": "white",
                                                    "ec": "none", "alpha": 0.8},
                )  # fmt: skip
        figure.text(
            0.2 / width, 1 - 0.28 / height, f"Nearest neighbours in {self.pictures.path.name}",
            fontsize=13, fontweight="bold", color=_INK, va="center",
        )  # fmt: skip
        figure.text(
            0.2 / width, 1 - 0.52 / height,
            f"left the query, then the pictures nearest to it among {len(self.pictures):,}, itself "
            f"left out; green: the same thing ({hits} of the {possible} possible), red: another; "
            "cosine in the corner", fontsize=7.5, color=_GREY, va="center",
        )  # fmt: skip
        return figure

    def _show(self, axes, row, title, frame, ink, weight):
        axes.imshow(ops.decode_rgb(self.pictures.read(int(row))))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(frame)
            spine.set_linewidth(2.4)
        axes.set_title(title, fontsize=7.5, color=ink, fontweight=weight, pad=3.5)

    def _name(self, row) -> str:
        number = int(self.pictures.classes[row])
        name = self.classes[number].label if number in self.classes else f"class {number}"
        return name if len(name) <= 22 else name[:21].rstrip() + "…"
