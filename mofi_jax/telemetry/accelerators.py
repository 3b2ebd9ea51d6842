"""What chips can do at most: the table behind MFU and rooflines, by jax's names of devices.

Peaks are dense and per chip, as their makers state them.  A device that is not in the table has no
MFU, which is better than a wrong one.
"""

import dataclasses
from typing import Any

GIB, GB = 2.0**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which jax may show as several ``devices``.

    Attributes:
      bf16_flops: peak of matrix products in bfloat16, FLOP/s.
      link_bandwidth: to the other chips of its slice or node (ICI, NVLink), bytes/s, all links and
        both directions added up, as makers do; None where no total is stated.
      hbm_bandwidth: of the chip's main memory, bytes/s; of TPUs.
      clock: of a TPU's cores, Hz: the peak over what a device's matrix units do a cycle, by the
        compiler's estimates of large products: 2^18 (v4, v5p), 2^17 (v5e), 2^19 (v6e, v7x) FLOP.
      cores: of a TPU's, in one jax device.
    """

    name: str
    bf16_flops: float
    hbm_bytes: float
    link_bandwidth: float | None
    hbm_bandwidth: float | None = None
    clock: float | None = None
    devices: int = 1
    cores: int = 1

    @property
    def device_flops(self) -> float:
        """Peak FLOP/s of one jax device: what MFU divides by."""
        return self.bf16_flops / self.devices

    @property
    def outgoing_bandwidth(self) -> float:
        """Bytes/s that one jax device sends: half of what makers state, the other half comes in."""
        return self.link_bandwidth / self.devices / 2


# Cloud TPU documentation, the page of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p,
# v6e, tpu7x).  v4's page states no total for its links.
_V4 = Chip("TPU v4", 275e12, 32 * GIB, None, 1200 * GB, 1.05e9, cores=2)
_V5E = Chip("TPU v5e", 197e12, 16 * GIB, 400 * GB, 819 * GB, 1.5e9)
_V5P = Chip("TPU v5p", 459e12, 95 * GIB, 1200 * GB, 2765 * GB, 1.75e9, cores=2)
_V6E = Chip("TPU v6e", 918e12, 32 * GIB, 800 * GB, 1638 * GB, 1.75e9)
# Two chiplets, each a jax device with half of everything.
_V7X = Chip("TPU v7x", 2307e12, 192 * GIB, 1200 * GB, 7380 * GB, 2.2e9, devices=2)

# By `device_kind`.  TPUs: as libtpu and jax's own tables name them.  GPUs: NVIDIA's
# data sheets, without sparsity; forms with other clocks or memory (PCIe, NVL) have other names.
_CHIPS: dict[str, Chip] = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40 * GIB, 600 * GB),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80 * GIB, 600 * GB),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 * GIB, 900 * GB),
    "NVIDIA H200": Chip("H200", 989e12, 141 * GB, 900 * GB),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * GB, 1800 * GB),
}


def chip_of(device: Any) -> Chip | None:
    """The chip of a jax device; None if unknown.

    The two cores of a v4 or v5p chip are one jax device (megacore), unless libtpu was asked for one
    device a core (``num_cores`` 1): then each has half of the chip.
    """
    chip = _CHIPS.get(device.device_kind)
    if chip in (_V4, _V5P) and getattr(device, "num_cores", 2) == 1:
        return dataclasses.replace(chip, devices=2, cores=1)
    return chip


def memory_of(device: Any) -> int | None:
    """Bytes of a jax device's memory that programs may take; None where it does not say (CPUs)."""
    return (device.memory_stats() or {}).get("bytes_limit")
