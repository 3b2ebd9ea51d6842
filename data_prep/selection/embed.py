"""Evidence: pictures and the texts of the entities that captions may mean, through a CLIP model.

links/ -> scores/. These are the stages that run a model; what follows from their embeddings alone
is in `fits`. One process for each machine owns the accelerator and all of its devices.

    model/    fingerprint.txt: of the files that embeddings depend on. A model folder may move.
    candidates/  entities.parquet: every entity that is a candidate somewhere
    texts/    entities.npy int32 [n], the same; embeddings.npy float16 [n, d], of their texts;
              model.json, the fingerprint
    scores/   NNNNN.parquet key, entities, scores (cosine, rounded to 1e-4), of the pairs that have
              a candidate, in the order of links/; NNNNN.npy image embeddings float16 [rows, d].
              A picture that cannot be decoded any more has no row: the labels give the reason.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
import threading
import typing
from collections.abc import Iterable, Iterator

import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.pairs import stage as pairs_stage
from mofi_jax.common import errors
from mofi_jax.data import ops

if typing.TYPE_CHECKING:
    import pyarrow as pa

# Cosines and fits are rounded before they meet a threshold: the last bits depend on the hardware.
DECIMALS = 4

CHUNK = 4096  # (picture, entity) pairs at a time: 4096 x 1024 float32 are 16 MB

_TEXTS = 1 << 16  # texts in memory at a time
_READ_BYTES = 32 << 20  # of picture files that are read at a time
_GROUP = 16  # pictures that a thread decodes at a time: Grain's own cost is for each group


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> None:
    """Runs the stages model, texts and scores.

    Args:
      config: `clip` (folder of a model: a training run, or Hugging Face's CLIP), `template` of an
        entity's text, `batch_size` (pictures or texts per step of the model).
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Raises:
      BadInput: no model named, or a folder that holds none.
    """
    workdir = work.workdir
    links = engine.listed(workdir / "links")
    if not config.clip:
        raise errors.BadInput(
            "config.clip is not set: name the folder of a trained run or of a Hugging Face CLIP "
            "model with --config.clip=FOLDER, or take config.labels=text."
        )
    task = engine.Task("clip", tuple(model_files(config.clip)))
    work.map_shards("model", _identify, [task], {}, here=True)

    # The folder is no part of the settings: which model it is, the fingerprint says.
    fingerprint = workdir / "model/fingerprint.txt"
    entities = workdir / "candidates/entities.parquet"
    work.aggregate("candidates", {"candidates/entities.parquet": _CANDIDATES}, {"links": links})
    task = engine.Task("all", (workdir / "kb/entities.parquet", fingerprint, entities))
    settings = {"batch_size": config.batch_size, "template": config.template}
    function = functools.partial(_embed_texts, config.clip)
    work.map_shards("texts", function, [task], settings, accelerator=True)

    texts = tuple(
        workdir / "texts" / name for name in ("entities.npy", "embeddings.npy", "model.json")
    )
    tasks = [
        engine.Task(path.stem, (path, workdir / "pairs" / path.name, *texts)) for path in links
    ]
    function = functools.partial(_score, config.clip)
    settings = {"batch_size": config.batch_size}
    work.map_shards("scores", function, tasks, settings, accelerator=True)


# --------------------------------------------------------------------------------------- the model


def model_files(folder: str) -> list[str]:
    """The files of a model folder that `mofi_jax.inference.load` takes embeddings from.

    Of a training run these are the parameters of the latest checkpoint: neither an earlier one nor
    the optimizer's state says anything about embeddings.

    Raises:
      BadInput: no such folder.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        raise errors.BadInput(
            f"config.clip={folder} is no folder: name the folder of a trained run or of a Hugging "
            "Face CLIP model, or take config.labels=text."
        )
    if (root / "model.json").exists():
        files = [root / name for name in ("model.json", "tokenizer.json")]
        checkpoints = root / "checkpoints"
        steps = [p.name for p in checkpoints.iterdir()] if checkpoints.is_dir() else []
        # Others are being written: their names end otherwise until they are whole.
        latest = max((name for name in steps if name.isdigit()), key=int, default="none")
        for path, _, inside in os.walk(checkpoints / latest / "params"):
            files += [epath.Path(path) / name for name in inside]
    else:
        files = [path for path in root.iterdir() if path.suffix in (".json", ".safetensors")]
    return sorted(os.fspath(path) for path in files if path.exists())


def _identify(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    digests = sorted((os.path.basename(path), engine.sha256(path)) for path in task.inputs)
    fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    outputs.path("model/fingerprint.txt").write_text(fingerprint + "\n")
    return {"files": len(digests)}


@functools.lru_cache(maxsize=1)
def load_model(folder: str, batch_size: int):
    """The CLIP model (`mofi_jax.inference.Model`) in `folder`, loaded once per process."""
    from mofi_jax import inference
    from mofi_jax.distributed import meshes

    # All devices of this machine: here every machine has a process, and a job, of its own.
    return inference.load(folder, mesh=meshes.make_mesh(), batch_size=batch_size)


# --------------------------------------------------------------------------------------- the texts


def entity_text(template: str, name: str, description: str) -> str:
    """`template` filled in; the name alone where the entity has no description."""
    if not description:
        return name
    return template.format(name=name, description=description)


_CANDIDATES = """
    SELECT DISTINCT entity FROM (
        SELECT unnest(candidates).entity AS entity FROM read_parquet($links)
    ) ORDER BY entity
"""


def _embed_texts(
    folder: str, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """Embeds the texts of the candidates."""
    kb, fingerprint, candidates_path = task.inputs
    entities = link_rows.read_column(candidates_path, "entity").to_numpy()
    _save(outputs, "texts/entities.npy", entities)
    path, written, embeddings = outputs.path("texts/embeddings.npy"), 0, None
    for texts in _texts(kb, entities, settings["template"]):
        block = load_model(folder, settings["batch_size"]).embed_texts(texts)
        if embeddings is None:
            shape = (len(entities), block.shape[1])
            embeddings = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        embeddings[written : written + len(texts)] = block
        written += len(texts)
    if embeddings is None:
        _save(outputs, "texts/embeddings.npy", np.zeros((0, 0), np.float16))
    else:
        embeddings.flush()
    model = {"fingerprint": epath.Path(fingerprint).read_text().strip()}
    outputs.path("texts/model.json").write_text(json.dumps(model) + "\n")
    return {"entities": len(entities)}


def _texts(kb: str, entities: np.ndarray, template: str) -> Iterator[list[str]]:
    """The texts of the given rows (ascending) of the knowledge base, _TEXTS at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: list[str] = []
    first = 0
    with pq.ParquetFile(kb) as file:
        for batch in file.iter_batches(_TEXTS, columns=["label", "description"]):
            start, stop = np.searchsorted(entities, (first, first + len(batch)))
            rows = batch.take(pa.array(entities[start:stop] - first)).to_pylist()
            texts += [entity_text(template, r["label"], r["description"] or "") for r in rows]
            first += len(batch)
            while len(texts) >= _TEXTS:
                yield texts[:_TEXTS]
                del texts[:_TEXTS]
    if texts:
        yield texts


# ------------------------------------------------------------------------------------ the pictures


def _score(
    folder: str, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """Embeds the pictures that have a candidate; cosines with the texts of their candidates."""
    import pyarrow as pa

    links_path, pairs_path, entities_path, texts_path, _ = task.inputs
    links = link_rows.read(links_path)
    known = link_rows.distinct(links)
    rows, picture = np.unique(known.row, return_inverse=True)
    keys = links.keys.take(pa.array(rows))
    pairs = engine.read_table(pairs_path, columns=["key", "path", "offset", "length"])
    pairs = pairs.take(pa.array(link_rows.positions(keys, pairs["key"])))

    embeddings, rejected = np.zeros((0, 0), np.float16), {}
    if len(pairs):
        model = load_model(folder, settings["batch_size"])
        batch_size = settings["batch_size"]
        embeddings, rejected = _embed_pictures(model, outputs.workdir, pairs, batch_size)
    if rejected:
        row = min(rejected)
        logging.warning(
            "scores, shard %s: %d pictures cannot be decoded any more, the first being %s (%s)",
            task.name,
            len(rejected),
            keys[row].as_py(),
            rejected[row],
        )
    whole = np.ones(len(keys), bool)
    whole[list(rejected)] = False
    kept = whole[picture]
    picture, entities = picture[kept], known.entity[kept]

    texts = np.load(texts_path, mmap_mode="r")
    columns = np.searchsorted(np.load(entities_path), entities)
    cosines = _row_dots(embeddings, picture, texts, columns)
    starts = np.searchsorted(picture, [*np.flatnonzero(whole), len(whole)])
    table = {
        "key": keys.filter(pa.array(whole)),
        "entities": link_rows.lists(entities, starts),
        "scores": link_rows.lists(np.round(cosines, DECIMALS).astype(np.float32), starts),
    }
    outputs.write_table(f"scores/{task.name}.parquet", pa.table(table))
    _save(outputs, f"scores/{task.name}.npy", embeddings if whole.all() else embeddings[whole])
    return {
        "pictures": int(whole.sum()),
        "candidates": len(entities),
        "undecodable": len(rejected),
    }


class _Pictures:
    """Random access to the bytes of pictures: groups of (row, bytes), in the order of the disk.

    Pictures are read tens of megabytes at a time, because single ones of a parquet cannot be, by
    whichever thread first needs one of them. Threads go through the groups side by side, so the
    latest three pieces are enough.
    """

    def __init__(self, workdir: epath.Path, pairs: pa.Table):
        self._workdir = workdir
        columns = [pairs[name].to_pylist() for name in ("path", "offset", "length")]
        self._order = sorted(range(len(pairs)), key=lambda r: (columns[0][r], columns[1][r]))
        self._pointers = [[column[row] for row in self._order] for column in columns]
        size = np.cumsum(self._pointers[2])
        steps = np.arange(_READ_BYTES, size[-1] if len(size) else 0, _READ_BYTES)
        # Of the pieces the first pictures; one that is larger than a piece makes two equal ones.
        self._starts = sorted({0, *(int(start) for start in np.searchsorted(size, steps))})
        self._pieces: dict[int, list[bytes]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return -(-len(self._order) // _GROUP)

    def __getitem__(self, group: int) -> list[tuple[int, bytes]]:
        numbers = range(group * _GROUP, min((group + 1) * _GROUP, len(self._order)))
        return [(self._order[number], self._bytes(number)) for number in numbers]

    def _bytes(self, number: int) -> bytes:
        piece = bisect.bisect_right(self._starts, number) - 1
        found = self._pieces.get(piece)
        if found is None:
            with self._lock:
                found = self._pieces.get(piece) or self._read(piece)
        return found[number - self._starts[piece]]

    def _read(self, piece: int) -> list[bytes]:
        start, *rest = self._starts[piece : piece + 2]
        pointers = [column[start : rest[0] if rest else None] for column in self._pointers]
        found = [b""] * len(pointers[0])
        for place, data in pairs_stage.read_pictures(self._workdir, *pointers):
            found[place] = data
        for old in sorted(self._pieces)[:-2]:
            del self._pieces[old]
        self._pieces[piece] = found
        return found


def _embed_pictures(
    model, workdir: epath.Path, pairs: pa.Table, batch_size: int
) -> tuple[Float[np.ndarray, "n d"], dict[int, str]]:
    """float16 embeddings, 0 for pictures that cannot be decoded; these with their reasons.

    Threads read and decode about two batches ahead of the devices; no more pixels are in memory.
    """
    import grain
    from absl import flags

    rejected: dict[int, str] = {}

    def decode(group: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray] | None:
        rows, pixels = [], []
        for row, data in group:
            try:
                pixels.append(model.towers.decode(data))
                rows.append(row)
            except ops.UndecodableImage as error:
                rejected[row] = str(error)
        return (np.array(rows), np.stack(pixels)) if rows else None  # Grain leaves None out

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for a flag of its own
    threads = os.cpu_count() or 1
    ahead = max(threads, -(-2 * batch_size // _GROUP))
    groups = (
        grain.MapDataset.source(_Pictures(workdir, pairs))
        .map(decode)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    )
    rows: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for numbers, pixels in _rebatch(groups, batch_size):
            rows.append(numbers)
            yield pixels

    embeddings = np.zeros((len(pairs), 0), np.float16)
    results = model.towers.embed_image_batches(model.params, batches())
    for number, vectors in enumerate(results):
        if not number:
            embeddings = np.zeros((len(pairs), vectors.shape[1]), np.float16)
        embeddings[rows[number]] = vectors
    return embeddings, rejected


def _rebatch(
    groups: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows and pixels, `size` of them at a time and at last what is left."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for group in groups:
        held.append(group)
        while sum(len(rows) for rows, _ in held) >= size:
            joined = tuple(np.concatenate(parts) for parts in zip(*held, strict=True))
            yield tuple(part[:size] for part in joined)
            held = [tuple(part[size:] for part in joined)]
    joined = tuple(np.concatenate(parts) for parts in zip(*held, strict=True))
    if joined and len(joined[0]):
        yield joined


def _row_dots(
    left: Float[np.ndarray, "n d"],
    rows: np.ndarray,
    right: Float[np.ndarray, "m d"],
    columns: np.ndarray,
) -> Float[np.ndarray, " p"]:
    """float32 [p]: left[rows[i]] . right[columns[i]], a chunk of pairs at a time."""
    parts = [np.zeros(0, np.float32)]
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        a, b = (x.astype(np.float32) for x in (left[rows[chunk]], right[columns[chunk]]))
        parts.append(np.einsum("pd,pd->p", a, b))
    return np.concatenate(parts)


def _save(outputs: engine.Outputs, name: str, array: np.ndarray) -> None:
    with open(outputs.path(name), "wb") as file:
        np.save(file, array)
