"""Training the class table: its update rule, and steps that see only some rows.

The rule is Adam that also remembers the step at which each row was last updated.  In exact training
every row is updated at every step and this is Adam, computed in float32 throughout.  In sampled
training the step runs on a smaller state of the drawn rows (`take`), which is written back (`put`):
other rows are not touched, and when one is drawn again its moments are first decayed by the steps
it missed, as if its gradient had been zero.  Momentum alone never moves a row.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mofi_jax.distributed import sharding
from mofi_jax.losses import class_order, entity_sampling

SECOND_MOMENTS = ("full", "row")


class RowAdamState(NamedTuple):
    """Moments of `scale_by_row_adam`."""

    count: Any  # int32 scalar, finished updates
    mu: Any  # first moments [e, d]
    nu: Any  # second moments, float32 [e, d], or [e] with one a row
    last_step: Any  # int32 [e], the value of `count` after the row's last update


def scale_by_row_adam(
    b1: float, b2: float, eps: float, *, mu_dtype: str, second_moment: str
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) for tables of rows that need not all be updated at each step.

    Args:
      b1, b2, eps: as `optax.scale_by_adam`, also in the bias correction.
      mu_dtype: of the first moment as it is stored.
      second_moment: "full" keeps one value a weight, "row" one a row, the mean square of its
        gradient, as row-wise Adam of embedding tables does.
    """
    full = second_moment == "full"

    def init(params: Any) -> RowAdamState:
        def second(p: jax.Array) -> jax.Array:
            return jnp.zeros(p.shape if full else p.shape[:1], jnp.float32)

        return RowAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros(p.shape, mu_dtype), params),
            nu=jax.tree.map(second, params),
            last_step=jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.int32), params),
        )

    def update(updates: Any, state: RowAdamState, params: Any = None) -> tuple[Any, RowAdamState]:
        del params
        count = optax.safe_increment(state.count)

        def decayed(moment: jax.Array, last_step: jax.Array, decay: float) -> jax.Array:
            missed = (state.count - last_step).astype(jnp.float32)
            factor = decay * decay**missed
            return factor.reshape(factor.shape + (1,) * (moment.ndim - 1)) * moment

        def first(g: jax.Array, m: jax.Array, last_step: jax.Array) -> jax.Array:
            return (1 - b1) * g + decayed(m, last_step, b1)

        def second(g: jax.Array, v: jax.Array, last_step: jax.Array) -> jax.Array:
            square = g * g if full else jnp.mean(g * g, axis=1)
            return (1 - b2) * square + decayed(v, last_step, b2)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            deviation = jnp.sqrt(v / (1 - b2**count)) + eps
            return m / (1 - b1**count) / (deviation if full else deviation[:, None])

        mu = jax.tree.map(first, updates, state.mu, state.last_step)
        nu = jax.tree.map(second, updates, state.nu, state.last_step)
        directions = jax.tree.map(direction, mu, nu)
        return directions, RowAdamState(
            count=count,
            mu=jax.tree.map(lambda m: m.astype(mu_dtype), mu),
            nu=nu,
            last_step=jax.tree.map(lambda row: jnp.full_like(row, count), state.last_step),
        )

    return optax.GradientTransformation(init, update)


def match(old: Sequence[str], new: Sequence[str]) -> Int[np.ndarray, " e"]:
    """int64 [new entities]: the id that each has among the old QIDs, -1 where it is not there."""
    ids = {qid: i for i, qid in enumerate(old)}
    return np.array([ids.get(qid, -1) for qid in new], np.int64)


def rows_of_sources(sources: Int[np.ndarray, " e"], num_old: int) -> Int[np.ndarray, " e"]:
    """Old ids by new id -> row of the old table for each row of the new one, -1 for new ones."""
    ids = class_order.table_entities(np.arange(len(sources)), len(sources))
    return class_order.table_rows(sources[ids], num_old)


def moved_rows(
    state: Any,
    *,
    sources: Int[np.ndarray, " e"],
    new_rows: Float[np.ndarray, "n d"],
    table_rows: int,
) -> Any:
    """The state for another vocabulary: rows and moments move with their entities, in numpy.

    A new row starts without moments, as a row that was not drawn for long.

    Args:
      sources: row of the old table for each row of the new one; below 0 for a new entity.
      new_rows: for each entity with a source below 0, in order.
      table_rows: rows of the new table with its padding, which is zero.
    """
    known = np.flatnonzero(sources >= 0)
    added = np.flatnonzero(sources < 0)

    def move(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        if not is_table(path):
            return leaf
        old = np.asarray(leaf)
        new = np.zeros((table_rows, *old.shape[1:]), old.dtype)
        new[known] = old[sources[known]]
        parent = sharding.path_name(path).split("/")[-2]
        if parent in ("params", "ema"):
            new[added] = new_rows
        elif parent == "last_step":
            new[added] = old.max(initial=0)
        return new

    return jax.tree.map_with_path(move, state)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether a path of the training state names the class table or one of its moments."""
    return sharding.path_name(path).endswith(sharding.ENTITY_TABLE)


def take(state: Any, rows: Int[Array, " s"], mesh: Mesh) -> Any:
    """The state with the drawn rows in place of the class table and of its moments."""
    return jax.tree.map_with_path(
        lambda path, leaf: entity_sampling.take_rows(leaf, rows, mesh) if is_table(path) else leaf,
        state,
    )


def put(state: Any, small: Any, rows: Int[Array, " s"], mesh: Mesh) -> Any:
    """`small`, an updated result of `take`, with its rows back among all the others of `state`."""
    return jax.tree.map_with_path(
        lambda path, leaf, part: (
            entity_sampling.put_rows(leaf, rows, part, mesh) if is_table(path) else part
        ),
        state,
        small,
    )


def ema_kept(first: Int[Array, "..."], last: Int[Array, ""], decay: float) -> Float[Array, "..."]:
    """The share of an average that remains after updates ``first`` to ``last`` - 1."""
    # From this step on the decay has its value; before, factors (1 + n) / (10 + n) telescope.
    grown = jnp.clip(math.ceil((10 * decay - 1) / (1 - decay)), first, last)
    a, b = first.astype(jnp.float32), grown.astype(jnp.float32)
    growing = math.prod((a + i) / (b + i) for i in range(1, 10))
    return growing * jnp.float32(decay) ** (last - grown).astype(jnp.float32)


def catch_up_ema(state: Any, decay: float) -> Any:
    """The state of drawn rows (`take`), their moving average as of the present step.

    A row that is not drawn does not change, and its average is as old as its last draw: the steps
    that it missed are applied here at once.
    """
    moments = sharding.named_leaves(state.opt_state).items()
    wanted = f"last_step/{sharding.ENTITY_TABLE}"
    last_steps = [leaf for name, leaf in moments if name.endswith(wanted)]
    if state.ema is None or not last_steps:  # a frozen table has none
        return state
    rows = state.params[sharding.ENTITY_TABLE]
    keep = ema_kept(last_steps[0], state.step, decay)[:, None]
    average = rows + keep * (state.ema[sharding.ENTITY_TABLE] - rows)
    return dataclasses.replace(state, ema=state.ema | {sharding.ENTITY_TABLE: average})
