"""What a person sees of a stage: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import tqdm
from absl import logging

_UPDATE = 60.0  # seconds between the lines of a stage in a log


@contextlib.contextmanager
def show(name: str, total: int, done: int) -> Iterator:
    """Shows a stage of `total` shards, `done` of which an earlier run finished.

    Yields:
      A function that takes the counts of one more finished shard; the first of them is what the
      stage counts its rows by.
    """
    started = told = time.monotonic()
    rows, here = 0, 0
    # disable=None: no bar where standard error is no terminal.
    with tqdm.tqdm(desc=name, total=total, initial=done, unit="shard", disable=None) as bar:

        def rate() -> float:
            return rows / max(time.monotonic() - started, 1e-9)

        def advance(counts: Mapping[str, int]) -> None:
            nonlocal rows, here, told
            here += 1
            rows += next(iter(counts.values()), 0)
            bar.set_postfix_str(f"{rate():,.0f} rows/s", refresh=False)
            bar.update()
            if bar.disable and time.monotonic() - told >= _UPDATE:
                told = time.monotonic()
                logging.info("%s: %d of %d shards, %.0f rows/s", name, done + here, total, rate())

        yield advance
        if bar.disable and total > done:
            seconds = time.monotonic() - started
            logging.info("%s: %d shards in %.1f s, %.0f rows/s", name, total, seconds, rate())
