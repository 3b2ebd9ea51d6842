"""The global batch: the rows that each host feeds, and how they become global arrays.

The batch is split over the mesh axes (replica, fsdp).  A host's devices may lie anywhere in the
mesh: on most TPU slices they are not a contiguous block of it.
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
def batch_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """The rows of a global batch (int [n], ascending) that a process has to feed.

    The batch is a multiple of `batch_shards`.  With ``tensor`` across hosts, several processes feed
    the same rows.
    """
    process = jax.process_index() if process is None else process
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    held = np.flatnonzero((owners.reshape(batch_shards(mesh), -1) == process).any(1))
    rows = np.arange(batch_size).reshape(batch_shards(mesh), -1)
    return rows[held].reshape(-1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def over_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside jit: x with its leading dimension over the batch axes; without a mesh, x itself."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weights: jax.Array, mesh: Mesh | None, tensor_axis: int | None = None) -> jax.Array:
    """Inside jit: weights whole on every device, but for what the mesh's tensor axis splits.

    Rows of the batch meet whole weights: one all-gather before a product, and of its gradient one
    all-reduce.  Left to itself, the TPU compiler cuts products with split weights into as many
    pieces as there are devices, to send one while it multiplies by another: for the widths of a
    ViT these take several times as long as the whole product.

    Args:
      tensor_axis: the dimension that the mesh's tensor axis splits, if it divides.
    """
    if mesh is None:
        return weights
    spec = [None] * weights.ndim
    if tensor_axis is not None and weights.shape[tensor_axis] % mesh.shape["tensor"] == 0:
        spec[tensor_axis] = "tensor"
    return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, PartitionSpec(*spec)))


gathered.defvjp(
    lambda weights, *where: (gathered(weights, *where), None),
    lambda mesh, tensor_axis, _, gradient: (gathered(gradient, mesh, tensor_axis),),
)


def to_global(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of the batch (`batch_rows`) -> global arrays, split over the batch axes.

    Raises ValueError: the rows do not divide over the pieces of the batch that this host holds.
    """
    shards = batch_shards(mesh)
    held = len(batch_rows(mesh, shards))
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh), local, (len(local) // held * shards, *local.shape[1:])
        )
        for name, local in batch.items()
    }
