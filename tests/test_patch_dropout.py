"""Patch dropout: which patches stay, what they come to, and that devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import step_case
from mofi_jax.distributed import global_batch, sharding
from mofi_jax.losses import class_order
from mofi_jax.model import image, layers, mofi
from mofi_jax.telemetry import flops
from mofi_jax.training import cadence, optim, state, step
from tests import test_step

MODEL = dataclasses.replace(test_step.MODEL, patch_size=4)
IMAGES = jnp.asarray(test_step.batch_of(8)["image"])
PATCHES = 16


def test_a_random_subset_of_each_pictures_patches():
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (np.asarray(image.kept_patches(key, 4_000, PATCHES, 0.25)) for key in keys)
    assert one.shape == (4_000, 12)
    assert (np.diff(one, axis=1) > 0).all()  # ascending, none twice
    assert np.bincount(one.reshape(-1)) / 4_000 == pytest.approx(0.75, abs=0.05)
    assert len(np.unique(one, axis=0)) > 1_500  # of 1,820 there are
    assert (one != other).any(axis=1).mean() > 0.99
    assert image.kept_count(PATCHES, 0.99) == 1


def test_subsets_do_not_depend_on_the_mesh(mesh_of):
    def draw(mesh):
        split = global_batch.batch_sharding(mesh)
        kept = jax.jit(image.kept_patches, static_argnums=(1, 2, 3), out_shardings=split)
        return np.asarray(kept(jax.random.key(3), 16, PATCHES, 0.5))

    np.testing.assert_array_equal(draw(mesh_of["1x1x1"]), draw(mesh_of["2x2x2"]))


def test_value_and_gradient_are_those_of_a_reference_that_gathers():
    """All embeddings with their positions first, then those of the class token and of the kept."""
    tower = image.ImageTower(MODEL, rngs=nnx.Rngs(0))
    graph, params = nnx.split(tower)
    kept = image.kept_patches(jax.random.key(1), len(IMAGES), PATCHES, 0.5)
    mix = jnp.sin(jnp.arange(len(IMAGES) * MODEL.embed_dim)).reshape(len(IMAGES), -1)

    def reference(params):
        tower = nnx.merge(graph, params)
        mean, std = map(np.array, image.pixel_statistics("clip"))
        x = (IMAGES / 255.0 - mean) / std
        x = tower.patch_embedding(image._patches(jnp.float32(x), 4))
        x += tower.position_embedding[...][1:]
        x = jnp.take_along_axis(x, kept[..., None], axis=1)
        first = tower.class_embedding[...] + tower.position_embedding[...][0]
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, len(first))), x], axis=1)
        options = {"length": x.shape[1], "causal": False}
        x = layers.run_stack(tower.blocks, tower.pre_norm(x), MODEL, **options)
        return (tower.projection(tower.post_norm(x[:, 0])) * mix).sum()

    def ours(params):
        return (nnx.merge(graph, params)(IMAGES, None, kept) * mix).sum()

    (value, grads), (expected, wanted) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (ours, reference)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()) + 1e-7)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_all_patches_in_order_are_no_dropout(family):
    width = {"embed_dim": MODEL.image.width} if family == "siglip" else {}
    model = dataclasses.replace(MODEL, family=family, **width)
    params = mofi.create(model, jax.random.key(0), towers=("image",))
    everything = jnp.broadcast_to(jnp.arange(PATCHES), (len(IMAGES), PATCHES))
    embed = functools.partial(mofi.embed_images, model, params, IMAGES)
    np.testing.assert_allclose(embed(kept=everything), embed(), atol=1e-6)


def test_another_size_than_the_models():
    """The tower takes it with its positions resampled, as if it had been made for it."""
    params = mofi.create(MODEL, jax.random.key(0), towers=("image",))
    small = dataclasses.replace(MODEL, image_size=8)
    positions = image.resampled(params["image"]["position_embedding"], 1 + 4)
    resized = {"image": params["image"] | {"position_embedding": positions}}
    pictures = IMAGES[:, :8, :8]
    np.testing.assert_array_equal(
        mofi.embed_images(MODEL, params, pictures), mofi.embed_images(small, resized, pictures)
    )


@functools.cache
def trained(mesh, microbatches=1, seed=0, sample_rate=1.0):
    """(parameters, loss) after three steps that drop half of the patches."""
    config = test_step.options(entity__sample_rate=sample_rate)
    losses = config.losses.to_dict()
    tx = optim.make(config.optimizer, cadence.Clock(test_step.BATCH, 1000, 100))
    rows = class_order.padded_rows(test_step.ENTITIES, mesh)
    init = state.initialiser(MODEL, tx, losses=losses, table_rows=rows)
    train_state, shardings = state.create(init, 1, mesh)
    context = step.StepContext(
        *(MODEL, mesh, losses, test_step.ENTITIES, microbatches), seed=seed, patch_dropout=0.5
    )
    update = step.make_train_step(context, tx, shardings)
    batch = global_batch.to_global(mesh, test_step.batch_of())
    for _ in range(3):
        train_state, metrics = update(train_state, batch)
    params = jax.device_get(train_state.params)
    table = params.pop(sharding.ENTITY_TABLE)[: test_step.ENTITIES]
    return params | {"table": table}, float(metrics["loss"])


@pytest.mark.parametrize(
    ("mesh", "parts"), [pytest.param("2x2x2", 1, marks=pytest.mark.slow), ("1x8x1", 4)]
)
def test_a_training_is_the_same_on_any_devices_and_in_any_parts(mesh_of, mesh, parts):
    params, loss = trained(mesh_of["1x1x1"])
    others, other_loss = trained(mesh_of[mesh], parts)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert test_step.largest_difference(params, others) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_another_seed_is_another_training(mesh_of, rate):
    """With an exact and with a sampled entity loss."""
    runs = [trained(mesh_of["1x1x1"], seed=seed, sample_rate=rate) for seed in (0, 1)]
    assert test_step.largest_difference(*(params for params, _ in runs)) > 1e-4
    assert all(np.isfinite(loss) for _, loss in runs)


def test_flops_are_those_of_the_patches_that_are_kept(mesh_of):
    case = step_case.Case("B/16", "supervised", batch=4, entities=100)
    context = step.StepContext(
        *(step_case.model_config(case), mesh_of["1x1x1"], step_case.task_losses("supervised"), 100)
    )
    whole = flops.of_step(context, batch_size=4)["image"]
    half = flops.of_step(dataclasses.replace(context, patch_dropout=0.5), batch_size=4)["image"]
    assert 0.48 < half / whole < 0.5  # 99 of 197 tokens, and shorter attention
