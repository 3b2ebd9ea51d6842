"""Durations as data: ``"20 epochs"``, ``"2000 steps"``, ``"1e6 examples"``, ``"5 percent"``."""

import dataclasses
import math

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
