"""Reports where a host hangs; it kills nothing."""

import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
from etils import epath

from mofi_jax.common.files import write_text
from mofi_jax.telemetry.goodput import Goodput


class Watchdog:
    """A thread that prints phase, step and the stacks of all threads when nothing moves.

    Every host has its own, since in a hung run the stacks differ: one host waits for its data and
    the others, in a collective, for that host.  A change of phase and a compiled program are
    progress, beside the calls of `progress`.  It reports again each time the limit has passed.

    Args:
      workdir: receives ``hang-PROCESS.txt``.
      goodput: knows the phase.
      minutes: without progress until it reports; 0 for never.
      clock: that of ``goodput``.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        goodput: Goodput,
        *,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path = epath.Path(workdir) / f"hang-{jax.process_index()}.txt"
        self._goodput = goodput
        self._limit = minutes * 60
        self._clock = clock
        self._last = clock()
        self._step: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if minutes > 0:
            self._thread.start()

    def progress(self, step: int | None = None) -> None:
        """Something was finished: a step with its number, or a part of a long phase."""
        self._step = self._step if step is None else step
        self._last = self._clock()

    def idle(self) -> float:
        """Seconds without progress."""
        return self._clock() - max(self._last, self._goodput.moved)

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported = 0  # times in this hang
        while not self._stop.wait(min(10.0, self._limit / 10)):
            idle = self.idle()
            due = int(idle / self._limit)
            if due > reported:
                self._report(idle)
            reported = due

    def _report(self, idle: float) -> None:
        reached = "before its first step" if self._step is None else f"at step {self._step}"
        lines = [
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}: process {jax.process_index()} of "
            f"{jax.process_count()} hangs: no progress for {idle / 60:.1f} minutes, in phase "
            f"{self._goodput.current!r}, {reached}\n"
        ]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            lines += [f"thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        text = "".join(lines)
        print(text, file=sys.stderr, flush=True)
        try:
            before = self._path.read_text() if self._path.exists() else ""
            write_text(self._path, before + text)
        except OSError as error:
            print(f"{self._path} cannot be written: {error}", file=sys.stderr, flush=True)
