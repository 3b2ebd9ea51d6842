"""The sharding rules: specs of parameters and moments, uneven shapes, what lies whole."""

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from configs import quickstart
from mofi_jax.distributed import meshes, sharding
from mofi_jax.model import mofi
from mofi_jax.training import state

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
    spec = sharding.partition_spec(
        "image/blocks/mlp/fc1/kernel", (3, 7, 16), mesh_of["2x2x2"].shape
    )
    assert spec == P(None, None, "tensor")


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


def wide_structs(mesh, width=1280):
    tree = {
        "image/blocks/mlp/fc1/kernel": (32, width, 4 * width),
        "image/blocks/attention/query/kernel": (32, width, 16, width // 16),
        "image/blocks/mlp/fc1/bias": (32, 4 * width),
        "image/position_embedding": (257, width),
    }
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in tree.items()}


def mesh_for(*sizes):
    return jax.sharding.AbstractMesh(sizes, meshes.ALL_AXES)


def test_what_lies_whole_is_told_with_the_mesh_that_splits_it():
    """ViT-H's 1,280 columns do not divide over 512: its kernels lie whole on each."""
    mesh = mesh_for(1, 512, 1)
    tree = wide_structs(mesh)
    kernels = 32 * 1280 * (4 + 1) * 1280 * 4
    rest = (32 * 4 + 257) * 1280 * 4
    assert sharding.device_bytes(mesh, tree) == (kernels + rest, kernels + rest)
    assert sharding.device_bytes(mesh_for(2, 256, 1), tree) == (kernels // 256 + rest, rest)
    words, much = sharding.layout(mesh, tree, slices=1, memory=9 * 2**30)
    assert "0.978 GiB of state on each of 512 devices, 0.978 of it whole on all" in words
    assert "config.mesh.replica=2 config.mesh.fsdp=256 would leave 0.006 on each" in words
    assert much
    assert not sharding.layout(mesh, tree, slices=1, memory=10 * 2**30)[1]
    assert not sharding.layout(mesh, tree, slices=1)[1]


def test_the_mesh_that_splits_keeps_parameters_within_a_slice():
    mesh = mesh_for(512, 1, 1)
    for slices, fsdp in ((1, 256), (4, 128)):
        words, _ = sharding.layout(mesh, wide_structs(mesh), slices=slices)
        assert f"config.mesh.replica={512 // fsdp} config.mesh.fsdp={fsdp} would" in words
    words, _ = sharding.layout(mesh_for(2, 256, 1), wide_structs(mesh), slices=2)
    assert words.endswith("0.002 of it whole on all")


def test_one_device_splits_nothing(mesh_of):
    mesh = mesh_of["1x1x1"]
    words, much = sharding.layout(mesh, wide_structs(mesh), slices=1, memory=1)
    assert words == "0.978 GiB of state on the only device"
    assert not much
