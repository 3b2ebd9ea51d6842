"""How many pictures an entity has: at most (a sample is kept), and at least. labels/ -> frequent/.

Pictures with the same perceptual hash are one picture here: a placeholder on two hundred pages
makes no class.

    entity_counts/  entities.parquet  entity, image_count, before the cap
    capped/         NNNNN.parquet     key of the pictures over the cap
    frequent/       entities.parquet  entity, image_count of the entities that are classes;
                    rare.parquet      of the others

The cap evens out head and tail as MetaCLIP does (arXiv 2309.16671): a picture is kept with the
probability max over its entities of min(1, cap / images of the entity), by a hash of seed and key,
so that the draw depends neither on shards nor on workers. An entity keeps more than the cap where
it shares pictures with rare ones.

Fewer than `min_images` pictures and an entity is no class. What then goes is
  "label":   the label; the picture stays while it has another. No other entity loses a picture,
             hence once is enough: counting again finds nothing more.
  "picture": the picture with all its labels. Its other entities lose one, so that "one_pass" (MOFI:
             count once, drop) may leave some of them with fewer, and "converge" repeats until all
             that are left have enough.

Labels are counted by runs of shards (STAGE_parts/: entity, phash, each once), then out of core over
all of them, again in each round of "converge" (frequent-2/ and so on). A picture lives while none
of its entities is known to be rare, and only the living count: there are ever more rare entities,
so that the rounds end. What is kept in memory is the labels of a run, and the rare entities.
"""

from __future__ import annotations

import hashlib
import os
import typing
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32, Int64

from data_prep import engine
from data_prep.linking import rows as link_rows

if typing.TYPE_CHECKING:
    import pyarrow as pa


def cap(
    work: engine.Engine,
    shards: Sequence[Sequence[epath.Path]],
    max_images: int,
    seed: int,
) -> list[dict]:
    """Samples the pictures of frequent entities.

    Args:
      work: the engine.
      shards: of each shard the file of labels/, then files of keys that were dropped already.
      max_images: the cap.
      seed: of the draw.

    Returns:
      The manifests of capped/; counts `over_cap`.
    """
    _count_labels(work, "entity_counts", shards, {"entity_counts/entities.parquet": _TOTALS})
    counts = work.workdir / "entity_counts/entities.parquet"
    tasks = [engine.Task(files[0].stem, (counts, *files)) for files in shards]
    settings = {"max_images": max_images, "seed": seed}
    return work.map_shards("capped", _sample, tasks, settings)


def find_frequent(
    work: engine.Engine,
    shards: Sequence[Sequence[epath.Path]],
    min_images: int,
    feedback: str,
    drops: str,
) -> epath.Path:
    """Decides which entities are classes.

    Args:
      work: the engine.
      shards: of each shard the file of labels/, then files of keys that were dropped already.
      min_images: pictures that an entity needs.
      feedback: "one_pass" or "converge".
      drops: what goes with a rare entity, "label" or "picture".

    Returns:
      The file of the entities that are classes: entity, image_count.
    """
    rare: list[epath.Path] = []
    stages: list[str] = []
    while True:
        stages.append(stage := f"frequent-{len(stages) + 1}" if stages else "frequent")
        frequent, new = (f"{stage}/{name}.parquet" for name in ("entities", "rare"))
        queries = {frequent: _FREQUENT.format(is_it=">="), new: _FREQUENT.format(is_it="<")}
        counts = _count_labels(work, stage, shards, queries, {"least": min_images}, rare)
        rare.append(work.workdir / new)
        if feedback == "one_pass" or drops == "label" or not counts[f"{stage}/rare"]:
            break
    for stale in sorted(os.listdir(work.workdir)):  # of a run that took more rounds
        if stale.startswith("frequent-") and stale.removesuffix("_parts") not in stages:
            work.map_shards(stale, _count, [], {})
    return work.workdir / frequent


def _count_labels(
    work: engine.Engine,
    stage: str,
    shards: Sequence[Sequence[epath.Path]],
    queries: Mapping[str, str],
    parameters: Mapping[str, int] | None = None,
    rare: Sequence[epath.Path] = (),
) -> dict[str, int]:
    """Counts the labels of all pictures without a rare entity; `queries` are of the totals."""
    pairs = [work.workdir / "pairs" / files[0].name for files in shards]
    runs = engine.run_tasks(pairs, *zip(*shards, strict=True))
    tasks = [engine.Task(run.name, (*rare, *run.inputs)) for run in runs]
    settings = {"version": 2, "tables": 1 + len(shards[0]), "rare": len(rare)}
    parts = work.map_shards(f"{stage}_parts", _count, tasks, settings, keys=None)
    files = [work.workdir / output["path"] for part in parts for output in part["outputs"]]
    return work.aggregate(stage, queries, {"parts": files}, parameters)["counts"]


_TOTALS = """
    SELECT entity, count(*) AS image_count
    FROM (SELECT DISTINCT entity, phash FROM read_parquet($parts)) GROUP BY entity ORDER BY entity
"""
_NONE = np.zeros(0, np.int32)  # entities
_FREQUENT = f"SELECT * FROM ({_TOTALS}) WHERE image_count {{is_it}} $least ORDER BY entity"


def read_candidates(
    labels: str | epath.Path, *dropped: str | epath.Path, columns: Sequence[str] | None = None
) -> pa.Table:
    """The labelled rows of a shard without those whose key is in one of the tables `dropped`."""
    import pyarrow.compute as pc

    wanted = None if columns is None else list({"reason", *columns, *(["key"] if dropped else [])})
    table = engine.read_table(labels, columns=wanted)
    table = table.filter(pc.is_null(table["reason"]))
    for path in dropped:
        keys = engine.read_table(path, columns=["key"])["key"]
        if len(keys):
            table = table.filter(pc.invert(pc.is_in(table["key"], keys)))
    return table


def labels_of(table: pa.Table) -> tuple[Int32[np.ndarray, " l"], Int64[np.ndarray, " l"]]:
    """All labels of a table in order: entities, and the row that each belongs to."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table["entities"]).to_numpy().astype(np.int64)
    entities = pc.list_flatten(table["entities"]).to_numpy().astype(np.int32)
    return entities, np.repeat(np.arange(len(table)), lengths)


# ------------------------------------------------------------------------------------------- counts


def _count(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Of a run of shards; what has to be remembered of earlier rounds is the rare entities."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rare, tables = task.inputs[: settings["rare"]], task.inputs[settings["rare"] :]
    known = np.concatenate([_NONE, *(engine.read_table(path)["entity"] for path in rare)])
    living, shards = [np.zeros((2, 0), np.int64)], len(tables) // settings["tables"]
    for shard in range(shards):
        pairs_path, *files = tables[shard::shards]
        table = read_candidates(*files, columns=["key", "entities"])
        pairs = engine.read_table(pairs_path, ["key", "phash"]).combine_chunks()
        hashes = pairs["phash"].take(pc.index_in(table["key"], pairs["key"].combine_chunks()))
        entities, row = labels_of(table)
        dead = np.zeros(len(table), bool)
        dead[row[np.isin(entities, known)]] = True
        alive = ~dead[row]
        living.append(np.stack([entities[alive], hashes.to_numpy()[row[alive]]]))
    entity, phash = np.concatenate(living, axis=1)
    order = np.lexsort((phash, entity))
    order = order[link_rows.starts_run(entity[order], phash[order])]
    table = pa.table({"entity": entity[order].astype(np.int32), "phash": phash[order]})
    outputs.write_table(f"{outputs.stage}/{task.name}.parquet", table)
    return {"labels": len(table)}


def _sample(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    counts_path, *shard = task.inputs
    known = engine.read_table(counts_path)
    table = read_candidates(*shard, columns=["key", "entities"])
    entities, row = labels_of(table)
    position = np.searchsorted(known["entity"].to_numpy(), entities)
    rarest = np.full(len(table), np.iinfo(np.int64).max)
    np.minimum.at(rarest, row, known["image_count"].to_numpy()[position])
    keys = [
        key
        for key, images in zip(table["key"].to_pylist(), rarest.tolist(), strict=True)
        # draw / 2^64 < cap / images, in whole numbers
        if draw(settings["seed"], key) * images >= settings["max_images"] << 64
    ]
    outputs.write_table(
        f"capped/{task.name}.parquet", pa.table({"key": pa.array(keys, pa.string())})
    )
    outputs.write_rejects([(key, "over_cap") for key in keys])
    return {"over_cap": len(keys)}


def draw(seed: int, key: str) -> int:
    """A number in [0, 2^64) that depends on seed and key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(seed).encode(), person=b"cap")
    return int.from_bytes(digest.digest(), "big")
