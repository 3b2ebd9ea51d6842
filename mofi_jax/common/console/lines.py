"""What a person sees while a command works: lines of the log, and what goes on right now.

On a terminal the last line says what goes on and for how long, and moves (by tqdm, whose other bars
stand beside it).  In a log file a line says so after some seconds of silence.  Imported before
anything heavy, so that a command speaks within a second.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from mofi_jax.common import packages
from mofi_jax.common.console import interrupts

_OWN = tuple(str(packages.ROOT / name) for name in ("mofi_jax", "data_prep", "quickstart"))

TICK = 0.25  # seconds between two looks at the clock
WAITING = 1.8  # seconds of silence in a log while somebody waits for a first sign of progress
PATIENT = 600.0  # after so many seconds of one activity a log has a line a minute
WORKING = 60.0  # seconds of silence in a log while a command makes progress
# Environment variables by which launchers number the processes of a run; 0 speaks.
_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")


def start_logging() -> None:
    """Sends the log to stderr as `Formatter` writes it; again without effect."""
    flags.FLAGS.mark_as_parsed()  # or absl says that it logs before they are
    absl_logging.set_verbosity(absl_logging.INFO)
    absl_logging.use_absl_handler()
    handler = absl_logging.get_absl_handler()
    if not isinstance(handler.python_handler.formatter, Formatter):
        handler.addFilter(_from_here)
        handler.setFormatter(Formatter())


def begin(text: str) -> None:
    """First line of a main, before its imports; of several processes the first speaks alone."""
    interrupts.install()
    interrupts.expect(grace=0)
    start_logging()
    ranks = [found[1] for a in sys.argv if (found := re.fullmatch(r"--?process=(\d+)", a))]
    ranks += [os.environ[name] for name in _RANKS if name in os.environ]
    helped = {"--help", "-h", "--helpfull"} & {word.partition("=")[0] for word in sys.argv}
    if not helped and (not ranks or ranks[0] == "0"):
        absl_logging.info("%s", text)
        now(text)


def is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _columns() -> int:
    """Of the terminal that stderr is; some say 0, and then as many as any has."""
    with contextlib.suppress(OSError, ValueError):
        return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
    return 79


def duration(seconds: float | int) -> str:
    """A length of time in the unit that people would take: 45 s, 12 min, 3.5 h, 12 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            amount = seconds / unit
            return f"{amount:.1f} {name}" if name == "h" else f"{amount:.0f} {name}"
    days = seconds / 86_400
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"


class Formatter(logging.Formatter):
    """``21:36:10 text``, with the date in files; warnings and worse say what they are."""

    process = ""  # which one speaks, where it is not the first of several

    def format(self, record: logging.LogRecord) -> str:
        _activity.heard()
        terminal = is_terminal()
        stamp = time.strftime(
            "%H:%M:%S" if terminal else "%Y-%m-%d %H:%M:%S", time.localtime(record.created)
        )
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        # The line that moves gives way, and comes back with its next tick.
        clear = "\r\x1b[K" if terminal else ""
        return f"{clear}{stamp} {self.process}{level}{super().format(record)}"


# Libraries' warnings that ask nothing of anybody: Orbax looks for a file that only its other
# interface writes, and says at each checkpoint that it is not there.
_NOISE = "Metadata file does not exist"


def _from_here(record: logging.LogRecord) -> bool:
    """Libraries log from warnings on, as Orbax writes ten lines about every checkpoint.

    Without tracebacks: what fails in their threads is raised again in ours, or does not matter.
    """
    if record.pathname.startswith(_OWN):
        return True
    record.exc_info = record.exc_text = None
    return record.levelno >= logging.WARNING and _NOISE not in record.getMessage()


class _Activity:
    """What goes on now, told by a thread while `now` has said something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._text: str | Callable[[], str] = ""
        self._silence = WAITING
        self._since = self._told = time.monotonic()
        self.mute = False

    def heard(self) -> None:
        """A line was written: silence begins anew."""
        self._told = time.monotonic()

    def now(self, text: str | Callable[[], str], silence: float) -> None:
        with self._lock:
            self._text, self._silence, self._since = text, silence, time.monotonic()
            if self._thread is None and not self.mute:
                self._told = self._since
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._tell, args=(self._wake,), daemon=True, name="console"
                )
                self._thread.start()

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._wake.set()
            if thread is not threading.current_thread():
                thread.join(timeout=2.0)

    def line(self) -> str:
        if callable(self._text):
            return self._text()
        passed = time.monotonic() - self._since
        return f"{self._text}, {duration(passed)}" if passed >= 1 else self._text

    def _tell(self, wake: threading.Event) -> None:
        moving = None
        if is_terminal():
            import tqdm  # not before the first line and Ctrl-C are seen to

            moving = tqdm.tqdm(bar_format="{desc}", leave=False, ncols=_columns(), nrows=20)
        while not wake.wait(TICK):
            if moving is not None:
                moving.ncols = _columns()
                moving.set_description_str(self.line())
                continue
            patient = self._silence == WAITING and time.monotonic() - self._since > PATIENT
            silence = WORKING if patient else self._silence
            if time.monotonic() - self._told >= silence:
                absl_logging.info("%s", self.line())
        if moving is not None:
            moving.close()


_activity = _Activity()


def now(text: str | Callable[[], str], silence: float = WAITING) -> None:
    """Says what goes on from here on, until the next call or `close`.

    Args:
      text: what, to which the seconds since are added; or what returns the whole line, called in
        another thread.
      silence: seconds after which a log gets a line.
    """
    _activity.now(text, silence)


def close() -> None:
    """Nothing goes on any longer."""
    _activity.close()


def speak_first(process: int) -> None:
    """Only the first of several processes tells more than warnings; the others say who they are."""
    if process:
        close()
        _activity.mute = True
        absl_logging.set_verbosity(absl_logging.WARNING)
        Formatter.process = f"process {process}: "
