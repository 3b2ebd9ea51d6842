"""How far a picture stands out for the entities that its caption may mean, beside other pictures.

embeddings/, texts/ -> z_scores/. A direction is looked along, and how far the picture lies along it
is told in standard deviations of the data set's pictures. It is the sum of two:

    text      that of the entity's text
    pictures  u = (C + eI)^-1 P: the linear discriminant between pictures at large, of mean m and
              covariance C, and the OTHER pictures whose caption mentions the entity, P being the
              sum of their x - m. Each counts 1 standard deviation, this one times prototype_weight
              and n / (n + 1) for n others

Cosines alone are no common scale: an entity named in every caption is close to every picture, and
a weak CLIP model spreads the levels of entities further apart than right and wrong pictures of one.
m and C give mean and spread of the products with ANY direction u in closed form (m.u and
sqrt(u'Cu)), so that no picture-by-entity matrix is ever made. Nor is a sum that leaves a picture
out: without the picture x of weight a u is Q - ag for Q = (C + eI)^-1 P and g = (C + eI)^-1 x, so
that with Q'CQ and Q'Ct of each entity and g and Cg of each picture a candidate costs a few products
of vectors.

    moments/     moments.npy float64 [1 + d, 1 + d]: the sum of (x, 1)(x, 1)' over all pictures,
                 those that look the same once
    prototypes/  NNNNN.npy float32 [block, d], the Q of a block of the entities; NNNNN-measures.npy
                 float64 [4, block]: sum of weights, t'Ct of the text t, Q'CQ and Q'Ct
    z_scores/    NNNNN.parquet key, entities, scores (cosines), z_scores (both rounded to 1e-4); of
                 the rows of embeddings/

Sums are made of runs of shards (moment_parts/, prototype_parts/) and then of these, in an order
that depends on the number of shards alone.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Float64, Int

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.selection import twins
from data_prep.selection.embed import DECIMALS

# Pictures' worth of doubt in a prototype: with n others, it counts n / (n + 1).
PROTOTYPE_DOUBT = 1.0

# e of the mean variance. Right against wrong captions, area under the curve: photos 0.71 without
# discriminants, 0.775 to 0.745 for 0.01 to 1; the sample 0.81, 0.86 to 0.85.
RIDGE = 0.03

CHUNK = 4096  # (picture, entity) pairs at a time: 4096 x 1024 float64 are 32 MB


def run(
    work: engine.Engine, shards: Sequence[str], same: Sequence[epath.Path], prototype_weight: float
) -> list[str]:
    """Runs the stages moments, prototypes and z_scores.

    No model is run and no picture is read. In memory are a few thousand candidates at a time and a
    number for each entity; vectors are mapped from disk.

    Args:
      work: the engine; its work directory holds links/, embeddings/, candidates/ and texts/.
      shards: those of embeddings/.
      same: of each the file of twins/.
      prototype_weight: of an entity's other pictures, beside its text.

    Returns:
      The names of the shards of z_scores/.
    """
    workdir = work.workdir
    links, keys, embeddings = (
        [workdir / folder / f"{shard}{end}" for shard in shards]
        for folder, end in (
            ("links", ".parquet"),
            ("embeddings", ".parquet"),
            ("embeddings", ".npy"),
        )
    )
    candidates = workdir / "candidates/entities.parquet"
    texts = engine.listed(workdir / "texts", ".npy")
    tasks = engine.run_tasks(keys, same, embeddings)
    parts = work.map_shards("moment_parts", _sum_moments, tasks, {"version": 2}, keys=None)
    task = engine.Task("all", _paths(work, parts))
    work.map_shards("moments", _add_moments, [task], {}, keys=None)
    moments = workdir / "moments/moments.npy"

    tasks = [
        engine.Task(task.name, (candidates, moments, *task.inputs))
        for task in engine.run_tasks(links, keys, same, embeddings)
    ]
    parts = work.map_shards("prototype_parts", _sum_pictures, tasks, {"version": 2}, keys=None)
    parts = _paths(work, parts)
    tasks = [engine.Task(path.stem, (path, moments, *parts)) for path in texts]
    lengths = [len(np.load(path, mmap_mode="r")) for path in texts]
    settings = {"version": 3, "starts": np.cumsum([0, *lengths]).tolist()}
    blocks = work.map_shards("prototypes", _add_pictures, tasks, settings, keys=None)

    blocks = (*texts, *_paths(work, blocks))
    tasks = [
        engine.Task(shard, (*own, candidates, moments, *blocks))
        for shard, *own in zip(shards, links, keys, embeddings, strict=True)
    ]
    settings = {"version": 4, "prototype_weight": prototype_weight}
    return [m["shard"] for m in work.map_shards("z_scores", _measure, tasks, settings)]


def _paths(work: engine.Engine, manifests: Sequence[dict]) -> tuple[str, ...]:
    """The outputs, by kind and then by shard."""
    outputs = [[os.fspath(work.workdir / o["path"]) for o in m["outputs"]] for m in manifests]
    return tuple(path for kind in zip(*outputs, strict=True) for path in kind)


class _Pairs(typing.NamedTuple):
    """Candidates by position: row of embeddings/, place among all candidates, and the prior."""

    row: np.ndarray  # int64 [p], ascending
    column: np.ndarray  # int64 [p]
    prior: np.ndarray  # float32 [p]


def _pairs(links_path: str, keys_path: str, entities: np.ndarray) -> _Pairs:
    """The candidates of a shard in the order of embeddings/, which lack undecodable pictures."""
    links = link_rows.read(links_path)
    known = link_rows.distinct(links)
    position = link_rows.positions(links.keys, link_rows.read_column(keys_path, "key"))
    row = position[known.row]
    known_row = row >= 0
    order = np.argsort(entities)
    column = order[np.searchsorted(entities, known.entity[known_row], sorter=order)]
    return _Pairs(row[known_row], column, known.prior[known_row])


def read_entities(candidates_path: str) -> np.ndarray:
    """int32 [c]: the entities of all candidates, in the order of texts/ and prototypes/."""
    return link_rows.read_column(candidates_path, "entity").to_numpy()


def _chunks(pairs: _Pairs) -> Iterator[_Pairs]:
    for start in range(0, len(pairs.row), CHUNK):
        yield _Pairs(*(values[start : start + CHUNK] for values in pairs))


class Blocks:
    """The rows of a matrix in files, mapped."""

    def __init__(self, paths: Sequence[str]):
        self._blocks = [np.load(path, mmap_mode="r") for path in paths]
        self._starts = np.cumsum([0, *map(len, self._blocks)])
        self.width = max((block.shape[1] for block in self._blocks), default=0)  # without rows: 0

    def bounds(self, number: int) -> tuple[int, int]:
        """The rows of a block: from, to."""
        return int(self._starts[number]), int(self._starts[number + 1])

    def __getitem__(self, rows: Int[np.ndarray, " p"]) -> Float[np.ndarray, "p d"]:
        found = np.empty((len(rows), self.width), self._blocks[0].dtype)
        block = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(block):
            of = np.flatnonzero(block == number)
            found[of] = self._blocks[number][rows[of] - self._starts[number]]
        return found


# ----------------------------------------------------------------- what pictures are like at large


def _sum_moments(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    pictures, total = 0, np.zeros((1, 1))
    for keys_path, same, path in zip(*np.split(np.array(task.inputs), 3), strict=True):
        keys, x = link_rows.read_column(keys_path, "key"), np.load(path, mmap_mode="r")
        rows = np.arange(len(x))
        rows = rows[~twins.among(keys, rows, twins.PICTURE, same)]
        pictures += len(rows)
        for start in range(0, len(rows), CHUNK):
            chunk = x[rows[start : start + CHUNK]].astype(np.float64)
            chunk = np.pad(chunk, ((0, 0), (0, 1)))
            chunk[:, -1] = 1
            total = total + chunk.T @ chunk
    np.save(outputs.path(f"moment_parts/{task.name}.npy"), total)
    return {"pictures": pictures}


def _add_moments(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    total = np.zeros((1, 1))
    for path in task.inputs:
        part = np.load(path)
        # Shards without a picture have no width.
        total = total + part if part.shape[0] > 1 else total
    np.save(outputs.path("moments/moments.npy"), total)
    return {"pictures": int(total[-1, -1])}


def mean_and_covariance(
    moments_path: str, width: int = 0
) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
    moments = np.load(moments_path)
    if len(moments) == 1:  # no picture
        moments = np.zeros((1 + width, 1 + width))
    moments /= max(moments[-1, -1], 1)
    mean = moments[-1, :-1]
    return mean, moments[:-1, :-1] - np.outer(mean, mean)


def ridged(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """C + eI."""
    dimensions = max(len(covariance), 1)
    ridge = RIDGE * np.trace(covariance) / dimensions
    return covariance + max(ridge, 1e-12) * np.eye(len(covariance))


def _sum_pictures(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Of each entity of a run of shards the sum of the pictures that mention it."""
    candidates_path, moments_path, *shards = task.inputs
    entities, count = read_entities(candidates_path), len(shards) // 4
    mean, _ = mean_and_covariance(moments_path)
    found = []
    for number in range(count):
        links_path, keys_path, same = shards[number : 3 * count : count]
        pairs = _pairs(links_path, keys_path, entities)
        keys = link_rows.read_column(keys_path, "key")
        new = ~twins.among(keys, pairs.row, entities[pairs.column], same)
        found.append(_Pairs(*(values[new] for values in pairs)))
    columns = np.unique(np.concatenate([pairs.column for pairs in found]))
    np.save(outputs.path(f"prototype_parts/{task.name}-columns.npy"), columns)
    path = outputs.path(f"prototype_parts/{task.name}-sums.npy")
    sums = zeros(path, (len(columns), len(mean)), np.float32)
    weights = np.zeros(len(columns))
    for pairs, path in zip(found, shards[3 * count :], strict=True):
        x = np.load(path, mmap_mode="r")
        for row, column, prior in _chunks(pairs):
            place = np.searchsorted(columns, column)
            add_by(sums, place, prior[:, None] * (x[row] - mean.astype(np.float32)))
            add_by(weights, place, prior.astype(np.float64))
    if isinstance(sums, np.memmap):
        sums.flush()
    np.save(outputs.path(f"prototype_parts/{task.name}-weights.npy"), weights)
    return {"entities": len(columns)}


def zeros(path: epath.Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that lies in a file: it may be larger than the memory."""
    if 0 in shape:  # nothing cannot be mapped
        np.save(path, array := np.zeros(shape, dtype))
        return array
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


def _add_pictures(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """The sums of a block of the entities over all runs, and how far pictures spread along them."""
    texts_path, moments_path, *parts = task.inputs
    texts = np.load(texts_path)
    _, covariance = mean_and_covariance(moments_path, texts.shape[1])
    first = settings["starts"][int(task.name)]
    prototypes, measures = np.zeros(texts.shape, np.float32), np.zeros((4, len(texts)))
    runs = len(parts) // 3
    for own in (parts[i::runs] for i in range(runs)):
        columns, sums, weights = (np.load(path, mmap_mode="r") for path in own)
        begin, end = np.searchsorted(columns, (first, first + len(texts)))
        if begin == end:  # where there is no picture or no text, there is no width either
            continue
        place = columns[begin:end] - first
        measures[0, place] += weights[begin:end]
        prototypes[place] += sums[begin:end]
    inverse = np.linalg.inv(ridged(covariance))
    for start in range(0, len(texts), CHUNK):
        of = slice(start, start + CHUNK)
        text = texts[of].astype(np.float64)
        prototypes[of] = prototypes[of] @ inverse
        u = prototypes[of].astype(np.float64)
        measures[1:, of] = [_dots(x @ covariance, y) for x, y in ((text, text), (u, u), (u, text))]
    np.save(outputs.path(f"prototypes/{task.name}.npy"), prototypes)
    np.save(outputs.path(f"prototypes/{task.name}-measures.npy"), measures)
    return {"entities": len(texts)}


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


# ------------------------------------------------------------------------------------- the z-scores


def _measure(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    links_path, keys_path, embeddings_path, candidates_path, moments_path, *blocks = task.inputs
    count = len(blocks) // 3
    texts, prototypes = (Blocks(blocks[i * count : (i + 1) * count]) for i in range(2))
    measures = [np.load(path) for path in blocks[2 * count :]]
    support, text_spread, spread, shared = np.concatenate(measures or [np.zeros((4, 0))], axis=1)
    entities = read_entities(candidates_path)
    pairs = _pairs(links_path, keys_path, entities)
    mean, covariance = mean_and_covariance(moments_path)
    inverse = np.linalg.inv(ridged(covariance))
    embeddings = np.load(embeddings_path, mmap_mode="r")
    columns = {name: [np.zeros(0, np.float32)] for name in ("scores", "z_scores")}
    for row, column, prior in _chunks(pairs):
        pictures = embeddings[row[0] : row[-1] + 1].astype(np.float32)
        row, prior = row - row[0], prior.astype(np.float64)
        text = texts[column].astype(np.float32)
        columns["scores"].append(_dots(pictures[row], text))

        centred = pictures - mean
        x, own = centred[row], (centred @ inverse)
        projected = own @ covariance
        prototype = prototypes[column].astype(np.float64)
        along = _dots(x, prototype) - prior * _dots(centred, own)[row]
        across = prior * _dots(projected, own)[row] - 2 * _dots(projected[row], prototype)
        across = spread[column] + prior * across
        others = np.maximum(support[column] - prior, 0)
        weight = settings["prototype_weight"] * others / (others + PROTOTYPE_DOUBT)
        both = shared[column] - prior * _dots(projected[row], text)
        columns["z_scores"].append(
            added(
                deviations(_dots(x, text), text_spread[column]),
                deviations(along, across),
                np.where(across > 1e-12, weight, 0),
                deviations(deviations(both, across), text_spread[column]),
            )
        )
    keys = link_rows.read_column(keys_path, "key")
    starts = np.searchsorted(pairs.row, np.arange(len(keys) + 1))
    table = {"key": keys, "entities": link_rows.lists(entities[pairs.column], starts)}
    for name, parts in columns.items():
        rounded = np.round(np.concatenate(parts), DECIMALS).astype(np.float32)
        table[name] = link_rows.lists(rounded, starts)
    outputs.write_table(f"z_scores/{task.name}.parquet", pa.table(table))
    return {"pictures": len(keys), "candidates": len(pairs.row)}


def added(
    text: Float[np.ndarray, " p"],
    picture: Float[np.ndarray, " p"],
    weight: Float[np.ndarray, " p"],
    correlation: Float[np.ndarray, " p"],
) -> Float[np.ndarray, " p"]:
    """text + weight * picture, in standard deviations of the sum; both are in their own."""
    variance = 1 + weight**2 + 2 * weight * np.clip(correlation, -1, 1)
    return (text + weight * picture) / np.sqrt(np.maximum(variance, 1e-6))


def _dots(
    left: Float[np.ndarray, "p d"], right: Float[np.ndarray, "p d"]
) -> Float[np.ndarray, " p"]:
    return np.einsum("pd,pd->p", left, right)


def deviations(
    along: Float[np.ndarray, " p"], spread: Float[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """How far each picture lies along a direction, in standard deviations of all pictures.

    Args:
      along: products of the direction, of any length, with the centred picture.
      spread: u'Cu of the direction u and the covariance C; about 0 where there is none gives 0.
    """
    return np.where(spread > 1e-12, along / np.sqrt(np.maximum(spread, 1e-12)), 0.0)
