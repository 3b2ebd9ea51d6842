"""Eight simulated CPU devices for every test, whatever hardware the machine has."""

import math
import os
import pathlib
import shutil
import tempfile
from importlib import metadata

# Tests write, sync and delete tens of thousands of small files: in memory, where it has room, that
# takes a hundredth of the time. Set TMPDIR to have them elsewhere.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free >= 4 << 30:
    os.environ.setdefault("TMPDIR", "/dev/shm")
    tempfile.tempdir = None  # pytest has asked already

# Before jax is imported; child processes of a test inherit the platform, not the device count.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a host of others
# Many tests train the same tiny model: each of its programs is compiled once in a session, for all
# processes of it: with a limit to its size jax locks the folder.  It is new each time, so that
# nothing stale is ever read.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mofi_jax_programs_")
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Programs run for milliseconds here: optimising their machine code is most of what tests would do.
# `make test-all` sets XLA_FLAGS to nothing and so takes the code that users run.
# XLA exits at a flag that it does not know, and the second one is of this release.
os.environ["XLA_FLAGS"] = os.environ.get(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh

from mofi_jax.distributed import meshes

jax.config.update("jax_num_cpu_devices", 8)
# Grain reads absl flags when it starts workers; no absl app runs under pytest.
flags.FLAGS.mark_as_parsed()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def mesh_of() -> dict[str, Mesh]:
    """Meshes by 'REPLICAxFSDPxTENSOR': one to four devices, and eight in three shapes."""

    def first_devices(*shape: int) -> Mesh:
        devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
        return Mesh(devices, meshes.ALL_AXES, axis_types=(AxisType.Auto,) * 3)

    return {
        "1x1x1": first_devices(1, 1, 1),
        "1x2x1": first_devices(1, 2, 1),
        "2x1x2": first_devices(2, 1, 2),
        "1x8x1": meshes.make_mesh(replica=1, fsdp=8, tensor=1),
        "2x2x2": meshes.make_mesh(replica=2, fsdp=2, tensor=2),
        "8x1x1": meshes.make_mesh(replica=8, fsdp=1, tensor=1),
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory, mesh_of) -> pathlib.Path:
    """data/ of seven entities and run/, 20 steps of multitask training on one device.

    To be read only: a test that changes something copies it first.
    """
    from mofi_jax import train
    from tests import datasets

    folder = tmp_path_factory.mktemp("trained")
    datasets.write(folder / "data", entities=7)
    config = datasets.tiny_config(folder / "data", steps=20)
    config.checkpoint.update({"every": "20 steps", "keep": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
        train.main(config, str(folder / "run"))
    return folder
