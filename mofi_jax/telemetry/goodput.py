"""Where a run's wall time goes: seconds by phase, which sum to the time since the very first start.

    start       a process's imports, data, model, restoring, up to its loop
    compile     JAX tracing, lowering and compiling (its own events), in whatever phase it happens
    input       the loop waits for the next batch
    step        everything else in the loop: the device computes
    eval        evaluators
    checkpoint  the loop waits for a save; the rest of it runs in the background
    profile     a trace is begun or written (``--profile``); the steps in between are steps
    lost        input, steps and evaluations after the checkpoint from which the next process
                resumed, which repeated them
    down        between the last heartbeat of a process and the start of the next

Each checkpoint holds the seconds of its moment, and ``goodput.json`` in the workdir those of the
last heartbeat: what the second has and the first has not was lost.
"""

import contextlib
import datetime
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import psutil
from absl import logging
from etils import epath

from mofi_jax.common.files import write_json

GOODPUT_FILE = "goodput.json"
PHASES = ("start", "compile", "input", "step", "eval", "checkpoint", "profile", "lost", "down")

_REDONE = ("input", "step", "eval")  # by a process that resumes from an earlier checkpoint
_HEARTBEAT_SECONDS = 10.0
_COMPILE_EVENTS = "/jax/core/compile/"


def process_start() -> float:
    """Unix time at which this process started, before its first import."""
    return psutil.Process().create_time()


class Goodput:
    """The clock of a run; every moment belongs to exactly one phase, at first to "start".

    It began at the Unix time ``started`` (None: now); ``clock`` only grows, ``wall`` is Unix time.
    """

    def __init__(
        self,
        started: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        now = wall()
        self._started = self._first_start = now if started is None else min(started, now)
        self._clock = clock
        self._mark = self._written = clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds["start"] = now - self._started
        self._stack = ["start"]
        self._compiled: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        self._path: epath.Path | None = None
        self._finished = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def resume(self, workdir: epath.PathLike, saved: Mapping[str, float]) -> None:
        """Adds what earlier processes spent on this run, and writes to the workdir from now on.

        ``saved`` are the seconds of the restored checkpoint, if any.  A run that had finished, and
        now has a larger total, was not down in between; nor was one without ``goodput.json``.
        """
        path = epath.Path(workdir) / GOODPUT_FILE
        alive, down = {phase: saved.get(phase, 0.0) for phase in PHASES}, 0.0
        try:
            last = json.loads(path.read_text())
            last_seconds = {phase: float(last["seconds"][phase]) for phase in PHASES}
            idle = self._started - float(last["first_start"]) - sum(last_seconds.values())
            if not math.isfinite(idle):
                raise ValueError("not finite")
            alive, down = last_seconds, 0.0 if last["finished"] else max(0.0, idle)
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            logging.warning("%s cannot be read (%r): the run's time down is unknown", path, error)
        self._first_start = self._started - down - sum(alive.values())
        for phase in _REDONE:
            redone = max(0.0, alive[phase] - saved.get(phase, 0.0))
            alive[phase] -= redone
            alive["lost"] += redone
        alive["down"] += down
        for phase, seconds in alive.items():
            self._seconds[phase] += seconds
        if jax.process_index() == 0:
            self._path = path
            self.save()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as ``name``; what it interrupts continues afterwards."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def enter(self, name: str) -> None:
        """From here on, time outside of any `phase` counts as ``name``."""
        self._settle()
        self._stack[0] = name

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the very first start, up to now."""
        self._settle()
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """``goodput/PHASE``: share of the wall time since the very first start; they sum to 1."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        return {f"goodput/{phase}": value / total for phase, value in seconds.items()}

    def line(self) -> str:
        """The shares for people."""
        total = datetime.timedelta(seconds=round(sum(self.seconds().values())))
        shares = {phase: 100 * self.shares()[f"goodput/{phase}"] for phase in PHASES}
        parts = ", ".join(f"{phase} {share:.1f} %" for phase, share in shares.items() if share)
        return f"goodput {shares['step']:.1f} % of {total} since the start: {parts}"

    def heartbeat(self) -> None:
        """Writes the seconds if the last time was a while ago."""
        if self._clock() - self._written >= _HEARTBEAT_SECONDS:
            self.save()

    def save(self) -> dict[str, float]:
        """Writes the seconds to the workdir (host 0, after `resume`) and returns them."""
        seconds = self.seconds()
        if self._path is not None:
            state = {"first_start": self._first_start, "finished": self._finished}
            write_json(self._path, {**state, "seconds": seconds})
        self._written = self._mark
        return seconds

    def finish(self) -> dict[str, float]:
        """As `save`, of a run that has reached its end."""
        self._finished = True
        return self.save()

    def close(self) -> None:
        """Saves for the last time, and listens to JAX no more."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        try:
            self.save()
        except OSError as error:  # the folder may be full or gone; what ended the run matters more
            logging.warning("%s cannot be written: %s", self._path, error)

    def compiled(self, seconds: float) -> None:
        """Moves the last ``seconds`` of the present phase to "compile".

        JAX reports an inner program before the outer one whose time contains it: what has been
        moved already is not moved again.
        """
        self._settle()
        begin = self._mark - seconds
        while self._compiled and self._compiled[-1][1] > begin:
            inner, end = self._compiled.pop()
            seconds -= end - max(inner, begin)
            begin = min(begin, inner)
        self._compiled.append((begin, self._mark))
        self._seconds[self._stack[-1]] -= seconds
        self._seconds["compile"] += seconds

    def _on_event(self, event: str, duration: float, **_) -> None:
        # A thread that compiles in the background takes none of the loop's time.
        if event.startswith(_COMPILE_EVENTS) and threading.get_ident() == self._thread:
            self.compiled(duration)

    def _settle(self) -> None:
        """Counts the time since the last call as the present phase's."""
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
