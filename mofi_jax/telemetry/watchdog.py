"""Prints where a host hangs; it kills nothing."""

import faulthandler
import sys
import threading


class Watchdog:
    """Prints the stacks of all threads to stderr when nothing is finished for some minutes.

    Every host has its own, since in a hung run the stacks differ: one host waits for its data and
    the others, in a collective, for that host.  It prints even while C++ code holds the interpreter
    lock, and again each time the limit has passed; with 0 minutes never.
    """

    def __init__(self, minutes: float):
        self._seconds = min(60 * minutes, threading.TIMEOUT_MAX)
        self.progress()

    def progress(self) -> None:
        """Something was finished: a step, or a part of a long phase."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=sys.__stderr__)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
