"""Preemption: on SIGTERM (spot machines, SLURM) a training saves and exits with code 75.

Before the first step nothing is lost by exiting at once; from then on a signal waits for the end of
the step, and for a save in progress.  The first Ctrl-C does the same, with exit code 130.  A main
that can be preempted imports this file first, so it imports nothing heavy itself.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from mofi_jax.common.console import interrupts
from mofi_jax.common.errors import Preempted

_GRACE = 2.0  # seconds for an end in good order before the first step
_SAVING = "saving after this step, then stopping; once more stops at once"
_EXITING = b"SIGTERM before the first step: exiting\n"


def exit_on_sigterm() -> None:
    """Makes SIGTERM end this process with 75, until `guard_preemption` takes over."""

    def leave(number: int, frame: Any) -> None:
        os.write(2, _EXITING)  # not print: the signal may have interrupted another one
        # An exception in the middle of importing a library in C++ crashes the process.
        os._exit(Preempted.exit_code)

    signal.signal(signal.SIGTERM, leave)


def ignore_signals() -> None:
    """In a data worker: SLURM and terminals signal all processes, and the run ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class PreemptionGuard:
    """Whether to save and exit, the same answer on every host; see `guard_preemption`.

    A single process handles SIGTERM and Ctrl-C itself.  Among several, JAX's preemption service
    receives SIGTERM on any of them and makes all agree on a step.
    """

    def __init__(self, own: bool = True) -> None:
        self._own = own  # handles signals itself
        self._signal: str | None = None
        self._deferred = False
        self._calls = 0

    def defer_exit(self) -> None:
        """From here on a signal only sets `requested`; before, it ends the process."""
        if not self._deferred:
            self._deferred = True
            interrupts.expect(*[_SAVING] * self._own)

    def preempted(self, sentence: str) -> Preempted:
        """What to raise once the run is saved, with its exit code."""
        error = Preempted(sentence)
        if self._signal == signal.SIGINT.name:
            error.exit_code = interrupts.EXIT_CODE
        return error

    def requested(self) -> bool:
        """Whether a signal has come; called by every host before every step."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._signal is not None
        # The service compares numbers of calls: one that is not the next, as the step of a run that
        # resumed, would never be reached by a signal from before the first call.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def _handle(self, number: int, frame: Any) -> None:
        again, self._signal = self._signal is not None, signal.Signals(number).name
        if number == signal.SIGINT:
            if again or not self._deferred:
                raise KeyboardInterrupt
            return  # `interrupts` has told it
        if not self._deferred:
            os.write(2, _EXITING)
            # No Exception, which a library may take for a failure of its own.
            raise SystemExit(Preempted.exit_code)
        os.write(2, f"{self._signal}: saving after this step, then exiting\n".encode())


@contextlib.contextmanager
def guard_preemption() -> Iterator[PreemptionGuard]:
    """A `PreemptionGuard` that handles signals inside the block; after jax.distributed began."""
    import jax

    # Python lets only the main thread set handlers.
    own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    guard = PreemptionGuard(own)
    numbers = (signal.SIGTERM, signal.SIGINT) if own else ()
    before = {number: signal.signal(number, guard._handle) for number in numbers}
    interrupts.expect(grace=_GRACE)
    try:
        yield guard
    finally:
        interrupts.expect()
        for number, handler in before.items():
            signal.signal(number, handler)
