"""What a run says: metrics as JSON lines and TensorBoard, a progress line, results for scripts.

The device never waits for a logger: `Metrics.push` takes device arrays and writes those of the step
before.  Host 0 writes, the others stay silent.  JSON lines are the truth; TensorBoard is a view.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from etils import epath

from mofi_jax.errors import BadInput

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends ``{"step": n, name: value, ...}`` lines to ``workdir/metrics.jsonl``.

    Args:
      workdir: the run's folder.
      resume_step: lines of later steps, and a line cut short by a crash, are dropped: they will be
        written again.
    """

    def __init__(self, workdir: epath.PathLike, *, resume_step: int):
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._active = jax.process_index() == 0
        if not self._active:
            return
        folder = epath.Path(workdir)
        path = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open as long as the run
        self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Takes a step's device metrics; writes and returns those pushed before."""
        written = self.flush()
        self._pending = (step, metrics)
        return written

    def flush(self) -> dict[str, float]:
        """Writes what is pending and returns it ({} if nothing was).

        Raises:
          BadInput: the loss is not finite.
        """
        if self._pending is None:
            return {}
        step, metrics = self._pending
        self._pending = None
        values = {k: float(np.asarray(v)) for k, v in jax.device_get(dict(metrics)).items()}
        self.write(step, values)
        self.require_finite(step, values)
        return values

    def require_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises BadInput unless loss and gradient norm are finite; called before every save."""
        for name in ("loss", "gradient_norm"):
            value = float(np.asarray(jax.device_get(metrics.get(name, 0.0))))
            if not math.isfinite(value):
                raise BadInput(
                    f"The {name} is {value} at step {step}: lower config.optimizer.learning_rate "
                    "or raise its warmup; the last checkpoint is from before."
                )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes host values at once."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """Closes the files without what is pending; harmless when closed already."""
        if self._active:
            self._active = False
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; a last line cut short is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def progress(total_examples: int, done_examples: int) -> tqdm.tqdm:
    """The progress line of host 0: share, img/s, time left."""
    return tqdm.tqdm(
        total=total_examples,
        initial=done_examples,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=0.5,
        disable=jax.process_index() != 0,
    )


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file whole or not at all."""
    path = epath.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
