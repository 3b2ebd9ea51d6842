"""The update rule: schedule, decay mask, and the class table's own learning rate and clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.training import cadence, optim

CLOCK = cadence.Clock(batch_size=10, examples_per_epoch=100, total_steps=100)
PARAMS = {
    "image": {
        "projection": {"kernel": jnp.ones((3, 2))},
        "blocks": {
            "norm1": {"scale": jnp.ones((2, 3))},
            "mlp": {"fc1": {"bias": jnp.ones((2, 4))}},
        },
        "position_embedding": jnp.ones((4, 3)),
    },
    "logit_scale": jnp.ones(()),
    "entity_table": jnp.ones((5, 2)),
}


def config(**changes):
    settings = quickstart.get_config("task=multitask").optimizer
    settings.update(changes)
    return settings


def test_schedule_warms_up_and_ends():
    rate = optim.schedule(config(learning_rate=0.5, warmup="10 steps", final_fraction=0.1), CLOCK)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.05, rtol=1e-5)
    np.testing.assert_allclose(rate(55), 0.275, rtol=1e-5)  # half way down the cosine


def test_decay_acts_on_matrices_only():
    mask = optim.decay_mask(PARAMS)
    assert mask["image"]["projection"]["kernel"]
    assert sum(jax.tree.leaves(mask)) == 1


def test_decoupled_decay_is_multiplied_by_the_learning_rate():
    settings = config(learning_rate=0.1, warmup="0 steps", weight_decay=0.5)
    tx = optim.make(settings, CLOCK)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["image"]["projection"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["entity_table"], 0)
    np.testing.assert_array_equal(updates["image"]["position_embedding"], 0)


def test_table_has_its_own_learning_rate_and_clip():
    settings = config(learning_rate=0.1, warmup="0 steps", weight_decay=0.0, eps=1e-30)
    settings.table.learning_rate_multiplier = 3.0
    tx = optim.make(settings, CLOCK)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    # Adam's first step has the size of the learning rate.
    np.testing.assert_allclose(updates["entity_table"], -0.3, rtol=1e-4)
    np.testing.assert_allclose(updates["image"]["projection"]["kernel"], -0.1, rtol=1e-4)


@pytest.mark.parametrize("part", ["towers", "table"])
def test_clips_do_not_mix(part):
    """A huge gradient of one part leaves the other part's clipped gradient as it is."""
    settings = config(learning_rate=0.1, warmup="0 steps", clip_norm=1.0)
    tx = optim.make(settings, CLOCK)
    small = jax.tree.map(lambda x: 1e-3 * x, PARAMS)
    huge = dict(small)
    if part == "towers":
        huge["entity_table"] = 1e6 * PARAMS["entity_table"]
    else:
        huge["image"] = jax.tree.map(lambda x: 1e6 * x, PARAMS["image"])
    a, b = (tx.update(g, tx.init(PARAMS), PARAMS)[0] for g in (small, huge))
    keys = ("image", "logit_scale") if part == "towers" else ("entity_table",)
    for key in keys:
        for x, y in zip(jax.tree.leaves(a[key]), jax.tree.leaves(b[key]), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_clip_of_zero_is_none():
    settings = config(warmup="0 steps", clip_norm=0.0)
    settings.table.clip_norm = 0.0
    tx, gradients = optim.make(settings, CLOCK), jax.tree.map(lambda x: 100.0 * x, PARAMS)
    _, after = tx.update(gradients, tx.init(PARAMS), PARAMS)
    for group, moments in (("towers", "image"), ("table", "entity_table")):
        mu = after.inner_states[group].inner_state[1].mu[moments]
        for leaf in jax.tree.leaves(mu):
            np.testing.assert_allclose(leaf, 100.0 * (1 - settings.b1), rtol=1e-2)  # in bfloat16


def test_groups_are_what_the_clips_see():
    towers = {name: PARAMS[name] for name in ("image", "logit_scale")}
    table = PARAMS["entity_table"]
    assert optim.clipped_groups(PARAMS) == {"towers": towers, "table": table}
    assert optim.clipped_groups(towers) == {"towers": towers}


STACKS = {
    "image": {
        "patch_embedding": {"kernel": jnp.ones((4, 6))},
        "blocks": {"mlp": {"fc1": {"kernel": jnp.ones((3, 6, 8))}}},
        "post_norm": {"scale": jnp.ones(6)},
        "projection": {"kernel": jnp.ones((6, 2))},
    },
    "text": {
        "token_embedding": jnp.ones((9, 4)),
        "blocks": {"mlp": {"fc1": {"kernel": jnp.ones((2, 4, 5))}}},
        "final_norm": {"scale": jnp.ones(4)},
    },
    "logit_scale": jnp.ones(()),
    "entity_table": jnp.ones((5, 2)),
}


def step_sizes(settings, params=STACKS):
    """The first step with gradients of one: Adam's has the size of the learning rate."""
    tx = optim.make(settings, CLOCK)
    updates, state = tx.update(params, tx.init(params), params)
    return jax.tree.map(lambda u: -np.asarray(u) / 0.1, updates), state


def still(**changes):
    """Steps of one size: no warm-up, no decay."""
    return config(
        **{"learning_rate": 0.1, "warmup": "0 steps", "weight_decay": 0.0, "eps": 1e-30, **changes}
    )


def test_logged_learning_rates_are_those_of_the_update():
    settings = still()
    settings.table.learning_rate_multiplier = 3.0
    params = {"logit_scale": jnp.ones(()), sharding.ENTITY_TABLE: jnp.ones((4, 2))}
    sizes, _ = step_sizes(settings, params)
    logged = optim.learning_rates(settings, CLOCK, entity_loss=True)(0)
    assert jax.device_get(logged) == {
        "learning_rate": pytest.approx(0.1 * sizes["logit_scale"]),
        "learning_rate/class_table": pytest.approx(0.1 * sizes[sharding.ENTITY_TABLE][0, 0]),
    }
    assert "learning_rate/class_table" not in optim.learning_rates(
        settings, CLOCK, entity_loss=False
    )(0)


def test_layer_decay_makes_lower_blocks_slower():
    settings = still(layer_decay=0.5)
    settings.table.learning_rate_multiplier = 1.0
    sizes, _ = step_sizes(settings)
    image = sizes["image"]["blocks"]["mlp"]["fc1"]["kernel"][:, 0, 0]
    np.testing.assert_allclose(image, [1 / 8, 1 / 4, 1 / 2], rtol=1e-4)
    np.testing.assert_allclose(sizes["text"]["blocks"]["mlp"]["fc1"]["kernel"][1], 0.5, rtol=1e-4)
    np.testing.assert_allclose(sizes["image"]["patch_embedding"]["kernel"], 1 / 16, rtol=1e-4)
    np.testing.assert_allclose(sizes["text"]["token_embedding"], 1 / 8, rtol=1e-4)
    for whole in (
        sizes["image"]["projection"]["kernel"],
        sizes["image"]["post_norm"]["scale"],
        sizes["text"]["final_norm"]["scale"],
        sizes["logit_scale"],
        sizes["entity_table"],
    ):
        np.testing.assert_allclose(whole, 1, rtol=1e-4)


def test_without_layer_decay_all_steps_are_whole():
    settings = still(layer_decay=1.0)
    settings.table.learning_rate_multiplier = 1.0
    for size in jax.tree.leaves(step_sizes(settings)[0]):
        np.testing.assert_allclose(size, 1, rtol=1e-4)


def test_frozen_parts_do_not_move_and_have_no_moments():
    moving, state = step_sizes(still(frozen=("image", "text/blocks"), weight_decay=0.5))
    for frozen in (moving["image"], moving["text"]["blocks"]):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert np.all(moving["text"]["token_embedding"])
    assert np.all(moving["entity_table"])
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    names = [optim.sharding.path_name(path) for path in paths]
    assert any(name.endswith("mu/text/token_embedding") for name in names)
    assert not any("image" in name or "text/blocks" in name for name in names)


@pytest.mark.parametrize(
    ("frozen", "sentence"),
    [
        (("picture",), "names 'picture', which is no part of the model: choose from entity_table,"),
        (("image/block",), "image/blocks"),
        (("image", "text", "logit_scale", "entity_table"), "leaves nothing to train"),
    ],
)
def test_frozen_parts_that_cannot_be(frozen, sentence):
    with pytest.raises(BadInput, match=sentence):
        optim.check_frozen(STACKS, frozen)
    optim.check_frozen(STACKS, ("image", "text/blocks", "logit_scale"))


def test_adafactor_follows_its_definition_in_a_fraction_of_the_memory():
    """Three steps against numpy; row and column sums in place of a value for each weight."""
    rng = np.random.default_rng(0)
    shape = (40, 64)
    params = {"image": {"projection": {"kernel": jnp.zeros(shape)}}, "logit_scale": jnp.ones(())}
    settings = still(kind="adafactor", b1=0.9, b2=0.5, clip_norm=1e9)
    tx = optim.make(settings, CLOCK)
    state = tx.init(params)
    rows, columns, mean = np.zeros(40), np.zeros(64), np.zeros(shape)
    rate = optim.schedule(settings, CLOCK)
    for t in range(3):
        g = rng.normal(size=shape)
        grads = {"image": {"projection": {"kernel": jnp.asarray(g)}}, "logit_scale": jnp.ones(())}
        updates, state = tx.update(grads, state, params)
        beta = min(1 - (t + 1.0) ** -0.8, 0.5)
        rows = beta * rows + (1 - beta) * np.mean(g**2, axis=1)
        columns = beta * columns + (1 - beta) * np.mean(g**2, axis=0)
        step = g / np.sqrt(rows / rows.mean())[:, None] / np.sqrt(columns)
        mean = 0.9 * mean + 0.1 * step
        ours = updates["image"]["projection"]["kernel"]
        np.testing.assert_allclose(ours, -rate(t) * mean, rtol=1e-4, atol=1e-7)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes[-3:] == [40, 64, 40 * 64], "rows, columns, the first moment"
