"""The update rule: schedule, decay mask, and the class table's own learning rate and clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
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
