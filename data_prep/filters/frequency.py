"""How many pictures an entity has: at most (a sample is kept), and at least. labels/ -> frequent/.

    entity_counts/  entities.parquet  entity, image_count, before the cap
    capped/         NNNNN.parquet     key of the pictures over the cap
    frequent/       entities.parquet  entity, image_count of the entities that are classes

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

What is kept in memory is a number for each entity. Shards are read one at a time, again in each
round of "converge": pictures are never held, nor are sets of their keys.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32, Int64

from data_prep import engine

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
    task = engine.Task("entities", tuple(path for files in shards for path in files))
    settings = {"shards": len(shards)}
    work.map_shards("entity_counts", _count, [task], settings, here=True)
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
      frequent/entities.parquet; counts `entities`, `rare_entities`, `rounds` of counting.
    """
    task = engine.Task("entities", tuple(path for files in shards for path in files))
    settings = {
        "shards": len(shards),
        "min_images": min_images,
        "rounds": 0 if feedback == "converge" and drops == "picture" else 1,
    }
    work.map_shards("frequent", _find_frequent, [task], settings, here=True)
    return work.workdir / "frequent/entities.parquet"


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


def among(
    entities: Int32[np.ndarray, " l"], known: Int32[np.ndarray, " k"]
) -> Bool[np.ndarray, " l"]:
    """Which entities are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(entities), bool)
    position = np.minimum(np.searchsorted(known, entities), len(known) - 1)
    return known[position] == entities


# ------------------------------------------------------------------------------------------- counts


class Counts:
    """Images per entity, int64, growing with the largest entity seen."""

    def __init__(self):
        self.images = np.zeros(0, np.int64)

    def add(self, entities: Int32[np.ndarray, " l"]) -> None:
        distinct, images = np.unique(entities, return_counts=True)
        if len(distinct) and distinct[-1] >= len(self.images):
            grown = np.zeros(max(distinct[-1] + 1, 2 * len(self.images)), np.int64)
            grown[: len(self.images)] = self.images
            self.images = grown
        self.images[distinct] += images

    def table(self, at_least: int = 1) -> pa.Table:
        """entity int32, image_count int64, by entity."""
        import pyarrow as pa

        entities = np.flatnonzero(self.images >= max(at_least, 1))
        images = self.images[entities]
        return pa.table({"entity": pa.array(entities.astype(np.int32)), "image_count": images})


def _shards(task: engine.Task, settings: dict) -> Iterator[pa.Table]:
    """The candidates of each shard, one shard at a time."""
    each = len(task.inputs) // max(settings["shards"], 1)
    for first in range(0, len(task.inputs), each or 1):
        yield read_candidates(*task.inputs[first : first + each], columns=["entities"])


def _count(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    counts = Counts()
    for table in _shards(task, settings):
        counts.add(labels_of(table)[0])
    table = counts.table()
    outputs.write_table("entity_counts/entities.parquet", table)
    return {"entities": len(table)}


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


def _find_frequent(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A picture lives while none of its entities is known to be rare, and only the living count.

    So what has to be remembered from round to round is the rare entities, of which there are ever
    more: the rounds end.
    """
    import pyarrow as pa

    rare = np.zeros(0, np.int32)  # sorted
    rounds, total = 0, 0
    while True:
        counts = Counts()
        for table in _shards(task, settings):
            entities, row = labels_of(table)
            dead = np.zeros(len(table), bool)
            dead[row[among(entities, rare)]] = True
            counts.add(entities[~dead[row]])
        rounds += 1
        seen = counts.table()
        total = total or len(seen)
        images = seen["image_count"].to_numpy()
        new = seen["entity"].to_numpy()[images < settings["min_images"]]
        if rounds == settings["rounds"] or not len(new):
            break
        rare = np.union1d(rare, new)
    frequent = seen.filter(pa.array(images >= settings["min_images"]))
    outputs.write_table("frequent/entities.parquet", frequent)
    counts = {"entities": len(frequent), "rare_entities": total - len(frequent)}
    return counts | {"rounds": rounds}
