"""The exponential moving average of the parameters, which is then evaluated and exported.

Its decay grows to its value, so that the first steps are soon forgotten: (1 + n) / (10 + n) after n
updates, as TensorFlow's ExponentialMovingAverage does.  In sampled training a row of the class
table is averaged when it is drawn, and first catches up with the steps that it missed, in which it
did not change: until then its average is as old as its last draw.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mofi_jax.distributed import sharding
from mofi_jax.training import class_table
from mofi_jax.training.state import TrainState


def updated(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The average after an update.

    Args:
      ema: the average before, None where there is none.
      params: after the update.
      step: updates before this one.
      decay: ``config.ema.decay``.
    """
    if ema is None:
        return None
    n = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda average, new: new + keep * (average - new), ema, params)


def kept(first: Int[Array, "..."], last: Int[Array, ""], decay: float) -> Float[Array, "..."]:
    """What the updates from step ``first`` on, before ``last``, leave of an average."""
    # From this step on the decay has its value; before, factors (1 + n) / (10 + n) telescope.
    grown = jnp.clip(math.ceil((10 * decay - 1) / (1 - decay)), first, last)
    a, b = first.astype(jnp.float32), grown.astype(jnp.float32)
    growing = math.prod((a + i) / (b + i) for i in range(1, 10))
    return growing * jnp.float32(decay) ** (last - grown).astype(jnp.float32)


def caught_up(state: TrainState, decay: float) -> TrainState:
    """The state of drawn rows (`class_table.take`) with their average as of the present step."""
    last_steps = [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        if class_table.is_table(path) and "last_step" in sharding.path_name(path).split("/")
    ]
    if state.ema is None or not last_steps:  # a frozen table has none
        return state
    rows = state.params[sharding.ENTITY_TABLE]
    keep = kept(last_steps[0], state.step, decay)[:, None]
    average = rows + keep * (state.ema[sharding.ENTITY_TABLE] - rows)
    return dataclasses.replace(state, ema=state.ema | {sharding.ENTITY_TABLE: average})
