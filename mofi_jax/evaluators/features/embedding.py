"""The features that evaluators compare: of picture sets, each embedded once, and of texts.

Every host decodes the pictures whose features its own devices hold, wherever these lie in the mesh;
features stay split over all devices, and hosts gather only the rows that they ask for.

A picture that cannot be decoded stays in the set with a random feature of its own: it finds, and is
found, by chance, and damaged pictures are no more like one another than like the others.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.distributed import hosts, meshes, sharding
from mofi_jax.evaluators.sets.pictures import PictureSet
from mofi_jax.losses import blocks

BATCH_SIZE = 64  # pictures or texts on each device at a time

UNDECODABLE = "undecodable"  # their names, in what is known of a picture set

_THREADS = max(8, os.cpu_count() or 8)  # that read and decode
_TAKEN = 4096  # rows gathered at a time
_TOLD = 5  # pictures that cannot be decoded whose reasons a host tells
_NAMED = 20  # of them whose names a card holds


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Rows that lie split over all devices of a mesh, in the order of these in it."""

    rows: Float32[jax.Array, "padded d"]  # L2-normalised; zeros from `size` on
    size: int
    mesh: Mesh

    @classmethod
    def of(cls, array: Float[np.ndarray, "n d"], mesh: Mesh) -> "Features":
        """Of an array that is the same on every host."""
        array = np.asarray(array, np.float32)
        held = max(1, -(-len(array) // mesh.size))
        padded = np.pad(array, ((0, held * mesh.size - len(array)), (0, 0)))
        split = NamedSharding(mesh, P(meshes.ALL_AXES))
        rows = jax.make_array_from_callback(padded.shape, split, padded.__getitem__)
        return cls(rows, len(array), mesh)

    def __len__(self) -> int:
        return self.size

    def on_all(self, numbers: Int[np.ndarray, " m"]) -> Float32[jax.Array, "m d"]:
        """These rows on every device; zeros for numbers beyond the last."""
        numbers = sharding.put(self.mesh, np.asarray(numbers, np.int32))
        return _gather(self.rows, numbers, mesh=self.mesh)

    def take(self, numbers: Int[np.ndarray, " m"] | Sequence[int]) -> Float32[np.ndarray, "m d"]:
        """These rows on every host, of which nothing else is gathered."""
        numbers = np.asarray(numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.size:
            raise ValueError(f"rows {numbers.min()} to {numbers.max()} of {self.size}")
        found = np.empty((len(numbers), self.rows.shape[1]), np.float32)
        for start in range(0, len(numbers), _TAKEN):
            part = numbers[start : start + _TAKEN]
            # Few sizes, each of which is compiled.
            padded = np.pad(part, (0, (1 << (len(part) - 1).bit_length()) - len(part)))
            found[start : start + _TAKEN] = np.asarray(self.on_all(padded))[: len(part)]
        return found

    def numpy(self) -> Float32[np.ndarray, "n d"]:
        """All rows on every host."""
        return self.take(np.arange(self.size))


@functools.partial(jax.jit, static_argnames="mesh")
def _gather(rows, numbers, *, mesh: Mesh):
    def shard(rows, numbers):
        local = numbers - lax.axis_index(meshes.ALL_AXES) * len(rows)
        here = (local >= 0) & (local < len(rows))
        found = rows[jnp.clip(local, 0, len(rows) - 1)]
        return lax.psum(jnp.where(here[:, None], found, 0.0), meshes.ALL_AXES)

    return blocks.shard_map(shard, mesh, (P(meshes.ALL_AXES), P()), P())(rows, numbers)


class Embedder:
    """A model as evaluators see it: its parameters, and features by them.

    One serves all evaluators of a round, which so share the features of a picture set and of texts.

    Args:
      batch_size: pictures on each device at a time, in all sets, so that there is one program.

    Raises BadInput: a batch without a picture.
    """

    def __init__(self, towers: Any, params: Any, batch_size: int = BATCH_SIZE):
        if batch_size < 1:
            raise BadInput(f"The batch size is {batch_size}: give at least one picture.")
        self.towers, self.params, self._batch = towers, params, batch_size
        self._pictures: dict[Any, tuple[Features, PictureSet]] = {}
        self._texts: dict[tuple[str, ...], np.ndarray] = {}

    def pictures(self, pictures: PictureSet) -> Features:
        """Features of a picture set, in its order; called on all hosts.

        Raises:
          BadInput: on every host, a set of which no picture can be decoded, or one cannot even be
            read, or features that are not finite.
        """
        key = pictures.key
        if key not in self._pictures:
            features = self._embed(pictures)
            # NaN compares false with everything, which would give every relevant row rank 1.
            bad = int(_first_not_finite(features.rows))
            if bad < len(features):
                raise _not_finite(pictures.names[bad], bad)
            self._pictures[key] = features, pictures
        features, read = self._pictures[key]
        pictures.known.update(read.known)
        return features

    def undecodable(self) -> dict[str, list[str]]:
        """Of each picture set embedded so far, the names of what cannot be decoded, if any."""
        found: dict[str, dict[str, None]] = {}
        for _, of in self._pictures.values():  # several may be called by one path
            found.setdefault(str(of.path), {}).update(dict.fromkeys(of.known[UNDECODABLE]))
        return {path: list(names) for path, names in found.items() if names}

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Features of texts, L2-normalised, on every host; BadInput if they are not finite."""
        key = tuple(texts)
        if key not in self._texts:
            features = self.towers.embed_texts(self.params, texts).astype(np.float32)
            bad = np.flatnonzero(~np.isfinite(features).all(1))
            if len(bad):
                raise _not_finite(repr(texts[bad[0]]), int(bad[0]))
            self._texts[key] = features
        return self._texts[key]

    def _embed(self, pictures: PictureSet) -> Features:
        # A device holds consecutive rows, and they are its part of every batch: no row changes
        # hosts, and each picture is read by one alone.  All hosts run the same number of batches,
        # so that no collective waits for one that has finished.
        mesh, size, batch = self.towers.mesh, len(pictures), self._batch
        processes = np.array([device.process_index for device in mesh.devices.flat])
        places = np.flatnonzero(processes == jax.process_index())[:, None]
        held = -(-size // mesh.size)  # rows of a device
        split = NamedSharding(mesh, P(meshes.ALL_AXES))
        undecodable: dict[int, ops.UndecodableImage] = {}
        failures: dict[int, Exception] = {}
        # Of each picture its SHA-256, and whether it cannot be decoded.
        told = np.zeros((len(places), held, 33), np.uint8)

        def decode(i: int) -> np.ndarray | None:
            own = told[np.searchsorted(places[:, 0], i // held), i % held]
            try:
                data = pictures.read(i)
                own[:32] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
                return self.towers.decode(data)
            except ops.UndecodableImage as error:
                undecodable[i], own[32] = error, 1
            except Exception as error:  # noqa: BLE001  told when no other host waits for this one
                failures[i] = error
            return None

        def submit(start: int) -> list[futures.Future | None]:
            numbers = start + np.arange(batch)
            rows = np.where(numbers < held, places * held + numbers, size).ravel().tolist()
            return [pool.submit(decode, row) if row < size else None for row in rows]

        bar = tqdm.tqdm(
            total=size,
            desc=f"embed {pictures.path.name}",
            unit="img",
            leave=False,
            delay=2,
            disable=None if jax.process_index() == 0 else True,  # None: shown on terminals only
        )
        features = previous = filler = None
        with futures.ThreadPoolExecutor(_THREADS) as pool, bar:
            jobs = submit(0)  # threads decode one batch ahead of the devices
            for start in range(0, held, batch):
                decoded = [job and job.result() for job in jobs]
                jobs = submit(start + batch)
                filler = next((pixels for pixels in decoded if pixels is not None), filler)
                if filler is None:  # no picture of the set is this host's
                    filler = np.zeros((self.towers.image_size, self.towers.image_size, 3), np.uint8)
                local = np.stack([filler if pixels is None else pixels for pixels in decoded])
                images = jax.make_array_from_process_local_data(
                    split, local, (mesh.size * batch, *filler.shape)
                )
                found = self.towers.embed_images(self.params, images)
                if features is None:
                    shape = held * mesh.size, found.shape[1]
                    features = jnp.zeros(shape, jnp.float32, device=split)
                features = _store(features, found, start, size, mesh=mesh)
                jax.block_until_ready(previous)  # no more than two batches lie on the devices
                previous = found
                bar.update(min(mesh.size * batch, size - bar.n))
        hosts.all_or_none(lambda: _raise_first(failures, pictures))
        for i, error in sorted(undecodable.items())[:_TOLD]:
            logging.warning("%s in %s: %s", pictures.names[i], pictures.path, error)
        # Who asks for the set's hash would read all of it again.
        told = jax.make_array_from_process_local_data(
            split, told.reshape(-1, 33), (mesh.size * held, 33)
        )
        told = multihost_utils.process_allgather(told, tiled=True)[:size]
        pictures.keep_digests(row.tobytes() for row in told[:, :32])
        broken = np.flatnonzero(told[:, 32])
        pictures.known[UNDECODABLE] = [pictures.names[i] for i in broken]
        if len(broken) == size:
            raise BadInput(
                f"None of the {size} pictures of {pictures.path} can be decoded "
                f"({pictures.names[0]} is the first): fetch the set again."
            )
        if len(broken):
            logging.warning(
                "%d of the %d pictures of %s cannot be decoded and have random features: scores do "
                "not compare with those of the whole set; fetch it again.",
                *(len(broken), size, pictures.path),
            )
            # By the set too: what has one name in two of them, such as the training and the test
            # set, is not to find itself there.
            seeds = [f"{pictures.sha256()} {pictures.names[i]}" for i in broken]
            new = np.stack([_random(seed, features.shape[1]) for seed in seeds])
            new = sharding.put(mesh, (broken.astype(np.int32), new))
            features = _replace(features, *new, mesh=mesh)
        return Features(features, size, mesh)


def _raise_first(failures: dict[int, Exception], pictures: PictureSet) -> None:
    if not failures:
        return
    first = min(failures)
    error = failures[first]
    if isinstance(error, OSError):
        raise BadInput(
            f"{pictures.names[first]} in {pictures.path} cannot be read "
            f"({error.strerror or error}): correct its permissions, or fetch the set again."
        ) from error
    raise error


def _random(seed: str, dim: int) -> Float32[np.ndarray, " d"]:
    """A direction that is as good as any other, and the same each time."""
    number = int.from_bytes(hashlib.sha256(seed.encode(errors="surrogateescape")).digest())
    feature = np.random.default_rng(number).standard_normal(dim, np.float32)
    return feature / np.linalg.norm(feature)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _replace(rows, numbers, new, *, mesh: Mesh):
    """Other rows at these numbers."""

    def shard(rows, numbers, new):
        local = numbers - lax.axis_index(meshes.ALL_AXES) * len(rows)
        local = jnp.where(local < 0, len(rows), local)  # beyond the end: dropped
        return rows.at[local].set(new, mode="drop")

    split = P(meshes.ALL_AXES)
    return blocks.shard_map(shard, mesh, (split, P(), P()), split)(rows, numbers, new)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _store(features, found, start, size, *, mesh: Mesh):
    """A batch's rows at place `start` of every device; no padding."""

    def shard(features, found, start, size):
        held = len(features)
        place = start + jnp.arange(len(found))
        real = (place < held) & (lax.axis_index(meshes.ALL_AXES) * held + place < size)
        return features.at[jnp.where(real, place, held)].set(found, mode="drop")

    specs = P(meshes.ALL_AXES), P(meshes.ALL_AXES), P(), P()
    run = blocks.shard_map(shard, mesh, specs, P(meshes.ALL_AXES))
    return run(features, found.astype(jnp.float32), start, size)


@jax.jit
def _first_not_finite(rows: jax.Array) -> jax.Array:
    """Number of the first row that is not finite, else of all rows."""
    return jnp.where(jnp.isfinite(rows).all(1), len(rows), jnp.arange(len(rows))).min()


def _not_finite(what: str, row: int) -> BadInput:
    return BadInput(
        f"The features of {what} are not finite (row {row}): the model has diverged or its weights "
        "are damaged; use an earlier checkpoint."
    )


def picture_card(towers: Any, pictures: PictureSet) -> dict[str, Any]:
    """The part of a protocol card that concerns the pictures and their features."""
    facts = {}
    if UNDECODABLE in pictures.known:  # of a set that was not asked for nobody knows
        broken = pictures.known[UNDECODABLE]
        named = {"names": broken[:_NAMED], "feature": "random"} if broken else {}
        facts[UNDECODABLE] = {"pictures": len(broken)} | named
    return {
        "pictures": len(pictures),
        "classes": len(np.unique(pictures.classes)),
        "sha256": pictures.sha256(),
        **pictures.origin,
        "preprocessing": towers.preprocess,
        "feature": f"{type(towers).__name__}.embed_images (towers: after the projection), float32",
        "normalisation": "L2",
        **facts,
    }
