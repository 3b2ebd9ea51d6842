"""What a person at host 0 sees of a run: a line for each logged step."""

import dataclasses
import datetime
from collections.abc import Mapping

import jax
from absl import logging

_SHOWN = ("loss", "entity_accuracy", "contrastive_accuracy")
_SHARES = {"data wait": "speed/data_wait", "MFU": "speed/mfu"}


@dataclasses.dataclass(frozen=True)
class Console:
    """Logs how far a run of ``total_steps`` is, and when it will end."""

    total_steps: int
    batch_size: int

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The logged values of a step; nothing if there are none, or on other hosts than 0."""
        if not values or jax.process_index() != 0:
            return
        parts = [f"{name} {values[name]:.4g}" for name in _SHOWN if name in values]
        rate = values.get("speed/images_per_second")
        if rate:
            seconds = (self.total_steps - step) * self.batch_size / rate
            shares = [f"{k} {100 * values[v]:.1f} %" for k, v in _SHARES.items() if v in values]
            eta = f"ETA {datetime.timedelta(seconds=round(seconds))}"
            parts += [f"{rate:,.1f} img/s", *shares, eta]
        share = 100 * step / self.total_steps
        logging.info("step %d/%d (%.1f %%)  %s", step, self.total_steps, share, "  ".join(parts))
