"""The optimizer: AdamW or Adafactor for the towers, the class table's own rule, frozen parts.

The table's rows are normalised in the loss, so weight decay would only change its effective
learning rate: it gets none.  It has a learning rate and a gradient clip of its own, because
millions of rows would dominate the global norm (UNICOM ``retrieval.py``, Partial FC
``train_v2.py``), and its own rule, `class_table.scale_by_row_adam`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.training import cadence, class_table

KINDS = ("adamw", "adafactor")

# Adafactor keeps a mean square for each row and each column of a matrix whose sides are at least
# this long.  An attention kernel is [width, heads, head size], so heads of 64 have to count.
FACTORED_FROM = 32

# No decay on vectors (norms, biases, class token, probe), temperature and class table; position
# embeddings are matrices by shape and biases by function (open_clip decays neither 1-d arrays nor
# the temperature).
NO_DECAY = r"(bias|scale|class_embedding|position_embedding|probe|entity_table)$"


def decay_mask(params: Any) -> Any:
    """Tree of bools: which parameters weight decay acts on."""
    return jax.tree.map_with_path(
        lambda path, _: not re.search(NO_DECAY, sharding.path_name(path)), params
    )


def schedule(
    config: Any, clock: cadence.Clock, stages: Sequence[cadence.Stage] = ()
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to ``final_fraction`` of the peak at the last step.

    The steps of each stage have this times its multiplier.
    """
    warmup = clock.steps(config.warmup, key="config.optimizer.warmup")
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(clock.total_steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    factors = [stage.learning_rate_multiplier for stage in stages]
    if set(factors) <= {1.0}:
        return rate
    ends = np.array([stage.end for stage in stages[:-1]], np.int32)

    def multiplied(step: jax.typing.ArrayLike) -> jax.Array:
        stage = jnp.searchsorted(jnp.asarray(ends), step, side="right")
        return rate(step) * jnp.asarray(factors, jnp.float32)[stage]

    return multiplied


def learning_rates(
    config: Any,
    clock: cadence.Clock,
    stages: Sequence[cadence.Stage] = (),
    *,
    entity_loss: bool,
) -> Callable[[int], dict[str, jax.Array]]:
    """The learning rates to log of a step, on the device: the towers', and the table's if any."""
    rate, factors = schedule(config, clock, stages), {"learning_rate": 1.0}
    if entity_loss:
        factors["learning_rate/class_table"] = config.table.learning_rate_multiplier
    # One program for the host to start, and not a dozen operations.
    return jax.jit(lambda step: {name: rate(step) * factor for name, factor in factors.items()})


def make(
    config: Any, clock: cadence.Clock, stages: Sequence[cadence.Stage] = ()
) -> optax.GradientTransformation:
    """The update rule of ``config.optimizer``; weight decay is multiplied by the learning rate."""
    rate = schedule(config, clock, stages)
    table = config.table
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    moments["mu_dtype"] = config.first_moment_dtype
    adam = optax.scale_by_adam(**moments)
    row_adam = class_table.scale_by_row_adam(**moments, second_moment=table.second_moment)
    rules = {
        "towers": optax.chain(
            _clip(config.clip_norm),
            scale_by_adafactor(config) if config.kind == "adafactor" else adam,
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            scale_by_depth(config.layer_decay),
            optax.scale_by_learning_rate(rate),
        ),
        "table": optax.chain(
            _clip(table.clip_norm),
            row_adam,
            optax.scale_by_learning_rate(lambda step: rate(step) * table.learning_rate_multiplier),
        ),
        "frozen": optax.set_to_zero(),
    }

    def rule_of(path: tuple[Any, ...]) -> str:
        if in_parts(sharding.path_name(path), config.frozen):
            return "frozen"  # ``image`` alone is LiT (arXiv 2111.07991)
        return "table" if class_table.is_table(path) else "towers"

    return optax.partition(
        rules, lambda tree: jax.tree.map_with_path(lambda path, _: rule_of(path), tree)
    )


def _clip(norm: float) -> optax.GradientTransformation:
    # optax would scale every gradient to a norm of 0.
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def clipped_groups(params: Any) -> dict[str, Any]:
    """Parameters, or their gradients, by the norm that clips them: towers, and table if any."""
    rest = dict(params)
    table = rest.pop(sharding.ENTITY_TABLE, None)
    return {"towers": rest} | ({} if table is None else {"table": table})


def scale_by_adafactor(config: Any) -> optax.GradientTransformation:
    """Adafactor as it trains vision transformers (arXiv 2106.04560, section 3.4).

    Factored second moments, whose decay grows to ``b2``; a first moment of ``b1`` in
    ``first_moment_dtype``; no scaling by the parameters.  Its memory is the first moment's.
    """

    def decay(step: jax.Array, power: float) -> jax.Array:
        return jnp.minimum(1.0 - (step.astype(jnp.float32) + 1.0) ** -power, config.b2)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM, decay_rate_fn=decay),
        optax.ema(config.b1, debias=False, accumulator_dtype=config.first_moment_dtype),
    )


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Layer-wise learning rate decay: ``decay`` ** (blocks above + 1) (BEiT, arXiv 2106.08254).

    A tower's embeddings lie below its first block; its last norm, projection and pooling, and what
    belongs to no tower, are not scaled.
    """

    def factor(path: tuple[Any, ...], update: jax.Array, layers: dict[str, int]) -> jax.Array:
        names = sharding.path_name(path).split("/")
        depth = layers.get(names[0])
        if depth is None or names[1] in ("final_norm", "post_norm", "projection", "head"):
            return update
        if names[1] == "blocks":  # a stack: one slice for each block
            scale = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
            return update * scale.reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
        return update * decay ** (depth + 1)

    def scaled(updates: Any, params: Any) -> Any:
        del params
        layers = {
            name.partition("/")[0]: leaf.shape[0]
            for name, leaf in sharding.named_leaves(updates).items()
            if "blocks" in name.split("/")
        }
        return jax.tree.map_with_path(lambda path, leaf: factor(path, leaf, layers), updates)

    return optax.identity() if decay == 1 else optax.stateless(scaled)


def in_parts(name: str, parts: Sequence[str]) -> bool:
    """Whether a path lies in one of some parts of a model, named by how their paths begin."""
    return any(name == part or name.startswith(f"{part}/") for part in parts)


def check_frozen(params: Any, frozen: Sequence[str]) -> None:
    """Raises BadInput for a part without parameters (names those there are), or for all of them."""
    paths = sharding.named_leaves(params).keys()
    for part in frozen:
        if not any(in_parts(path, (part,)) for path in paths):
            names = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise BadInput(
                f"config.optimizer.frozen names {part!r}, which is no part of the model: choose "
                f"from {', '.join(names)}, or what these begin with."
            )
    if all(in_parts(path, frozen) for path in paths):
        raise BadInput("config.optimizer.frozen leaves nothing to train: freeze fewer parts.")
