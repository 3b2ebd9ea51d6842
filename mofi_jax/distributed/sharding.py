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


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs, by the path rules."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, partition_spec(path_name(path), leaf.shape, mesh.shape)
        ),
        tree,
    )


def check_replication(mesh: Mesh | AbstractMesh, tree: Any, limit: float) -> None:
    """Refuses a state of which more than ``limit`` of the bytes are replicated on every device.

    A dimension that does not divide over ``fsdp`` stays whole, and on wide meshes memory would run
    out without saying why.  Arrays below 1 MiB do not count.

    Raises BadInput: names the largest arrays and the largest ``fsdp`` that splits enough.
    """
    if mesh.size == 1:
        return
    tensor = mesh.shape["tensor"]
    rest = mesh.size // tensor  # devices for replica and fsdp
    leaves = [
        (leaf.size * leaf.dtype.itemsize, name, leaf.shape)
        for name, leaf in named_leaves(tree).items()
    ]
    total = sum(size for size, _, _ in leaves)

    def replicated_on(fsdp: int) -> list[tuple[int, str]]:
        axes = {"replica": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
        sizes = [
            (size, name)
            for size, name, shape in leaves
            if size >= 2**20 and not any(partition_spec(name, shape, axes))
        ]
        return sorted(sizes, reverse=True)

    def share(arrays: list[tuple[int, str]]) -> float:
        return sum(size for size, _ in arrays) / max(total, 1)

    whole = replicated_on(mesh.shape["fsdp"])
    if share(whole) <= limit:
        return
    remedy = "choose another config.mesh"
    for fsdp in range(rest, 1, -1):
        if rest % fsdp == 0 and share(replicated_on(fsdp)) <= limit:
            remedy = f"set config.mesh.fsdp={fsdp} and config.mesh.replica={rest // fsdp}"
            break
    names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in whole[:3])
    raise BadInput(
        f"{share(whole):.0%} of the training state would lie whole on each of {mesh.size} devices, "
        f"{len(whole)} arrays, {names} first: {remedy}, or raise config.max_replicated={limit:g} "
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
