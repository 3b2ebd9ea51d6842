"""Leaving when asked: SIGTERM (spot machines, SLURM) ends a training with exit code 75, saved.

Before the first step nothing is lost by leaving at once; from then on a signal waits for the end of
the step, and for a save that is under way.  Imports nothing heavy, as it is what a main that can be
preempted imports first.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mofi_jax.common.errors import Preempted


def leave_from_the_start() -> None:
    """Has SIGTERM end this process with 75 until `listening` begins."""

    def leave(number: int, frame: Any) -> None:
        _say_leaving(number)
        # An exception in the middle of importing a library in C++ crashes the process.
        os._exit(Preempted.exit_code)

    signal.signal(signal.SIGTERM, leave)


def _say_leaving(number: int) -> None:
    # Not print: the signal may have come in the middle of another one.
    os.write(2, f"{signal.Signals(number).name} before the first step: leaving\n".encode())


def leave_to_the_run(worker: int, workers: int) -> None:
    """In a data worker: SLURM and terminals signal all processes, and the run ends its workers."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class PreemptionGuard:
    """Whether it is time to save and go, the same answer on every host; see `listening`.

    A lone process listens for SIGTERM and Ctrl-C.  Among several, jax's own service hears SIGTERM
    on any of them, since jax.distributed began, and makes all agree on a step.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._deferred = False
        self._asked = 0

    def defer(self) -> None:
        """From here on a signal waits until it is `asked` for."""
        self._deferred = True

    def asked(self) -> bool:
        """Called by every host before every step."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._signal is not None
        # The service compares numbers of calls: one that is not the next, as the step of a run that
        # resumed, would never be reached by a signal from before the first call.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _heard(self, number: int, frame: Any) -> None:
        again, self._signal = self._signal is not None, signal.Signals(number).name
        if number == signal.SIGINT and (again or not self._deferred):
            raise KeyboardInterrupt
        if not self._deferred:
            _say_leaving(number)
            # No Exception, which a library may take for a failure of its own.
            raise SystemExit(Preempted.exit_code)
        os.write(2, f"{self._signal}: saving after this step, then leaving\n".encode())


@contextlib.contextmanager
def listening() -> Iterator[PreemptionGuard]:
    """A `PreemptionGuard` that hears signals inside the block; after jax.distributed has begun."""
    import jax

    leave = PreemptionGuard()
    # Python lets only the main thread listen.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield leave
        return
    before = {n: signal.signal(n, leave._heard) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
