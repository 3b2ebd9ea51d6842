"""The global batch: which rows each host feeds, wherever its devices lie in the mesh."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from etils import epath
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import global_batch, meshes
from mofi_jax.plan import tpu_topology
from tests.test_meshes import Device

REPOSITORY = epath.Path(__file__).parent.parent


def test_batch_goes_over_replica_and_fsdp(mesh_of):
    batch = {"image": np.arange(16).reshape(8, 2), "weight": np.arange(8.0)}
    placed = global_batch.to_global(mesh_of["2x2x2"], batch)
    np.testing.assert_array_equal(placed["image"], batch["image"])
    assert placed["image"].sharding.spec == P(meshes.BATCH_AXES)
    assert placed["weight"].addressable_shards[0].data.shape == (2,)


SCATTERED = {  # a host's devices in the mesh: blocks, every other one, two that share their rows
    "blocks": (np.arange(8) // 4, (2, 4, 1)),
    "scattered": (np.arange(8) % 2, (1, 8, 1)),
    "shared": (np.arange(8) % 2, (1, 4, 2)),
    "uneven": (np.array([0, 0, 1, 0, 1, 1, 1, 0]), (2, 2, 2)),
}


def fake_mesh(owners, shape):
    devices = [Device(i) for i in range(len(owners))]
    for device, owner in zip(devices, owners, strict=True):
        device.process_index = int(owner)
    mesh_devices = np.array(devices).reshape(shape)
    return Mesh(mesh_devices, meshes.ALL_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("layout", SCATTERED)
def test_every_device_is_fed_its_rows_wherever_it_lies(layout):
    check_feeding(fake_mesh(*SCATTERED[layout]))


def check_feeding(mesh):
    """Each host feeds, in ascending order, just the rows that the sharding puts on its devices."""
    size = 3 * global_batch.batch_shards(mesh)
    wanted = global_batch.batch_sharding(mesh).devices_indices_map((size,))
    for process in {device.process_index for device in mesh.devices.flat}:
        rows = [np.arange(size)[i] for d, i in wanted.items() if d.process_index == process]
        np.testing.assert_array_equal(
            global_batch.batch_rows(mesh, size, process), np.unique(np.concatenate(rows))
        )


TOPOLOGIES = ("v5e:4x8", "v5e:8x8", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v6e:8x8", "v4:4x4x4")


@pytest.mark.skipif(not tpu_topology.COMPILER.exists(), reason="make test installs the compiler")
def test_hosts_of_real_slices_lie_anywhere():
    """On all of them, hosts' chips are no block of the mesh, and each host feeds what it holds."""
    code = """
        import sys
        from mofi_jax.distributed import meshes
        from mofi_jax.plan import tpu_topology
        from tests import test_global_batch
        for topology in sys.argv[1:]:
            mesh = meshes.make_mesh(devices=tpu_topology.devices(topology))
            test_global_batch.check_feeding(mesh)
            owners = [device.process_index for device in mesh.devices.flat]
            changes = sum(a != b for a, b in zip(owners, owners[1:]))
            print(topology, len(set(owners)), changes)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *TOPOLOGIES],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.strip().splitlines():
        topology, hosts, changes = line.split()
        assert int(changes) > int(hosts) - 1, topology  # as many, where each host is one run
    assert len(done.stdout.strip().splitlines()) == len(TOPOLOGIES)
