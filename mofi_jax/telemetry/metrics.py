"""The numbers of a run: JSON lines, TensorBoard and Weights & Biases; stops when one is not finite.

The device never waits for a logger: `Metrics.push` takes device arrays, and they are written a step
later, when they have been computed anyway.
"""

import collections
import math
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.telemetry.metrics_file import MetricsFile

NAN_FILE = "nan-batch.txt"
# Beginnings of the names of numbers that depend on the machine; all others are reproducible.
TIMED = ("time", "speed/", "memory/", "goodput/")

_MUST_BE_FINITE = ("loss", "gradient_norm")
# Steps whose loss stays on the device until it is known to be finite.
_WATCHED_STEPS = 1000
_KEYS_NAMED = 3


class Metrics:
    """Appends ``{"step": n, "time": t, name: value, ...}`` to a run's metrics file, t in Unix time.

    Args:
      resume_step, wandb: see `MetricsFile` and `open_wandb`.
      keys: the keys of all examples of a step's batch, for `NAN_FILE`; None: not known.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        resume_step: int,
        keys: Callable[[int], list[str]] | None = None,
        wandb: Any = None,
    ):
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._unchecked: collections.deque[tuple[int, dict[str, Any]]] = collections.deque(
            maxlen=_WATCHED_STEPS
        )
        self._keys = keys
        self._wandb = wandb
        self._tensorboard: futures.Future[Any] | None = None
        self._scalars: collections.deque[tuple[int, float, Mapping[str, float]]] = (
            collections.deque()
        )
        self._folder = epath.Path(workdir)
        self._events = files.stage(self._folder / "tensorboard")
        self._active = jax.process_index() == 0
        if self._active:
            self._file = MetricsFile(workdir, resume_step=resume_step)

    def watch(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps a step's loss on the device, to find later which step's was not finite first."""
        watched = {name: metrics[name] for name in _MUST_BE_FINITE if name in metrics}
        self._unchecked.append((step, watched))

    def push(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Takes a step's device metrics; writes and returns those pushed before."""
        written = self.flush()
        self._pending = (step, metrics)
        return written

    def flush(self) -> dict[str, float]:
        """Writes what is pending and returns it ({} if nothing was); see `require_finite`."""
        if self._pending is None:
            return {}
        step, metrics = self._pending
        self._pending = None
        values = {k: float(np.asarray(v)) for k, v in jax.device_get(dict(metrics)).items()}
        self.write(step, values)
        # From here on, as its import may keep other threads from telling how a first step goes.
        self._open_tensorboard()
        self.require_finite(step, values)
        return values

    def require_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises BadInput unless loss and gradient norm are finite; called before every save.

        Writes the keys of the first batch where they are not to `NAN_FILE` (host 0).
        """
        if _first_not_finite(metrics) is None:
            while self._unchecked and self._unchecked[0][0] <= step:
                self._unchecked.popleft()
            return
        for earlier, watched in [*self._unchecked, (step, metrics)]:
            if bad := _first_not_finite(watched):
                raise BadInput(
                    f"The {bad[0]} is {bad[1]} at step {earlier}: lower "
                    "config.optimizer.learning_rate or raise its warmup; the last checkpoint is "
                    f"from before{self._write_batch(earlier)}."
                )

    def _write_batch(self, step: int) -> str:
        """Writes the keys of a step's batch; returns the end of the error message about it."""
        if self._keys is None or not self._active:
            return ""
        keys = self._keys(step)
        path = self._folder / NAN_FILE
        files.write_text(path, "".join(f"{step}\t{key}\n" for key in keys))
        first = ", ".join(keys[:_KEYS_NAMED])
        return f", and {path} names the {len(keys)} examples of the batch ({first}, ...)"

    def store(self) -> None:
        """Brings what has been written to a bucket; before a save, so that no row is missing."""
        if self._active:
            self._file.upload()
            files.upload(self._events, self._folder / "tensorboard")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes host values."""
        if not self._active:
            return
        now = time.time()
        self._file.append({"step": step, "time": round(now, 3), **values})
        self._scalars.append((step, now, dict(values)))
        if self._tensorboard is not None and self._tensorboard.done():
            self._write_scalars()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _open_tensorboard(self) -> None:
        """Opens its writer in another thread; what is written until then waits for it."""
        if self._tensorboard is None and self._active:
            opener = futures.ThreadPoolExecutor(1)
            self._tensorboard = opener.submit(_tensorboard_writer, self._events)
            opener.shutdown(wait=False)

    def _write_scalars(self) -> None:
        writer = self._tensorboard.result()
        while self._scalars:
            step, when, values = self._scalars.popleft()
            for name, value in values.items():
                writer.add_scalar(name, value, step, when)

    def close(self) -> None:
        """Writes what is pending and closes the files of a run that has finished."""
        self.flush()
        self._finish(exit_code=0)

    def abandon(self) -> None:
        """Closes the files without what is pending; does nothing when closed already."""
        self._finish(exit_code=1)

    def _finish(self, exit_code: int) -> None:
        if self._active:
            if self._scalars:
                self._open_tensorboard()
            if self._tensorboard is not None:
                self._write_scalars()
                self._tensorboard.result().close()
            self.store()
            self._active = False
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=exit_code)


def _tensorboard_writer(folder: epath.Path) -> Any:
    # Imports PyTorch where that is installed: more than a second that no run need wait for.
    import tensorboardX

    # Scalars beyond the queue's length would wait for the thread that writes.
    return tensorboardX.SummaryWriter(str(folder), flush_secs=10, max_queue=1000)


def _first_not_finite(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    for name in _MUST_BE_FINITE:
        value = float(np.asarray(jax.device_get(metrics.get(name, 0.0))))
        if not math.isfinite(value):
            return name, value
    return None
