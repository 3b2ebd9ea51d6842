"""The last stage of the data: a deterministic global shuffle into ArrayRecord shards: i2t/, i2e/.

Pairs are ordered by (md5(seed/key), key), which depends on nothing but the seed and the keys: not
on input order, workers or machine. The plan of an output shard holds everything of its records but
the picture, of which it holds the pointer, so that picture bytes are moved once and never sorted.

    plan-DATASET/NNNNN.parquet      rows of one output shard, in order
    DATASET/1.0.0/                  shards, dataset_info.json, features.json, tokenizer.json and,
                                    for i2e, entities.parquet (see `mofi_jax.data.records`)
"""

import io
import os
import shutil
from collections.abc import Iterator

import cv2
import ml_collections
import numpy as np
from etils import epath
from PIL import Image

from data_prep import engine, sources, vocabulary
from mofi_jax import errors
from mofi_jax.data import ops, records, tokenizer

DESCRIPTIONS = {
    "i2t": "Image-text pairs with the captions they were found with; no labels.",
    "i2e": "Image-to-entities: pictures with their captions, labelled with the entities that were "
    "found in the caption and fit the picture (MOFI, arXiv 2306.07952).",
}

# A byte-pair vocabulary of tens of thousands does not change any more beyond this many captions.
TOKENIZER_CAPTIONS = 1_000_000

ORIENTATION = 0x0112  # EXIF tag; 1 is upright

_ORDERED = {
    "i2t": """
        SELECT key, text, path, "offset", length, sha256,
               []::INT[] AS entities, []::FLOAT[] AS scores
        FROM read_parquet($pairs)
        ORDER BY md5(concat($seed, '/', key)), key
    """,
    "i2e": """
        SELECT key, text, path, "offset", length, sha256, entities, scores
        FROM read_parquet($pairs) AS pairs JOIN read_parquet($labels) AS labels USING (key)
        ORDER BY md5(concat($seed, '/', key)), key
    """,
}


def run(config: ml_collections.ConfigDict, work: engine.Engine, dataset: str) -> list[dict]:
    """Writes the data set `dataset` in `workdir`/`dataset`/1.0.0.

    Args:
      config: `seed`, `shard_examples`, `jpeg_quality`, `max_side` (px of the shorter side: larger
        pictures are shrunk to it), `vocab_size` of the tokenizer, `source`.
      work: the engine; its work directory holds pairs/ and, for i2e, labels_final/ and vocabulary/.
      dataset: "i2t", all valid pairs without labels, or "i2e", the labelled ones.

    Returns:
      The manifests of the shards; counts `records`, `record_bytes`, `reencoded`.

    Raises:
      BadInput: there is no pair to write.
    """
    workdir = work.workdir
    plans = _plan(config, work, dataset)
    vocabulary_files = (workdir / "vocabulary/kb_rows.npy",) if dataset == "i2e" else ()
    tasks = [engine.Task(path.stem, (path, *vocabulary_files)) for path in plans]
    settings = {key: config[key] for key in ("jpeg_quality", "max_side", "source")}
    settings |= {"dataset": dataset, "shards": len(plans)}
    written = work.map_shards(f"shards-{dataset}", _write_shard, tasks, settings)
    _describe(config, work, dataset, plans, written)
    return written


# ----------------------------------------------------------------------------------------- the plan


def _plan(config: ml_collections.ConfigDict, work: engine.Engine, dataset: str) -> list[epath.Path]:
    """Writes plan-DATASET/ and returns its files, one per output shard."""
    workdir = work.workdir
    pairs = sorted(workdir.glob("pairs/*.parquet"))
    labels = sorted(workdir.glob("labels_final/*.parquet")) if dataset == "i2e" else []
    settings = {
        "dataset": dataset,
        "seed": config.seed,
        "pairs_shards": len(pairs),
        "shard_examples": config.shard_examples,
    }
    task = engine.Task("all", (*pairs, *labels))
    [manifest] = work.map_shards(f"plan-{dataset}", _order, [task], settings, here=True)
    return [workdir / output["path"] for output in manifest["outputs"]]


def _order(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Orders all pairs and cuts them into shards of equal size, up to one record."""
    import duckdb
    import pyarrow.parquet as pq

    dataset, split = settings["dataset"], settings["pairs_shards"]
    parameters = {"seed": str(settings["seed"]), "pairs": list(task.inputs[:split])}
    if dataset == "i2e":
        parameters["labels"] = list(task.inputs[split:])
    counted = parameters.get("labels", parameters["pairs"])
    total = sum(pq.read_metadata(path).num_rows for path in counted)
    if not total:
        raise errors.BadInput(
            f"There is nothing to write into {dataset}: no pair is left after the stages before; "
            f"see the reasons in {outputs.workdir / 'rejects'}."
        )
    rows = _Rows(duckdb.connect().sql(_ORDERED[dataset], params=parameters).to_arrow_reader())
    count = -(-total // settings["shard_examples"])
    for shard in range(count):
        length = total // count + (shard < total % count)
        outputs.write_table(f"plan-{dataset}/{shard:05d}.parquet", rows.take(length))
    return {"records": total, "shards": count}


class _Rows:
    """Hands out the rows of an Arrow reader in pieces of any length, holding little more."""

    def __init__(self, reader):
        self._reader = reader
        self._rest = None

    def take(self, length: int):
        import pyarrow as pa

        batches = [self._rest] if self._rest is not None else []
        while sum(map(len, batches)) < length:
            batches.append(self._reader.read_next_batch())
        surplus = sum(map(len, batches)) - length
        last = batches.pop()
        self._rest = last.slice(len(last) - surplus)
        return pa.Table.from_batches([*batches, last.slice(0, len(last) - surplus)])


# -------------------------------------------------------------------------------------- the records


def _write_shard(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow.parquet as pq
    from array_record.python import array_record_module

    plan_path, *vocabulary_files = task.inputs
    kb_rows = np.load(vocabulary_files[0]) if vocabulary_files else np.zeros(0, np.int32)
    dataset = settings["dataset"]
    name = records.shard_name(dataset, "train", int(task.name), settings["shards"])
    path = outputs.path(f"{dataset}/{records.VERSION}/{name}")
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), records.WRITER_OPTIONS)
    counts = {"records": 0, "record_bytes": 0, "reencoded": 0}
    rows = pq.read_table(plan_path).to_pylist()
    # Read in the order of the tars, write in the order of the plan: a shard is held in memory.
    pictures = {}
    pointers = ([row[name] for row in rows] for name in ("path", "offset", "length"))
    for i, found in sources.read_pictures(outputs.workdir, *pointers):
        pictures[i] = to_jpeg(found, settings["max_side"], settings["jpeg_quality"])
        counts["reencoded"] += pictures[i][0] is not found
    for i, row in enumerate(rows):
        image, width, height = pictures.pop(i)
        record = records.serialize(
            {
                "key": row["key"],
                "image": image,
                "text": row["text"],
                "entity_ids": vocabulary.entity_ids(kb_rows, np.array(row["entities"], np.int32)),
                "entity_scores": np.array(row["scores"], np.float32),
                "source": settings["source"],
                "width": width,
                "height": height,
            }
        )
        writer.write(record)
        counts["records"] += 1
        counts["record_bytes"] += len(record)
    writer.close()
    return counts


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
        with Image.open(io.BytesIO(data)) as header:  # reads the header alone
            upright = header.getexif().get(ORIENTATION, 1) == 1
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
    plans: list[epath.Path],
    written: list[dict],
) -> None:
    """Tokenizer, vocabulary and TFDS metadata."""
    entities = (work.workdir / "vocabulary/entities.parquet",) if dataset == "i2e" else ()
    settings = {
        "dataset": dataset,
        "vocab_size": config.vocab_size,
        "tokenizer_captions": TOKENIZER_CAPTIONS,
        "shard_lengths": [manifest["counts"]["records"] for manifest in written],
        "num_bytes": engine.total_counts(written)["record_bytes"],
    }
    task = engine.Task("all", (*plans, *entities))
    work.map_shards(f"metadata-{dataset}", _write_metadata, [task], settings, here=True)


def _write_metadata(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    dataset, shards = settings["dataset"], len(settings["shard_lengths"])
    plans, vocabulary_files = task.inputs[:shards], task.inputs[shards:]
    folder = f"{dataset}/{records.VERSION}"
    texts = _texts(plans, vocabulary_files, settings["tokenizer_captions"])
    tokenizer.train_bpe(
        texts, settings["vocab_size"], outputs.path(f"{folder}/{records.TOKENIZER_FILE}")
    )
    for path in vocabulary_files:
        shutil.copyfile(path, outputs.path(f"{folder}/{records.ENTITIES_FILE}"))
    # The engine publishes in this order: dataset_info.json, which readers look for, comes last.
    outputs.path(f"{folder}/features.json")
    records.write_metadata(
        outputs.path(f"{folder}/dataset_info.json").parent,
        name=dataset,
        shard_lengths=settings["shard_lengths"],
        num_bytes=settings["num_bytes"],
        description=DESCRIPTIONS[dataset],
    )
    return {"records": sum(settings["shard_lengths"]), "shards": shards}


def _texts(plans: tuple[str, ...], vocabulary_files: tuple[str, ...], limit: int) -> Iterator[str]:
    """What the tokenizer learns from: captions in shuffled order, and all the entities' words."""
    import pyarrow.parquet as pq

    for path in plans:
        captions = pq.read_table(path, columns=["text"])["text"].to_pylist()
        yield from captions[:limit]
        limit -= min(limit, len(captions))
        if not limit:
            break
    for path in vocabulary_files:
        entities = records.read_entities(path)
        yield from entities.names
        yield from filter(None, entities.descriptions)
