"""Durations as data: ``"20 epochs"``, ``"2000 steps"``, ``"1e6 examples"``, ``"5 percent"``.

And the stages of a run, which are told by them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mofi_jax.common.errors import BadInput

UNITS = ("steps", "epochs", "examples", "percent")


@dataclasses.dataclass(frozen=True)
class Clock:
    """Turns durations into steps; ``batch_size`` is the global one."""

    batch_size: int
    examples_per_epoch: int
    total_steps: int = 0  # while it is not known

    def steps(self, duration: str, *, key: str) -> int:
        """Number of steps, at least 1; ``"0 steps"`` (any unit) is 0 and means never.

        Raises BadInput: not a number and a unit, or negative; ``key`` names it.
        """
        number, _, unit = str(duration).strip().partition(" ")
        unit = unit.strip() if unit.strip().endswith("s") or unit == "percent" else f"{unit}s"
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if not 0 <= amount < math.inf or unit not in UNITS:
            raise BadInput(
                f"{key}={duration!r} is not a duration: write a number and one of "
                f"{', '.join(UNITS)}, as in '20 epochs'."
            )
        if unit == "percent" and amount and not self.total_steps:
            raise BadInput(f"{key}={duration!r}: the total cannot be a percentage of itself.")
        per_unit = {
            "steps": 1.0,
            "epochs": self.examples_per_epoch / self.batch_size,
            "examples": 1 / self.batch_size,
            "percent": self.total_steps / 100,
        }[unit]
        return max(1, round(amount * per_unit)) if amount else 0

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every ``every`` steps (0: never) and at the end is due now."""
        return every > 0 and (step == self.total_steps or step % every == 0)


def make_clock(total: str, *, batch_size: int, examples_per_epoch: int) -> Clock:
    """The clock of a run of length ``total`` (config key ``total``)."""
    clock = Clock(batch_size, examples_per_epoch)
    steps = clock.steps(total, key="config.total")
    if not steps:
        raise BadInput(f"config.total={total!r} trains for no step at all: make it longer.")
    if steps >= 2**31:
        raise BadInput(
            f"config.total={total!r} is more steps than can be counted: make it shorter."
        )
    return dataclasses.replace(clock, total_steps=steps)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of a run, from ``first`` up to ``end``, that see pictures in one way."""

    first: int
    end: int
    image_size: int
    patch_dropout: float = 0.0
    learning_rate_multiplier: float = 1.0

    def __str__(self) -> str:
        return (
            f"steps {self.first} to {self.end}: {self.image_size} pixels, patch dropout "
            f"{self.patch_dropout:g}, learning rate times {self.learning_rate_multiplier:g}"
        )


def make_stages(
    wanted: Sequence[Mapping[str, Any]], clock: Clock, *, image_size: int, patch_size: int
) -> tuple[Stage, ...]:
    """The stages of a run, one after the other; what they leave of it is one as the model is.

    Args:
      wanted: ``config.stages``, each with a ``length`` and what differs from the defaults of
        `Stage` and the model's ``image_size``.

    Raises BadInput: stages that are longer than the run or have no step, and sizes that do not
      divide into patches.
    """
    stages: list[Stage] = []
    first, total = 0, clock.total_steps
    for number, options in enumerate(wanted):
        key = f"config.stages[{number}]"
        options = {"image_size": image_size, **options}
        length = clock.steps(options.pop("length"), key=f"{key}.length")
        # Rounded lengths may add up to a step more than the run for each of them.
        if not length or first >= total or first + length > total + number:
            raise BadInput(
                f"{key} would be {length} steps from step {first} of {total} of the run: choose "
                "lengths above 0 that the run (config.total) has room for."
            )
        if options["image_size"] % patch_size:
            raise BadInput(
                f"{key}.image_size={options['image_size']} is not a multiple of the patch, "
                f"{patch_size} pixels: choose one that is."
            )
        stages.append(Stage(first, min(first + length, total), **options))
        first = stages[-1].end
    if first < total:
        stages.append(Stage(first, total, image_size))
    return tuple(stages)
