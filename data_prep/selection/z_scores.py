"""Fits: how well pictures fit the entities that their captions may mean, beside other pictures.

scores/ -> fits/. Three things are measured, in standard deviations above the data set's pictures:

    text fit      how much closer the picture is to the entity's text than pictures in general are
    picture fit   the same with the mean of the OTHER pictures whose caption mentions the entity in
                  place of the text, shrunk towards 0 where there are few of them
    coherence     of an entity: the mean picture fit of all pictures whose caption mentions it. High
                  for what pictures show (a tram), near 0 for what captions merely say (time, free)

Cosines alone are no common scale: an entity named in every caption is close to every picture, and
a weak CLIP model spreads the levels of entities further apart than right and wrong pictures of one.
Mean m and covariance C of all embeddings give mean and spread of the products with ANY direction u
in closed form (m.u and sqrt(u'Cu)), so that no picture-by-entity matrix is ever made.

    background/  moments.npy float64 [1 + d, d] (mean, covariance), prototypes.npy float32 [n, d],
                 support.npy float32 [n]; n as in texts/
    fits/        NNNNN.parquet key, entities, text_fits, picture_fits
    coherence/   entities.parquet entity, support, coherence
"""

from __future__ import annotations

import typing
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.selection.embed import CHUNK, DECIMALS

# Pictures' worth of doubt in a prototype: with n others, the picture fit counts n / (n + 1).
PROTOTYPE_DOUBT = 1.0


def run(work: engine.Engine) -> None:
    """Runs the stages background, fits and coherence on links/, texts/ and scores/ of `work`.

    No model is run and no picture is read. In memory are one shard and, of all entities that are a
    candidate somewhere, mapped from disk, a float32 vector each.
    """
    workdir = work.workdir
    links = engine.listed(workdir / "links")
    scores = [workdir / "scores" / path.name for path in links]
    embeddings = [path.with_suffix(".npy") for path in scores]
    entities, texts = (workdir / "texts" / f"{n}.npy" for n in ("entities", "embeddings"))
    task = engine.Task("all", (entities, *links, *scores, *embeddings))
    work.map_shards("background", _measure, [task], {"shards": len(links)}, here=True)

    moments, prototypes, support = (
        workdir / "background" / f"{name}.npy" for name in ("moments", "prototypes", "support")
    )
    tasks = [
        engine.Task(path.stem, (path, *own, entities, texts, moments, prototypes, support))
        for path, *own in zip(links, scores, embeddings, strict=True)
    ]
    work.map_shards("fits", _fit, tasks, {})

    fits = [workdir / "fits" / path.name for path in links]
    task = engine.Task("all", (entities, support, *links, *fits))
    work.map_shards("coherence", _cohere, [task], {"shards": len(links)}, here=True)


class _Pairs(typing.NamedTuple):
    """Candidates by position: row of scores/, column of texts/entities.npy, and the prior."""

    row: np.ndarray  # int64 [p], ascending
    column: np.ndarray  # int64 [p]
    prior: np.ndarray  # float32 [p]


def _pairs(links_path: str, scores_path: str, entities: np.ndarray) -> _Pairs:
    """The candidates of a shard in the order of its scores/, which lack undecodable pictures."""
    links = link_rows.read(links_path)
    known = link_rows.distinct(links)
    position = link_rows.positions(links.keys, link_rows.read_column(scores_path, "key"))
    row = position[known.row]
    scored = row >= 0
    column = np.searchsorted(entities, known.entity[scored])
    return _Pairs(row[scored], column, known.prior[scored])


def _load_embeddings(path: str, width: int) -> Float[np.ndarray, "n d"]:
    """float32 [rows, width], also of a shard without pictures."""
    embeddings = np.load(path).astype(np.float32)
    return embeddings.reshape(len(embeddings), width)


def _chunks(pairs: _Pairs) -> Iterator[_Pairs]:
    for start in range(0, len(pairs.row), CHUNK):
        yield _Pairs(*(values[start : start + CHUNK] for values in pairs))


# ----------------------------------------------------------------- what pictures are like at large


def _measure(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Mean and covariance of all embeddings; per entity the sum of the pictures that mention it."""
    entities = np.load(task.inputs[0])
    shards = settings["shards"]
    links, scores, embeddings = (
        task.inputs[1 + i * shards : 1 + (i + 1) * shards] for i in range(3)
    )
    width = max((np.load(path, mmap_mode="r").shape[1] for path in embeddings), default=0)
    count, total, squares = 0, np.zeros(width), np.zeros((width, width))
    for path in embeddings:
        x = _load_embeddings(path, width)
        count += len(x)
        for start in range(0, len(x), CHUNK):
            chunk = x[start : start + CHUNK].astype(np.float64)
            total += chunk.sum(0)
            squares += chunk.T @ chunk
    mean = total / max(count, 1)
    covariance = squares / max(count, 1) - np.outer(mean, mean)
    with open(outputs.path("background/moments.npy"), "wb") as file:
        np.save(file, np.concatenate([mean[None], covariance]))

    shape = (len(entities), width)
    prototypes = _zeros(outputs.path("background/prototypes.npy"), shape, np.float32)
    support = _zeros(outputs.path("background/support.npy"), shape[:1], np.float32)
    for links_path, scores_path, path in zip(links, scores, embeddings, strict=True):
        pairs = _pairs(links_path, scores_path, entities)
        x = _load_embeddings(path, width) - mean.astype(np.float32)
        add_by(support, pairs.column, pairs.prior)
        for chunk in _chunks(pairs):
            add_by(prototypes, chunk.column, chunk.prior[:, None] * x[chunk.row])
    for array in (prototypes, support):
        if isinstance(array, np.memmap):
            array.flush()
    return {"pictures": count, "entities": len(entities)}


def _zeros(path: epath.Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that lies in a file: it may be larger than the memory."""
    if 0 in shape:  # nothing cannot be mapped
        array = np.zeros(shape, dtype)
        with open(path, "wb") as file:
            np.save(file, array)
        return array
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


def add_by(
    total: Float[np.ndarray, "n ..."],
    columns: Int[np.ndarray, " p"],
    values: Float[np.ndarray, "p ..."],
) -> None:
    """total[columns[i]] += values[i] for all i, equal columns in the order of i."""
    if not len(columns):
        return
    order = np.argsort(columns, kind="stable")
    ordered = columns[order]
    first = np.flatnonzero(link_rows.starts_run(ordered))
    total[ordered[first]] += np.add.reduceat(values[order], first, axis=0)


# ----------------------------------------------------------------------------------------- the fits


def _fit(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:

    links_path, scores_path, embeddings_path, *rest = task.inputs
    entities, texts, moments, prototypes, support = (np.load(path, mmap_mode="r") for path in rest)
    pairs = _pairs(links_path, scores_path, entities)
    mean, covariance = moments[0].astype(np.float32), moments[1:].astype(np.float32)
    x = _load_embeddings(embeddings_path, len(mean)) - mean
    text_fits, picture_fits = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for row, column, prior in _chunks(pairs):
        own = prior[:, None] * x[row]
        others = np.maximum(support[column] - prior, 0)
        picture_fit = deviations(x[row], prototypes[column] - own, covariance)
        text_fits.append(deviations(x[row], texts[column].astype(np.float32), covariance))
        picture_fits.append(picture_fit * others / (others + PROTOTYPE_DOUBT))
    table = engine.read_table(scores_path, columns=["key", "entities"])
    starts = np.searchsorted(pairs.row, np.arange(len(table) + 1))
    for name, values in (("text_fits", text_fits), ("picture_fits", picture_fits)):
        rounded = np.round(np.concatenate(values), DECIMALS).astype(np.float32)
        table = table.append_column(name, link_rows.lists(rounded, starts))
    outputs.write_table(f"fits/{task.name}.parquet", table)
    return {"pictures": len(table), "candidates": len(pairs.row)}


def _cohere(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    entities, support = (np.load(path) for path in task.inputs[:2])
    links, fits = task.inputs[2 : 2 + settings["shards"]], task.inputs[2 + settings["shards"] :]
    total = np.zeros(len(entities))
    for links_path, fits_path in zip(links, fits, strict=True):
        pairs = _pairs(links_path, fits_path, entities)
        fit = link_rows.read_column(fits_path, "picture_fits").flatten()
        fit = fit.to_numpy(zero_copy_only=False).astype(np.float64)
        add_by(total, pairs.column, pairs.prior * fit)
    coherence = np.round(total / np.maximum(support, 1e-6), DECIMALS).astype(np.float32)
    table = {"entity": entities, "support": support, "coherence": coherence}
    outputs.write_table("coherence/entities.parquet", pa.table(table))
    return {"entities": len(entities)}


def deviations(
    centred: Float[np.ndarray, "p d"],
    directions: Float[np.ndarray, "p d"],
    covariance: Float[np.ndarray, "d d"],
) -> Float[np.ndarray, " p"]:
    """How far each picture lies along its direction, in standard deviations of all pictures.

    Args:
      centred: embeddings minus the mean of all embeddings.
      directions: of any length; a zero direction gives 0.
      covariance: of all embeddings.
    """
    along = np.einsum("pd,pd->p", centred, directions)
    variance = np.einsum("pd,pd->p", directions @ covariance, directions)
    return np.where(variance > 1e-12, along / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
