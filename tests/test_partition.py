"""Path rules, uneven shapes, and the way of a host's batch onto the mesh."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from configs import quickstart
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.plan import tpu_topology
from mofi_jax.training import state

REPOSITORY = epath.Path(__file__).parent.parent

GOLDEN = {
    "params/entity_table": P(meshes.ALL_AXES, None),
    "params/image/blocks/attention/query/kernel": P(None, "fsdp", "tensor", None),
    "params/image/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "params/image/blocks/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
    "params/image/blocks/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
    "params/image/blocks/norm1/scale": P(None, None),
    "params/image/patch_embedding/kernel": P(None, None, None, "fsdp"),
    "params/image/position_embedding": P(None, None),
    "params/text/token_embedding": P(None, "fsdp"),
    "params/text/projection/kernel": P("fsdp", None),
    "params/logit_scale": P(),
}


def test_golden_specs_of_parameters_and_moments(mesh_of):
    mesh = mesh_of["2x2x2"]
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(16, 2, 2),
        text=mofi.TowerConfig(16, 2, 2),
        vocab_size=40,
        context_length=8,
        eos_id=39,
        embed_dim=8,
    )
    init = state.initialiser(
        config,
        optax.adam(1e-3),
        losses=quickstart.get_config("task=multitask").losses.to_dict(),
        table_rows=24,
    )
    _, shardings = state.abstract(init, mesh)
    specs = {
        sharding.path_name(path): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }
    for name, spec in GOLDEN.items():
        assert specs[name] == spec, name
        moment = f"opt_state/0/mu/{name.removeprefix('params/')}"
        assert specs[moment] == spec, moment


def test_what_does_not_divide_stays_whole(mesh_of):
    spec = sharding.partition_spec("image/blocks/mlp/fc1/kernel", (3, 7, 16), mesh_of["2x2x2"])
    assert spec == P(None, None, "tensor")


def test_padded_rows(mesh_of):
    assert class_order.padded_rows(1003, mesh_of["2x2x2"]) == 1008
    assert class_order.padded_rows(1008, mesh_of["1x8x1"]) == 1008
    assert class_order.padded_rows(5, mesh_of["1x1x1"]) == 5


def test_batch_goes_over_replica_and_fsdp(mesh_of):
    batch = {"image": np.arange(16).reshape(8, 2), "weight": np.arange(8.0)}
    placed = global_batch.to_global(mesh_of["2x2x2"], batch)
    np.testing.assert_array_equal(placed["image"], batch["image"])
    assert placed["image"].sharding.spec == P(meshes.BATCH_AXES)
    assert placed["weight"].addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3, -1, 1), (-1, -1, 1), (2, 2, 1)])
def test_mesh_that_does_not_cover_the_devices(sizes):
    with pytest.raises(BadInput, match="does not cover 8 devices"):
        meshes.make_mesh(*sizes)


def test_initialisation_is_the_same_on_any_mesh(mesh_of):
    """Partitionable random bits: sharded creation gives the numbers of one device."""

    def init():
        return {"entity_table": jax.random.normal(jax.random.key(0), (16, 8))}

    one, eight = (
        jax.jit(init, out_shardings=sharding.tree_shardings(mesh, jax.eval_shape(init)))()
        for mesh in (mesh_of["1x1x1"], mesh_of["2x2x2"])
    )
    assert not eight["entity_table"].is_fully_replicated
    np.testing.assert_array_equal(one["entity_table"], eight["entity_table"])


@given(st.integers(1, 20_000))
def test_every_entity_has_one_row_and_back(entities):
    ids = np.arange(-3, entities + 3, dtype=np.int32)
    rows = class_order.table_rows(ids, entities)
    assert rows.dtype == np.int32
    assert sorted(rows[3:-3].tolist()) == list(range(entities))
    np.testing.assert_array_equal(np.r_[rows[:3], rows[-3:]], np.r_[ids[:3], ids[-3:]])
    np.testing.assert_array_equal(class_order.table_entities(rows, entities), ids)


def test_rows_of_entities_on_devices_are_those_of_numpy():
    for entities in (1003, 2_000_003):
        ids = np.r_[np.arange(-1, 5000), entities - 5 : entities + 2].astype(np.int32)
        rows = class_order.table_rows(ids, entities)
        np.testing.assert_array_equal(
            jax.jit(class_order.table_rows, static_argnums=1)(ids, entities), rows
        )
        np.testing.assert_array_equal(
            jax.jit(class_order.table_entities, static_argnums=1)(rows, entities), ids
        )


@pytest.mark.parametrize("devices", [8, 64, 256, 1024])
def test_frequent_entities_are_spread_over_the_devices(devices):
    entities = 2_000_003
    per_device = -(-entities // devices)
    for frequent in (devices, 4096, 100_000):
        owner = class_order.table_rows(np.arange(frequent), entities) // per_device
        counts = np.bincount(owner, minlength=devices)
        assert counts.max() <= 1.1 * frequent / devices + 4, "one device owns too many"


def wide_structs(mesh, width=1280):
    tree = {
        "image/blocks/mlp/fc1/kernel": (32, width, 4 * width),
        "image/blocks/attention/query/kernel": (32, width, 16, width // 16),
        "image/blocks/mlp/fc1/bias": (32, 4 * width),
        "image/position_embedding": (257, width),
    }
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in tree.items()}


def test_too_much_on_every_device_is_refused_with_the_mesh_that_works():
    """ViT-H's 1,280 columns do not divide over 512: its kernels would lie whole on each."""
    mesh = jax.sharding.AbstractMesh((1, 512, 1), meshes.ALL_AXES)
    with pytest.raises(BadInput) as caught:
        sharding.check_replication(mesh, wide_structs(mesh), 0.02)
    told = str(caught.value)
    assert "of the training state would lie whole on each of 512 devices" in told
    assert "image/blocks/mlp/fc1/kernel (800 MiB), image/blocks/attention/query/kernel" in told
    assert "set config.mesh.fsdp=256 and config.mesh.replica=2" in told
    works = jax.sharding.AbstractMesh((2, 256, 1), meshes.ALL_AXES)
    sharding.check_replication(works, wide_structs(works), 0.02)
    sharding.check_replication(mesh, wide_structs(mesh), 1.0)


def test_one_device_replicates_nothing(mesh_of):
    sharding.check_replication(mesh_of["1x1x1"], wide_structs(mesh_of["1x1x1"]), 0.0)


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


@pytest.mark.parametrize("sizes", [(2, 8, 1), (4, 2, 2)])
def test_tpu_slices_lie_along_the_replica_axis(sizes):
    mesh = meshes.make_mesh(*sizes, devices=[Device(i) for i in range(16)])
    assert mesh.devices.shape == sizes
    for half in np.split(mesh.devices, 2, axis=0):
        assert len({chip.slice_index for chip in half.flat}) == 1


def test_tpu_slices_share_no_parameters():
    with pytest.raises(BadInput, match=r"config\.mesh\.replica=1 does not divide over 2 slices"):
        meshes.make_mesh(devices=[Device(i) for i in range(16)])


def test_gpu_nodes_are_no_slices():
    """jax numbers them as slices by their boot id; parameters are split over all of them."""
    devices = [Device(i, "gpu") for i in reversed(range(16))]
    assert dict(meshes.make_mesh(devices=devices).shape)["fsdp"] == 16
    hybrid = meshes.make_mesh(replica=2, devices=devices)
    assert [{d.slice_index for d in node.flat} for node in hybrid.devices] == [{0}, {1}]


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
    """What each host gives each of its devices is what the sharding wants to be there."""
    size = 3 * global_batch.batch_shards(mesh)
    wanted = global_batch.batch_sharding(mesh).devices_indices_map((size,))
    fed = set()
    for process in {device.process_index for device in mesh.devices.flat}:
        rows = global_batch.batch_rows(mesh, size, process)
        assert np.all(np.diff(rows) > 0)
        fed |= set(rows.tolist())
        for device, index in wanted.items():
            if device.process_index == process:
                local = global_batch.local_piece(mesh, index, len(rows), process)
                np.testing.assert_array_equal(rows[local], np.arange(size)[index])
    assert fed == set(range(size))


TOPOLOGIES = ("v5e:4x8", "v5e:8x8", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v6e:8x8", "v4:4x4x4")


@pytest.mark.skipif(not tpu_topology.COMPILER.exists(), reason="make test installs the compiler")
def test_hosts_of_real_slices_lie_anywhere():
    """On all of them, hosts' chips are no block of the mesh, and each host feeds what it holds."""
    code = """
        import sys
        from mofi_jax.distributed import meshes
        from mofi_jax.plan import tpu_topology
        from tests import test_partition
        for topology in sys.argv[1:]:
            mesh = meshes.make_mesh(devices=tpu_topology.devices(topology))
            test_partition.check_feeding(mesh)
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
