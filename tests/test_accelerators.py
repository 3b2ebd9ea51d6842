"""The chip table: jax's names of devices, devices that share a chip, none for what is unknown."""

import math
import types

import jax
import pytest

from mofi_jax.telemetry import accelerators


def device(kind, **attributes):
    return types.SimpleNamespace(device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("kind", "teraflops", "gib"),
    [
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v5p", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H200", 989, 131),
        ("NVIDIA B200", 2250, 168),
    ],
)
def test_one_device_a_chip(kind, teraflops, gib):
    chip = accelerators.chip_of(device(kind))
    assert chip.device_flops == chip.bf16_flops == teraflops * 1e12
    assert chip.hbm_bytes / 2**30 == pytest.approx(gib, abs=0.5)


def test_a_device_has_its_share_of_the_chip():
    whole = accelerators.chip_of(device("TPU7x", num_cores=1))
    assert (whole.devices, whole.device_flops) == (2, 1153.5e12)
    assert accelerators.chip_of(device("TPU v4", num_cores=2)).device_flops == 275e12
    assert accelerators.chip_of(device("TPU v4", num_cores=1)).device_flops == 137.5e12
    assert accelerators.chip_of(device("TPU v4", num_cores=1)).cores == 1
    assert accelerators.chip_of(device("TPU v5 lite", num_cores=1)).device_flops == 197e12


@pytest.mark.parametrize(
    ("kind", "cores", "terabytes"),
    [
        *(("TPU v4", 2, 1.2), ("TPU v5 lite", 1, 0.819), ("TPU v5p", 2, 2.765)),
        *(("TPU v6 lite", 1, 1.638), ("TPU7x", 1, 7.38)),
    ],
)
def test_the_clock_of_tpus(kind, cores, terabytes):
    chip = accelerators.chip_of(device(kind))
    assert (chip.cores, chip.hbm_bandwidth) == (cores, terabytes * 1e12)
    # What all matrix units of a device do a cycle is a power of two.
    power = math.log2(chip.device_flops / chip.clock)
    assert power == pytest.approx(round(power), abs=0.01)


def test_memory_that_programs_may_take():
    tpu = device("TPU v4", memory_stats=lambda: {"bytes_limit": 32, "bytes_in_use": 1})
    assert accelerators.memory_of(tpu) == 32
    assert accelerators.memory_of(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize("kind", ["cpu", "TPU v9", "NVIDIA H100 PCIe", "NVIDIA H100", ""])
def test_no_figure_rather_than_a_wrong_one(kind):
    assert accelerators.chip_of(device(kind)) is None


def test_this_machine_has_no_entry():
    assert accelerators.chip_of(jax.devices()[0]) is None
