"""The optimizer: AdamW for the towers, and the class table's own rule.

The table's rows are normalised in the loss, so weight decay would only change its effective
learning rate: it gets none.  Its learning rate and its gradient clip are its own, because millions
of rows would otherwise dominate the global norm (UNICOM ``retrieval.py``, Partial FC
``train_v2.py``).  The rule itself is `class_table.scale_by_row_adam`.
"""

import re
from typing import Any

import jax
import optax

from mofi_jax import partition
from mofi_jax.training import cadence, class_table

# No decay on vectors (norms, biases, class token), the temperature and the class table; position
# embeddings are matrices by shape and biases by function (open_clip decays neither 1-d arrays nor
# the temperature).
NO_DECAY = r"(bias|scale|class_embedding|position_embedding|entity_table)$"


def decay_mask(params: Any) -> Any:
    """Tree of bools: which parameters weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(NO_DECAY, partition.path_name(path)), params
    )


def schedule(config: Any, clock: cadence.Clock) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to ``final_fraction`` of the peak at the last step."""
    warmup = clock.steps(config.warmup, key="config.optimizer.warmup")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(clock.total_steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make(config: Any, clock: cadence.Clock) -> optax.GradientTransformation:
    """Builds the update rule.

    Args:
      config: ``config.optimizer``: learning_rate (peak), warmup (a duration), final_fraction, b1,
        b2, eps, weight_decay (multiplied by the learning rate, as `optax.adamw` does), clip_norm,
        first_moment_dtype, and table = {learning_rate_multiplier, clip_norm, second_moment}.
    """
    rate = schedule(config, clock)
    table = config.table
    rules = {
        "towers": optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_adam(
                b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.first_moment_dtype
            ),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(rate),
        ),
        "table": optax.chain(
            optax.clip_by_global_norm(table.clip_norm),
            class_table.scale_by_row_adam(
                config.b1,
                config.b2,
                config.eps,
                mu_dtype=config.first_moment_dtype,
                second_moment=table.second_moment,
            ),
            optax.scale_by_learning_rate(lambda step: rate(step) * table.learning_rate_multiplier),
        ),
    }

    def label(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "table" if class_table.is_table(path) else "towers", params
        )

    return optax.partition(rules, label)
