"""Pictures of evaluation sets: hashed, and embedded with the model that scores the pairs.

    eval_hashes/      NAME-NNNNN.parquet  set, name, sha256, phash (null: cannot be decoded)
    eval_embeddings/  NAME-NNNNN.npy      float16 [rows of that table, d]

Knows nothing of pairs; `duplicates` looks for these pictures among them.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
import numpy as np

from data_prep import engine
from data_prep.pairs import pictures
from data_prep.selection import embed as selection_embed
from mofi_jax.common import errors
from mofi_jax.data import ops
from mofi_jax.data.pictures import arrow_files, containers, tree
from mofi_jax.interop import from_hub

_TARS = (".tar", ".tar.gz", ".tgz")
_ROWS = (".parquet", arrow_files.SUFFIX)
_FILES_PER_TASK = 4096


def find(eval_sets: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of evaluation sets: pictures, tars and parquet of them, absolute, in order.

    Args:
      eval_sets: name to a folder, searched in depth, or to one file; or to a set on the hub.

    Raises:
      BadInput: a name that is no file name, a path that does not exist or holds no pictures.
    """
    found = {}
    for name, path in sorted(eval_sets.items()):
        where = f"config.filters.eval_sets.{name}={path!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise errors.BadInput(f"{where}: name the set in letters, digits, `_`, `.` and `-`.")
        path = from_hub.data(path) if isinstance(path, str) else path
        if not isinstance(path, str) or not os.path.exists(path):
            raise errors.BadInput(
                f"{where} does not exist: name a folder of pictures or a tar of them."
            )
        files = [os.path.abspath(path)]
        if os.path.isdir(path):
            files = sorted(
                os.path.abspath(os.path.join(folder, file))
                for folder, _, inside in os.walk(path)
                for file in inside
                if file.lower().endswith((*tree.PICTURES, *_TARS, *_ROWS))
                and not file.startswith(".")
            )
        if not files:
            raise errors.BadInput(f"{where} holds no pictures: name the folder that does.")
        found[name] = files
    return found


def run(config: ml_collections.ConfigDict, work: engine.Engine, embed: bool) -> tuple[str, ...]:
    """Writes eval_hashes/ and, if they are wanted, eval_embeddings/.

    Args:
      config: `filters.eval_sets`; for embeddings also `clip` and `batch_size`.
      work: the engine.
      embed: whether pictures are embedded; needs model/fingerprint.txt of `selection.embed`.

    Returns:
      The names of the shards of both stages.

    Raises:
      BadInput: a set without pictures, or a damaged file.
    """
    tasks = []
    for name, files in find(config.filters.eval_sets.to_dict()).items():
        loose = [file for file in files if file.lower().endswith(tree.PICTURES)]
        parts = [[file] for file in files if not file.lower().endswith(tree.PICTURES)]
        parts += [loose[i : i + _FILES_PER_TASK] for i in range(0, len(loose), _FILES_PER_TASK)]
        tasks += [engine.Task(f"{name}-{i:05d}", tuple(part)) for i, part in enumerate(parts)]
    # A shard of pairs may be left out; of an evaluation set, what is left out would be missed.
    settings = {"decoders": pictures.DECODERS}
    written = work.map_shards("eval_hashes", _hash, tasks, settings, keys=None)
    for name in config.filters.eval_sets:
        own = [m for m in written if _set_of(m["shard"]) == name]
        if not engine.total_counts(own).get("pictures"):
            raise errors.BadInput(
                f"config.filters.eval_sets.{name} holds no pictures: name the tar that does."
            )
    if embed:
        model = os.fspath(work.workdir / "model/fingerprint.txt")
        tasks = [engine.Task(task.name, (model, *task.inputs)) for task in tasks]
        function = functools.partial(_embed, config.clip, config.batch_size)
        settings = {"version": 2, **settings}
        work.map_shards("eval_embeddings", function, tasks, settings, keys=None, accelerator=True)
    return tuple(m["shard"] for m in written)


def read(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The pictures of an evaluation set: (name with its folder, bytes), in order.

    Raises:
      BadInput: a file called tar that is none, or a file that is damaged.
    """
    for path in files:
        if path.lower().endswith(tree.PICTURES):
            with open(path, "rb") as file:
                yield "/".join(path.split(os.sep)[-2:]), file.read()
            continue
        if path.lower().endswith(_ROWS):
            yield from _read_rows(path)
            continue
        try:
            with tarfile.open(path) as tar:
                for info in tar:
                    if info.isreg() and info.name.lower().endswith(tree.PICTURES):
                        yield info.name, tar.extractfile(info).read()
        except (tarfile.TarError, EOFError) as error:
            raise errors.BadInput(
                f"The evaluation set {path} cannot be read as a tar of pictures ({error}): fetch"
                " it again, or name a folder of pictures."
            ) from error


def _read_rows(path: str) -> Iterator[tuple[str, bytes]]:
    """The pictures of a parquet or Arrow file, none of a table without any."""
    reader = containers.Reader(containers.folder_of(path))
    for place in containers.find(path, collections.Counter()):
        try:
            if place.reason:
                raise containers.Unreadable(place.reason)
            yield reader.read(place)
        except containers.NoPicture:
            continue
        except containers.Unreadable as error:
            raise errors.BadInput(
                f"The evaluation set {path} cannot be read ({error}): fetch it again."
            ) from error


def _set_of(shard: str) -> str:
    return shard.rpartition("-")[0]


def _hash(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    names, digests, hashes = [], [], []
    for name, data in read(task.inputs):
        names.append(name)
        digests.append(hashlib.sha256(data).hexdigest())
        try:
            hashes.append(pictures.perceptual_hash(ops.decode_rgb(data)))
        except ops.UndecodableImage:
            hashes.append(None)
    table = {
        "set": pa.array([_set_of(task.name)] * len(names), pa.string()),
        "name": pa.array(names, pa.string()),
        "sha256": pa.array(digests, pa.string()),
        "phash": pa.array(hashes, pa.int64()),
    }
    outputs.write_table(f"eval_hashes/{task.name}.parquet", pa.table(table))
    return {"pictures": len(names), "undecodable": hashes.count(None)}


def _embed(
    folder: str, batch_size: int, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    """A row for every picture; of zeros, which is near nothing, where it cannot be decoded."""
    model = selection_embed.load_model(folder, batch_size)
    embedded: dict[int, np.ndarray] = {}
    count = 0

    def decode(data: bytes) -> np.ndarray | None:
        try:
            return model.towers.decode(data)
        except ops.UndecodableImage:
            return None

    files = read(task.inputs[1:])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(files, batch_size)):
            pixels = enumerate(pool.map(decode, (data for _, data in batch)), count)
            whole = {row: picture for row, picture in pixels if picture is not None}
            count += len(batch)
            if whole:
                vectors = model.towers.embed_images(model.params, np.stack(list(whole.values())))
                embedded |= zip(whole, vectors, strict=True)
    rows = np.zeros((count, len(next(iter(embedded.values()), []))), np.float16)
    for row, vector in embedded.items():
        rows[row] = vector
    np.save(outputs.path(f"eval_embeddings/{task.name}.npy"), rows)
    return {"pictures": count}
