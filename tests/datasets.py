"""Small data sets and configs that several tests share."""

import itertools
import json
from collections.abc import Sequence

import cv2
import ml_collections
import numpy as np
from array_record.python import array_record_module
from etils import epath

from configs import quickstart
from data_prep.dataset import files as dataset_files
from mofi_jax.data import ops, records

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square")
SHARDS = 4


def drawing(entity: int, seed: int, size: int = 24) -> np.ndarray:
    """uint8 [size, size, 3]: a filled shape whose kind and colour are the entity's."""
    rng = np.random.default_rng(seed)
    colours = ((220, 40, 40), (40, 180, 60), (50, 80, 220), (230, 210, 40), (150, 60, 180))
    canvas = np.full((size, size, 3), 255, np.uint8)
    centre = tuple(int(c) for c in rng.integers(size // 3, 2 * size // 3, 2))
    radius = int(rng.integers(size // 5, size // 3))
    colour = colours[entity // 2 % len(colours)]
    if entity % 2:
        corner = [(c - radius, c + radius) for c in centre]
        cv2.rectangle(canvas, *zip(*corner, strict=True), colour, -1)
    else:
        cv2.circle(canvas, centre, radius, colour, -1)
    return canvas


def name_of(entity: int) -> str:
    return f"{COLOURS[entity // 2 % len(COLOURS)]} {SHAPES[entity % 2]}"


def write(
    folder: epath.PathLike,
    *,
    name: str = "i2e",
    examples: int = 48,
    entities: int = 7,
    shards: int = SHARDS,
) -> epath.Path:
    """Writes a data set of drawings; "i2t" carries no labels.  Returns its version folder.

    Record i has the key i, the entity i % entities and, where i % 5 is 0, the next one too.
    """
    version = epath.Path(folder) / name / records.VERSION
    version.mkdir(parents=True)
    labelled = name == "i2e"
    lengths = [(i + 1) * examples // shards - i * examples // shards for i in range(shards)]
    paths = [version / records.shard_name(name, "train", shard, shards) for shard in range(shards)]
    shard_of = np.repeat(np.arange(shards), lengths)
    serialized: list[list[bytes]] = [[] for _ in paths]
    for i in range(examples):
        entity = i % entities
        ids = ([entity, (entity + 1) % entities] if i % 5 == 0 else [entity]) if labelled else []
        record = records.serialize(
            {
                "key": f"{i:06d}",
                "image": ops.encode_jpeg(drawing(entity, i), 95),
                "text": f"a {name_of(entity)} number {i % 4}",
                "entity_ids": np.array(ids, np.int32),
                "entity_scores": np.linspace(0.4, 0.3, len(ids)).astype(np.float32),
                "source": "tests",
                "width": 24,
                "height": 24,
            }
        )
        serialized[shard_of[i]].append(record)
    for path, examples_there in zip(paths, serialized, strict=True):
        write_shard(path, examples_there)
    num_bytes = sum(map(len, itertools.chain.from_iterable(serialized)))
    dataset_files.write_metadata(version, name=name, shard_lengths=lengths, num_bytes=num_bytes)
    names = [name_of(i) for i in range(entities)]
    dataset_files.train_bpe(
        [f"a {n} number {i}" for n in names for i in range(4)], 300, version / "tokenizer.json"
    )
    if labelled:
        vocabulary = records.Entities(
            qids=[f"Q{i:03d}" for i in range(entities)],
            names=names,
            descriptions=["a drawing"] * entities,
            counts=np.full(entities, 10, np.int64),
        )
        records.write_entities(version / records.ENTITIES_FILE, vocabulary)
    return version


def write_shard(path: epath.PathLike, serialized: Sequence[bytes]) -> None:
    """Writes a shard of records as they are."""
    writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
    for record in serialized:
        writer.write(record)
    writer.close()


def name_foreign_class(version: epath.Path, module: str, *, legacy: bool) -> None:
    """Has features.json name `module`.Foreign for one feature, in either format of TFDS."""
    path = version / "features.json"
    features = json.loads(path.read_text())["featuresDict"]["features"]
    features["extra"] = {"pythonClassName": f"{module}.Foreign", "text": {}}
    name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    content = {"pythonClassName": name, "featuresDict": {"features": features}}
    if legacy:
        fields = {key: {"type": f["pythonClassName"], "content": {}} for key, f in features.items()}
        content = {"type": name, "content": fields}
    path.write_text(json.dumps(content))


def tiny_config(
    folder: epath.PathLike, arg: str = "task=multitask", *, steps: int = 6
) -> ml_collections.ConfigDict:
    """`configs/quickstart.py` shrunk until a step takes milliseconds."""
    config = quickstart.get_config(arg)
    config.batch_size = 16
    config.total = f"{steps} steps"
    config.log_every = "1 steps"
    config.checkpoint.every = "2 steps"
    config.data.dir = str(folder)
    config.data.train_ops = "decode|new_view({size})|flip|light"
    config.data.eval_ops = "mofi"
    config.data.threads = 1
    config.model.update(
        {
            "image_size": 16,
            "image": {"width": 16, "layers": 2, "heads": 2},
            "text": {"width": 16, "layers": 1, "heads": 2},
            "embed_dim": 12,
            "context_length": 12,
        }
    )
    if "entity" in config.losses:
        config.losses.entity.block_size = 4
    config.evaluators = {}
    return config
