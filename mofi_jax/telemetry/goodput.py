"""Where a run's wall time goes: a split that sums to the time since the very first start.

    start       a process's imports, data, model, restoring, up to its loop
    compile     JAX tracing, lowering and compiling (its own events), in whatever phase it happens
    input       the loop waits for the next batch
    step        everything else in the loop: the device computes
    eval        evaluators
    checkpoint  the loop waits for a save, which goes on in the background
    profile     a trace is begun or written (``--profile``); the steps in between are steps
    lost        input, steps and evaluations of an earlier process that came after the checkpoint
                from which the next one went on, and so were done again
    down        between the last sign of life of a process and the start of the next

The split travels in two places: each checkpoint holds that of its moment, and ``goodput.json`` in
the workdir that of the last sign of life.  What the second has and the first has not was lost.
"""

import contextlib
import dataclasses
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

_REDONE = ("input", "step", "eval")  # by a process that goes on from an earlier checkpoint
_HEARTBEAT_SECONDS = 10.0
_COMPILE_EVENTS = "/jax/core/compile/"


@dataclasses.dataclass(frozen=True)
class Stand:
    """Where the host stands.

    Attributes:
      phase: one of `PHASES`.
      since: when it got there, in seconds of the clock of `Goodput`.
    """

    phase: str
    since: float


def process_start() -> float:
    """Unix time at which this process started, before its first import."""
    return psutil.Process().create_time()


def carried_over(
    alive: Mapping[str, float], saved: Mapping[str, float], idle: float
) -> dict[str, float]:
    """The split with which a process goes on from a checkpoint; sums to ``sum(alive) + idle``.

    Args:
      alive: seconds by phase at the last sign of life of the process before.
      saved: the same at the moment of the checkpoint.
      idle: seconds between that sign of life and now.
    """
    split = {phase: alive.get(phase, 0.0) for phase in PHASES}
    for phase in _REDONE:
        redone = max(0.0, split[phase] - saved.get(phase, 0.0))
        split[phase] -= redone
        split["lost"] += redone
    split["down"] += idle
    return split


class Goodput:
    """The clock of a run; every moment belongs to exactly one phase.

    A new clock stands in "start", and counts there the time since ``started``.  To be used by one
    thread; other threads may read `stand` and `moved`.

    Args:
      started: Unix time at which this process began the run; None: now.
      clock: seconds that only grow; `time.monotonic`.
      wall: Unix time.
    """

    def __init__(
        self,
        started: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        now = wall()
        self._started = now if started is None else min(started, now)
        self._clock = clock
        self._mark = clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds["start"] = now - self._started
        self._stack = ["start"]
        self.stand = Stand("start", self._mark)
        self.compile_seconds = 0.0  # of this process
        self.moved = self._mark  # when it last changed phase or finished compiling a program
        self._compiled: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        self._path: epath.Path | None = None
        self._first_start = self._started
        self._written = self._mark
        self._finished = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def resume(self, workdir: epath.PathLike, saved: Mapping[str, float]) -> None:
        """Adds what earlier processes spent on this run, and writes to the workdir from now on.

        Args:
          workdir: the run's folder.  A run that had finished, and now has a larger total, was not
            down in between; without ``goodput.json`` nobody knows, and it is taken so too.
          saved: seconds by phase of the restored checkpoint; empty without one.
        """
        path = epath.Path(workdir) / GOODPUT_FILE
        alive, first_start, finished = saved, 0.0, True
        try:
            found = json.loads(path.read_text())
            alive, first_start, finished = (
                {phase: float(found["seconds"][phase]) for phase in PHASES},
                float(found["first_start"]),
                bool(found["finished"]),
            )
            if not all(map(math.isfinite, (first_start, *alive.values()))):
                raise ValueError("not finite")
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            alive, first_start, finished = saved, 0.0, True
            logging.warning("%s cannot be read (%r): the run's time down is unknown", path, error)
        if finished:
            first_start = self._started - sum(alive.values())
        idle = max(0.0, self._started - first_start - sum(alive.values()))
        for phase, seconds in carried_over(alive, saved, idle).items():
            self._seconds[phase] += seconds
        self._first_start = first_start
        if jax.process_index() == 0:
            self._path = path
            self.save()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as ``name``; what it interrupts goes on afterwards."""
        self._settle()
        self._stack.append(name)
        self._stand(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()
            self._stand(self._stack[-1])

    def enter(self, name: str) -> None:
        """From here on, time outside of any `phase` counts as ``name``."""
        self._settle()
        self._stack[0] = name
        self._stand(self._stack[-1])

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
        """The split for people."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        parts = ", ".join(f"{p} {100 * s / total:.1f} %" for p, s in seconds.items() if s)
        whole = datetime.timedelta(seconds=round(total))
        return f"goodput {100 * seconds['step'] / total:.1f} % of {whole} since the start: {parts}"

    def heartbeat(self) -> None:
        """A sign of life: writes the split if the last time was a while ago."""
        if self._clock() - self._written >= _HEARTBEAT_SECONDS:
            self.save()

    def save(self) -> dict[str, float]:
        """Writes the split to the workdir (host 0, after `resume`) and returns it."""
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
        """A last sign of life, and no more listening to JAX."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        if self._path is None:
            return
        try:
            self.save()
        except OSError as error:  # the folder may be full or gone; what ended the run matters more
            logging.warning("%s cannot be written: %s", self._path, error)

    def compiled(self, seconds: float) -> None:
        """Moves the last ``seconds`` of the present phase to "compile".

        JAX tells of an inner program before the outer one whose time contains it: what has been
        moved already is not moved again.
        """
        self._settle()
        end, begin = self._mark, self._mark - seconds
        known = 0.0
        while self._compiled and self._compiled[-1][1] > begin:
            inner = self._compiled.pop()
            known += inner[1] - max(inner[0], begin)
            begin = min(begin, inner[0])
        self._compiled.append((begin, end))
        self._seconds[self._stack[-1]] -= seconds - known
        self._seconds["compile"] += seconds - known
        self.compile_seconds += seconds - known
        self.moved = end

    def _on_event(self, event: str, duration: float, **_) -> None:
        # A thread that compiles in the background takes none of the loop's time.
        if event.startswith(_COMPILE_EVENTS) and threading.get_ident() == self._thread:
            self.compiled(duration)

    def _stand(self, name: str) -> None:
        self.stand = Stand(name, self._mark)
        self.moved = self._mark

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
