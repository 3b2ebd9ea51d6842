"""Cycles of kernels of one's own (Pallas), for which the TPU compiler writes no estimate.

It writes how many bundles it schedules for each operation, though, if it is told to when it is
loaded, and a bundle is one cycle.  As it takes half as long again then, `cycles` has the kernels of
a program compiled alone, by this module run as a process.
"""

import base64
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.extend.mlir import ir

from mofi_jax.plan import hlo, tpu_topology
from mofi_jax.telemetry import accelerators

_DTYPES = {"pred": "bool", "bf16": "bfloat16", "s": "int", "u": "uint", "f": "float"}


def cycles(program: hlo.Program, chip: accelerators.Chip) -> dict[str, int | None]:
    """Cycles of one execution of each kernel of a program, by the name of its instruction.

    Memory stalls are not in it.  None where the compiler tells no schedule, or the kernel has loops
    beside its grid, of which a schedule does not tell how often they run.
    """
    calls = {}
    for computation in (program.computations[name] for name in program.executions):
        for name, kernel in computation.items():
            if is_kernel(kernel):
                backend, _ = json.JSONDecoder().raw_decode(kernel.text.split("backend_config=")[1])
                kept = {"custom_call_config", "scoped_memory_configs"} & backend.keys()
                calls[name] = json.dumps(
                    {
                        "operands": [a for o in kernel.operands for a in computation[o].arrays],
                        "results": kernel.arrays,
                        "config": {key: backend[key] for key in sorted(kept)},
                    }
                )
    distinct = list(dict.fromkeys(calls.values()))
    bundles = dict(zip(distinct, scheduled(distinct, chip), strict=True))
    result: dict[str, int | None] = {}
    for name, call in calls.items():
        config = json.loads(call)["config"].get("custom_call_config", {})
        steps = grid_steps(config.get("body", ""), chip.cores)
        result[name] = steps * bundles[call] if steps and bundles[call] else None
    return result


def is_kernel(instruction: hlo.Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.text


@functools.cache
def grid_steps(body: str, cores: int) -> int | None:
    """Steps of a kernel's grid that one core runs; None if unknown or with loops in a step.

    The cores of a device share a grid whose first dimension is declared parallel; else one of them
    runs it alone, as loops of 66 and of 130 turns for a grid of 128 show on a v5p.
    """
    try:
        from jax.experimental.mosaic.dialects import tpu  # here, as a newer jax may lack it

        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            tpu.register_dialect(context)
            module = ir.Module.parse(base64.b64decode(body))
            text = str(module)
            main = next(o for o in module.body.operations if "iteration_bounds" in o.attributes)
            steps = math.prod(main.attributes["iteration_bounds"])
            parallel = "parallel" in str(main.attributes["dimension_semantics"]).split(",")[0]
    except (ImportError, AttributeError, ir.MLIRError, StopIteration, ValueError, KeyError):
        return None
    if re.search(r"\bscf\.(for|while)\b", text):
        return None
    return -(-steps // (cores if parallel else 1))


def scheduled(calls: list[str], chip: accelerators.Chip) -> list[int | None]:
    """Bundles of each kernel call (JSON as `cycles` writes it), from a process of its own."""
    if not calls:
        return []
    with tempfile.TemporaryDirectory() as folder:
        flags = {"to": folder, "llo_text": "true", "llo_pass_label_regex": "^final_bundles"}
        # A compiler that does not know them shall go on without.
        known = "--undefok=" + ",".join(f"xla_jf_dump_{name}" for name in flags)
        dump = [known, *(f"--xla_jf_dump_{name}={value}" for name, value in flags.items())]
        dump.insert(0, os.environ.get("LIBTPU_INIT_ARGS", ""))
        done = subprocess.run(
            [sys.executable, "-m", "mofi_jax.plan.kernels", chip.name, folder],
            env=os.environ | {"LIBTPU_INIT_ARGS": " ".join(dump)},
            input="\n".join(calls),
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        [*_, answer] = done.stdout.splitlines()
        return json.loads(answer)
    except ValueError:
        logging.warning("no schedule of the kernels: %s", " ".join(done.stderr.split())[-300:])
        return [None] * len(calls)


def _compile(call: dict[str, Any], device: Any, folder: epath.Path) -> int | None:
    """Bundles of one kernel call, compiled alone; the compiler records them in `folder`."""

    def struct(array: tuple[str, list[int]]) -> jax.ShapeDtypeStruct:
        kind, bits = re.fullmatch(r"(pred|bf16|[suf])(\d*)", array[0]).groups()
        return jax.ShapeDtypeStruct(array[1], _DTYPES[kind] + bits)

    run = jax.ffi.ffi_call(
        "tpu_custom_call",
        [struct(array) for array in call["results"]],
        custom_call_api_version=1,
        legacy_backend_config=json.dumps(call["config"]),
    )
    operands = [struct(array) for array in call["operands"]]
    whole = jax.sharding.SingleDeviceSharding(device)
    compiled = jax.jit(run, in_shardings=whole).lower(*operands).compile()
    program = hlo.Program(compiled.as_text())
    [name] = (n for c in program.computations.values() for n, i in c.items() if is_kernel(i))
    bundles = None
    for path in sorted(folder.iterdir()):  # by time: after a second attempt that one counts
        if re.fullmatch(
            rf"\d+-{re.escape(name)}-\d+-schedule-analysis_final_bundles.txt", path.name
        ):
            found = re.search(r"total scheduled bundles: *(\d+)", path.read_text())
            bundles = int(found[1]) if found else bundles
        path.unlink()
    return bundles


def main(chip_name: str, folder: str) -> None:
    device = tpu_topology.devices(tpu_topology.smallest(chip_name))[0]
    calls = [json.loads(line) for line in sys.stdin]
    print(json.dumps([_compile(call, device, epath.Path(folder)) for call in calls]))


if __name__ == "__main__":
    main(*sys.argv[1:])
