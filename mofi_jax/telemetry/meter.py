"""How fast a run is and what it takes: rates, data wait, MFU, compile time, memory, goodput."""

import jax
import psutil

from mofi_jax.telemetry.goodput import Goodput

_GIB = 2**30


class Meter:
    """Reads a `Goodput` clock once per logging interval.

    Rates count training time, that is input and step: no evaluation, save or compilation.

    Args:
      goodput: the run's clock.
      images_per_step: global batch.
      tokens_per_step: positions of the text tower, padding included: texts of the global batch
        times the context length; 0 without a text tower.
      flops_per_step: model FLOP of a step on all devices together; None: unknown, then no MFU.
      peak_flops: FLOP/s of all devices together; None: unknown, then no MFU.
    """

    def __init__(
        self,
        goodput: Goodput,
        *,
        images_per_step: int,
        tokens_per_step: int = 0,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ):
        self._goodput = goodput
        self._images = images_per_step
        self._tokens = tokens_per_step
        known = flops_per_step is not None and peak_flops is not None
        self._busy_seconds = flops_per_step / peak_flops if known else None
        self._process = psutil.Process()
        self._steps = 0
        self._before = goodput.seconds()
        self._compile_told = 0.0

    def read(self, steps: int) -> dict[str, float]:
        """What to log.

        Args:
          steps: finished by the devices since this meter was made.

        Returns:
          ``speed/``: images_per_second, tokens_per_second, step_seconds, data_wait (share of the
          training time in which the loop waited for a batch), mfu, all of the interval since the
          read before, left out until a step is finished; compile_seconds of this process, once and
          again whenever it has grown.  ``memory/``: host_gib, resident memory of this process
          without its data workers; device_gib, the peak so far on the fullest local device, where
          the device tells.  ``goodput/``: see `Goodput.shares`.
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
            if self._busy_seconds is not None:
                values["speed/mfu"] = done * self._busy_seconds / spent
            self._steps, self._before = steps, seconds
        compiled = self._goodput.compile_seconds
        if compiled > self._compile_told:
            values["speed/compile_seconds"] = self._compile_told = compiled
        values["memory/host_gib"] = self._process.memory_info().rss / _GIB
        values |= device_memory()
        return values | self._goodput.shares()


def device_memory() -> dict[str, float]:
    """``memory/device_gib``, the peak on the fullest local device; empty where none tells (CPU)."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peaks = [stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)) for stats in found]
    return {"memory/device_gib": max(peaks) / _GIB} if peaks else {}
