"""Embeds the pieces of a listing of pictures, as fast as threads decode and devices compute."""

import collections
import contextlib
import datetime
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt8

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.data.pictures import containers
from mofi_jax.inference import embeddings
from mofi_jax.inference.embeddings import Picture
from mofi_jax.inference.model import Model

THREADS = max(8, os.cpu_count() or 8)  # that read and decode
_OF_JOB = 8  # pictures that a thread is given at once
_AHEAD = 2  # batches that are decoded while the devices work on one
_TOLD = 5  # pictures that cannot be decoded whose reasons a host tells
_LOG_SECONDS = 60.0  # where there is no terminal for a bar


class _Batch(NamedTuple):
    """Pictures on their way to the devices."""

    piece: int
    pixels: UInt8[np.ndarray, "b s s 3"]  # zeros where a picture cannot be decoded
    looks: list[futures.Future]  # each of some pictures
    last: bool  # of its piece


class Work:
    """Embeds pieces: threads read and decode ahead, and another one writes what is done."""

    def __init__(
        self,
        loaded: Model,
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
            futures.ThreadPoolExecutor(THREADS) as pool,
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
            seen = itertools.chain.from_iterable(look.result() for look in batch.looks)
            looked.append((batch, [*seen]))
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
                looks = [
                    pool.submit(self._look_at, part[i : i + _OF_JOB], pixels[i : i + _OF_JOB])
                    for i in range(0, len(part), _OF_JOB)
                ]
                yield _Batch(piece, pixels, looks, start + size >= len(places))

    def _look_at(
        self, places: Sequence[containers.Place], pixels: UInt8[np.ndarray, "j s s 3"]
    ) -> list[Picture]:
        return [self._look(*of) for of in zip(places, pixels, strict=True)]

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
