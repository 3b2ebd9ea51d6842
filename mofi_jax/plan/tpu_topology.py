"""The devices of TPU slices that this machine does not have, to compile for.

The compiler is the package ``libtpu``.  Beside jax it makes every start of jax look for a TPU, so
it may also lie in a folder of its own, ``tpu_compiler`` in the environment's folder.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from typing import Any

import jax
from etils import epath
from jax.experimental import topologies

from mofi_jax.common.errors import BadInput

COMPILER = epath.Path(sys.prefix) / "tpu_compiler"

# Dimensions of a slice, and the most chips that one has (docs.cloud.google.com/tpu/docs).
SLICES = {"v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 6144), "v6e": (2, 256), "tpu7x": (3, 9216)}
_KNOWN = f"write VERSION:CHIPS with one of {', '.join(SLICES)}, as in v5e:16x16, v5p:8x8x4."


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices for which programs can be compiled, not run.

    Sets up jax for compiling alone: call it before anything else of jax is used.  BadInput for a
    topology (of one slice, as in "v5e:16x16") that does not exist, or without the compiler.
    """
    version, _, chips = topology.partition(":")
    if version not in SLICES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", chips):
        raise BadInput(f"--topology={topology} is no slice of TPUs: {_KNOWN}")
    sides = [int(side) for side in chips.split("x")]
    dimensions, most = SLICES[version]
    if len(sides) != dimensions or math.prod(sides) > most:
        raise BadInput(
            f"--topology={topology}: a slice of {version} has {dimensions} dimensions and at most "
            f"{most} chips; --slices=N joins several."
        )
    if not has_compiler():
        wanted = (r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or ())
        package = next((r for r in wanted if r.startswith("libtpu")), "libtpu")
        raise BadInput(
            "The TPU compiler is not installed: python -m pip install --no-deps "
            f"--target {COMPILER} '{package}'"
        )
    # No TPU is looked for, nor a GPU taken, and several of these processes may run at once.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # Without them the compiler complains on stderr that it runs on no TPU host.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if version in ("v4", "v5p"):  # their two cores are one device of jax, unless told otherwise
        options["chip_config_name"] = "megacore"
    if min(sides[:2]) < 2:  # less than the four chips of a host
        options["chips_per_host_bounds"] = (*(min(side, 2) for side in sides[:2]), 1)
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except Exception as error:
        raise BadInput(
            f"The TPU compiler does not know --topology={topology} "
            f"({' '.join(str(error).split())[:200]}): {_KNOWN}"
        ) from error


def smallest(chip: str) -> str:
    """The slice of one host's four chips, by the name that `accelerators.chip_of` gives one."""
    version = {"v7x": "tpu7x"}.get(name := chip.split()[-1], name)
    return f"{version}:{'2x2x1' if SLICES[version][0] == 3 else '2x2'}"


def has_compiler() -> bool:
    """Whether libtpu can be imported; from COMPILER, too, after this call."""
    if importlib.util.find_spec("libtpu") is None and COMPILER.exists():
        sys.path.append(str(COMPILER))
    return importlib.util.find_spec("libtpu") is not None
