"""A training config's values, checked once at the start."""

import numbers
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.interop import clip_config
from mofi_jax.losses import margins, relations
from mofi_jax.model import mofi
from mofi_jax.training import cadence, class_table, optim

KINDS = ("softmax", "sigmoid")  # of the contrastive loss

Check = tuple[str, Callable[[Any], bool]]  # what a value must be: in words, and as a test

POSITIVE: Check = "above 0", lambda x: x > 0
NOT_NEGATIVE: Check = "of 0 or more", lambda x: x >= 0
BELOW_ONE: Check = "of 0 or more and below 1", lambda x: 0 <= x < 1
SHARE: Check = "above 0 and at most 1", lambda x: 0 < x <= 1
SWITCH: Check = ("True or False", lambda x: isinstance(x, bool))
TEXT: Check = ("text", lambda x: isinstance(x, str | os.PathLike))
MAPPING: Check = ("keys with values", lambda x: hasattr(x, "to_dict"))
PARTS: Check = (
    'names of parts in brackets, as ("image",)',
    lambda x: isinstance(x, tuple | list) and all(isinstance(name, str) for name in x),
)


def real(words: str, fits: Callable[[Any], bool]) -> Check:
    return (
        f"a number {words}",
        lambda x: (
            # Not math.isfinite, which raises where an int is too large for a float.
            isinstance(x, numbers.Real)
            and not isinstance(x, bool)
            and abs(x) <= sys.float_info.max
            and fits(x)
        ),
    )


def whole(words: str, fits: Callable[[Any], bool]) -> Check:
    is_number = real(words, fits)[1]
    return f"a whole number {words}", lambda x: isinstance(x, numbers.Integral) and is_number(x)


def choice(allowed: tuple[str, ...]) -> Check:
    return f"one of {', '.join(allowed)}", lambda x: x in allowed


OF_LOSSES: dict[str, dict[str, Check]] = {
    "entity": {
        "scale": real(*POSITIVE),
        "learn_scale": SWITCH,
        "margin": real(*BELOW_ONE),
        "margin_kind": choice(margins.KINDS),
        "sample_rate": real(*SHARE),
        "block_size": whole(*NOT_NEGATIVE),
    },
    "contrastive": {"kind": choice(KINDS), "same_entity": choice(relations.SAME_ENTITY)},
}
OF_STAGE: dict[str, Check] = {
    "length": ("a duration, as '80 percent'", TEXT[1]),
    "image_size": whole(*POSITIVE),
    "patch_dropout": real(*BELOW_ONE),
    "learning_rate_multiplier": real(*POSITIVE),
}
CHECKS: dict[str, Check] = {
    "seed": whole(f"from 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32),
    "start_timeout": whole(*POSITIVE),
    **dict.fromkeys(
        (f"mesh.{axis}" for axis in meshes.ALL_AXES),
        whole("above 0, or -1 for what the others leave", lambda x: x > 0 or x == -1),
    ),
    "batch_size": whole(*POSITIVE),
    "microbatches": whole(*POSITIVE),
    "losses": (
        f"one or both of {', '.join(OF_LOSSES)}",
        lambda tasks: len(tasks) > 0 and set(tasks) <= OF_LOSSES.keys(),
    ),
    **dict.fromkeys(("data.dir", "data.name", "data.train_ops", "data.eval_ops"), TEXT),
    "data.extra": MAPPING,
    **dict.fromkeys(
        ("data.block", "data.threads", "data.prefetch", "data.max_labels"), whole(*POSITIVE)
    ),
    "data.workers": whole(*NOT_NEGATIVE),
    "data.text_sources": (
        "weights of 0 or more, one of them positive",
        lambda w: (
            hasattr(w, "values")
            and all(map(real(*NOT_NEGATIVE)[1], w.values()))
            and sum(w.values()) > 0
        ),
    ),
    "model.context_length": whole(*POSITIVE),
    "stages": (
        f"stages in brackets, each with a length and {', '.join(list(OF_STAGE)[1:])}",
        lambda stages: (
            isinstance(stages, tuple | list)
            and all("length" in stage and set(stage) <= OF_STAGE.keys() for stage in stages)
        ),
    ),
    "evaluators": MAPPING,
    "init.model": ("text, empty for none", lambda x: not x or TEXT[1](x)),
    "init.parts": PARTS,
    "optimizer.kind": choice(optim.KINDS),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.eps"), real(*POSITIVE)),
    **dict.fromkeys(
        (f"optimizer.{key}" for key in ("final_fraction", "weight_decay", "clip_norm")),
        real(*NOT_NEGATIVE),
    ),
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "ema.decay"), real(*BELOW_ONE)),
    "optimizer.first_moment_dtype": choice(("bfloat16", "float32")),
    "optimizer.frozen": PARTS,
    "optimizer.layer_decay": real(*SHARE),
    "optimizer.table.learning_rate_multiplier": real(*NOT_NEGATIVE),
    "optimizer.table.clip_norm": real(*NOT_NEGATIVE),
    "optimizer.table.second_moment": choice(class_table.SECOND_MOMENTS),
    "checkpoint.keep": whole(*POSITIVE),
    "checkpoint.verify": SWITCH,
    "checkpoint.keep_best": TEXT,
    "telemetry.hang_minutes": real(*NOT_NEGATIVE),
}


def validate(config: Any) -> None:
    """Raises BadInput that names the first key that is missing, or whose value cannot work."""
    _check(config, CHECKS)
    for name in config.losses:
        of_loss = {"weight": real(*POSITIVE), **OF_LOSSES[name]}
        _check(config, {f"losses.{name}.{key}": check for key, check in of_loss.items()})
    for number, stage in enumerate(config.stages):
        _check(stage, {key: OF_STAGE[key] for key in stage}, f"stages[{number}].")
    if "entity" in config.losses and config.losses.entity.learn_scale:
        cap = mofi.MAX_LOGIT_SCALE
        words = f"at most {cap:g}, its cap, where it is learned"
        _check(config, {"losses.entity.scale": real(words, lambda x: x <= cap)})


def _check(config: Any, checks: Mapping[str, Check], prefix: str = "") -> None:
    for key, (wanted, fits) in checks.items():
        value, name = config, f"config.{prefix}{key}"
        try:
            for part in key.split("."):
                value = value[part]
        except (KeyError, TypeError):
            raise BadInput(f"{name} is missing: add it, see configs/mofi.py.") from None
        try:
            fine = fits(value)
        except (TypeError, AttributeError):  # of another kind altogether
            fine = False
        if not fine:
            shown = "" if hasattr(value, "items") else f", not {value!r}"
            raise BadInput(f"{name} must be {wanted}{shown}: change it in the config file or flag.")


def warnings(config: Any, clock: cadence.Clock, *, eos_id: int) -> list[str]:
    """Sentences about settings that work and are seldom meant."""
    sentences, warmup, every = [], config.optimizer.warmup, config.checkpoint.every
    steps = clock.steps(warmup, key="config.optimizer.warmup")
    if steps >= clock.total_steps:
        sentences.append(
            f"config.optimizer.warmup={warmup!r} is {steps} steps and the run has "
            f"{clock.total_steps}: the learning rate never reaches its peak; shorten the warm-up."
        )
    if not clock.steps(every, key="config.checkpoint.every"):
        sentences.append(
            f"config.checkpoint.every={every!r} saves nothing before the run ends or is preempted: "
            "a crash loses all of it."
        )
    if "contrastive" in config.losses and eos_id == clip_config.ARGMAX_EOS:
        sentences.append(
            f"The tokenizer's EOS has the id {eos_id}, for which transformers pools texts at "
            "another token: this run cannot be exported; use a tokenizer whose EOS has another id."
        )
    return sentences
