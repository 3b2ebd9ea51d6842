"""Where arrays live: the mesh, the path rules for parameters, a host's batch to the devices.

This file knows nothing of models or losses beyond the names of parameters.  Mesh axes:

* ``replica``: across slices or hosts; batch only.
* ``fsdp``: batch and parameters.
* ``tensor``: wide matrices; 1 unless asked for.

The batch is split over (replica, fsdp); the class table over all axes on its class dimension.  A
host's devices may lie anywhere in the mesh: on most TPU slices they are no block of it.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mofi_jax import hosts
from mofi_jax.errors import BadInput

BATCH_AXES = ("replica", "fsdp")
ALL_AXES = ("replica", "fsdp", "tensor")

_LARGE = 2**20  # bytes from which an array counts as replicated

ENTITY_TABLE = "entity_table"  # the class table among the parameters
# Of `table_rows`: a table whose rows lie in another order names the wrong entities.
TABLE_ORDER = 1

# Ordered, first match wins, applied to parameters and optimizer moments alike (their paths end in
# the parameter's path).  Each entry names the axis for each dimension counted from the last one, so
# that a leading layer axis of a scanned stack needs no rule of its own.
RULES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"/v_(row|col)/", ()),  # Adafactor's sums, laid out unlike their parameter and small
    (rf"{ENTITY_TABLE}$", (ALL_AXES, None)),
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
    (r"token_embedding$", (None, "fsdp")),
    (r"patch_embedding/kernel$", (None, "fsdp")),
    (r"projection/kernel$", ("fsdp", None)),
    (r".*", ()),
)


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh over all devices; one size may be -1 and takes what the others leave.

    Args:
      devices: `hosts.devices` if left out; of a slice to compile for, `tpu_topology.devices`.

    Raises:
      BadInput: the sizes do not multiply to the number of devices, or slices would share
        parameters; or there are none.
    """
    given = hosts.devices() if devices is None else list(devices)
    sizes = [replica, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(given) % known == 0:
        sizes[sizes.index(-1)] = len(given) // known
    if -1 in sizes or int(np.prod(sizes)) != len(given):
        raise BadInput(
            f"config.mesh replica={replica} fsdp={fsdp} tensor={tensor} does not cover "
            f"{len(given)} devices: make the sizes multiply to that number or set one of them to "
            "-1."
        )
    replica, fsdp, tensor = sizes
    groups: dict[int, list[Any]] = {}
    for device in given:
        groups.setdefault(slice_of(device), []).append(device)
    if replica % len(groups):
        raise BadInput(
            f"config.mesh.replica={replica} does not divide over {len(groups)} slices: make it "
            f"{len(groups)} or a multiple, as parameters are not split across slices."
        )
    # Slices are joined by the data-centre network alone: they are laid along ``replica``, which
    # only gradients cross, once a step.
    shape = (replica // len(groups), fsdp, tensor)
    arranged = [
        mesh_utils.create_device_mesh(shape, groups[number], allow_split_physical_axes=True)
        for number in sorted(groups)
    ]
    # Auto axes, spelled out once for the whole project: jax's default is Explicit axes.
    return Mesh(np.concatenate(arranged), ALL_AXES, axis_types=(AxisType.Auto,) * 3)


def slice_of(device: Any) -> int:
    """The TPU slice of a device; 0 for all others.

    jax numbers the hosts of GPUs and CPUs as slices too (by their boot id), but a network between
    nodes is no reason to keep parameters whole on each of them: ``replica`` decides that there.
    """
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def padded_rows(rows: int, mesh: Mesh) -> int:
    """Rows of the class table, rounded up so that every device holds the same number."""
    return -(-rows // mesh.size) * mesh.size


def table_rows(ids: Any, num_entities: int) -> Any:
    """Rows of the class table at which entities live: a fixed shuffle of range(num_entities).

    Ids come by descending image count, and devices hold contiguous rows: without a shuffle the
    first device would own every frequent entity, and in sampled training nearly all labels of a
    batch.  The ids are dealt onto piles, consecutive ones far apart (golden-ratio multiplication),
    and the piles lie one after the other in the table.  That depends on the number of entities
    alone, so a checkpoint fits any number of devices.

    Args:
      ids: int32 entity ids, numpy or jax, any shape; ids outside [0, num_entities) stay as they
        are.
      num_entities: size of the vocabulary.
    """
    piles, multiplier = _piles(num_entities)
    height = num_entities // piles
    rows = ids % piles * multiplier % piles * height + ids // piles
    # The last, incomplete round (the rarest entities) stays where it is.
    dealt = (ids >= 0) & (ids < piles * height)
    return _where(dealt, rows, ids)


def table_entities(rows: Any, num_entities: int) -> Any:
    """The inverse of `table_rows`: entity ids of rows of the class table."""
    piles, multiplier = _piles(num_entities)
    height = num_entities // piles
    ids = rows // height * pow(multiplier, -1, piles) % piles + rows % height * piles
    dealt = (rows >= 0) & (rows < piles * height)
    return _where(dealt, ids, rows)


def _piles(num_entities: int) -> tuple[int, int]:
    """Number of piles (a power of two, many times the devices of a pod) and the dealing factor."""
    piles = 1
    while piles < 4096 and 16 * piles <= num_entities:
        piles *= 2
    return piles, round(piles * 0.6180339887) | 1


def _where(condition: Any, a: Any, b: Any) -> Any:
    return (jnp if isinstance(condition, jax.Array) else np).where(condition, a, b)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as 'image/blocks/mlp/fc1/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one array by the first rule that matches; what does not divide stays whole."""
    return PartitionSpec(*_spec(name, shape, mesh.shape))


def _spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> list[Any]:
    """Axes of each dimension on a mesh of these sizes."""
    if not shape:
        return []
    axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
    # Fewer dimensions than the rule has: one value for each row of the class table.
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)[: len(shape)]
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        names = (axis,) if isinstance(axis, str) else (axis or ())
        pieces = math.prod(sizes[n] for n in names)
        spec.append(axis if pieces > 1 and size % pieces == 0 else None)
    return spec


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by the path rules."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)),
        tree,
    )


def check_replication(mesh: Mesh | AbstractMesh, tree: Any, limit: float) -> None:
    """Refuses a state of which more than ``limit`` of the bytes lie whole on every device.

    Wide models on wide meshes: a dimension that does not divide over ``fsdp`` stays whole, memory
    runs out, and nothing says why.  Arrays below 1 MiB do not count.

    Args:
      tree: ShapeDtypeStructs or arrays with shardings.
      limit: ``config.max_replicated``.

    Raises:
      BadInput: names the largest arrays and the largest ``fsdp`` that splits enough.
    """
    if mesh.size == 1:
        return
    leaves = [
        (path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]

    def whole(fsdp: int) -> list[tuple[int, str]]:
        sizes = {"replica": rest // fsdp, "fsdp": fsdp, "tensor": mesh.shape["tensor"]}
        found = [
            (leaf.size * leaf.dtype.itemsize, name)
            for name, leaf in leaves
            if not any(_spec(name, leaf.shape, sizes))
        ]
        return sorted((entry for entry in found if entry[0] >= _LARGE), reverse=True)

    rest = mesh.size // mesh.shape["tensor"]
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    found = whole(mesh.shape["fsdp"])
    share = sum(size for size, _ in found) / max(total, 1)
    if share <= limit:
        return
    better = [
        fsdp
        for fsdp in range(rest, 1, -1)
        if rest % fsdp == 0 and sum(size for size, _ in whole(fsdp)) <= limit * total
    ]
    remedy = (
        f"set config.mesh.fsdp={better[0]} and config.mesh.replica={rest // better[0]}"
        if better
        else "choose another config.mesh"
    )
    names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in found[:3])
    raise BadInput(
        f"{share:.0%} of the training state would lie whole on each of {mesh.size} devices, "
        f"{len(found)} arrays, {names} first: {remedy}, or raise config.max_replicated={limit:g} "
        "if that is meant."
    )


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


def put(mesh: Mesh, tree: Any) -> Any:
    """Whole arrays, the same on every host -> global arrays, split by the path rules."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index]
        ),
        tree,
        tree_shardings(mesh, tree),
    )
