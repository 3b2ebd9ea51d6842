"""Embeds pictures: all of a folder, a tar, parquet or shards, whatever they are called.

    python -m mofi_jax.embed --model M --images D --out E [--entities 3] [--texts LINES.txt]

D is a folder of any depth, with pictures, uncompressed tars (img2dataset's among them), Hugging
Face parquet or our I2E shards in it, or one such file.  E receives

    embeddings.npy        float32 [n, d], L2-normalised: np.load(..., mmap_mode="r")
    pictures.parquet      a row for each: key, container and place in it, width, height, sha256,
                          and with --entities the nearest of the model's class table
    undecodable.parquet   pictures that cannot be decoded, and why
    texts.npy             with --texts: float32 [lines, d]
    result.json           {"model", "images", "pictures", "undecodable", "reasons", "passed_over",
                          "dimension", "seconds", "embedded", "versions", ...}

Killed at any moment, the same command embeds the rest and ends in the same bytes.  All devices are
used; on several hosts, start it on all of them with the flags of `mofi_jax.train`, with D and E on
a file system that all of them see: each takes its share.  `mofi_jax.search` finds pictures in E.
"""

import collections
import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from jaxtyping import UInt8

from mofi_jax import inference
from mofi_jax.common import cli, errors, files, versions
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.data.pictures import containers
from mofi_jax.distributed import hosts
from mofi_jax.inference import embeddings
from mofi_jax.inference.embeddings import Picture
from mofi_jax.training import run_lock

_THREADS = max(8, os.cpu_count() or 8)  # that read and decode
_AHEAD = 2  # batches that are decoded while the devices work on one
_TOLD = 5  # pictures that cannot be decoded whose reasons a host tells
_LOG_SECONDS = 60.0  # where there is no terminal for a bar
_START_TIMEOUT = 300  # seconds to wait for the other hosts
_PROBE = "probe.npy"


def main(
    model: str,
    images: str,
    out: str,
    step: str = "",
    entities: str = "0",
    texts: str = "",
    batch_size: str = "64",
    distributed: bool = False,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> None:
    """Embeds the pictures of `images` by `model` into the folder `out`.

    Args:
      model: a training run, or a Hugging Face CLIP folder.
      step: of a training run, a saved step or best (config.checkpoint.keep_best); else the last.
      entities: how many of the nearest entities are named for each picture.
      texts: a text file whose lines are embedded too.
      batch_size: pictures on each device at a time.
      distributed: on a TPU slice or under SLURM, one process on each host.
      coordinator, processes, process: HOST:PORT of process 0, how many there are, and which one
        this is, counted from 0; left out where jax finds them by itself.
    """
    number, of_device = cli.whole("--entities", entities), cli.whole("--batch_size", batch_size, 1)
    folder = files.output_folder(out, "--out")
    root = files.absolute(files.local_input(images, "the pictures"))
    files.input_folder(model, "--model")
    jax.config.update("jax_enable_preemption_service", False)
    hosts.start(distributed, coordinator, processes, process, _START_TIMEOUT)
    lines = _read_lines(texts)
    settings = {
        "model": str(files.absolute(model)),
        "step": step,
        "images": str(root),
        "entities": number,
    }
    start = time.monotonic()
    with run_lock.held(folder, "--out"), _storage(folder):
        batch = of_device * jax.local_device_count()
        done = hosts.agree(lambda: _prepare(folder, root, settings, batch))
        if done and not lines:
            logging.info("%s is finished already", out)
            return

        # --------------------------------------------------------------------------------- model
        pieces = None if done else embeddings.Pieces(folder)
        # Few pictures are no reason to compute a whole batch of zeros.
        batch = batch if done else min(batch, pieces.pictures)
        loaded = inference.load(model, step=step, batch_size=batch)
        if lines:
            hosts.agree(lambda: _embed_texts(loaded, lines, folder))
        if done:
            return
        if number:  # a model that cannot is told before hours have passed
            none = np.zeros((1, loaded.towers.config.embed_dim), np.float32)
            loaded.towers.nearest_entities(loaded.params, none, number)
        hosts.agree(lambda: _check_probe(loaded, folder, model))

        # -------------------------------------------------------------------------------- pieces
        missing = hosts.agree(pieces.missing)
        own = missing[jax.process_index() :: jax.process_count()]
        reader = containers.Reader(containers.folder_of(root))
        hosts.all_or_none(lambda: _Work(loaded, reader, pieces, number).run(own))

        # -------------------------------------------------------------------------------- result
        facts = {
            "embedded": sum(map(pieces.size, missing)),  # by this run
            "seconds": round(time.monotonic() - start, 1),
            "versions": versions.of("jax", "numpy", "opencv-python-headless", "pillow"),
            "device": jax.devices()[0].device_kind,
        }
        hosts.agree(lambda: _finish(pieces, folder, settings | facts))


def _read_lines(texts: str) -> list[str]:
    if not texts:
        return []
    try:
        lines = files.local_input(texts, "the texts").read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"--texts={texts} cannot be read ({error}): name a text file in UTF-8."
        ) from error
    if not lines:
        raise BadInput(f"--texts={texts} is empty: write a text on each line, or leave it out.")
    return lines


def _prepare(folder: epath.Path, root: epath.Path, settings: dict[str, Any], batch: int) -> bool:
    """Lists the pictures, unless that was done; whether everything is."""
    finished = (folder / embeddings.RESULT).exists()
    if finished or embeddings.is_listed(folder):
        old = embeddings.read_result(folder) if finished else embeddings.Pieces(folder).facts
        for name, value in settings.items():
            if old.get(name) != value:
                raise BadInput(
                    f"--out={folder} holds embeddings with {name}={old.get(name)}, not {value}: "
                    "give the same command as before, or name another folder."
                )
        if finished:
            embeddings.finish(folder)  # a run may have been killed right before it
        return finished
    if (folder / embeddings.VECTORS).exists():
        raise BadInput(
            f"--out={folder} holds an {embeddings.VECTORS} that this command has not finished: "
            "name another folder."
        )
    passed_over: collections.Counter[str] = collections.Counter()
    places = tqdm.tqdm(
        containers.find(root, passed_over),
        **{"desc": "list", "unit": "img", "leave": False, "delay": 2, "disable": None},
    )
    facts = settings | {"passed_over": passed_over}
    number = embeddings.write_listing(folder, places, batch, facts)
    packed = sum(count for suffix, count in passed_over.items() if suffix in containers.ARCHIVES)
    if packed:
        logging.warning("%d archives are passed over: unpack them to have their pictures", packed)
    if not number:
        embeddings.finish(folder)
        others = ", ".join(f"{count} {of or 'without suffix'}" for of, count in passed_over.items())
        raise BadInput(
            f"--images={root} holds no pictures{f' (but {others})' if others else ''}: give a "
            "folder, tar, parquet or shard of them, unpacked."
        )
    logging.info("%d pictures in %s", number, root)
    return False


def _embed_texts(loaded: inference.Model, lines: list[str], folder: epath.Path) -> None:
    with embeddings.appears(folder, "texts.npy") as path, open(path, "wb") as file:
        np.save(file, loaded.embed_texts(lines))


def _check_probe(loaded: inference.Model, folder: epath.Path, model: str) -> None:
    """Raises BadInput where a killed run had other weights under the same name."""
    size = loaded.towers.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    probe = loaded.towers.embed_images(loaded.params, pixels)
    path = folder / embeddings.PARTS / _PROBE
    if not path.exists():
        with embeddings.appears(path.parent, _PROBE) as new, open(new, "wb") as file:
            np.save(file, probe)
        return
    old = np.load(path)
    # Other devices round in other ways, by far less.
    if old.shape != probe.shape or not np.allclose(old, probe, atol=0.02):
        raise BadInput(
            f"--model={model} is not the model that {folder} was begun with (it has been trained "
            "further, or replaced): name another folder, or give --step."
        )


def _finish(pieces: embeddings.Pieces, folder: epath.Path, facts: dict[str, Any]) -> None:
    counts = pieces.assemble()
    result = facts | counts | {"passed_over": pieces.facts["passed_over"]}
    reasons = ", ".join(f"{count} {name}" for name, count in counts["reasons"].items())
    if not counts["pictures"]:
        raise BadInput(
            f"None of the {counts['undecodable']} pictures of --images={facts['images']} can be "
            f"decoded ({reasons}): {folder / embeddings.UNDECODABLE} names them."
        )
    files.write_json(folder / embeddings.RESULT, result)
    embeddings.finish(folder)
    rate = facts["embedded"] / max(facts["seconds"], 1e-9)
    print(
        f"{counts['pictures']:,} pictures embedded, {counts['dimension']} numbers each, "
        f"{rate:,.1f} a second: {folder / embeddings.VECTORS}"
    )
    if reasons:
        print(f"{counts['undecodable']:,} left out ({reasons}): {folder / embeddings.UNDECODABLE}")


@contextlib.contextmanager
def _storage(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = errors.storage_problem(error, folder)
        if problem is None:
            raise
        raise BadInput(
            f"--out={folder} cannot be written ({problem}): make room or correct its permissions; "
            "the same command goes on."
        ) from error


class _Batch(NamedTuple):
    """Pictures on their way to the devices."""

    piece: int
    pixels: UInt8[np.ndarray, "b s s 3"]  # zeros where a picture cannot be decoded
    looks: list[futures.Future]
    last: bool  # of its piece


class _Work:
    """Embeds pieces: threads read and decode ahead, and another one writes what is done."""

    def __init__(
        self,
        loaded: inference.Model,
        reader: containers.Reader,
        pieces: embeddings.Pieces,
        entities: int,
    ):
        self._towers, self._params = loaded.towers, loaded.params
        self._reader, self._pieces, self._entities = reader, pieces, entities
        self._told = 0

    def run(self, own: Sequence[int]) -> None:
        """Raises BadInput: a model whose embeddings are not finite."""
        total = sum(map(self._pieces.size, own))
        bar = _Progress(total)
        looked: collections.deque[tuple[_Batch, list[Picture]]] = collections.deque()
        pictures: list[Picture] = []
        vectors: list[np.ndarray] = []
        writing: collections.deque[futures.Future] = collections.deque()
        with (
            bar,
            futures.ThreadPoolExecutor(1) as writer,
            futures.ThreadPoolExecutor(_THREADS) as pool,
        ):
            stream = self._decoded(pool, own, looked)
            for found in self._towers.embed_image_batches(self._params, stream):
                batch, seen = looked.popleft()
                self._check(found, seen)
                pictures += seen
                vectors.append(found)
                bar.add(len(seen))
                if not batch.last:
                    continue
                done = np.concatenate(vectors).astype(np.float32, copy=False)
                named = self._name(done) if self._entities else None
                writing.append(
                    writer.submit(self._pieces.write, batch.piece, pictures, done, named)
                )
                pictures, vectors = [], []
                if len(writing) > 1:
                    writing.popleft().result()
            for last in writing:
                last.result()

    def _decoded(
        self, pool: futures.Executor, own: Sequence[int], looked: collections.deque
    ) -> Iterator[np.ndarray]:
        """Pixels of batches; notes each in `looked` when the devices are given it."""
        ahead: collections.deque[_Batch] = collections.deque()

        def next_pixels() -> np.ndarray:
            batch = ahead.popleft()
            looked.append((batch, [look.result() for look in batch.looks]))
            return batch.pixels

        for batch in self._batches(pool, own):
            ahead.append(batch)
            if len(ahead) > _AHEAD:
                yield next_pixels()
        while ahead:
            yield next_pixels()

    def _batches(self, pool: futures.Executor, own: Sequence[int]) -> Iterator[_Batch]:
        side, size = self._towers.image_size, self._towers.batch_size
        for piece in own:
            places = self._pieces.places(piece)
            for start in range(0, len(places), size):
                part = places[start : start + size]
                pixels = np.zeros((len(part), side, side, 3), np.uint8)
                looks = [pool.submit(self._look, *of) for of in zip(part, pixels, strict=True)]
                yield _Batch(piece, pixels, looks, start + size >= len(places))

    def _look(self, place: containers.Place, pixels: UInt8[np.ndarray, "s s 3"]) -> Picture:
        """Reads a picture and puts its pixels into their place; what is known of it."""
        if place.reason:
            return Picture(place)
        seen = Picture(place)
        try:
            key, data = self._reader.read(place)
            seen = Picture(place._replace(key=key, length=len(data)))
            header = ops.open_picture(data)
            width, height = header.size
            if ops.orientation(header.info.get("exif")) > 4:
                width, height = height, width
            seen = Picture(seen.place, width, height, hashlib.sha256(data).hexdigest())
            pixels[...] = self._towers.decode(data)
        except (ops.UndecodableImage, containers.Unreadable) as error:
            return Picture(seen.place._replace(reason=str(error)))
        return seen

    def _check(self, found: np.ndarray, seen: Sequence[Picture]) -> None:
        finite = np.isfinite(found).all(1)
        for of, fine in zip(seen, finite.tolist(), strict=True):
            if of.place.reason is None and not fine:
                raise BadInput(
                    f"The embedding of {of.place.key} is not finite: the model has diverged or its "
                    "weights are damaged; use an earlier checkpoint."
                )
            if of.place.reason and self._told < _TOLD:
                self._told += 1
                logging.warning("%s is left out: %s", of.place.key, of.place.reason)

    def _name(self, vectors: np.ndarray) -> list[list[tuple[str, str, float]]]:
        known = self._towers.entities
        ids, cosines = self._towers.nearest_entities(self._params, vectors, self._entities)
        return [
            [(known.qids[i], known.names[i], cosine) for i, cosine in zip(*of, strict=True)]
            for of in zip(ids.tolist(), cosines.tolist(), strict=True)
        ]


class _Progress(contextlib.AbstractContextManager):
    """A bar with the time left, of host 0 for its own share; lines in a log without a terminal."""

    def __init__(self, total: int):
        first = jax.process_index() == 0
        self._bar = tqdm.tqdm(
            **{"total": total, "desc": "embed", "unit": "img", "leave": False, "delay": 2},
            disable=None if first else True,  # None: shown on terminals only
        )
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._said = self._start if first else float("inf")

    def add(self, number: int) -> None:
        self._bar.update(number)
        self._done += number
        now = time.monotonic()
        if self._bar.disable and now - self._said > _LOG_SECONDS:
            self._said = now
            rate = self._done / (now - self._start)
            left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
            logging.info(
                "%d of %d pictures, %.0f a second, %s left", self._done, self._total, rate, left
            )

    def __exit__(self, *_: Any) -> None:
        self._bar.close()


if __name__ == "__main__":
    cli.run(main)
