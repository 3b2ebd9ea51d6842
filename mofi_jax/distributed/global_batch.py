"""The global batch: which of its rows a host feeds, and how they become global arrays.

The batch is split over the mesh axes (replica, fsdp).  A host's devices may lie anywhere in the
mesh: on most TPU slices they are no block of it.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mofi_jax.distributed.meshes import BATCH_AXES


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces into which the batch dimension is split."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


@functools.lru_cache(maxsize=64)
def held_shards(mesh: Mesh, process: int | None = None) -> np.ndarray:
    """Which pieces of the batch (int [n], ascending) lie on the devices of a process.

    With ``tensor`` across hosts, several processes hold the same piece.

    Args:
      process: this one if None.
    """
    process = jax.process_index() if process is None else process
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return np.flatnonzero((owners.reshape(batch_shards(mesh), -1) == process).any(1))


def batch_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """The rows of a global batch (int [n], ascending) that a process has to feed.

    Args:
      batch_size: a multiple of `batch_shards`.
      process: this one if None.
    """
    length = batch_size // batch_shards(mesh)
    return (held_shards(mesh, process)[:, None] * length + np.arange(length)).reshape(-1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def over_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside jit: x with its leading dimension over the batch axes; without a mesh, x itself."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def to_global(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of the batch (`batch_rows`) -> global arrays, split over the batch axes.

    Raises:
      ValueError: the rows do not divide over the pieces of the batch that this host holds.
    """
    sharding, shards, held = batch_sharding(mesh), batch_shards(mesh), len(held_shards(mesh))
    if any(len(local) % held for local in batch.values()):
        raise ValueError(f"rows that do not divide over {held} pieces of the batch")
    return {
        name: jax.make_array_from_callback(
            (len(local) // held * shards, *local.shape[1:]),
            sharding,
            lambda index, local=local: local[local_piece(mesh, index, len(local))],
        )
        for name, local in batch.items()
    }


def local_piece(
    mesh: Mesh, index: tuple[slice, ...], rows: int, process: int | None = None
) -> slice:
    """Where a device's piece of the global batch is among the rows of its host.

    Args:
      index: of the piece in the global array.
      rows: of the host, as `batch_rows` counts them.
      process: this one if None.
    """
    held = held_shards(mesh, process)
    length = rows // len(held)
    start = int(np.searchsorted(held, (index[0].start or 0) // length)) * length
    return slice(start, start + length)
