"""What is chosen from the machine: cores, within what its container may use, and the dtype."""

import os
import sys

import pytest

from mofi_jax.common import processes
from mofi_jax.training import setup


@pytest.fixture
def many(monkeypatch):
    """A host with 200 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(200), raising=False)


def cores(folder, own):
    (folder / "own").write_text(own)
    return processes.cores(str(folder), str(folder / "own"))


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [("max 100000", "150000 100000", 2), ("800000 100000", "max 100000", 8), ("max", "?", 200)],
)
def test_of_a_container_the_smallest_quota_counts(many, tmp_path, outer, inner, expected):
    (tmp_path / "pod/box").mkdir(parents=True)
    (tmp_path / "pod/cpu.max").write_text(f"{outer}\n")
    (tmp_path / "pod/box/cpu.max").write_text(f"{inner}\n")
    assert cores(tmp_path, "0::/pod/box\n") == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 200), ("50000", 1), ("400000", 4)])
def test_version_1_of_control_groups(many, tmp_path, quota, expected):
    folder = tmp_path / "cpu,cpuacct/docker"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    own = "3:memory:/docker\n2:cpu,cpuacct:/docker\n1:name=systemd:/docker\n0::/docker\n"
    assert cores(tmp_path, own) == expected


def test_without_control_groups_the_affinity_counts(many, tmp_path):
    assert processes.cores(str(tmp_path), str(tmp_path / "none")) == 200


def test_of_memory_the_smallest_limit_around_the_process_counts(tmp_path):
    (tmp_path / "pod/box").mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/pod/box\n")
    assert processes.memory_limit(str(tmp_path), str(own)) == sys.maxsize
    (tmp_path / "pod/box/memory.max").write_text("max\n")
    (tmp_path / "pod/memory.max").write_text("3000\n")
    assert processes.memory_limit(str(tmp_path), str(own)) == 3000
    own.write_text("4:memory:/docker\n2:cpu:/pod\n")
    (tmp_path / "memory/docker").mkdir(parents=True)
    (tmp_path / "memory/docker/memory.limit_in_bytes").write_text("2000\n")
    assert processes.memory_limit(str(tmp_path), str(own)) == 2000


def test_a_dtype_of_ones_own_stays_and_auto_is_that_of_the_device():
    found = [setup.dtype_on("auto", platform) for platform in ("cpu", "gpu", "tpu")]
    assert found == ["float32", "bfloat16", "bfloat16"]
    assert setup.dtype_on("bfloat16", "cpu") == "bfloat16"
    assert setup.dtype_on("float32", "tpu") == "float32"
