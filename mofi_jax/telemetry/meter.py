"""How fast a run is, and what it takes."""

import jax
import psutil

from mofi_jax.telemetry.goodput import Goodput

_GIB = 2**30


class Meter:
    """Reads a `Goodput` clock once per logging interval.

    Rates count training time, that is input and step: no evaluation, save or compilation.

    Args:
      images_per_step: global batch.
      tokens_per_step: texts of the global batch times the context length, padding included; 0
        without a text tower.
      peak_flops: FLOP/s of all devices together; None: unknown, then no MFU.
    """

    def __init__(
        self,
        goodput: Goodput,
        *,
        images_per_step: int,
        tokens_per_step: int = 0,
        peak_flops: float | None = None,
    ):
        self._goodput = goodput
        self._images = images_per_step
        self._tokens = tokens_per_step
        self._peak = peak_flops
        self._steps, self._flops = 0, 0.0
        self._before = goodput.seconds()

    def read(self, steps: int, flops: float = 0.0) -> dict[str, float]:
        """What to log after so many steps since this meter was made.

        Args:
          flops: model FLOP of these steps, on all devices together.

        Returns:
          ``speed/``: images_per_second, tokens_per_second, step_seconds, data_wait (share of the
          training time in which the loop waited for a batch), mfu, all since the last read, left
          out until a step is finished.  ``memory/``: host_gib, resident memory of this process
          without its data workers; device_gib, the peak so far on the fullest local device, where
          devices report it (CPUs do not).  ``goodput/``: see `Goodput.shares`.
        """
        seconds = self._goodput.seconds()
        values = {}
        done = steps - self._steps
        if done > 0:
            waited = seconds["input"] - self._before["input"]
            spent = max(waited + seconds["step"] - self._before["step"], 1e-9)
            values["speed/images_per_second"] = done * self._images / spent
            if self._tokens:
                values["speed/tokens_per_second"] = done * self._tokens / spent
            values["speed/step_seconds"] = spent / done
            values["speed/data_wait"] = waited / spent
            if self._peak:
                values["speed/mfu"] = (flops - self._flops) / self._peak / spent
            self._steps, self._flops, self._before = steps, flops, seconds
        values["memory/host_gib"] = psutil.Process().memory_info().rss / _GIB
        stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
        if stats:
            peaks = [s.get("peak_bytes_in_use", s.get("bytes_in_use", 0)) for s in stats]
            values["memory/device_gib"] = max(peaks) / _GIB
        return values | self._goodput.shares()
