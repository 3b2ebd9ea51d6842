"""The training state: step, parameters, their average, optimizer state; created sharded."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mofi_jax.distributed import sharding
from mofi_jax.model import mofi

# N(0, 0.01) rows, as UNICOM and Partial FC initialise theirs; only their direction matters.
TABLE_STD = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Plain pytrees; ``step`` counts finished updates (int32 scalar).

    ``ema`` is the moving average of the parameters, in the same structure, or None without one.
    The leaves are arrays, or ShapeDtypeStructs and NamedShardings in trees about them.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated and exported."""
        return self.params if self.ema is None else self.ema


def updated_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of the parameters after an update; None without one.

    The decay grows to its value, so that the first steps are soon forgotten: (1 + n) / (10 + n)
    after n updates, as TensorFlow's ExponentialMovingAverage does.

    Args:
      params: after the update.
      step: updates before this one.
    """
    if ema is None:
        return None
    n = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda average, new: new + keep * (average - new), ema, params)


def initialiser(
    model: mofi.MofiConfig,
    tx: optax.GradientTransformation,
    *,
    losses: Mapping[str, Mapping[str, Any]],
    table_rows: int,
    ema: bool = False,
):
    """A function of a uint32 seed that makes the state that the given losses need.

    Args:
      losses: ``config.losses``; "entity" needs the class table and, if asked for, a learned scale,
        "contrastive" the text tower and, for the sigmoid loss, its bias.
      table_rows: rows of the class table, padded to the mesh (`class_order.padded_rows`).
      ema: whether the state has an average of the parameters, which begins as they are.
    """
    towers = ("image", "text") if "contrastive" in losses else ("image",)

    def init(seed: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        params = mofi.create(model, key, towers=towers)
        if "contrastive" in losses and losses["contrastive"]["kind"] == "sigmoid":
            params |= mofi.siglip_logits()
        if "entity" in losses:
            if losses["entity"]["learn_scale"]:
                scale = math.log(losses["entity"]["scale"])
                params["entity_log_scale"] = jnp.asarray(scale, jnp.float32)
            table_key = jax.random.fold_in(key, 2)
            # One key a row: the rows of real entities do not depend on the padding, hence not on
            # the number of devices.
            row_keys = jax.vmap(lambda i: jax.random.fold_in(table_key, i))(jnp.arange(table_rows))
            params[sharding.ENTITY_TABLE] = TABLE_STD * jax.vmap(
                lambda k: jax.random.normal(k, (model.embed_dim,), jnp.float32)
            )(row_keys)
        # A copy, as the parameters are donated on their own.
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)

    return init


def create(init: Any, seed: int, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The sharded state, made without a whole one, and the tree of its NamedShardings."""
    _, shardings = abstract(init, mesh)
    return jax.jit(init, out_shardings=shardings)(jnp.uint32(seed)), shardings


def abstract(init: Any, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """As `create`, with ShapeDtypeStructs in place of arrays."""
    shapes = jax.eval_shape(init, jnp.uint32(0))
    shardings = sharding.tree_shardings(mesh, shapes)
    structs = jax.tree.map(lambda shape, at: shape.update(sharding=at), shapes, shardings)
    return structs, shardings
