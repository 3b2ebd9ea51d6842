"""Pictures whose CLIP embedding lies as near one of an evaluation set's as a copy's would.

How near that is, depends on the model: the cosines of a weak one are all close to 1. So it is
measured, for each set. Of innocent pictures the distance to the nearest of many others is, in
whatever space, Weibull distributed near its lower end (the extreme value distribution of what is
bounded below); two quantiles of all pictures' distances give its scale and shape, and these the
distance below which only the share `eval_false_positives` of innocent pictures lies. Copies do not
change the quantiles while they are few, and those that hashes find are left out.

So the share of innocent pictures that are lost is known beforehand; that of copies that are found
is not: a model that puts a cropped picture no nearer to its original than other pictures are does
not find it, at whatever limit.

    eval_nearest/   NNNNN.parquet  key, set, distance (1 - cosine), position (of the nearest picture
                                   among all evaluation pictures), of all embedded pictures
    eval_spread/    NNNNN.parquet  set, bin (of the logarithm of the distance), pictures
    eval_limits/    limits.parquet set, pictures, limit (null: too few to tell)
    eval_cosines/   NNNNN.parquet  key, set, layer, distance, name: those within the limit
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from data_prep import engine

LAYER = "cosine"

# Pictures and evaluation pictures at a time: 64 MB of cosines.
_BLOCK, _EVAL_BLOCK = 1024, 16384
_DECIMALS = 6  # of distances; the last bits depend on hardware
_BIN = 0.01  # of the logarithm of distances, whose quantiles are as exact
_QUANTILES = (0.05, 0.5)  # the fit stands on these, and extrapolates from the lower one
MOST_FALSE_POSITIVES = 0.01
_LEAST = 100  # pictures, of fewer nothing can be said about one in a thousand

_SPREAD = f"""
    SELECT "set", floor(ln(greatest(distance, 1e-6)) / {_BIN})::BIGINT AS bin, count(*) AS pictures
    FROM read_parquet($nearest) GROUP BY "set", bin ORDER BY "set", bin
"""


def run(
    work: engine.Engine,
    shards: Sequence[str],
    hashes: Sequence[epath.Path],
    embeddings: Sequence[epath.Path],
    false_positives: float,
) -> None:
    """Writes eval_cosines/, and the stages before it.

    Args:
      work: the engine; its work directory holds embeddings/ and eval_matches/.
      shards: names of the shards to look at.
      hashes, embeddings: eval_hashes/ and eval_embeddings/.
      false_positives: of the pictures that are no copies, the share that may be taken for some, for
        each set.
    """
    workdir = work.workdir
    tasks = []
    for shard in shards:
        keys = workdir / f"embeddings/{shard}.parquet"
        own = (keys, keys.with_suffix(".npy"), workdir / f"eval_matches/{shard}.parquet")
        tasks.append(engine.Task(shard, (*own, *hashes, *embeddings)))
    found = work.map_shards("eval_nearest", _find_nearest, tasks, {}, accelerator=True)
    nearest = [workdir / output["path"] for manifest in found for output in manifest["outputs"]]
    parts = work.partial("eval_spread", _SPREAD, {"nearest": nearest})
    task = engine.Task("limits", parts)
    settings = {"false_positives": false_positives}
    work.map_shards("eval_limits", _set_limits, [task], settings, keys=None)
    limits = workdir / "eval_limits/limits.parquet"
    for row in engine.read_table(limits).to_pylist():
        if row["limit"] is None:
            logging.warning(
                "config.filters.eval_sets.%s: %d pictures are too few or too much alike to tell"
                " copies by their cosines; hashes alone find them",
                *(row["set"], row["pictures"]),
            )
        else:
            logging.info("%s: a cosine above %.6f is a copy", row["set"], 1 - row["limit"])
    tasks = [engine.Task(path.stem, (path, limits, *hashes)) for path in nearest]
    work.map_shards("eval_cosines", _pick, tasks, {"version": 2})


# ---------------------------------------------------------------------------------------- distances


def _find_nearest(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """What eval_matches/ knows of a key and a set already is left out."""
    import pyarrow as pa

    keys_path, embeddings_path, matches_path, *paths = task.inputs
    keys = engine.read_table(keys_path, ["key"])["key"]
    sets, _ = _sets(paths[: len(paths) // 2])
    pictures = np.load(embeddings_path)
    distance = np.full((len(sets), len(pictures)), np.inf)
    position = np.zeros(distance.shape, np.int64)
    for start in range(0, len(pictures), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(pictures)))
        block = _padded(pictures[rows], _BLOCK)
        for number, first, evaluation in _eval_blocks(paths):
            found, column = (np.asarray(x) for x in _nearest()(block, evaluation))
            found = np.round(found[: rows.stop - start].astype(np.float64), _DECIMALS)
            nearer = np.flatnonzero(found < distance[number, rows])
            distance[number, start + nearer] = found[nearer]
            position[number, start + nearer] = first + column[nearer]
    matches = engine.read_table(matches_path, ["key", "set"]).to_pylist()
    known = {(match["key"], match["set"]) for match in matches}
    listed = keys.to_pylist()
    unknown = [
        (row, number)
        for row, key in enumerate(listed)
        for number, name in enumerate(sets)
        if np.isfinite(distance[number, row]) and (key, name) not in known
    ]
    row, number = np.array(unknown, np.int64).reshape(-1, 2).T
    table = {
        "key": keys.take(pa.array(row)),
        "set": pa.array([sets[i] for i in number], pa.string()),
        "distance": distance[number, row],
        "position": position[number, row],
    }
    outputs.write_table(f"eval_nearest/{task.name}.parquet", pa.table(table))
    return {"pictures": len(keys)}


def _sets(hashes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The names of the sets, sorted, and the place among them of each evaluation picture."""
    names = np.concatenate([engine.read_table(path, ["set"])["set"] for path in hashes])
    sets, place = np.unique(names.astype(str), return_inverse=True)
    return sets.tolist(), place


@engine.kept
def _eval_blocks(paths: Sequence[str]) -> list:
    """(the set's place, position of its first row, block on the device); of one set each.

    Args:
      paths: all of eval_hashes/, then as many of eval_embeddings/.
    """
    import jax

    half = len(paths) // 2
    _, set_of = _sets(paths[:half])
    blocks, position = [], 0
    for path in paths[half:]:
        rows = np.load(path, mmap_mode="r")
        # Of no width where no picture could be decoded.
        for start in range(0, len(rows) if rows.shape[1] else 0, _EVAL_BLOCK):
            part = rows[start : start + _EVAL_BLOCK]
            # Few shapes, so that few are compiled; zeros are near nothing.
            size = min(_EVAL_BLOCK, 1 << max(5, (len(part) - 1).bit_length()))
            first = position + start
            blocks.append((set_of[first], first, jax.device_put(_padded(part, size))))
        position += len(rows)
    return blocks


@functools.cache
def _nearest():
    import jax
    import jax.numpy as jnp

    @jax.jit
    def nearest(pictures, evaluation):
        """Smallest distance float32 [b] and its row int32 [b], of float16 [b d] and [m d]."""
        # float16 keeps the direction well, the length to 3 digits only. Rows of zeros stay so.
        pictures, evaluation = (
            rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
            for rows in (pictures.astype(jnp.float32), evaluation.astype(jnp.float32))
        )
        # Full precision: what is a duplicate may not depend on the hardware.
        row = jnp.matmul(pictures, evaluation.T, precision="highest").argmax(1)
        # Half the square of the difference is 1 - cosine, with all digits where it is small.
        return jnp.square(pictures - evaluation[row]).sum(1) / 2, row

    return nearest


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


# ------------------------------------------------------------------------------------------- limits


def _set_limits(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    table = pa.concat_tables([engine.read_table(path) for path in task.inputs])
    names, bins, counts = (table[name].to_numpy() for name in ("set", "bin", "pictures"))
    rows = []
    for name in np.unique(names.astype(str)):
        own = names == name
        limit = fit_limit(bins[own], counts[own], settings["false_positives"])
        rows.append((name, int(counts[own].sum()), limit))
    schema = pa.schema({"set": pa.string(), "pictures": pa.int64(), "limit": pa.float64()})
    columns = list(zip(*rows, strict=True)) or [()] * 3
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)
    outputs.write_table("eval_limits/limits.parquet", table)
    return {"sets": len(rows)}


def fit_limit(
    bins: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"], share: float
) -> float | None:
    """The distance below which the share of innocent pictures lies, by a Weibull distribution.

    Its p-quantile x_p has log x_p = log scale + log(-log(1 - p)) / shape.

    Args:
      bins: of the logarithm of distances, in units of `_BIN`.
      counts: how many pictures each bin holds; a bin may come repeatedly.
      share: at most `MOST_FALSE_POSITIVES`.

    Returns:
      None where pictures are too few, or the distances do not differ.
    """
    if counts.sum() < _LEAST:
        return None
    bins, place = np.unique(bins, return_inverse=True)
    reached = np.cumsum(np.bincount(place, counts)) / counts.sum()
    # In the middle of the bin in which a quantile lies.
    low, high = ((bins[np.searchsorted(reached, q)] + 0.5) * _BIN for q in _QUANTILES)
    if high - low <= _BIN:
        return None
    heights = [math.log(-math.log1p(-q)) for q in (*_QUANTILES, share)]
    slope = (high - low) / (heights[1] - heights[0])  # 1 / shape
    return math.exp(low - slope * (heights[0] - heights[2]))


def _pick(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    nearest_path, limits_path, *hashes = task.inputs
    table = engine.read_table(nearest_path)
    limits = engine.read_table(limits_path)
    limit = limits["limit"].take(pc.index_in(table["set"], limits["set"].combine_chunks()))
    table = table.filter(pc.fill_null(pc.less_equal(table["distance"], limit), False))
    names = pa.concat_tables([engine.read_table(path, ["name"]) for path in hashes])
    found = {
        "key": table["key"],
        "set": table["set"],
        "layer": pa.array([LAYER] * len(table), pa.string()),
        "distance": table["distance"].cast(pa.float32()),
        "name": names["name"].take(table["position"]),
    }
    outputs.write_table(f"eval_cosines/{task.name}.parquet", pa.table(found))
    return {"copies": len(table)}
