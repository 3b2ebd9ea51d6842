"""A small world with known answers, as the first stages of data preparation leave it on disk.

Pictures are noise around a colour. A caption names a colour, mostly the picture's own, and says
"background". The knowledge base knows each colour, a second, likelier sense of "red" that no
picture shows, and "background". So the right labels are known without any model.
"""

import dataclasses
import io
import tarfile
import types

import cv2
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import engine
from data_prep.kb import kinds
from data_prep.linking import stage as linking_stage
from data_prep.pairs import stage as pairs_stage
from mofi_jax.data import ops

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 50, 220),
    "gold": (230, 190, 20),
}
NAMES = [*COLOURS, "red", "background"]
DESCRIPTIONS = [*(f"the colour {name}" for name in COLOURS), "a state", ""]
RED_STATE, BACKGROUND = 4, 5


@dataclasses.dataclass(frozen=True)
class Pair:
    key: str
    colour: int  # what the picture shows
    named: int | None  # the colour that the caption names


def config(**changes) -> ml_collections.ConfigDict:
    """The configuration that the stages read."""
    values = {
        "dataset": "i2e",
        "labels": "clip",
        "clip": None,
        "template": "{name}, {description}",
        "batch_size": 16,
        "label_kinds": kinds.KINDS,
        "never_labels": (),
        "prototype_weight": 1.0,
        "prior_weight": 0.5,
        "kin_weight": 8.0,
        "min_probability": 0.45,  # halfway between the right and the wrong colours
        "target_precision": None,
        "max_labels": 2,
        "min_images": 3,
        "min_images_feedback": "one_pass",
        "rare_entity_drops": "label",
        "max_images": None,
        "held_out": 0,
        "removed": (),
        "filters": {
            "eval_sets": {},
            "max_hamming": 4,
            "eval_false_positives": 0.001,
            "duplicates": "keep",
            "safety": {
                "head": None,
                "threshold": 0.5,
                "columns": {},
                "blocked_domains": None,
                "blocked_hashes": None,
            },
        },
        "jpeg_quality": 90,
        "max_side": 48,
        "shard_examples": 20,
        "vocab_size": 300,
        "seed": 0,
        "workers": 1,
        "min_side": 8,
        "max_aspect": 4.0,
        "max_pixels": 10**6,
        "max_caption_chars": 200,
        "caption_column": None,
        "keep_columns": ("punsafe", "NSFW"),
        "context_columns": (),
        "given": {"ids": None, "titles": None, "weights": None, "where": ()},
        "rows_per_shard": 20,
    }
    return ml_collections.ConfigDict(values | changes)


def pairs(count: int = 60) -> list[Pair]:
    """Every fifth caption names a wrong colour, every eleventh names none."""
    found = []
    for i in range(count):
        colour = i % 4
        named = None if i % 11 == 10 else (colour + 1) % 4 if i % 5 == 4 else colour
        found.append(Pair(f"{i:04d}", colour, named))
    return found


def write(folder, count: int = 60, tars: int = 3):
    """Writes tars, pairs/ (by the real stage), links/ and kb/; returns (workdir, pairs)."""
    tar_folder, workdir = folder / "tars", folder / "W"
    tar_folder.mkdir(parents=True)
    workdir.mkdir()
    made = pairs(count)
    for number in range(tars):
        with tarfile.open(tar_folder / f"{number:05d}.tar", "w") as tar:
            for pair in made[number::tars]:
                suffix = "jpg" if int(pair.key) % 2 else "png"
                add(tar, f"{pair.key}.{suffix}", picture(pair, suffix))
                add(tar, f"{pair.key}.txt", caption(pair).encode())
    pairs_stage.run(config(sources=(f"colours={tar_folder}",)), engine.Engine(workdir))
    _write_kb(workdir)
    by_key = {pair.key: pair for pair in made}
    (workdir / "links").mkdir()
    for path in sorted((workdir / "pairs").glob("*.parquet")):
        rows = [_link(by_key[key]) for key in pq.read_table(path)["key"].to_pylist()]
        table = {
            "key": pa.array([row[0] for row in rows]),
            "mentions": pa.array([row[1] for row in rows], linking_stage.mentions_type()),
            "candidates": pa.array([row[2] for row in rows], linking_stage.candidates_type()),
        }
        pq.write_table(pa.table(table), workdir / "links" / path.name)
    return workdir, made


def picture(pair: Pair, suffix: str) -> bytes:
    """JPEG of 40x40 or PNG of 90x60 pixels."""
    rng = np.random.default_rng(int(pair.key))
    size = (40, 40, 3) if suffix == "jpg" else (60, 90, 3)
    colour = np.array(list(COLOURS.values())[pair.colour])
    rgb = np.clip(colour + rng.normal(0, 25, size) + rng.normal(0, 15, 3), 0, 255).astype(np.uint8)
    return cv2.imencode(f".{suffix}", rgb[..., ::-1])[1].tobytes()


def caption(pair: Pair) -> str:
    return "nothing" if pair.named is None else f"{NAMES[pair.named]} thing on background"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _link(pair: Pair):
    if pair.named is None:
        return pair.key, [], []
    name = NAMES[pair.named]
    mentions = [
        {"start": 0, "end": len(name), "surface": name, "kind": "gazetteer"},
        {"start": len(name) + 10, "end": len(name) + 20, "surface": "background", "kind": "ner"},
    ]
    prior = 0.45 if pair.named == 0 else 1.0
    candidates = [{"mention": 0, "entity": pair.named, "prior": prior}]
    if pair.named == 0:
        candidates.insert(0, {"mention": 0, "entity": RED_STATE, "prior": 0.55})
    candidates.append({"mention": 1, "entity": BACKGROUND, "prior": 1.0})
    return pair.key, mentions, candidates


def _write_kb(workdir) -> None:
    (workdir / "kb").mkdir()
    qids = [f"Q{100 - i}" for i in range(len(NAMES))]
    table = {"qid": qids, "label": NAMES, "description": DESCRIPTIONS}
    table |= {name: pa.nulls(len(NAMES), pa.string()) for name in ("kind", "image")}
    parents = [["Q1"]] * len(COLOURS) + [["Q2"], []]
    table |= {name: pa.array(parents, pa.list_(pa.string())) for name in ("hypernyms", "types")}
    pq.write_table(pa.table(table), workdir / "kb/entities.parquet")
    pq.write_table(pa.table({"qid": ["Q3"], "entity": [3]}), workdir / "kb/redirects.parquet")
    # Names that are equal are one.
    names = sorted(set(NAMES))
    meant = [[row for row, of in enumerate(NAMES) if of == name] for name in names]
    np.save(workdir / "kb/alias_offsets.npy", np.cumsum([0, *map(len, meant)]))
    np.save(workdir / "kb/cand_entity.npy", np.concatenate(meant).astype(np.int32))
    (workdir / "kb/manifest.json").write_text("{}")


class Model:
    """A CLIP model that sees colour: the mean colour of a picture, the colour an entity stands for.

    Like a real one it has a cone: all embeddings share a large component, so that no cosine is low.
    """

    def __init__(self):
        self.params = {"offset": np.float32(1.0)}
        self.towers = types.SimpleNamespace(
            decode=self._decode,
            embed_images=self._embed_images,
            embed_image_batches=lambda params, batches: (
                self._embed_images(params, images) for images in batches
            ),
        )
        self.pictures = self.texts = 0

    def _decode(self, data: bytes) -> np.ndarray:
        return cv2.resize(ops.decode_rgb(data), (8, 8), interpolation=cv2.INTER_AREA)

    def _embed_images(self, params, images: np.ndarray) -> np.ndarray:
        self.pictures += len(images)
        assert images.dtype == np.uint8
        return self._cone(images.mean((1, 2)).astype(np.float32), params["offset"])

    def embed_texts(self, texts) -> np.ndarray:
        self.texts += len(texts)
        colours = {f"{name}, the colour {name}": rgb for name, rgb in COLOURS.items()}
        colours["red, a state"] = (0, 255, 255)
        grey = np.array([128, 128, 128])
        vectors = np.stack([np.array(colours.get(text, grey)) for text in texts])
        return self._cone(vectors.astype(np.float32), np.float32(1.0))

    def _cone(self, rgb: np.ndarray, offset: np.float32) -> np.ndarray:
        vectors = np.concatenate([rgb / 128 - 1, np.full((len(rgb), 1), offset)], axis=1)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
