"""What a person at host 0 sees: one live line on a terminal, plain lines in a log file."""

import datetime
import sys
from collections.abc import Mapping

import jax
import tqdm
from absl import logging

_SHOWN = ("loss", "entity_accuracy", "contrastive_accuracy")


class Console:
    """A context manager; on other hosts than 0 it prints nothing.

    Args:
      total_steps: of the run.
      first: step at which this process begins.
      batch_size: images a step.
      live: one line that changes in place; None: if stderr is a terminal.
    """

    def __init__(self, total_steps: int, *, first: int, batch_size: int, live: bool | None = None):
        self._total = total_steps
        self._batch_size = batch_size
        lead = jax.process_index() == 0
        live = sys.stderr.isatty() if live is None else live
        self._plain = lead and not live
        self._bar = tqdm.tqdm(
            total=total_steps * batch_size,
            initial=first * batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
            disable=not (lead and live),
        )

    def __enter__(self) -> "Console":
        logging.get_absl_handler().addFilter(self._clear)
        return self

    def __exit__(self, *error) -> None:
        logging.get_absl_handler().removeFilter(self._clear)
        self._bar.close()

    def step(self) -> None:
        """A step was begun."""
        self._bar.update(self._batch_size)

    def status(self, text: str) -> None:
        """Sets what the live line shows at its end for now."""
        self._bar.set_postfix_str(text)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The logged values of a step; nothing if there are none."""
        if not values:
            return
        parts = [f"{name} {values[name]:.4g}" for name in _SHOWN if name in values]
        shares = {"data wait": "speed/data_wait", "MFU": "speed/mfu"}
        shares = [f"{k} {100 * values[v]:.1f} %" for k, v in shares.items() if v in values]
        self._bar.set_postfix_str("  ".join(parts + shares))
        if not self._plain:
            return
        rate = values.get("speed/images_per_second")
        if rate:
            left = datetime.timedelta(seconds=round((self._total - step) * self._batch_size / rate))
            parts += [f"{rate:,.1f} img/s", *shares, f"ETA {left}"]
        share = 100 * step / self._total
        logging.info("step %d/%d (%.1f %%)  %s", step, self._total, share, "  ".join(parts))

    def _clear(self, record: object) -> bool:
        """Log lines take the place of the live line, which is drawn again below them."""
        del record
        self._bar.clear()
        return True
