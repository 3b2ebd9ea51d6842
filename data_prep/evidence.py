"""Evidence: how well pictures fit the entities that their captions may mean. links/ -> fits/

Three things are measured, in standard deviations above the data set's pictures:

    text fit      how much closer the picture is to the entity's text than pictures in general are
    picture fit   the same with the mean of the OTHER pictures whose caption mentions the entity in
                  place of the text, shrunk towards 0 where there are few of them
    coherence     of an entity: the mean picture fit of all pictures whose caption mentions it. High
                  for what pictures show (a tram), near 0 for what captions merely say (time, free)

Cosines alone are no common scale: an entity named in every caption is close to every picture, and
a weak CLIP model spreads the levels of entities further apart than right and wrong pictures of one.
Mean m and covariance C of all embeddings give mean and spread of the products with ANY direction u
in closed form (m.u and sqrt(u'Cu)), so that no picture-by-entity matrix is ever made.

Stages, each with manifests of its own:

    texts/       entities.npy int32 [n], embeddings.npy float16 [n, d], model.json
    scores/      NNNNN.parquet key, entities, scores (cosine, rounded to 1e-4);
                 NNNNN.npy image embeddings float16 [rows, d]; the one stage that runs the image
                 tower, in this one process, which owns the accelerator
    background/  moments.npy float64 [1 + d, d] (mean, covariance), prototypes.npy float32 [n, d],
                 support.npy float32 [n]
    fits/        NNNNN.parquet key, entities, text_fits, picture_fits
    coherence/   entities.parquet entity, support, coherence
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float

from data_prep import engine, sources
from mofi_jax import errors

# Cosines and fits are rounded before they meet a threshold: the last bits depend on the hardware.
DECIMALS = 4

# Pictures' worth of doubt in a prototype: with n others, the picture fit counts n / (n + 1).
PROTOTYPE_DOUBT = 1.0

_CHUNK = 4096  # (picture, entity) pairs at a time: 4096 x 1024 float32 are 16 MB


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> None:
    """Runs the stages texts, scores, background, fits and coherence.

    Args:
      config: `clip` (folder of a model: a training run, or Hugging Face's CLIP), `template` of an
        entity's text, `batch_size` (pictures or texts per step of the model).
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Raises:
      BadInput: no model named, or a folder that holds none.
    """
    workdir = work.workdir
    links = sorted(workdir.glob("links/*.parquet"))
    if not config.clip:
        raise errors.BadInput(
            "config.clip is not set: name the folder of a trained run or of a Hugging Face CLIP "
            "model with --config.clip=FOLDER, or take config.labels=text."
        )
    kb = workdir / "kb/entities.parquet"
    texts_task = engine.Task("all", (kb, *links, *_model_files(config.clip)))
    settings = {
        "clip": config.clip,
        "batch_size": config.batch_size,
        "template": config.template,
        "links": len(links),
    }
    # The model is loaded at most once, by this process, and only when there is work for it.
    work.map_shards("texts", _embed_texts, [texts_task], settings, here=True)
    texts = tuple(workdir / "texts" / name for name in ("entities.npy", "embeddings.npy"))
    model = workdir / "texts/model.json"
    tasks = [
        engine.Task(path.stem, (path, workdir / "pairs" / path.name, *texts, model))
        for path in links
    ]
    settings = {"clip": config.clip, "batch_size": config.batch_size}
    work.map_shards("scores", _score, tasks, settings, here=True)

    embeddings = tuple(path.with_suffix(".npy") for path in _scores(workdir, links))
    task = engine.Task("all", (texts[0], *links, *_scores(workdir, links), *embeddings))
    work.map_shards("background", _measure, [task], {"shards": len(links)}, here=True)
    background = tuple(
        workdir / "background" / f"{name}.npy" for name in ("moments", "prototypes", "support")
    )
    tasks = [
        engine.Task(path.stem, (path, scores, scores.with_suffix(".npy"), *texts, *background))
        for path, scores in zip(links, _scores(workdir, links), strict=True)
    ]
    work.map_shards("fits", _fit, tasks, {})

    fits = [workdir / "fits" / path.name for path in links]
    task = engine.Task("all", (texts[0], background[2], *links, *fits))
    work.map_shards("coherence", _cohere, [task], {"shards": len(links)}, here=True)


def _scores(workdir: epath.Path, links: list[epath.Path]) -> list[epath.Path]:
    return [workdir / "scores" / path.name for path in links]


def _model_files(folder: str) -> list[str]:
    """The files of a model folder that its embeddings depend on."""
    root = epath.Path(folder)
    if not root.is_dir():
        raise errors.BadInput(
            f"config.clip={folder} is no folder: name the folder of a trained run or of a Hugging "
            "Face CLIP model, or take config.labels=text."
        )
    names = ("model.json", "config.json", "tokenizer.json", "tokenizer_config.json")
    files = [os.fspath(p) for p in root.iterdir() if p.name in names or p.suffix == ".safetensors"]
    for path, _, inside in os.walk(root / "checkpoints"):
        files += [os.path.join(path, name) for name in inside]
    return sorted(files)


@functools.lru_cache(maxsize=1)
def load_model(folder: str, batch_size: int):
    """The CLIP model (`mofi_jax.inference.Model`) in `folder`, loaded once per process."""
    from mofi_jax import inference

    return inference.load(folder, batch_size=batch_size)


def entity_text(template: str, name: str, description: str) -> str:
    """`template` filled in; the name alone where the entity has no description."""
    if not description:
        return name
    return template.format(name=name, description=description)


def _embed_texts(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Embeds the texts of all entities that are a candidate somewhere."""
    import pyarrow.parquet as pq

    kb_path, links = task.inputs[0], task.inputs[1 : 1 + settings["links"]]
    model_files = task.inputs[1 + settings["links"] :]
    entities = np.unique(np.concatenate([_links_of(path).entity for path in links]))
    kb = pq.read_table(kb_path, columns=["label", "description"]).take(entities)
    texts = [
        entity_text(settings["template"], row["label"], row["description"] or "")
        for row in kb.to_pylist()
    ]
    model = load_model(settings["clip"], settings["batch_size"])
    embeddings = model.embed_texts(texts) if texts else np.zeros((0, 0), np.float32)
    _save(outputs, "texts/entities.npy", entities.astype(np.int32))
    _save(outputs, "texts/embeddings.npy", embeddings.astype(np.float16))
    digests = [engine.sha256(path) for path in model_files]
    fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    outputs.path("texts/model.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
    return {"entities": len(entities)}


class _Links(NamedTuple):
    """The candidates of a shard: distinct (row, entity) with the highest prior, rows in order."""

    keys: list[str]  # all pairs of the shard, also those without a candidate
    row: np.ndarray  # int64 [p], position in `keys`
    entity: np.ndarray  # int32 [p]
    prior: np.ndarray  # float32 [p]


def _links_of(path: str) -> _Links:
    import duckdb

    found = duckdb.sql(
        """
        SELECT row, candidate.entity AS entity, max(candidate.prior) AS prior
        FROM (
            SELECT file_row_number AS row, unnest(candidates) AS candidate
            FROM read_parquet($links, file_row_number = true)
        )
        GROUP BY ALL ORDER BY ALL
        """,
        params={"links": path},
    ).fetchnumpy()
    return _Links(
        _keys(path),
        np.asarray(found["row"], np.int64),
        np.asarray(found["entity"], np.int32),
        np.asarray(found["prior"], np.float32),
    )


def _keys(path: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["key"])["key"].to_pylist()


def _score(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Embeds the pictures that have a candidate; cosines with the texts of their candidates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    links_path, pairs_path, entities_path, texts_path, _ = task.inputs
    links = _links_of(links_path)
    with_candidate = np.unique(links.row)
    keys = [links.keys[row] for row in with_candidate]
    pairs = pq.read_table(pairs_path, columns=["key", "path", "offset", "length"])
    position = {key: row for row, key in enumerate(pairs["key"].to_pylist())}
    pairs = pairs.take(pa.array([position[key] for key in keys], pa.int64()))

    model = load_model(settings["clip"], settings["batch_size"])
    embeddings = _embed_pictures(model, outputs.workdir, pairs, settings["batch_size"])
    texts = np.load(texts_path, mmap_mode="r")
    columns = np.searchsorted(np.load(entities_path), links.entity)
    rows = np.searchsorted(with_candidate, links.row)
    cosines = _row_dots(embeddings, rows, texts, columns)
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    outputs.write_table(
        f"scores/{task.name}.parquet",
        pa.table(
            {
                "key": pa.array(keys, pa.string()),
                "entities": _lists(links.entity, starts),
                "scores": _lists(np.round(cosines, DECIMALS).astype(np.float32), starts),
            }
        ),
    )
    _save(outputs, f"scores/{task.name}.npy", embeddings)
    return {"pictures": len(keys), "candidates": len(rows)}


def _embed_pictures(model, workdir: epath.Path, pairs, batch_size: int) -> np.ndarray:
    """float16 [rows, d]. Threads read and decode the next batch while the device has this one."""
    towers = model.towers
    columns = (pairs[name].to_pylist() for name in ("path", "offset", "length"))
    pictures = sources.read_pictures(workdir, *columns)
    found: dict[int, np.ndarray] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting: list = []
        for batch in itertools.chain(_batches(pictures, batch_size), [[]]):
            coming = [(row, pool.submit(towers.decode, data)) for row, data in batch]
            if waiting:
                images = np.stack([pixels.result() for _, pixels in waiting])
                rows = [row for row, _ in waiting]
                found |= zip(rows, towers.embed_images(model.params, images), strict=True)
            waiting = coming
    if not found:
        return np.zeros((0, 0), np.float16)
    return np.stack([found[row] for row in range(len(found))]).astype(np.float16)


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _row_dots(
    left: Float[np.ndarray, "n d"],
    rows: np.ndarray,
    right: Float[np.ndarray, "m d"],
    columns: np.ndarray,
) -> Float[np.ndarray, " p"]:
    """float32 [p]: left[rows[i]] . right[columns[i]], a chunk of pairs at a time."""
    parts = [np.zeros(0, np.float32)]
    for start in range(0, len(rows), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        a, b = (x.astype(np.float32) for x in (left[rows[chunk]], right[columns[chunk]]))
        parts.append(np.einsum("pd,pd->p", a, b))
    return np.concatenate(parts)


def _lists(values: np.ndarray, starts: np.ndarray):
    """An Arrow list column: row i holds values[starts[i]:starts[i + 1]]."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def _save(outputs: engine.Outputs, name: str, array: np.ndarray) -> None:
    with open(outputs.path(name), "wb") as file:
        np.save(file, array)


# ----------------------------------------------------------------- what pictures are like at large


def _measure(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Mean and covariance of all embeddings; per entity the sum of the pictures that mention it."""
    entities = np.load(task.inputs[0])
    shards = settings["shards"]
    links, scores, embeddings = (
        task.inputs[1 + i * shards : 1 + (i + 1) * shards] for i in range(3)
    )
    width = max(np.load(path, mmap_mode="r").shape[1] for path in embeddings)
    count, total, squares = 0, np.zeros(width), np.zeros((width, width))
    for path in embeddings:
        x = _load_embeddings(path, width).astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(0), squares + x.T @ x
    mean = total / max(count, 1)
    covariance = squares / max(count, 1) - np.outer(mean, mean)
    _save(outputs, "background/moments.npy", np.concatenate([mean[None], covariance]))

    prototypes = np.zeros((len(entities), width), np.float32)
    support = np.zeros(len(entities), np.float32)
    for links_path, scores_path, path in zip(links, scores, embeddings, strict=True):
        pairs = _pairs(links_path, scores_path, entities)
        x = _load_embeddings(path, width) - mean.astype(np.float32)
        np.add.at(support, pairs.column, pairs.prior)
        for start in range(0, len(pairs.row), _CHUNK):
            row, column, prior = (values[start : start + _CHUNK] for values in pairs)
            np.add.at(prototypes, column, prior[:, None] * x[row])
    _save(outputs, "background/prototypes.npy", prototypes)
    _save(outputs, "background/support.npy", support)
    return {"pictures": count, "entities": len(entities)}


class _Pairs(NamedTuple):
    """Candidates by position: row of scores/, column of texts/entities.npy, and the prior."""

    row: np.ndarray
    column: np.ndarray
    prior: np.ndarray


def _pairs(links_path: str, scores_path: str, entities: np.ndarray) -> _Pairs:
    """The candidates of a shard in the order of its scores/."""
    links = _links_of(links_path)
    position = {key: i for i, key in enumerate(_keys(scores_path))}
    row = np.array([position[links.keys[i]] for i in links.row], np.int64)
    return _Pairs(row, np.searchsorted(entities, links.entity), links.prior)


def _load_embeddings(path: str, width: int) -> np.ndarray:
    """float32 [rows, width], also of a shard without pictures."""
    embeddings = np.load(path).astype(np.float32)
    return embeddings.reshape(len(embeddings), width)


def _fit(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow.parquet as pq

    links_path, scores_path, embeddings_path, *rest = task.inputs
    entities, texts, moments, prototypes, support = (np.load(path, mmap_mode="r") for path in rest)
    pairs = _pairs(links_path, scores_path, entities)
    mean, covariance = moments[0].astype(np.float32), moments[1:].astype(np.float32)
    x = _load_embeddings(embeddings_path, len(mean)) - mean
    text_fits, picture_fits = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for start in range(0, len(pairs.row), _CHUNK):
        row, column, prior = (values[start : start + _CHUNK] for values in pairs)
        own = prior[:, None] * x[row]
        others = np.maximum(support[column] - prior, 0)
        picture_fit = deviations(x[row], prototypes[column] - own, covariance)
        text_fits.append(deviations(x[row], texts[column].astype(np.float32), covariance))
        picture_fits.append(picture_fit * others / (others + PROTOTYPE_DOUBT))
    table = pq.read_table(scores_path, columns=["key", "entities"])
    starts = np.searchsorted(pairs.row, np.arange(len(table) + 1))
    for name, values in (("text_fits", text_fits), ("picture_fits", picture_fits)):
        rounded = np.round(np.concatenate(values), DECIMALS).astype(np.float32)
        table = table.append_column(name, _lists(rounded, starts))
    outputs.write_table(f"fits/{task.name}.parquet", table)
    return {"pictures": len(table), "candidates": len(pairs.row)}


def _cohere(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entities, support = (np.load(path) for path in task.inputs[:2])
    links, fits = task.inputs[2 : 2 + settings["shards"]], task.inputs[2 + settings["shards"] :]
    total = np.zeros(len(entities))
    for links_path, fits_path in zip(links, fits, strict=True):
        pairs = _pairs(links_path, fits_path, entities)
        column = pq.read_table(fits_path, columns=["picture_fits"])["picture_fits"]
        picture_fits = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        np.add.at(total, pairs.column, pairs.prior * picture_fits)
    coherence = np.round(total / np.maximum(support, 1e-6), DECIMALS).astype(np.float32)
    table = {"entity": entities, "support": support, "coherence": coherence}
    outputs.write_table("coherence/entities.parquet", pa.table(table))
    return {"entities": len(entities)}


def deviations(
    centred: Float[np.ndarray, "p d"],
    directions: Float[np.ndarray, "p d"],
    covariance: Float[np.ndarray, "d d"],
) -> Float[np.ndarray, " p"]:
    """How far each picture lies along its direction, in standard deviations of all pictures.

    Args:
      centred: embeddings minus the mean of all embeddings.
      directions: of any length; a zero direction gives 0.
      covariance: of all embeddings.
    """
    along = np.einsum("pd,pd->p", centred, directions)
    variance = np.einsum("pd,pd->p", directions @ covariance, directions)
    return np.where(variance > 1e-12, along / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
