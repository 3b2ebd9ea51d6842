"""The class table's update rule: Adam, rows that were missed, rows that stay untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mofi_jax.distributed import meshes, sharding
from mofi_jax.losses import entity_sampling
from mofi_jax.training import class_table

ROWS, DIM = 48, 5
TABLE = sharding.ENTITY_TABLE


def rule(**changes):
    options = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "mu_dtype": "float32", "second_moment": "full"}
    return class_table.scale_by_row_adam(**{**options, **changes})


def gradients(steps, rows=ROWS):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, DIM)), jnp.float32) for _ in range(steps)]


def run(tx, steps):
    params = {TABLE: jnp.zeros((ROWS, DIM))}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in steps:
        directions, state = update({TABLE: gradient}, state, params)
        params = jax.tree.map(jnp.add, params, directions)
    return params[TABLE], state


def test_all_rows_at_every_step_is_adam():
    ours, _ = run(rule(), gradients(8))
    theirs, _ = run(optax.scale_by_adam(0.9, 0.98, 1e-6), gradients(8))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_first_moment_in_bfloat16():
    """Stored in bfloat16, computed in float32: b1 itself is not rounded to 0.898 (as in optax)."""
    ours, state = run(rule(mu_dtype="bfloat16"), gradients(30))
    assert state.mu[TABLE].dtype == jnp.bfloat16
    exact, _ = run(rule(), gradients(30))
    theirs, _ = run(optax.scale_by_adam(0.9, 0.98, 1e-6, mu_dtype="bfloat16"), gradients(30))
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert error < 3e-3
    assert error < np.linalg.norm(theirs - exact) / np.linalg.norm(exact)


def test_row_wise_second_moment():
    """One mean square a row: Adam on rows whose entries all have the row's root mean square."""
    ours, state = run(rule(second_moment="row"), gradients(8))
    assert state.nu[TABLE].shape == (ROWS,)
    m, v, expected = np.zeros((ROWS, DIM)), np.zeros((ROWS, 1)), np.zeros((ROWS, DIM))
    for t, gradient in enumerate(gradients(8), start=1):
        g = np.asarray(gradient, np.float64)
        m = 0.9 * m + 0.1 * g
        v = 0.98 * v + 0.02 * (g * g).mean(1, keepdims=True)
        expected += m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second_moment", class_table.SECOND_MOMENTS)
def test_missed_steps_decay_the_moments_and_move_nothing(second_moment):
    """A row's moments are those of a row whose gradient was zero; its weights stand still."""
    tx = rule(second_moment=second_moment)
    seen = [0, 1, 5, 6, 9]
    steps = gradients(10)
    _, expected = run(tx, [g if t in seen else jnp.zeros_like(g) for t, g in enumerate(steps)])

    params = jnp.zeros((ROWS, DIM))
    state = tx.init({TABLE: params})
    for t, gradient in enumerate(steps):
        if t in seen:
            directions, state = tx.update({TABLE: gradient}, state)
            params += directions[TABLE]
        else:  # as the step of a sample without these rows leaves them
            state = state._replace(count=state.count + 1)
    np.testing.assert_allclose(state.mu[TABLE], expected.mu[TABLE], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(state.nu[TABLE], expected.nu[TABLE], rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(state.last_step[TABLE], 10)
    assert np.abs(params).max() <= 1.5 * len(seen), "momentum moved a row that was not there"


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_only_drawn_rows_change(mesh_of, mesh):
    """Table, moments and memory of all other rows keep their bits over a whole step."""
    mesh = mesh_of[mesh]
    tx = rule(mu_dtype="bfloat16", second_moment="row")
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(ROWS, DIM)), jnp.float32)
    _, state = run(tx, gradients(3))
    before = {"params": {TABLE: table, "other": jnp.ones(3)}, "moments": state}
    sample = entity_sampling.draw(
        jax.random.key(0),
        jnp.arange(8, dtype=jnp.int32)[:, None],
        table_rows=ROWS,
        num_entities=ROWS - 3,
        rate=0.5,
        mesh=mesh,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(whole):
        small = class_table.take(whole, sample.rows, mesh)
        assert small["params"][TABLE].shape == (*sample.rows.shape, DIM)
        assert small["moments"].nu[TABLE].shape == sample.rows.shape
        gradient = {TABLE: jnp.ones_like(small["params"][TABLE])}
        directions, moments = tx.update(gradient, small["moments"])
        params = small["params"] | {TABLE: small["params"][TABLE] + directions[TABLE]}
        return class_table.put(whole, {"params": params, "moments": moments}, sample.rows, mesh)

    sharded = jax.device_put(before, sharding.tree_shardings(mesh, before))
    after = step(jax.tree.map(jnp.copy, sharded))
    drawn = np.isin(np.arange(ROWS), sample.rows)
    assert 0 < drawn.sum() < ROWS
    for path, old in jax.tree_util.tree_flatten_with_path(before)[0]:
        new = functools.reduce(
            lambda node, key: getattr(node, key.name) if hasattr(key, "name") else node[key.key],
            path,
            after,
        )
        if class_table.is_table(path):
            np.testing.assert_array_equal(new[~drawn], old[~drawn])
            assert np.all(np.any(np.reshape(new != old, (ROWS, -1))[drawn], axis=1)), path
    assert after["moments"].count == 4


def test_moments_lie_with_their_rows(mesh_of):
    """[e, d] and [e] moments are split over all devices as the table is."""
    state = rule(second_moment="row").init({TABLE: jnp.zeros((ROWS, DIM))})
    shardings = sharding.tree_shardings(mesh_of["2x2x2"], state)
    for moment in (shardings.mu, shardings.nu, shardings.last_step):
        assert moment[TABLE].spec[0] == meshes.ALL_AXES
