"""Pictures and the texts of the entities that captions may mean, through a CLIP model.

links/ -> embeddings/, texts/. These are the stages that run a model; what follows from embeddings
alone is in `z_scores`. One process for each machine owns the accelerator and all of its devices. A
picture's embedding depends on its bytes and the model, a text's on its words and the model: what
else changes, other candidates or a knowledge base that has grown, embeds only what is new.

    model/        fingerprint.txt: of the files that embeddings depend on. A model folder may move.
    embeddings/   NNNNN.parquet key and sha256, of the pairs that have a candidate, in the order of
                  links/; NNNNN.npy float16 [rows, d]. A picture that cannot be decoded any more has
                  no row: the labels give the reason.
    candidates/   entities.parquet: every entity that is a candidate somewhere, label, description,
                  bucket (by these); by bucket and entity
    texts/        NNNNN.parquet text, NNNNN.npy float16 [block, d], of a run of the buckets
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.pairs import ahead, pictures
from data_prep.pairs import stage as pairs_stage
from mofi_jax.common import errors
from mofi_jax.data import ops

if typing.TYPE_CHECKING:
    import pyarrow as pa

# Cosines and z-scores are rounded before they meet a threshold: their last bits depend on hardware.
DECIMALS = 4

# Texts that are embedded at a time; of more there are several blocks. A text stays in its block
# wherever its entity stands, so that the block knows whether it is new.
_TEXTS, _BUCKETS = 1 << 16, 64
_GROUP = 16  # pictures that a thread decodes at a time: handing them over costs for each group

# A process works on several shards at once: one of them has the devices, the next has its first
# pictures decoded by then.
_LOADING, _DEVICES = threading.Lock(), threading.Lock()


def is_on(config: Mapping) -> bool:
    """Whether pictures are embedded, by `dataset`, `labels` and `clip`: where they decide."""
    labels = config["labels"]
    decide = labels == "clip" or (labels == "given" and bool(config["clip"]))
    return decide and config["dataset"] == "i2e"


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[str]:
    """Runs the stages model, model_check, embeddings, candidates and texts.

    Args:
      config: `clip` (folder of a model: a training run, or Hugging Face's CLIP), `template` of an
        entity's text, `batch_size` (pictures or texts per step of the model).
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Returns:
      The names of the shards of which there are embeddings.

    Raises:
      BadInput: no model named, a folder that holds none, or weights that are no numbers.
    """
    workdir = work.workdir
    links = engine.listed(workdir / "links")
    if not config.clip:
        raise errors.BadInput(
            "config.clip is not set: name the folder of a trained run or of a Hugging Face CLIP "
            "model with --config.clip=FOLDER, or take config.labels=text."
        )
    # Neither the folder nor the size of a batch is part of the settings: which model it is, the
    # fingerprint says.
    fingerprint = work.fingerprint("model", model_files(config.clip))
    model = (config.clip, config.batch_size)
    function = functools.partial(_check_model, *model)
    task = engine.Task("weights", (fingerprint,))
    work.map_shards("model_check", function, [task], {}, keys=None, accelerator=True)
    tasks = [
        engine.Task(path.stem, (path, workdir / "pairs" / path.name, fingerprint)) for path in links
    ]
    function = functools.partial(_embed_pairs, *model)
    settings = {"version": 3, "decoders": pictures.DECODERS}
    embedded = work.map_shards("embeddings", function, tasks, settings, accelerator=True)

    entities = "candidates/entities.parquet"
    tables = {"kb": [workdir / "kb/entities.parquet"]}
    tables["parts"] = work.partial("candidate_parts", _CANDIDATES, {"files": links})
    found = work.aggregate("candidates", {entities: _NAMED}, tables, {"buckets": _BUCKETS})
    count = found["counts"]["candidates/entities"]
    each = _BUCKETS if count <= _TEXTS else 1
    tasks = [
        engine.Task(f"{block:05d}", (workdir / entities, fingerprint))
        for block in range(_BUCKETS // each if count else 0)
    ]
    settings = {"version": 3, "template": config.template, "buckets": each}
    settings["tokenizers"] = importlib.metadata.version("tokenizers")
    function = functools.partial(_embed_texts, *model)
    work.map_shards("texts", function, tasks, settings, keys=None, accelerator=True)
    return [manifest["shard"] for manifest in embedded]


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


def load_model(folder: str, batch_size: int):
    """The CLIP model (`mofi_jax.inference.Model`) in `folder`, kept until another lies there."""
    with _LOADING:
        return _load_model(model_files(folder), folder, batch_size)


def _check_model(
    folder: str, batch_size: int, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """Before hours are spent on pictures: the weights of a run that diverged are NaN."""
    import jax

    weights = jax.tree.leaves(load_model(folder, batch_size).params)
    damaged = sum(not np.isfinite(np.asarray(array)).all() for array in weights)
    if damaged:
        raise errors.BadInput(
            f"config.clip={folder}: {damaged} of its {len(weights)} arrays of weights hold NaN or"
            " infinity, as after a training that diverged: name an earlier checkpoint or another"
            " model."
        )
    return {"arrays": len(weights)}


@engine.kept
def _load_model(files: Sequence[str], folder: str, batch_size: int):
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
        SELECT unnest(candidates).entity AS entity FROM read_parquet($files)
    )
"""


# file_row_number is the row of the knowledge base, which is what candidates hold.
_NAMED = f"""
    SELECT entity, label, description,
           CAST({engine.bucket_of("concat(label, chr(10), description)")} AS INT) AS bucket
    FROM read_parquet($kb, file_row_number = true) AS kb
    JOIN (SELECT DISTINCT entity FROM read_parquet($parts)) ON entity = kb.file_row_number
    ORDER BY bucket, entity
"""
_IN_BUCKETS = """
    SELECT label, coalesce(description, '') AS description
    FROM read_parquet($candidates) WHERE bucket >= $first AND bucket < $last
"""


def _embed_texts(
    folder: str, batch_size: int, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """Embeds the texts of a block of the candidates."""
    import pyarrow as pa

    candidates, fingerprint = task.inputs
    first = int(task.name) * settings["buckets"]
    found = {"candidates": candidates, "first": first, "last": first + settings["buckets"]}
    with engine.connect(outputs) as connection:
        rows = engine.ask(connection, _IN_BUCKETS, found).fetchall()
    texts = [entity_text(settings["template"], *row) for row in rows]

    def embed(new: np.ndarray) -> np.ndarray:
        model = load_model(folder, batch_size)
        parts = np.split(new, range(_TEXTS, len(new), _TEXTS))
        vectors = (model.embed_texts([texts[row] for row in part]) for part in parts)
        return np.concatenate([part.astype(np.float16) for part in vectors])

    table = pa.table({"text": pa.array(texts, pa.string())})
    name = f"texts/{task.name}"
    embeddings = _embed_new(outputs, name, table["text"], fingerprint, embed)
    outputs.write_table(f"{name}.parquet", table)
    np.save(outputs.path(f"{name}.npy"), embeddings)
    return {"entities": len(texts)}


def _embed_new(
    outputs: engine.Outputs,
    name: str,
    what: pa.ChunkedArray,
    fingerprint: str,
    embed: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, "n d"]:
    """Embeddings of what an earlier run did not embed, and those of the others taken over.

    Args:
      outputs, name: NAME.npy holds the embeddings, NAME.parquet of what they are.
      what: its last column, [n].
      fingerprint: the file that says which model it is.
      embed: float16 [m, d] of the rows int64 [m].
    """
    kept = [outputs.kept(f"{name}.{end}", fingerprint) for end in ("npy", "parquet")]
    place, old = np.full(len(what), -1), np.zeros((0, 0), np.float16)
    if all(kept):
        place = link_rows.positions(what, engine.read_table(kept[1]).columns[-1])
    new = place < 0
    if not new.all():  # else not even their width is taken over
        old = np.load(kept[0])
    fresh = embed(np.flatnonzero(new)) if new.any() else old[:0]
    # Without a row, or where nothing could be decoded, they have no width.
    width = max(old.shape[1], fresh.shape[1])
    old, fresh = (x if x.shape[1] else np.zeros((len(x), width), x.dtype) for x in (old, fresh))
    return np.concatenate([old, fresh])[np.where(new, len(old) - 1 + np.cumsum(new), place)]


# ------------------------------------------------------------------------------------ the pictures


def _embed_pairs(
    folder: str, batch_size: int, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """Embeds the pictures that have a candidate."""
    import pyarrow as pa

    links_path, pairs_path, fingerprint = task.inputs
    links = link_rows.read(links_path)
    keys = links.keys.take(pa.array(np.unique(links.row)))
    pairs = engine.read_table(pairs_path, columns=["key", "sha256", "path", "offset", "length"])
    pairs = pairs.take(pa.array(link_rows.positions(keys, pairs["key"])))
    rejected: dict[int, str] = {}

    def embed(new: np.ndarray) -> np.ndarray:
        model = load_model(folder, batch_size)
        found, reasons = _embed_pictures(model, outputs.workdir, pairs.take(new), batch_size)
        rejected.update((int(new[row]), reason) for row, reason in reasons.items())
        return found

    name = f"embeddings/{task.name}"
    embeddings = _embed_new(outputs, name, pairs["sha256"], fingerprint, embed)
    if rejected:
        row = min(rejected)
        logging.warning(
            "embeddings, shard %s: %d pictures cannot be embedded, the first being %s (%s)",
            task.name,
            len(rejected),
            keys[row].as_py(),
            rejected[row],
        )
    whole = np.ones(len(keys), bool)
    whole[list(rejected)] = False
    outputs.write_table(f"{name}.parquet", pairs.select(["key", "sha256"]).filter(pa.array(whole)))
    np.save(outputs.path(f"{name}.npy"), embeddings if whole.all() else embeddings[whole])
    return {"pictures": int(whole.sum()), "undecodable": len(rejected)}


def _embed_pictures(
    model, workdir: epath.Path, pairs: pa.Table, batch_size: int
) -> tuple[Float[np.ndarray, "n d"], dict[int, str]]:
    """float16 embeddings; with their reasons pictures that cannot be decoded, or overflow.

    Threads read and decode about two batches ahead of the devices; no more pixels are in memory.
    """
    rejected: dict[int, str] = {}

    def decode(group: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray] | None:
        rows, pixels = [], []
        for row, data in group:
            try:
                pixels.append(model.towers.decode(data))
                rows.append(row)
            except ops.UndecodableImage as error:
                rejected[row] = str(error)
        return (np.array(rows), np.stack(pixels)) if rows else None

    columns = (pairs[name].to_pylist() for name in ("path", "offset", "length"))
    pictures = pairs_stage.read_pictures(workdir, *columns)
    in_groups = iter(lambda: list(itertools.islice(pictures, _GROUP)), [])
    threads = os.cpu_count() or 1
    most = max(threads, -(-2 * batch_size // _GROUP))
    groups = filter(None, ahead.results(decode, in_groups, threads, most))
    first = list(itertools.islice(groups, 1))  # from now on the threads are ahead
    rows: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for numbers, pixels in _rebatch(itertools.chain(first, groups), batch_size):
            rows.append(numbers)
            yield pixels

    embeddings = np.zeros((len(pairs), 0), np.float16)
    with _DEVICES:
        results = model.towers.embed_image_batches(model.params, batches())
        for number, vectors in enumerate(results):
            if not number:
                embeddings = np.zeros((len(pairs), vectors.shape[1]), np.float16)
            embeddings[rows[number]] = vectors
    damaged = np.flatnonzero(~np.isfinite(embeddings).all(1))
    return embeddings, rejected | dict.fromkeys(damaged.tolist(), "not finite")


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
