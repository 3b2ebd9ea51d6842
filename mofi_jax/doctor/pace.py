"""How long a run will take, and the least memory that it needs.

The speed is that of real steps of a small piece of the model, two layers of each tower on a few
pictures, by their FLOPs.  They run in a process of their own (``python -m mofi_jax.doctor.pace``),
as `doctor.machine` looks at devices.  On several hosts, where no process can have the devices for
itself, it is a share of what the chips can do at most.
"""

import json
import math
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import psutil
from absl import flags

from mofi_jax.common import processes
from mofi_jax.distributed import meshes
from mofi_jax.model import mofi
from mofi_jax.telemetry import accelerators, flops
from mofi_jax.training import setup, state, step

ASSUMED_MFU = 0.4  # what large runs reach on accelerators
TIMEOUT = 120  # seconds

_LAYERS, _ENTITIES, _ROWS = 2, 4096, 256  # at most, of the piece
# FLOPs of a step of it, on a device: long enough that starting it does not count.
_STEP = {"cpu": 3e10, "gpu": 3e12, "tpu": 3e12}
_SECONDS = 2.0  # of measuring


def run_seconds(made: setup.TrainSetup, rate: float) -> float:
    """Seconds of a run's steps at so many FLOP/s."""
    batch = made.clock.batch_size
    spent = 0.0
    for stage in made.stages:
        cost = sum(flops.of_step(made.context_of(stage), batch_size=batch).values())
        spent += cost * (stage.end - stage.first)
    return spent / rate


def rate(config: dict[str, Any], sizes: dict[str, int], found: dict[str, Any]) -> tuple[float, str]:
    """FLOP/s of all devices together, and in words how they are known.

    Args:
      config: the training config as JSON.
      sizes: `data.training_set.TrainingSet.sizes`.
      found: by `machine.devices`.

    Returns (0, why) where they cannot be known.
    """
    if found["processes"] == 1:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mofi_jax.doctor.pace"],
                input=json.dumps({"config": config, "sizes": sizes}),
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            measured = json.loads(done.stdout.strip().rpartition("\n")[2])
            return measured["rate"], measured["words"]
        except subprocess.TimeoutExpired:
            why = f"the probe took more than {TIMEOUT} s"
        except ValueError:
            last = done.stderr.strip().rpartition("\n")[2]
            why = f"the probe failed: {last[:200]}"
        return 0.0, why
    kind = type("Device", (), {"device_kind": found["kind"]})
    chip = accelerators.chip_of(kind)
    if chip is None:
        return 0.0, f"the peak of {found['kind']} is not known"
    words = f"assumed {100 * ASSUMED_MFU:.0f} % of the chips' peak, which only a run can tell"
    return chip.device_flops * found["devices"] * ASSUMED_MFU, words


def host_memory() -> int:
    """Bytes that this process may have: of the machine, or of its container."""
    return min(psutil.virtual_memory().total, processes.memory_limit())


def batch_bytes(model: mofi.MofiConfig, rows: int, *, texts: bool, microbatches: int) -> int:
    """The least that a step keeps of so many pictures on a device, for its backward pass.

    The pictures themselves; of each layer its input, and unless that is computed again what its
    matrix products give: queries, keys and values, both outputs, the inside of the MLP.
    """
    each = 2 if model.dtype == "bfloat16" else 4
    kept = 0
    patches = (model.image_size // model.patch_size) ** 2
    towers = [(model.image, patches), *[(model.text, model.context_length)] * texts]
    for tower, tokens in towers:
        width = tower.width
        if model.remat != "full":
            width += 5 * tower.width + tower.hidden_width
        kept += tower.layers * tokens * width * each
    pictures = rows * model.image_size**2 * 3
    return pictures + math.ceil(rows / microbatches) * kept


def _piece(config: Any, sizes: dict[str, int], device: Any) -> tuple[float, str]:
    """FLOP/s of this process's devices in steps of a piece of the model, and how in words."""
    count = jax.local_device_count()
    for tower in ("image", "text"):
        config.model[tower]["layers"] = min(_LAYERS, config.model[tower]["layers"])
    config.update({"stages": [], "microbatches": 1, "total": "1000 steps"})
    config.checkpoint.update({"every": "0 steps", "keep_every": "0 steps"})
    config.optimizer.warmup = "1 steps"
    sizes = sizes | {"num_entities": min(sizes["num_entities"], _ENTITIES)}
    mesh = meshes.make_mesh(-1, 1, 1, devices=jax.local_devices())
    made = setup.make(config, mesh, **sizes)
    one = sum(flops.of_step(made.context, batch_size=1).values())
    enough = max(4, round(_STEP[device.platform] / one))
    rows = min(_ROWS, max(1, config.batch_size // count), enough)
    config.batch_size = rows * count
    cost = sum(flops.of_step(made.context, batch_size=config.batch_size).values())
    # Any numbers take as long; to make true ones is a program that takes long to compile.
    structs, shardings = state.abstract(made.init, mesh)
    train_state = jax.tree.map(lambda struct: _filled(struct, 0.01), structs)
    batch = {name: _filled(s, 1) for name, s in setup.batch_structs(config, mesh).items()}
    update = step.make_train_step(made.context, made.tx, shardings)
    best, started = math.inf, None
    while started is None or time.monotonic() - started < _SECONDS:
        begun = time.monotonic()
        train_state, values = update(train_state, batch)
        jax.block_until_ready((train_state, values))
        if started is None:  # that one was compiled
            started = time.monotonic()
        else:
            best = min(best, time.monotonic() - begun)
    return cost / best, (
        f"measured on steps of {config.batch_size:,} pictures and {_LAYERS} layers, without the"
        " reading of pictures"
    )


def _filled(struct: Any, value: float) -> jax.Array:
    return jax.device_put(np.full(struct.shape, value, struct.dtype), struct.sharding)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    given = json.load(sys.stdin)
    found = _piece(ml_collections.ConfigDict(given["config"]), given["sizes"], jax.devices()[0])
    print(json.dumps(dict(zip(("rate", "words"), found, strict=True))))
