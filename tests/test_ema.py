"""The moving average of the parameters; rows of the class table that are not always drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mofi_jax.distributed import sharding
from mofi_jax.training import class_table
from mofi_jax.training.state import TrainState, updated_ema

ROWS, DIM = 16, 3


def factor(n, decay):
    return min(float(np.float32(decay)), (1 + n) / (10 + n))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_what_several_steps_leave(decay):
    """Before the decay has grown, across that step, and after; no steps leave everything."""
    first = np.array([0, 0, 1, 5, 60, 80, 500, 20_000, 20_000])
    for last in (20_000, 20_050):
        wanted = [np.prod([factor(n, decay) for n in range(a, last)]) for a in first]
        found = class_table.ema_kept(jnp.asarray(first), jnp.asarray(last), decay)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1])
def test_drawn_rows_follow_the_average_over_all(mesh_of, rate):
    """Against an average of every row at every step; exact for the rows that were just drawn."""
    mesh, decay, steps = mesh_of["1x2x1"], 0.97, 60
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    tx = class_table.scale_by_row_adam(0.9, 0.99, 1e-8, mu_dtype="float32", second_moment="full")
    params = {sharding.ENTITY_TABLE: jnp.asarray(table), "bias": jnp.zeros(2)}
    state = TrainState(
        jnp.zeros((), jnp.int32),
        params,
        tx.init({sharding.ENTITY_TABLE: params[sharding.ENTITY_TABLE]}),
        jax.tree.map(jnp.copy, params),
    )

    @jax.jit
    def step(state, rows):
        small = class_table.catch_up_ema(class_table.take(state, rows, mesh), decay)
        updates = {sharding.ENTITY_TABLE: small.params[sharding.ENTITY_TABLE] * 0 + 1.0}
        _, opt_state = tx.update(updates, small.opt_state)
        moved = small.params | {
            sharding.ENTITY_TABLE: small.params[sharding.ENTITY_TABLE] * 0.9 + 0.1
        }
        ema = updated_ema(small.ema, moved, small.step, decay)
        small = TrainState(small.step + 1, moved, opt_state, ema)
        return class_table.put(state, small, rows, mesh)

    dense, exact = table.astype(np.float64), table.astype(np.float64)
    for n in range(steps):
        # Each device draws from its own half, in ascending order.
        halves = np.sort(
            rng.permuted(np.arange(ROWS).reshape(2, -1), axis=1)[:, : max(1, int(8 * rate))]
        )
        rows = halves.reshape(-1).astype(np.int32)
        state = step(state, jnp.asarray(rows))
        dense[rows] = dense[rows] * 0.9 + 0.1
        exact = dense + factor(n, decay) * (exact - dense)
        found = np.asarray(state.ema[sharding.ENTITY_TABLE])
        np.testing.assert_allclose(found[rows], exact[rows], rtol=1e-5, atol=1e-6)


def test_without_an_average_or_with_a_frozen_table():
    params = {sharding.ENTITY_TABLE: jnp.ones((4, 2))}
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.EmptyState(), None)
    assert class_table.catch_up_ema(state, 0.9) is state
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.EmptyState(), params)
    assert class_table.catch_up_ema(state, 0.9) is state
