"""Draws the picture of the README: unseen things, and what the quick start's model finds near them.

    python -m quickstart.neighbours        after `make quickstart`; writes docs/neighbours.png

Which queries are shown is a rule, not a choice by looks: every thing is stood for by that of its
pictures which has most right ones among its nearest; things are sorted by how many these are, of
equals in their own order, and of the upper half `ROWS` are taken at even distances.  The share of
right ones over all queries is printed beside, for the caption.
"""

import io
import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw

import mofi_jax
from mofi_jax.common.pages import plots
from mofi_jax.evaluators.pages import gallery
from mofi_jax.evaluators.sets import pictures as picture_sets

MODEL, OUT = "runs/quickstart/multitask", "docs/neighbours.png"
SAMPLE = pathlib.Path("data_prep/sample")
ROWS, NEAREST = 5, 3
# Pixels, of which a phone's screen has two or three for each of its own.
_SIDE, _GAP, _FRAME = 172, 20, 5
_FINER = 2  # drawn so many times larger, for smooth edges


def main() -> None:
    """Writes the picture and prints what its caption says."""
    found = picture_sets.read_set(SAMPLE / "unseen.tar")
    classes, pictures = found.classes, list(map(found.read, range(len(found))))
    vectors = mofi_jax.load(MODEL).embed_images(pictures)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    right = classes[nearest] == classes[:, None]
    queries = choose(classes, right.sum(1))
    rows = [[query, *nearest[query]] for query in queries]
    image = draw([[pictures[i] for i in row] for row in rows], right[queries])
    image.save(OUT, optimize=True)
    with (SAMPLE / "classes.jsonl").open(encoding="utf-8") as lines:
        names = {of["class"]: of["label"] for of in map(json.loads, lines)}
    print(f"{OUT}: {', '.join(names[classes[query]] for query in queries)}")
    print(
        f"right: {right[queries].sum()} of the {right[queries].size} shown, "
        f"{100 * right.mean():.0f} % of the {NEAREST} nearest of all {len(right)} queries"
    )


def choose(classes: np.ndarray, right: np.ndarray) -> list[int]:
    """The queries that are shown, as the head of this file says.

    Args:
      classes: int [n], of each picture.
      right: int [n], how many of its nearest are of its class.
    """
    best = [
        max(np.flatnonzero(classes == one).tolist(), key=lambda i: right[i])
        for one in np.unique(classes)
    ]
    upper = sorted(best, key=lambda i: -right[i])[: -(-len(best) // 2)]
    return [upper[i] for i in gallery.evenly(len(upper), ROWS)]


def draw(rows: list[list[bytes]], right: np.ndarray) -> Image.Image:
    """A row for each query, its picture apart from its nearest, which are framed and marked."""
    side, gap = _SIDE * _FINER, _GAP * _FINER
    size = (side * (1 + NEAREST) + gap * (NEAREST + 2), side * len(rows) + gap * (len(rows) + 1))
    image = Image.new("RGBA", size)  # on a page of any colour
    for y, row in enumerate(rows):
        top = gap + y * (side + gap)
        for x, data in enumerate(row):
            left = gap + x * (side + gap)
            picture = Image.open(io.BytesIO(data)).convert("RGBA").resize((side, side))
            mask = Image.new("L", (side, side))
            ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), side // 10, 255)
            image.paste(picture, (left, top), mask)
            if x:
                _mark(ImageDraw.Draw(image), left, top, bool(right[y, x - 1]))
    return image.resize((size[0] // _FINER, size[1] // _FINER), Image.Resampling.LANCZOS)


def _mark(canvas: ImageDraw.ImageDraw, left: int, top: int, right: bool) -> None:
    """A frame, and a tick or a cross on a disc: told apart by shape as well as by colour."""
    side, wide = _SIDE * _FINER, _FRAME * _FINER
    colour = plots.ACCENT if right else plots.RED
    box = (left - wide, top - wide, left + side + wide - 1, top + side + wide - 1)
    canvas.rounded_rectangle(box, side // 10 + wide, outline=colour, width=wide)
    r = side // 7
    x, y = left + side - r, top + side - r
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline="white", width=wide // 2)
    arms = [[(-0.5, 0.0), (-0.1, 0.4), (0.5, -0.35)]] if right else []
    arms = arms or [[(-0.4, -0.4), (0.4, 0.4)], [(-0.4, 0.4), (0.4, -0.4)]]
    for arm in arms:
        points = [(x + r * dx, y + r * dy) for dx, dy in arm]
        canvas.line(points, fill="white", width=wide + 4, joint="curve")


if __name__ == "__main__":
    main()
