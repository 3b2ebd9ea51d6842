"""One update: parts of a batch equal the whole, sampled equals exact at rate 1, learned scales."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import step_case
from configs import quickstart
from mofi_jax.distributed import global_batch, sharding
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import cadence, optim, state, step

ENTITIES, BATCH = 203, 32
MODEL = mofi.MofiConfig(
    image_size=16,
    patch_size=8,
    image=mofi.TowerConfig(16, 2, 2),
    text=mofi.TowerConfig(8, 1, 2),
    vocab_size=20,
    context_length=4,
    eos_id=19,
    embed_dim=8,
    dtype="float32",
)


def batch_of(rows=BATCH):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ENTITIES, (rows, 2)).astype(np.int32)
    ids[::3, 1] = -1
    weights = (ids >= 0) / (ids >= 0).sum(1, keepdims=True)
    return {
        "image": rng.integers(0, 255, (rows, 16, 16, 3)).astype(np.uint8),
        "tokens": np.c_[rng.integers(0, 19, (rows, 3)), np.full(rows, 19)].astype(np.int32),
        "text_group": ids[:, 0],
        "text_valid": np.arange(rows) % 7 != 3,
        "entity_ids": ids,
        "entity_weights": weights.astype(np.float32),
    }


def options(**changes):
    """The losses and the optimizer of the quick start, with changes such as entity__scale."""
    config = quickstart.get_config("task=multitask")
    config.optimizer.warmup = "0 steps"
    for key, value in changes.items():
        task, name = key.split("__")
        config.losses[task][name] = value
    return config


@functools.cache
def built(mesh, config, seed):
    """(the first state on the host, its shardings, the update), compiled once for all tests."""
    losses = config.losses.to_dict()
    clock = cadence.Clock(batch_size=BATCH, examples_per_epoch=1000, total_steps=100)
    tx = optim.make(config.optimizer, clock)
    init = state.initialiser(
        MODEL, tx, losses=losses, table_rows=class_order.padded_rows(ENTITIES, mesh)
    )
    train_state, shardings = state.create(init, 1, mesh)
    context = step.StepContext(MODEL, mesh, losses, ENTITIES, seed=seed)
    update = step.make_train_step(context, tx, shardings)
    return jax.device_get(train_state), shardings, update


def train(mesh, config, *, steps=1, seed=0, batch=None):
    """(state, metrics of the last step) after some steps on one batch."""
    first, shardings, update = built(mesh, ml_collections.FrozenConfigDict(config), seed)
    train_state = jax.device_put(first, shardings)
    batch = global_batch.to_global(mesh, batch or batch_of())
    for _ in range(steps):
        train_state, metrics = update(train_state, batch)
    return jax.device_get(train_state), jax.device_get(metrics)


def largest_difference(a, b):
    return max(
        np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.cache
def gradients(mesh, microbatches, kind="softmax"):
    """(loss, gradients) of the first step."""
    config = options(contrastive__kind=kind)
    losses = config.losses.to_dict()
    tx = optim.make(config.optimizer, cadence.Clock(BATCH, 1000, 100))
    init = state.initialiser(
        MODEL, tx, losses=losses, table_rows=class_order.padded_rows(ENTITIES, mesh)
    )
    train_state, _ = state.create(init, 1, mesh)
    loss = step.make_loss(step.StepContext(MODEL, mesh, losses, ENTITIES, microbatches))
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), grads = run(train_state.params, global_batch.to_global(mesh, batch_of()))
    return float(value), jax.device_get(grads)


@pytest.mark.parametrize(
    ("mesh", "parts", "kind"),
    [
        pytest.param("1x1x1", 2, "softmax", marks=pytest.mark.slow),
        ("1x1x1", 8, "sigmoid"),
        ("2x2x2", 4, "softmax"),
    ],
)
def test_parts_of_a_batch_give_the_gradients_of_the_whole(mesh_of, mesh, parts, kind):
    value, grads = gradients(mesh_of[mesh], parts, kind)
    expected, expected_grads = gradients(mesh_of[mesh], 1, kind)
    assert value == pytest.approx(expected, rel=1e-6)
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True))
    # Some gradients are zero but for rounding, as that of a key's bias: they have no scale.
    noise = 1e-7 * max(np.abs(b).max() for _, b in pairs)
    for a, b in pairs:
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + noise


def lowered(mesh, parts, rows):
    """The image tower's value and gradient on `rows` pictures, compiled."""
    context = step.StepContext(MODEL, mesh, {}, ENTITIES, parts)
    params = jax.eval_shape(
        functools.partial(mofi.create, MODEL, towers=("image",)), jax.random.key(0)
    )
    images = jax.ShapeDtypeStruct(
        (rows, 16, 16, 3), jnp.uint8, sharding=global_batch.batch_sharding(mesh)
    )

    def loss(params, images):
        embed = functools.partial(mofi.embed_images, MODEL, params)
        return jnp.sum(jnp.sin(step.in_microbatches(embed, [images], context)))

    return jax.jit(jax.value_and_grad(loss)).lower(params, images).compile()


def test_memory_of_a_batch_in_parts_is_that_of_a_part(mesh_of):
    """Four times the batch in four times the parts: the activations' memory does not grow."""
    mesh = mesh_of["1x8x1"]
    whole, parts, larger = (
        lowered(mesh, n, rows).memory_analysis().temp_size_in_bytes
        for n, rows in ((1, 4096), (8, 4096), (32, 16_384))
    )
    assert parts < 0.3 * whole
    # Pictures and embeddings of the batch themselves are there, once more each.
    row = 16 * 16 * 3 + 4 * MODEL.embed_dim
    assert larger - parts <= 1.1 * (16_384 - 4096) // mesh.size * row


def test_parts_exchange_nothing(mesh_of):
    """Each device cuts its own rows: the only exchange is the gradient's sum."""
    text = lowered(mesh_of["2x2x2"], 4, 512).as_text()
    for kind in ("all-to-all", "collective-permute", "all-gather"):
        assert f" {kind}" not in text, kind


@pytest.mark.parametrize("mesh", [pytest.param("1x1x1", marks=pytest.mark.slow), "2x2x2"])
def test_every_row_drawn_is_the_exact_update(mesh_of, mesh):
    """The sampled step at a rate of 1 and the exact step: the same state but for rounding."""
    exact, exact_metrics = train(mesh_of[mesh], options(), steps=3)
    # Just below 1, so that the sampled step runs; its places are rounded up to every row.
    config = options(entity__sample_rate=0.999)
    sampled, metrics = train(mesh_of[mesh], config, steps=3)
    assert metrics["sample_overflow"] == 0
    assert metrics["loss"] == pytest.approx(exact_metrics["loss"], rel=1e-5)
    parts = [metrics[f"gradient_norm/{group}"] for group in ("towers", "table")]
    assert min(parts) > 0
    assert metrics["gradient_norm"] == pytest.approx(np.hypot(*parts), rel=1e-6)
    assert largest_difference(sampled.params, exact.params) <= 2e-5
    for moment in ("mu", "nu"):
        got, expected = (
            getattr(s.opt_state.inner_states["table"].inner_state[1], moment)[
                sharding.ENTITY_TABLE
            ][:ENTITIES]
            for s in (sampled, exact)
        )
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_sampled_training_moves_drawn_rows_only_and_learns(mesh_of):
    mesh = mesh_of["2x2x2"]
    config = options(entity__sample_rate=0.6)
    before, first = train(mesh, config, steps=1)
    after, last = train(mesh, config, steps=20)
    assert last["loss_entity"] < first["loss_entity"]
    rows, rows_after = (
        s.opt_state.inner_states["table"].inner_state[1].last_step[sharding.ENTITY_TABLE]
        for s in (before, after)
    )
    drawn = rows == 1
    labels = class_order.table_rows(batch_of()["entity_ids"], ENTITIES)
    assert drawn[labels[labels >= 0]].all()
    assert drawn.sum() < 0.9 * ENTITIES
    assert (rows_after[labels[labels >= 0]] == 20).all()
    assert rows_after.max() == 20
    again, _ = train(mesh, config, steps=20)
    assert largest_difference(after, again) == 0, "the same seed and steps, another result"
    other, _ = train(mesh, config, steps=20, seed=1)
    assert largest_difference(after, other) > 0


def test_a_device_without_room_for_its_positives_says_so(mesh_of):
    config = options(entity__sample_rate=0.02)
    _, metrics = train(mesh_of["1x1x1"], config)
    assert metrics["sample_overflow"] > 0
    assert 0 < metrics["labelled_share"] < 1
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_a_learned_scale_moves_and_is_capped(mesh_of, kind):
    config = options(entity__learn_scale=True, entity__margin_kind=kind)
    start, _ = train(mesh_of["1x1x1"], config, steps=1)
    end, metrics = train(mesh_of["1x1x1"], config, steps=10)
    assert metrics["entity_scale"] == pytest.approx(config.losses.entity.scale, rel=0.1)
    assert start.params["entity_log_scale"] != end.params["entity_log_scale"]
    assert float(mofi.capped_exp(jnp.float32(9.0))) == 100
    fixed, _ = train(mesh_of["1x1x1"], options())
    assert "entity_log_scale" not in fixed.params


CAP = np.log(np.float32(mofi.MAX_LOGIT_SCALE))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_scale_ends_at_its_cap_and_comes_back_from_it(mesh_of, monkeypatch, rate):
    """With a loss that pulls both scales down or up, as the batch says."""

    def loss(params, batch, sample=None):
        scales = {
            "logit_scale": mofi.capped_exp(params["logit_scale"]),
            "entity": mofi.capped_exp(params["entity_log_scale"]),
        }
        return jnp.mean(batch["pull"]) * sum(scales.values()), scales

    monkeypatch.setattr(step, "make_loss", lambda context: loss)
    mesh = mesh_of["1x1x1"]
    config = options(entity__sample_rate=rate)
    config.optimizer.learning_rate = 0.01
    losses = config.losses.to_dict()

    def after(pull, start, frozen=()):
        config.optimizer.frozen = frozen
        tx = optim.make(config.optimizer, cadence.Clock(BATCH, 1000, 100))
        context = step.StepContext(MODEL, mesh, losses, 16, frozen=frozen, ema_decay=0.9)
        params = {sharding.ENTITY_TABLE: jnp.ones((16, 2)), "logit_bias": jnp.float32(9)}
        params |= {name: jnp.float32(start) for name in mofi.LOG_SCALES}
        ema = jax.tree.map(jnp.copy, params)
        old = state.TrainState(jnp.int32(0), params, tx.init(params), ema)
        shardings = sharding.tree_shardings(mesh, old)
        update = step.make_train_step(context, tx, shardings)
        batch = {"pull": np.full(8, pull, np.float32), "entity_ids": np.zeros((8, 1), np.int32)}
        new, metrics = update(jax.device_put(old, shardings), global_batch.to_global(mesh, batch))
        assert new.params["logit_bias"] == 9
        return jax.device_get((new, metrics))

    up, metrics = after(-1.0, CAP - np.float32(0.005))
    down, at_cap = after(1.0, CAP)
    loaded, beyond = after(1.0, CAP + np.float32(0.5))
    for name in mofi.LOG_SCALES:
        assert up.params[name] == loaded.params[name] == CAP
        # The first update's decay is 1 / 10.
        assert up.ema[name] == pytest.approx(CAP - 0.0005, abs=1e-6)
        assert down.params[name] == pytest.approx(CAP - 0.01, abs=1e-5)
    assert metrics["logit_scale"] == pytest.approx(100 * np.exp(-0.005), rel=1e-5)
    assert beyond["logit_scale"] == beyond["entity"] == 100
    for values in (at_cap, beyond):
        assert values["gradient_norm"] == pytest.approx(100 * 2**0.5, rel=1e-5)
    frozen, _ = after(-1.0, CAP + np.float32(0.5), frozen=("logit_scale",))
    assert frozen.params["logit_scale"] == CAP + np.float32(0.5)


def test_sigmoid_starts_at_the_papers_scale_and_bias(mesh_of):
    _, metrics = train(mesh_of["1x1x1"], options(contrastive__kind="sigmoid"))
    assert metrics["logit_scale"] == pytest.approx(10.0, rel=1e-5)
    assert metrics["logit_bias"] == pytest.approx(-10.0, rel=1e-5)


def test_related_pictures_decide_over_negatives(mesh_of):
    """A batch of one entity: nothing left to push apart when related pairs are masked."""
    batch = batch_of()
    batch["entity_ids"][:] = [5, -1]
    batch["text_group"] = np.full(BATCH, 5, np.int32)
    losses = {
        mode: train(mesh_of["2x2x2"], options(contrastive__same_entity=mode), batch=batch)[1]
        for mode in ("off", "masked", "positive")
    }
    assert losses["masked"]["loss_contrastive"] == pytest.approx(0, abs=1e-6)
    assert losses["off"]["loss_contrastive"] > 1
    assert losses["positive"]["loss_contrastive"] > 1
    # A picture's second entity counts too: texts about 5 are no negatives of pictures of 9 and 5.
    batch["entity_ids"][: BATCH // 2] = [9, 5]
    batch["text_group"][: BATCH // 2] = 9
    batch["entity_ids"][BATCH // 2 :] = [9, 5]
    _, metrics = train(mesh_of["2x2x2"], options(), batch=batch)
    assert metrics["loss_contrastive"] == pytest.approx(0, abs=1e-6)


def test_an_embedding_without_length_has_a_gradient():
    """Pictures that the tower maps to zero: no NaN reaches the parameters."""
    params = mofi.create(MODEL, jax.random.key(0), towers=("image",))
    params["image"]["projection"]["kernel"] = jnp.zeros_like(
        params["image"]["projection"]["kernel"]
    )
    images = jnp.asarray(batch_of(4)["image"])
    value, grads = jax.value_and_grad(lambda p: jnp.sum(mofi.embed_images(MODEL, p, images)))(
        params
    )
    assert value == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_benchmark_measures_a_step():
    small = {"image_size": 32, "dtype": "float32", "groups": 1, "steps": 1}
    case = step_case.Case("Ti/16", "supervised", batch=8, entities=100, **small)
    result = step_case.measure(case)
    assert result["seconds"] > 0
    assert result["attention"] == "xla"
