"""The sharding rules: path patterns that say over which mesh axes each parameter is split.

This file knows nothing of models or losses beyond the names of parameters.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mofi_jax.distributed.meshes import ALL_AXES, BATCH_AXES

ENTITY_TABLE = "entity_table"  # the class table among the parameters

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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as 'image/blocks/mlp/fc1/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their `path_name`."""
    return {path_name(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}


def partition_spec(name: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    """The spec of one array by the first rule that matches; what does not divide stays whole.

    ``name`` is its path, as of `path_name`, and ``axes`` are the mesh's sizes (``mesh.shape``).
    """
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    # Fewer dimensions than the rule has: one value for each row of the class table.
    rule = (None,) * (len(shape) - len(rule)) + rule[: len(shape)]
    spec = []
    for size, axis in zip(shape, rule, strict=True):
        names = (axis,) if isinstance(axis, str) else (axis or ())
        pieces = math.prod(axes[n] for n in names)
        spec.append(axis if pieces > 1 and size % pieces == 0 else None)
    return PartitionSpec(*spec)


def tree_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by the path rules."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, partition_spec(path_name(path), leaf.shape, mesh.shape)
        ),
        tree,
    )


def device_bytes(mesh: Mesh | AbstractMesh, tree: Any) -> tuple[int, int]:
    """Bytes of a tree on one device of ``mesh``, and how many of them every other device holds."""
    held = whole = 0
    places = jax.tree.leaves(tree_shardings(mesh, tree))
    for leaf, place in zip(jax.tree.leaves(tree), places, strict=True):
        size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        held += size
        whole += size if place.is_fully_replicated else 0
    return held, whole


def layout(
    mesh: Mesh | AbstractMesh, tree: Any, *, slices: int, memory: int | None = None
) -> tuple[str, bool]:
    """How a training state lies on ``mesh``, in words, and whether much of it lies whole on all.

    A dimension that does not divide over ``fsdp`` stays whole: then the words name the mesh that
    leaves the least on a device.  Much is a tenth of ``memory``, the bytes of a device, if known.
    """
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    if mesh.size == 1:
        return f"{total / 2**30:.3f} GiB of state on the only device", False
    tensor = mesh.shape["tensor"]
    across = mesh.size // slices // tensor  # devices over which fsdp may split
    meshes = (
        AbstractMesh((mesh.size // (fsdp * tensor), fsdp, tensor), ALL_AXES)
        for fsdp in range(1, across + 1)
        if across % fsdp == 0
    )
    held, whole = device_bytes(mesh, tree)
    text = (
        f"{held / 2**30:.3f} of {total / 2**30:.3f} GiB of state on each of {mesh.size} devices, "
        f"{whole / 2**30:.3f} of it whole on all"
    )
    least, best = min(((device_bytes(m, tree)[0], m) for m in meshes), key=lambda pair: pair[0])
    if least < held:
        sizes = " ".join(f"config.mesh.{axis}={best.shape[axis]}" for axis in BATCH_AXES)
        text += f"; {sizes} would leave {least / 2**30:.3f} on each"
    return text, memory is not None and whole > memory / 10


def put(mesh: Mesh, tree: Any) -> Any:
    """Whole arrays, the same on every host -> global arrays, split by the path rules."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index]
        ),
        tree,
        tree_shardings(mesh, tree),
    )
