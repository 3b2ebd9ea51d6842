"""Finds pictures by pictures and by words, in what `mofi embed` has written.

    mofi search --embeddings E --text "a red car" "a boat" --out found.html
    mofi search --embeddings E --image my.jpg --k 48 --out found.html

PAGE is one HTML file with the pictures in it; keys and cosines are printed too.  The model is the
one that made E.  The first search of a large collection makes its index, E/index.npy, in seconds.
"""

import base64
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import page
from mofi_jax.data import ops
from mofi_jax.data.pictures import containers
from mofi_jax.inference import embeddings as embeddings_lib
from mofi_jax.inference.index import Index

_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html.j2")
_THUMBNAIL = 240  # pixels, more than are shown: screens have several for each
_MOST = 1000  # pictures on a page for each query


class Found(NamedTuple):
    row: int
    cosine: float
    key: str
    names: str  # of its entities, if there are any


class Query(NamedTuple):
    """A query and what is nearest to it, best first."""

    words: str  # the text, or the picture's path
    thumbnail: str | None  # JPEG in base64; None for a text
    found: list[Found]


def main(
    embeddings: str,
    out: str,
    image: Sequence[str] = (),
    text: Sequence[str] = (),
    k: str = "24",
    model: str = "",
    step: str = "",
    images: str = "",
    exact: bool = False,
) -> None:
    """Searches the folder `embeddings` and writes the page `out`.

    Args:
      embeddings: what `mofi embed` has written.
      out: the page, .html.
      image: picture files to search by, one or more.
      text: words to search by, in quotes, one or more.
      k: how many pictures to find for each.
      model: where the model lies now, if it was moved.
      step: of a training run, the step that made the embeddings, if it is not as it was then.
      images: where the pictures lie now, if they were moved.
      exact: compares every vector, ten times slower than the index.
    """
    number = cli.whole("--k", k, 1)
    if number > _MOST:
        raise BadInput(f"--k={k} is more than a page shows: ask for {_MOST} or fewer.")
    if not image and not text:
        raise BadInput("There is nothing to search by: write --image FILE or --text WORDS.")
    target = files.output_file(out, "--out")
    index = Index.open(files.local_input(embeddings, "the embeddings"), images=images)
    made_by = embeddings_lib.read_result(embeddings)
    model, step = model or made_by.get("model", ""), step or made_by.get("step", "")
    if not model:
        raise BadInput(f"{embeddings} does not say which model made it: name it in --model.")
    pictures = [_read(path) for path in image]
    loaded = inference.load(model, step=step, batch_size=len(image) + 1)
    vectors = _embed(loaded, index, [data for data, _ in pictures], text, str(embeddings))
    rows, cosines = index.search(vectors, number, exact=exact)

    # ------------------------------------------------------------------------------------ results
    queries = []
    shown = [*[small for _, small in pictures], *[None] * len(text)]
    for i, (words, small) in enumerate(zip([*image, *text], shown, strict=True)):
        near = zip(rows[i].tolist(), cosines[i].tolist(), strict=True)
        queries.append(Query(words, small, [_found(index, *of) for of in near]))
    values = {
        "queries": queries,
        "thumbnails": {int(row): _thumbnail_of(index, int(row)) for row in np.unique(rows)},
        "pictures": len(index),
        "images": images or made_by.get("images", ""),
        "model": loaded.description,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, page.fill(_TEMPLATE, values))
    for query in queries:
        print(cli.printable(query.words))
        for place, of in enumerate(query.found, 1):
            print(cli.printable(f"{place:5d}  {of.cosine:6.3f}  {of.key}  {of.names}".rstrip()))
    print(f"written: {target}")


def _read(path: str) -> tuple[bytes, str]:
    """A picture file, and its thumbnail."""
    try:
        data = epath.Path(path).read_bytes()
        return data, thumbnail(data)
    except (OSError, ops.UndecodableImage) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--image={path} cannot be read ({reason}): name a picture file.") from error


def _embed(
    loaded: inference.Model,
    index: Index,
    pictures: Sequence[bytes],
    texts: Sequence[str],
    embeddings: str,
) -> np.ndarray:
    """Embeddings of pictures, then texts; BadInput where the model is not the index's."""
    try:
        known = [index.picture(0)] if len(index) else []
    except (containers.Unreadable, OSError):
        known = []
        logging.warning("the pictures are not where they were: name their place in --images")
    parts = []
    if pictures or known:
        found = loaded.embed_images([*pictures, *known])
        if found.shape[1] != index.vectors.shape[1] or (known and not index.made_by(found[-1])):
            raise BadInput(
                f"{loaded.description} is not the model that made {embeddings}: name that one in "
                "--model, or embed the pictures again."
            )
        parts.append(found[: len(pictures)])
    if texts:
        parts.append(loaded.embed_texts(list(texts)))
    return np.concatenate(parts)


def _found(index: Index, row: int, cosine: float) -> Found:
    of = index.describe(row)
    names = ", ".join(entity["name"] for entity in of.get("entities") or ())
    return Found(row, cosine, of["key"], names)


def _thumbnail_of(index: Index, row: int) -> str:
    """As `thumbnail`; "" where the picture is gone: what was found stands without it."""
    try:
        return thumbnail(index.picture(row))
    except (containers.Unreadable, ops.UndecodableImage, OSError):
        return ""


def thumbnail(data: bytes) -> str:
    """The middle of a picture, which is what models look at, as JPEG in base64."""
    rgb = ops.decode_rgb(data)
    size = min(_THUMBNAIL, *rgb.shape[:2])
    square = ops.apply(f"resize_short({size})|center_crop({size})", rgb)
    return base64.b64encode(ops.encode_jpeg(square, 85)).decode()


if __name__ == "__main__":
    cli.run(main)
