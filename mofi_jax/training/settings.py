"""A training config's values: checked once at the start, and turned into the model's own config."""

from typing import Any

from mofi_jax.errors import BadInput
from mofi_jax.losses import margins, relations
from mofi_jax.model import mofi
from mofi_jax.training import class_table, optim

KINDS = ("softmax", "sigmoid")  # of the contrastive loss


def model_config(config: Any, *, vocab_size: int, eos_id: int) -> mofi.MofiConfig:
    """``config.model`` (an ml_collections ConfigDict) and a tokenizer's sizes -> `MofiConfig`."""
    return mofi.MofiConfig.from_dict(
        {**config.to_dict(), "vocab_size": vocab_size, "eos_id": eos_id}
    )


def validate(config: Any) -> None:
    """Checks the values of a finished training config.

    Raises:
      BadInput: names the first key whose value cannot work.
    """

    def choice(key: str, allowed: tuple[str, ...]) -> tuple[str, bool, str]:
        value = config
        for part in key.split("."):
            value = value[part]
        return key, value in allowed, f"one of {', '.join(allowed)}"

    checks = [
        ("start_timeout", config.start_timeout > 0, "a positive number of seconds"),
        ("batch_size", config.batch_size > 0, "a positive number"),
        ("optimizer.learning_rate", config.optimizer.learning_rate > 0, "a positive number"),
        ("data.threads", config.data.threads > 0, "a positive number"),
        ("data.workers", config.data.workers >= 0, "0 or more"),
        ("data.prefetch", config.data.prefetch > 0, "a positive number"),
        ("losses", len(config.losses) > 0, "at least one task"),
        ("data.text_sources", sum(config.data.text_sources.values()) > 0, "a positive weight"),
        ("data.max_labels", config.data.max_labels > 0, "a positive number"),
        ("checkpoint.keep", config.checkpoint.keep > 0, "a positive number"),
        ("telemetry.hang_minutes", config.telemetry.hang_minutes >= 0, "0 or more"),
        ("microbatches", config.microbatches > 0, "a positive number"),
        choice("optimizer.kind", optim.KINDS),
        choice("optimizer.table.second_moment", class_table.SECOND_MOMENTS),
        ("optimizer.layer_decay", 0 < config.optimizer.layer_decay <= 1, "above 0, at most 1"),
        ("ema.decay", 0 <= config.ema.decay < 1, "0 for none, or below 1"),
        ("max_replicated", 0 <= config.max_replicated <= 1, "a share between 0 and 1"),
    ]
    for name, task in config.losses.items():
        checks.append((f"losses.{name}.weight", task.weight > 0, "a positive weight"))
        if name == "entity":
            checks += [
                ("losses.entity.scale", task.scale > 0, "a positive scale"),
                ("losses.entity.margin", 0 <= task.margin < 1, "a margin in [0, 1)"),
                choice("losses.entity.margin_kind", margins.KINDS),
                ("losses.entity.sample_rate", 0 < task.sample_rate <= 1, "above 0, at most 1"),
                ("losses.entity.block_size", task.block_size >= 0, "0 or more"),
            ]
            if task.learn_scale:
                fits = task.scale < mofi.MAX_LOGIT_SCALE
                checks.append(
                    ("losses.entity.scale", fits, "below 100, its cap, where it is learned")
                )
        if name == "contrastive":
            checks += [
                choice("losses.contrastive.kind", KINDS),
                choice("losses.contrastive.same_entity", relations.SAME_ENTITY),
            ]
    for key, fine, wanted in checks:
        if not fine:
            raise BadInput(f"config.{key} must be {wanted}: change it in the config file or flag.")
