"""One display over all stages: a live table on a terminal, a line per finished stage in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from absl import logging

_UPDATE = 60.0  # seconds between the lines of a stage in a log


class Display:
    """Shows stages as they come; `with display.stage(...) as advance`, then `advance(counts)`."""

    def __init__(self) -> None:
        self._live = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator:
        """Shows a stage of `total` shards, `done` of which an earlier run finished.

        Yields:
          A function that takes the counts of one more finished shard; the first of them is what
          the stage counts its rows by.
        """
        started = time.monotonic()
        state = {"done": done, "rows": 0, "told": started}
        row = self._row(name, total, done) if sys.stderr.isatty() else None

        def advance(counts: Mapping[str, int]) -> None:
            state["done"] += 1
            state["rows"] += next(iter(counts.values()), 0)
            now = time.monotonic()
            rate = state["rows"] / max(now - started, 1e-9)
            if row is not None:
                self._live.update(row, completed=state["done"], rate=f"{rate:,.0f} rows/s")
            elif now - state["told"] >= _UPDATE:
                state["told"] = now
                logging.info("%s: %d of %d shards, %.0f rows/s", name, state["done"], total, rate)

        yield advance
        seconds = time.monotonic() - started
        if row is None and total > done:
            rate = state["rows"] / max(seconds, 1e-9)
            logging.info("%s: %d shards in %.1f s, %.0f rows/s", name, total, seconds, rate)

    def close(self) -> None:
        """Ends the live table; what it showed stays on the screen."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def _row(self, name: str, total: int, done: int):
        if self._live is None:
            import rich.console
            from rich import progress

            self._live = progress.Progress(
                progress.TextColumn("{task.description:<14}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._live.start()
        return self._live.add_task(name, total=total, completed=done, rate="")
