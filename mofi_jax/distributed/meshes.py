"""The device mesh: its axes, and how slices and hosts are laid along them.

* ``replica``: across slices or hosts; batch only.
* ``fsdp``: batch and parameters.
* ``tensor``: wide matrices; 1 unless asked for.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mofi_jax.common import processes
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts

BATCH_AXES = ("replica", "fsdp")
ALL_AXES = ("replica", "fsdp", "tensor")


def make_mesh(
    replica: int = -1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh over all devices.

    A size of -1 takes what the others leave.  Where both ``replica`` and ``fsdp`` are -1, there is
    one replica for each TPU slice and a single one elsewhere (`slice_of`).

    Args:
      devices: `hosts.devices` if left out; a topology's to compile for a slice.

    Raises BadInput: the sizes do not multiply to the number of devices, or slices share parameters.
    """
    devices = hosts.devices() if devices is None else list(devices)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    sizes = [len(slices) if replica == fsdp == -1 else replica, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or int(np.prod(sizes)) != len(devices):
        raise BadInput(
            f"config.mesh replica={replica} fsdp={fsdp} tensor={tensor} does not cover "
            f"{len(devices)} devices: make the sizes multiply to that number, or leave replica and "
            "fsdp at -1 and let tensor divide the devices of a slice."
        )
    replica, fsdp, tensor = sizes
    if replica % len(slices):
        raise BadInput(
            f"config.mesh.replica={replica} does not divide over {len(slices)} slices: leave it "
            f"and fsdp at -1, or make it {len(slices)} or a multiple, as parameters are not split "
            "across slices."
        )
    # Only the data-centre network joins slices: they lie along ``replica``, which only gradients
    # cross, once a step.
    shape = (replica // len(slices), fsdp, tensor)
    arranged = [
        mesh_utils.create_device_mesh(shape, slices[number], allow_split_physical_axes=True)
        for number in sorted(slices)
    ]
    # Auto axes, spelled out once for the whole project: jax's default is Explicit axes.
    return Mesh(np.concatenate(arranged), ALL_AXES, axis_types=(AxisType.Auto,) * 3)


def in_words(mesh: Mesh) -> str:
    """As ``8 x TPU v5 lite, mesh replica 1 x fsdp 8``; of a CPU with the cores that it may use."""
    device = mesh.devices.flat[0]
    kind, axes = device.device_kind, [f"{axis} {size}" for axis, size in mesh.shape.items()]
    if device.platform == "cpu":
        kind = f"CPU with {processes.cores()} cores"
    return f"{mesh.size} x {kind}, mesh {' x '.join(axes)}"


def count_slices(devices: Iterable[Any]) -> int:
    return len({slice_of(device) for device in devices})


def slice_of(device: Any) -> int:
    """The TPU slice of a device; 0 for all others.

    jax numbers the hosts of GPUs and CPUs as slices too (by boot id), but their parameters may be
    split across nodes: there ``replica`` decides.
    """
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
