"""The SigLIP family: it trains, on one device as on eight, and moves to transformers and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mofi as mofi_config
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch, sharding
from mofi_jax.model import image, mofi
from mofi_jax.telemetry import flops
from mofi_jax.training import cadence, optim, setup, state, step

SIZE, BATCH = 24, 16
CONFIG = mofi.MofiConfig(
    image_size=SIZE,
    patch_size=8,
    image=mofi.TowerConfig(24, 1, 2, mlp_width=40),  # heads of 12 dimensions
    text=mofi.TowerConfig(16, 1, 4),
    vocab_size=40,
    context_length=7,
    eos_id=1,
    embed_dim=24,
    activation="gelu_tanh",
    layer_norm_eps=1e-6,
    dtype="float32",
    family="siglip",
)


@functools.cache
def gradients(mesh):
    """Loss and gradients of both losses, parameters and batch split over the mesh."""
    losses = {
        "contrastive": {"weight": 1.0, "kind": "sigmoid", "same_entity": "off"},
        "entity": dict(mofi_config.get_config().losses.entity) | {"scale": 8.0},
    }
    tx = optim.make(mofi_config.get_config().optimizer, cadence.Clock(BATCH, 1000, 100))
    init = state.initialiser(CONFIG, tx, losses=losses, table_rows=16)
    train_state, _ = state.create(init, 0, mesh)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (BATCH, 1)).astype(np.int32)
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8),
        "tokens": rng.integers(0, 40, (BATCH, 7)).astype(np.int32),
        "text_group": ids[:, 0],
        "text_valid": np.ones(BATCH, bool),
        "entity_ids": ids,
        "entity_weights": np.ones((BATCH, 1), np.float32),
    }
    loss = step.make_loss(step.StepContext(CONFIG, mesh, losses, 16))
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), grads = run(train_state.params, global_batch.to_global(mesh, batch))
    return float(value), jax.device_get(sharding.named_leaves(grads))


@pytest.mark.parametrize("mesh", [pytest.param("1x8x1", marks=pytest.mark.slow), "2x2x2"])
def test_eight_devices_give_the_gradients_of_one(mesh_of, mesh):
    value, grads = gradients(mesh_of[mesh])
    expected, expected_grads = gradients(mesh_of["1x1x1"])
    assert value == pytest.approx(expected, rel=1e-6)
    largest = max(np.abs(g).max() for g in expected_grads.values())
    for name, expected in expected_grads.items():
        np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=1e-6 * largest)
        # All is trained but the biases of keys, which the softmax removes.
        trained = np.abs(expected).max() > 1e-6 * largest
        assert trained != name.endswith("key/bias"), name


def test_parameters_of_the_head_are_split_and_decay_as_those_of_blocks(mesh_of):
    shapes = jax.eval_shape(lambda key: mofi.create(CONFIG, key), jax.random.key(0))
    specs = sharding.named_leaves(sharding.tree_shardings(mesh_of["2x2x2"], shapes))
    split = {name for name, place in specs.items() if not place.is_fully_replicated}
    decays = {name for name, yes in sharding.named_leaves(optim.decay_mask(shapes)).items() if yes}
    head = {name for name in specs if name.startswith("image/head/")}
    kernels = {name for name in head if name.endswith("kernel")}
    assert (len(kernels), len(head)) == (6, 6 * 2 + 2 + 1)  # the norm's and the probe
    assert split & head == decays & head == kernels
    assert not {name for name in decays if "bias" in name or "probe" in name}
    # The pooling is above all blocks: the decay of learning rates by depth leaves it alone.
    ones = jax.tree.map(jnp.ones_like, shapes)
    scaled, _ = optim.scale_by_depth(0.5).update(ones, optim.scale_by_depth(0.5).init(ones))
    scaled = sharding.named_leaves(scaled)
    assert all(np.all(scaled[name] == 1) for name in head)
    assert np.all(scaled["image/patch_embedding/bias"] == 0.5**2)


def test_scales_of_siglip_have_no_cap():
    params = {"logit_scale": jnp.log(jnp.float32(117.3)), "entity_log_scale": jnp.float32(9.0)}
    assert mofi.logit_scale(CONFIG, params) == pytest.approx(117.3, rel=1e-5)
    kept = mofi.capped(CONFIG, params)
    assert kept["logit_scale"] == params["logit_scale"]
    assert kept["entity_log_scale"] == pytest.approx(np.log(100))


def test_texts_see_all_of_themselves_and_their_padding():
    """A change in any position moves the pooled last one."""
    params = mofi.create(CONFIG, jax.random.key(0))
    tokens = jnp.array([[5, 6, 1, 0, 0, 0, 0]], jnp.int32)
    first = mofi.embed_texts(CONFIG, params, tokens)
    for position in range(7):
        other = tokens.at[0, position].set(9)
        assert jnp.abs(mofi.embed_texts(CONFIG, params, other) - first).max() > 1e-4


def test_embedding_size_is_that_of_the_image_tower():
    with pytest.raises(BadInput, match=r"set config\.model\.embed_dim=24"):
        dataclasses.replace(CONFIG, embed_dim=16)


def test_config_trains_the_family(mesh_of):
    """The real config's keys, small; FLOPs counted by hand against XLA's own count."""
    config = mofi_config.get_config("task=contrastive,family=siglip,variant=B/16,res=48")
    assert (config.model.embed_dim, config.losses.contrastive.kind) == (768, "sigmoid")
    config.batch_size = 16
    config.model.update(
        {
            "patch_size": 8,
            "image": {"width": 256, "layers": 2, "heads": 4, "mlp_width": 320},
            "text": {"width": 192, "layers": 1, "heads": 3},
            "embed_dim": 256,
            "context_length": 24,
            "remat": "none",
        }
    )
    sizes = {"vocab_size": 100, "eos_id": 99, "num_entities": 0, "examples_per_epoch": 1000}
    made = setup.make(config, mesh_of["1x1x1"], **sizes)
    structs, _ = state.abstract(made.init, mesh_of["1x1x1"])
    loss = jax.jit(jax.grad(step.make_loss(made.context), has_aux=True))
    compiled = loss.lower(structs.params, setup.batch_structs(config, mesh_of["1x1x1"])).compile()
    counted = sum(flops.of_step(made.context, batch_size=16).values())
    expected = compiled.cost_analysis()["flops"]
    assert 0.95 * expected <= counted <= expected


def test_pictures_of_other_sizes_and_patches_left_out():
    params = mofi.create(CONFIG, jax.random.key(0), towers=("image",))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8))
    whole = mofi.embed_images(CONFIG, params, images)
    every = jnp.tile(jnp.arange(9, dtype=jnp.int32), (2, 1))
    same = mofi.embed_images(CONFIG, params, images, kept=every)
    np.testing.assert_allclose(same, whole, atol=1e-6)
    # No class token: the position of patch 0 is the first.
    fewer = mofi.embed_images(CONFIG, params, images, kept=every[:, :8])
    assert jnp.abs(fewer - whole).max() > 1e-3
    assert not image.can_resample(9, 1 + 16)
    positions = image.resampled(params["image"]["position_embedding"], 16)
    made_for_it = dataclasses.replace(CONFIG, image_size=32)
    other = {"image": params["image"] | {"position_embedding": positions}}
    large = jnp.pad(images, ((0, 0), (0, 8), (0, 8), (0, 0)))
    expected = mofi.embed_images(made_for_it, other, large)
    np.testing.assert_allclose(mofi.embed_images(CONFIG, params, large), expected, atol=1e-6)
