"""The last stage of the data: ArrayRecord shards in the order of `order`: i2t/, i2e/.

DATASET/1.0.0/  shards, dataset_info.json, features.json, tokenizer.json, keys.parquet (which
                record of which shard a key is) and, for i2e, entities.parquet (see
                `mofi_jax.data.records`)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import typing
from collections.abc import Iterator, Mapping, Sequence

import cv2
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.dataset import files as dataset_files
from data_prep.dataset import order as record_order
from data_prep.dataset import versions, vocabulary
from data_prep.pairs import pictures
from data_prep.pairs import stage as pairs_stage
from mofi_jax.data import metadata, ops, records

if typing.TYPE_CHECKING:
    import pyarrow as pa

DESCRIPTIONS = {
    "i2t": "Image-text pairs with the captions they were found with; no labels.",
    "i2e": "Image-to-entities: pictures with their captions, labelled with the entities that were "
    "found in the caption and fit the picture (MOFI, arXiv 2306.07952).",
}

# A byte-pair vocabulary of tens of thousands does not change any more beyond this many captions.
TOKENIZER_CAPTIONS = 1_000_000


def run(config: ml_collections.ConfigDict, work: engine.Engine, dataset: str) -> list[dict]:
    """Writes the data set `dataset` in `workdir`/`dataset`/1.0.0.

    Args:
      config: `seed`, `shard_examples`, `jpeg_quality`, `max_side` (px of the shorter side: larger
        pictures are shrunk to it), `vocab_size` of the tokenizer.
      work: the engine; its work directory holds pairs/ and, for i2e, labels_final/ and vocabulary/.
      dataset: "i2t", all valid pairs without labels, or "i2e", the labelled ones.

    Returns:
      The manifests of the shards; counts `records`, `record_bytes`, `reencoded`. A picture that
      cannot be decoded any more is a reject, picture_unreadable.

    Raises:
      BadInput: there is no pair to write.
    """
    workdir = work.workdir
    plans = record_order.run(work, dataset, config.seed, config.shard_examples)
    vocabulary_files = (workdir / "vocabulary/ids.npy",) if dataset == "i2e" else ()
    tasks = [
        engine.Task(f"{plan.shard:05d}", (plan.path, *vocabulary_files))
        for plan in plans
        if plan.path.exists()
    ]
    settings = {key: config[key] for key in ("jpeg_quality", "max_side")}
    settings |= {"dataset": dataset, "shards": len(plans), "shards_per_plan": _per_plan(plans)}
    settings["decoders"] = pictures.DECODERS
    keys = functools.partial(_keys_of_shard, _per_plan(plans))
    if engine.outdated(workdir, f"metadata-{dataset}"):
        # It would describe shards of two builds, whose entities have other ids.
        (workdir / dataset / records.VERSION / metadata.INFO_FILE).unlink(missing_ok=True)
    written = work.map_shards(f"shards-{dataset}", _write_shard, tasks, settings, keys=keys)
    _fill_in(work, dataset, plans, written)
    _describe(config, work, dataset, plans, written)
    made = workdir / dataset / records.VERSION
    for path in versions.others(made):
        logging.warning(
            "%s was made from an earlier build, and readers open the highest version: delete it to"
            " have them read %s",
            path,
            made,
        )
    return written


def _per_plan(plans: Sequence[record_order.Plan]) -> int:
    """How many output shards a file of plan-DATASET/ holds, but for the last one."""
    return 1 + max(plan.row_group for plan in plans)


def _keys_of_shard(shards_per_plan: int, task: engine.Task) -> Iterator[pa.ChunkedArray]:
    """The keys of an output shard; see `engine.Engine.map_shards`."""
    row_group = int(task.name) % shards_per_plan
    yield record_order.read(task.inputs[0], row_group, ["key"])["key"]


def _fill_in(
    work: engine.Engine,
    dataset: str,
    plans: Sequence[record_order.Plan],
    written: list[dict],
) -> None:
    """Leaves shards of this number in the folder: empty ones for those in quarantine."""
    from array_record.python import array_record_module

    folder = work.workdir / dataset / records.VERSION
    folder.mkdir(parents=True, exist_ok=True)
    names = {records.shard_name(dataset, "train", n, len(plans)) for n in range(len(plans))}
    made = {os.path.basename(output["path"]) for m in written for output in m["outputs"]}
    for path in folder.iterdir():
        if ".array_record-" in path.name and path.name not in names:
            path.unlink()
    for name in names - made:
        path = os.fspath(folder / name)
        array_record_module.ArrayRecordWriter(path, records.WRITER_OPTIONS).close()


# -------------------------------------------------------------------------------------- the records


def _write_shard(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    from array_record.python import array_record_module

    plan_path, *vocabulary_files = task.inputs
    dataset = settings["dataset"]
    name = records.shard_name(dataset, "train", int(task.name), settings["shards"])
    path = outputs.path(f"{dataset}/{records.VERSION}/{name}")
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), records.WRITER_OPTIONS)
    counts = {"records": 0, "record_bytes": 0, "reencoded": 0}
    table = record_order.read(plan_path, int(task.name) % settings["shards_per_plan"])
    rows, ids = table.to_pylist(), _entity_ids(table["entities"], *vocabulary_files)
    # Read in the order of the tars, write in the order of the plan: a shard is held in memory.
    pictures, rejects = {}, []
    pointers = ([row[name] for row in rows] for name in ("path", "offset", "length"))
    for i, found in pairs_stage.read_pictures(outputs.workdir, *pointers):
        try:
            pictures[i] = to_jpeg(found, settings["max_side"], settings["jpeg_quality"])
        except ops.UndecodableImage:
            rejects.append((rows[i]["key"], "picture_unreadable"))
            continue
        counts["reencoded"] += pictures[i][0] is not found
    for i, row in enumerate(rows):
        if i not in pictures:
            continue
        image, width, height = pictures.pop(i)
        record = records.serialize(
            {
                "key": row["key"],
                "image": image,
                "text": row["text"],
                "entity_ids": ids[i],
                "entity_scores": np.array(row["scores"], np.float32),
                "source": row["source"],
                "width": width,
                "height": height,
            }
        )
        writer.write(record)
        counts["records"] += 1
        counts["record_bytes"] += len(record)
    writer.close()
    if rejects:
        outputs.write_rejects(sorted(rejects))
    return counts


def _entity_ids(entities: pa.ChunkedArray, inverse_path: str = "") -> list[np.ndarray]:
    """Of each row of a column of labels int32 [l] their entity ids, all looked up at once."""
    lists = entities.combine_chunks()
    labels = lists.flatten().to_numpy()
    if len(labels):
        labels = vocabulary.entity_ids(np.load(inverse_path, mmap_mode="r"), labels)
    return np.split(labels, np.cumsum(lists.value_lengths().to_numpy())[:-1])


def to_jpeg(data: bytes, max_side: int, quality: int) -> tuple[bytes, int, int]:
    """A picture as RGB JPEG whose shorter side is at most `max_side` px.

    An upright RGB JPEG that is small enough already is returned as it is: encoding again costs
    quality.

    Returns:
      (JPEG bytes, width, height).

    Raises:
      ops.UndecodableImage: corrupt or truncated input.
    """
    if data[:2] == b"\xff\xd8":
        with ops.open_picture(data) as header:
            upright = ops.orientation(header.info.get("exif")) == 1
            plain = header.format == "JPEG" and header.mode == "RGB" and upright
            if plain and min(header.size) <= max_side:
                return data, *header.size
    rgb = ops.decode_rgb(data)
    height, width = rgb.shape[:2]
    short = min(height, width)
    if short > max_side:
        width, height = (max(1, round(side * max_side / short)) for side in (width, height))
        # INTER_AREA averages: no aliasing when shrinking.
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    return ops.encode_jpeg(rgb, quality), width, height


# ------------------------------------------------------------------------------------- the metadata


def _describe(
    config: ml_collections.ConfigDict,
    work: engine.Engine,
    dataset: str,
    plans: Sequence[record_order.Plan],
    written: list[dict],
) -> None:
    """Tokenizer, vocabulary and TFDS metadata."""
    names = ("entities.parquet", "kb_rows.npy") if dataset == "i2e" else ()
    entities = [work.workdir / "vocabulary" / name for name in names]
    lengths = {int(m["shard"]): m["counts"]["records"] for m in written}
    settings = {
        "version": 2,
        "dataset": dataset,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "vocab_size": config.vocab_size,
        "tokenizer_captions": TOKENIZER_CAPTIONS,
        "shard_lengths": [lengths.get(plan.shard) for plan in plans],  # None: in quarantine
        "shards_per_plan": _per_plan(plans),
        "num_bytes": engine.total_counts(written)["record_bytes"],
    }
    rejects = {int(m["shard"]): o for m in written for o in m["outputs"] if "rejects/" in o["path"]}
    settings["rejects"] = sorted(rejects)
    files = list(dict.fromkeys(plan.path for plan in plans if plan.shard in lengths))
    settings["plans"] = len(files)
    files += [work.workdir / rejects[shard]["path"] for shard in sorted(rejects)]
    task = engine.Task("all", (*files, *entities))
    work.map_shards(f"metadata-{dataset}", _write_metadata, [task], settings, keys=None)


def _write_metadata(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    dataset, lengths = settings["dataset"], settings["shard_lengths"]
    files, rest = _cut(task.inputs, settings["plans"])
    rejects, vocabulary_files = _cut(rest, len(settings["rejects"]))
    files, each = {int(epath.Path(file).stem): file for file in files}, settings["shards_per_plan"]
    plans = [
        record_order.Plan(shard, epath.Path(files[shard // each]), shard % each)
        for shard, length in enumerate(lengths)
        if length is not None
    ]
    rejects = dict(zip(settings["rejects"], rejects, strict=True))
    folder = f"{dataset}/{records.VERSION}"
    texts = _texts(plans, vocabulary_files[:1], settings["tokenizer_captions"])
    dataset_files.train_bpe(
        texts, settings["vocab_size"], outputs.path(f"{folder}/{records.TOKENIZER_FILE}")
    )
    kb_rows = np.load(vocabulary_files[1]) if vocabulary_files else np.zeros(0, np.int32)
    labels = np.zeros(kb_rows.max(initial=-1) + 1, np.int64)
    _write_keys(outputs.path(f"{folder}/{records.KEYS_FILE}"), plans, rejects, labels)
    if vocabulary_files:
        entities = records.read_entities(vocabulary_files[0])
        # Of the records alone: damage may have kept others out. Ids stay as the records have them.
        counted = dataclasses.replace(entities, counts=labels[kb_rows])
        path = outputs.path(f"{folder}/{records.ENTITIES_FILE}")
        records.write_entities(path, counted, old=entities)
    # The engine publishes in this order: dataset_info.json, which readers look for, comes last.
    outputs.path(f"{folder}/features.json")
    dataset_files.write_metadata(
        outputs.path(f"{folder}/dataset_info.json").parent,
        name=dataset,
        shard_lengths=[length or 0 for length in lengths],
        num_bytes=settings["num_bytes"],
        description=DESCRIPTIONS[dataset],
    )
    return {"records": sum(filter(None, lengths)), "shards": len(plans)}


def _cut(files: Sequence[str], count: int) -> tuple[Sequence[str], Sequence[str]]:
    return files[:count], files[count:]


def _texts(
    plans: Sequence[record_order.Plan], vocabulary_files: Sequence[str], limit: int
) -> Iterator[str]:
    """What the tokenizer learns from: captions in shuffled order, and all the entities' words."""
    for plan in plans:
        captions = plan.read(["text"])["text"].to_pylist()
        yield from captions[:limit]
        limit -= min(limit, len(captions))
        if not limit:
            break
    for path in vocabulary_files:
        entities = records.read_entities(path)
        yield from entities.names
        yield from filter(None, entities.descriptions)


def _write_keys(
    path: epath.Path,
    plans: Sequence[record_order.Plan],
    rejects: Mapping[int, str],
    labels: np.ndarray,
) -> None:
    """Writes where each record is: key, shard int32, index int32; a shard is a row group.

    Adds to `labels` int64 how many records each row of the knowledge base is a label of.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema([("key", pa.string()), ("shard", pa.int32()), ("index", pa.int32())])
    with pq.ParquetWriter(os.fspath(path), schema, compression="zstd") as writer:
        for plan in plans:
            table = plan.read(["key", "entities"])
            if plan.shard in rejects:
                gone = engine.read_table(rejects[plan.shard], ["key"])["key"]
                table = table.filter(pc.invert(pc.is_in(table["key"], gone)))
            keys = table["key"].combine_chunks()
            rows, counts = np.unique(pc.list_flatten(table["entities"]), return_counts=True)
            labels[rows] += counts
            columns = [keys, np.full(len(keys), plan.shard, np.int32), np.arange(len(keys))]
            writer.write_table(pa.table([*map(pa.array, columns)], names=schema.names).cast(schema))
