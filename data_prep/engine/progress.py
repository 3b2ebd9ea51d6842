"""What a person sees of a stage: a line that moves on a terminal, a line a minute in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from absl import logging

from mofi_jax.common import console

_SHORT = 1.0  # seconds; stages that take less are many, and get no line of their own


@contextlib.contextmanager
def show(name: str, total: int, done: int) -> Iterator:
    """Shows a stage of `total` shards, `done` of which an earlier run finished.

    Yields:
      A function that takes the counts of one more finished shard; the first of them is what the
      stage counts its speed by.
    """
    started = time.monotonic()
    amount, here, unit = 0, 0, "rows"

    def rate() -> str:
        return f"{amount / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s"

    def line() -> str:
        seconds = time.monotonic() - started
        text = f"{name}: {done + here} of {total} shards"
        if not here:
            return f"{text}, {console.duration(seconds)}"
        left = seconds / here * (total - done - here)
        return f"{text}, {rate()}, {console.duration(left)} left"

    def advance(counts: Mapping[str, int]) -> None:
        nonlocal amount, here, unit
        first = next(iter(counts), "rows")
        # What SQL has made is counted by its files.
        unit = "rows" if "/" in first else first.replace("_", " ")
        amount, here = amount + counts.get(first, 0), here + 1

    console.now(line, silence=console.WORKING)
    try:
        yield advance
    finally:
        console.close()
    seconds = time.monotonic() - started
    if seconds >= _SHORT:
        logging.info(
            "%s: %d %s in %s, %s",
            name,
            total,
            "shard" if total == 1 else "shards",
            console.duration(seconds),
            rate(),
        )
