"""The chip table: jax's names of devices, devices that share a chip, none for what is unknown."""

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
    assert accelerators.chip_of(device("TPU v5 lite", num_cores=1)).device_flops == 197e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v9", "NVIDIA H100 PCIe", "NVIDIA H100", ""])
def test_no_figure_rather_than_a_wrong_one(kind):
    assert accelerators.chip_of(device(kind)) is None


def test_this_machine_has_no_entry():
    assert accelerators.chip_of(jax.devices()[0]) is None
