"""The mesh: sizes that cover the devices, TPU slices along the replica axis, GPU nodes."""

import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes


class Device:
    """What a mesh needs of one: two hosts of four in each slice."""

    core_on_chip = 0

    def __init__(self, number, platform="tpu"):
        self.id, self.process_index = number, number // 4
        self.slice_index = number // 8
        self.platform, self.device_kind = platform, "TPU v4" if platform == "tpu" else "NVIDIA H100"
        self.coords = (number % 2, number // 2 % 2, number // 4 % 2)

    def __repr__(self):
        return f"Device({self.id})"


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3, -1, 1), (1, -1, -1), (-1, -1, 3), (2, 2, 1)])
def test_mesh_that_does_not_cover_the_devices(sizes):
    with pytest.raises(BadInput, match="does not cover 8 devices"):
        meshes.make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(2, 8, 1), (4, 2, 2)])
def test_tpu_slices_lie_along_the_replica_axis(sizes):
    mesh = meshes.make_mesh(*sizes, devices=[Device(i) for i in range(16)])
    assert mesh.devices.shape == sizes
    for half in np.split(mesh.devices, 2, axis=0):
        assert len({chip.slice_index for chip in half.flat}) == 1


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((), (2, 8, 1)), ((-1, -1, 4), (2, 2, 4)), ((-1, 4, 1), (4, 4, 1)), ((4,), (4, 4, 1))],
)
def test_sizes_left_open_are_those_of_the_slices(sizes, shape):
    devices = [Device(i) for i in range(16)]
    assert meshes.make_mesh(*sizes, devices=devices).devices.shape == shape


def test_tpu_slices_share_no_parameters():
    with pytest.raises(BadInput, match=r"config\.mesh\.replica=1 does not divide over 2 slices"):
        meshes.make_mesh(replica=1, devices=[Device(i) for i in range(16)])


def test_gpu_nodes_are_no_slices():
    """jax numbers them as slices by their boot id; parameters are split over all of them."""
    devices = [Device(i, "gpu") for i in reversed(range(16))]
    assert dict(meshes.make_mesh(devices=devices).shape)["fsdp"] == 16
    hybrid = meshes.make_mesh(replica=2, devices=devices)
    assert [{d.slice_index for d in node.flat} for node in hybrid.devices] == [{0}, {1}]
