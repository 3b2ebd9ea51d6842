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

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed.meshes import ALL_AXES

_LARGE = 2**20  # bytes from which an array counts as replicated

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


def put(mesh: Mesh, tree: Any) -> Any:
    """Whole arrays, the same on every host -> global arrays, split by the path rules."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index]
        ),
        tree,
        tree_shardings(mesh, tree),
    )
