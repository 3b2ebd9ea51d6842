"""What a person reads of a training: its size, how far it is, and when it will end.

Lines go to the log of the first process (`common.console`); on a terminal the last one moves with
every step.  The numbers themselves are in ``metrics.jsonl``, all of them.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from mofi_jax.common import console
from mofi_jax.telemetry.goodput import Goodput

_SHOWN = ("loss", "entity_accuracy", "contrastive_accuracy")
_SHARES = {"data wait": "speed/data_wait", "MFU": "speed/mfu"}
# Seconds between two lines: a tenth of the time that the run has taken, within these.
_LEAST, _MOST = 5.0, 60.0
_WINDOW = 60  # looks at the clock, a second or a step apart, over which speed is measured


class Progress:
    """How far a run is, told as its steps go by.

    Args:
      goodput: the run's clock; speed is that of input and steps, without what is compiled.
      first, total: the steps from which and up to which this process trains.
      batch_size: pictures in a step.
      work: FLOPs of the steps from one up to another; stages differ in theirs.
      pauses: by phase of `Goodput`, the steps between two evaluations or saves, for each of them.
      peak_flops: FLOP/s of all devices together, None where it is not known.
    """

    def __init__(
        self,
        goodput: Goodput,
        *,
        first: int,
        total: int,
        batch_size: int,
        work: Callable[[int, int], float],
        pauses: Mapping[str, Sequence[int]],
        peak_flops: float | None = None,
    ):
        self._goodput = goodput
        self._first, self._total, self._batch = first, total, batch_size
        self._work, self._pauses, self._peak = work, pauses, peak_flops
        self._started = goodput.seconds()
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW)
        self._begun = self._told = self._looked = time.monotonic()
        self._text = ""

    @contextlib.contextmanager
    def pause(self, text: str) -> Iterator[None]:
        """What the run does between two steps, such as to evaluate."""
        console.now(text, silence=console.WORKING if self._text else console.WAITING)
        yield
        if self._text:
            self._tell()

    def _tell(self) -> None:
        console.now(lambda: self._text, silence=console.WORKING)

    def at(self, step: int) -> None:
        """This many steps are finished, of which the devices have told."""
        now = time.monotonic()
        early = step - self._first <= 2
        if not early and now - self._looked < 1.0 and step < self._total:
            return
        self._looked = now
        seconds = self._goodput.seconds()
        self._seen.append((step, seconds["input"] + seconds["step"]))
        if step == self._first:
            console.now(f"step {step + 1} of {self._total:,}")
            return
        if step == self._first + 2:
            self._seen.popleft()  # the first step warms up
        self._text = self._line(step, seconds)
        if step == self._first + 1:
            spent = self._seen[-1][1] - self._seen[0][1]
            mfu = ""
            if self._peak:
                mfu = f", MFU {100 * self._work(step - 1, step) / self._peak / spent:.1f} %"
            logging.info(
                "the first step took %.3g s (%s img/s%s): about %s to the end",
                spent,
                _rate(self._batch / spent),
                mfu,
                console.duration(self._left(step, seconds)),
            )
            self._told = now
            self._tell()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The logged values of a step, now and then and at the end; nothing if there are none."""
        now = time.monotonic()
        wait = min(_MOST, max(_LEAST, (now - self._begun) / 10))
        if not values or (step < self._total and now - self._told < wait):
            return
        self._told = now
        parts = [f"{name} {values[name]:.4g}" for name in _SHOWN if name in values]
        if rate := values.get("speed/images_per_second"):
            shares = [f"{k} {100 * values[v]:.1f} %" for k, v in _SHARES.items() if v in values]
            parts += [f"{_rate(rate)} img/s", *shares]
        if step < self._total and len(self._seen) > 1:
            parts.append(f"{console.duration(self._left(step, self._goodput.seconds()))} left")
        logging.info("%s  %s", self._head(step), "  ".join(parts))

    def _head(self, step: int) -> str:
        return f"step {step:,}/{self._total:,} ({100 * step / self._total:.1f} %)"

    def _line(self, step: int, seconds: Mapping[str, float]) -> str:
        (before, start), (after, end) = self._seen[0], self._seen[-1]
        rate = (after - before) * self._batch / max(end - start, 1e-9)
        left = console.duration(self._left(step, seconds))
        return f"{self._head(step)}  {_rate(rate)} img/s  {left} left"

    def _left(self, step: int, seconds: Mapping[str, float]) -> float:
        """Seconds to the end: steps as of late, evaluations and saves as they were on average."""
        (before, start), (after, end) = self._seen[0], self._seen[-1]
        done = self._work(before, after) or 1.0
        left = (end - start) * self._work(step, self._total) / done
        for phase, periods in self._pauses.items():
            spent = seconds[phase] - self._started[phase]
            first = self._first == 0 and phase == "eval"  # before the first step
            times = sum(_times(step, n) - _times(self._first, n) + first for n in periods)
            ahead = sum(_times(self._total - 1, n) - _times(step, n) + 1 for n in periods)
            left += ahead * spent / times if times else 0.0
        return left


def _rate(pictures: float) -> str:
    return f"{pictures:,.1f}" if pictures >= 10 else f"{pictures:.2g}"


def _times(step: int, every: int) -> int:
    """How often something that happens every so many steps has happened."""
    return step // every if every else 0


def parts_of(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Parameters altogether and by part: ``150.2 M parameters: image tower 86.2 M, ...``.

    Args:
      params: a tree of arrays or their structs.
      names: of top-level keys, for people; others are called as they are.
    """
    sizes = {
        names.get(name, name): sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in params.items()
    }
    large = {name: size for name, size in sizes.items() if size >= 1000}
    parts = ", ".join(f"{name} {_count(size)}" for name, size in large.items())
    return f"{_count(sum(sizes.values()))} parameters ({parts})"


def _count(number: int) -> str:
    for limit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:,.1f} {name}"
    return f"{number:.0f}"


def periods_in_words(periods: Mapping[str, int]) -> str:
    """``a and b every 212 steps, c every 500 steps``."""
    by_period: dict[int, list[str]] = {}
    for name, every in periods.items():
        by_period.setdefault(every, []).append(name)
    return ", ".join(f"{' and '.join(names)} every {n:,} steps" for n, names in by_period.items())
