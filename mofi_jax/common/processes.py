"""What processes ask of their machine; workers, and commands whose end this one waits for."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

from mofi_jax.common import console
from mofi_jax.common.console import interrupts


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that this thread starts inside never hear of Ctrl-C, not even in their imports.

    A terminal sends it to all of them, and it is for the one that has started them.
    """
    resource_tracker.ensure_running()  # as it starts it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """For a worker process as it starts: its log is like the parent's, and it ends with it.

    A worker waits on a queue whose writing end it holds itself, so after kill -9 of the parent it
    would wait for ever.
    """
    console.start_logging()
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def cores(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """CPU cores that this process may use: by its affinity, and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in _cgroups(pathlib.Path(cgroups), own, "cpu"):
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((folder / name).read_text().strip() for name in names)
            if quota not in ("max", "-1"):
                allowed = min(allowed, -(-int(quota) // int(period)))
        except (OSError, ValueError, ArithmeticError):
            continue
    return max(allowed, 1)


def memory_limit(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that the container of this process may have; `sys.maxsize` without a limit."""
    limit = sys.maxsize
    for folder in _cgroups(pathlib.Path(cgroups), own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of versions 2 and 1
            with contextlib.suppress(OSError, ValueError):  # "max" is none
                limit = min(limit, int((folder / name).read_text()))
    return limit


def _cgroups(root: pathlib.Path, own: str, controller: str) -> list[pathlib.Path]:
    """The folders of this process's control groups and of those around them."""
    try:
        lines = pathlib.Path(own).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inner = (root / controllers if controllers else root) / path.lstrip("/")
        found += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return found


def wait_for(command: Sequence[str]) -> int:
    """Runs a command of this project, and returns its exit code; 130 also where SIGINT ended it.

    A terminal sends Ctrl-C to both: the command does what it does then, and this process waits for
    it.  SIGTERM is passed on.
    """
    child: subprocess.Popen | None = None

    def stop(number: int, frame: Any) -> None:
        if child and number == signal.SIGTERM:
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.expect("waiting for the command above to stop; once more stops both at once")
    try:
        child = subprocess.Popen(command)
        code = child.wait()
        return interrupts.EXIT_CODE if code == -signal.SIGINT else code
    finally:
        interrupts.expect()
        for number, handler in before.items():
            signal.signal(number, handler)
