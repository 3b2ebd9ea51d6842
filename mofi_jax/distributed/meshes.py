"""The device mesh: its axes, and how slices and hosts are laid along them.

* ``replica``: across slices or hosts; batch only.
* ``fsdp``: batch and parameters.
* ``tensor``: wide matrices; 1 unless asked for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts

BATCH_AXES = ("replica", "fsdp")

ALL_AXES = ("replica", "fsdp", "tensor")


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh over all devices; one size may be -1 and takes what the others leave.

    Args:
      devices: `hosts.devices` if left out; of a slice to compile for, those of a topology.

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
