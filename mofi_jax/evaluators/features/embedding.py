"""The features that evaluators compare: of picture sets, each embedded once, and of texts."""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.distributed import meshes, sharding
from mofi_jax.evaluators.sets.pictures import PictureSet
from mofi_jax.losses import blocks

_THREADS = 8
_CHUNK = 1024  # pictures decoded ahead of the devices: 150 MB at 224 pixels
_TAKEN = 4096  # rows gathered at a time


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
    """A model as evaluators see it: its parameters, and features by them, the same on every host.

    One serves all evaluators of a round, which so share the features of a picture set.
    """

    def __init__(self, towers: Any, params: Any):
        self.towers, self.params = towers, params
        self._features: dict[str, Features] = {}

    def pictures(self, pictures: PictureSet) -> Features:
        """Features of a picture set, in its order.

        Raises:
          BadInput: a picture that cannot be decoded (skipping it would change the metric), or
            features that are not finite.
        """
        key = str(pictures.path)
        if key not in self._features:
            features = _finite(self._embed(pictures))
            self._features[key] = Features.of(features, self.towers.mesh)
        return self._features[key]

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Features of texts, float32, L2-normalised; BadInput if they are not finite."""
        return _finite(self.towers.embed_texts(self.params, texts).astype(np.float32))

    def _embed(self, pictures: PictureSet) -> np.ndarray:
        # Every host reads all pictures and runs the same number of batches, so that no collective
        # waits for a host that has finished.  Threads decode one chunk ahead of the devices.
        def decode(i: int) -> np.ndarray:
            try:
                return self.towers.decode(pictures.read(i))
            except ops.UndecodableImage as error:
                raise BadInput(
                    f"{pictures.names[i]} in {pictures.path} cannot be decoded ({error}): fetch "
                    "the picture set again, since scores are comparable only on the complete set."
                ) from None

        features = []
        bar = tqdm.tqdm(
            total=len(pictures),
            desc=f"embed {pictures.path.name}",
            unit="img",
            leave=False,
            delay=2,
            disable=None if jax.process_index() == 0 else True,  # None: shown on terminals only
        )
        with futures.ThreadPoolExecutor(_THREADS) as pool, bar:
            jobs = [pool.submit(decode, i) for i in range(min(_CHUNK, len(pictures)))]
            for start in range(0, len(pictures), _CHUNK):
                images = np.stack([job.result() for job in jobs])
                following = range(start + _CHUNK, min(start + 2 * _CHUNK, len(pictures)))
                jobs = [pool.submit(decode, i) for i in following]
                features.append(self.towers.embed_images(self.params, images))
                bar.update(len(images))
        return np.concatenate(features).astype(np.float32, copy=False)


def picture_card(towers: Any, pictures: PictureSet) -> dict[str, Any]:
    """The part of a protocol card that concerns the pictures and their features."""
    return {
        "pictures": len(pictures),
        "classes": len(np.unique(pictures.classes)),
        "sha256": pictures.sha256(),
        "preprocessing": towers.preprocess,
        "feature": f"{type(towers).__name__}.embed_images (towers: after the projection), float32",
        "normalisation": "L2",
    }


def _finite(features: np.ndarray) -> np.ndarray:
    # NaN compares false with everything, which would give every relevant row rank 1.
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise BadInput(
            f"The features are not finite (row {bad[0]}): the model has diverged or its weights "
            "are damaged; use an earlier checkpoint."
        )
    return features
