"""A profile of chosen steps, for TensorBoard's profiler or Perfetto."""

import re
from typing import Any

import jax
from absl import logging
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput


class Profile:
    """Traces the updates from step N to step M into ``workdir/profile``, on every host.

    A run resumed inside the window traces the rest of it; one resumed after it, nothing.

    Args:
      window: ``"N:M"``, N < M; empty for no profile.
      total_steps: of the run, which must reach M.

    Raises BadInput: not such a window.
    """

    def __init__(self, window: str, workdir: epath.PathLike, *, total_steps: int):
        self._folder = epath.Path(workdir) / "profile"
        self._tracing = False
        numbers = re.fullmatch(r"(\d{1,15}):(\d{1,15})", window or "0:0")
        self._begin, self._end = map(int, numbers.groups()) if numbers else (0, 0)
        if window and self._begin >= self._end:
            raise BadInput(
                f"--profile={window} is no window of steps: write --profile=N:M with N < M, as in "
                "--profile=100:110."
            )
        if self._end > total_steps:
            raise BadInput(
                f"--profile={window} ends after the run's {total_steps} steps: choose an earlier "
                "window, or raise config.total."
            )

    def at(self, step: int, in_flight: Any) -> None:
        """Starts or stops before the update after ``step``, once ``in_flight`` is computed."""
        if self._tracing == (self._begin <= step < self._end):
            return
        jax.block_until_ready(in_flight)
        if self._tracing:
            self.close()
        else:
            self._staged = files.stage(self._folder)
            jax.profiler.start_trace(str(self._staged))
            self._tracing = True

    def close(self) -> None:
        """Writes the trace if one is being taken."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            files.upload(self._staged, self._folder)
            logging.info("profile of steps %d to %d: %s", self._begin, self._end, self._folder)
