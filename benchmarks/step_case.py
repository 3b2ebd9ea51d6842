"""One measurement of the whole training step; `benchmarks.train_step` runs many.

    python -m benchmarks.step_case '{"variant": "B/16", "task": "supervised", "batch": 512, ...}'

Prints one JSON object.  The step is the project's own (`mofi_jax.training.step.make_train_step`:
both clips, AdamW, donated state) on random pictures that are already on the device.
"""

import dataclasses
import json
import statistics
import sys
import time
import types
from typing import Any

import jax
import numpy as np

from mofi_jax.distributed import global_batch, meshes
from mofi_jax.losses import class_order
from mofi_jax.model import attention, image, layers, mofi
from mofi_jax.telemetry import accelerators, flops
from mofi_jax.training import cadence, optim, step
from mofi_jax.training import state as state_lib

VOCABULARY, CONTEXT = 49_408, 77  # CLIP's tokenizer


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      task: "supervised", "contrastive" or "multitask".
      entities: rows of the class table.
      unroll: stacks of up to so many layers run without a loop; -1 for what the device has.
      layers: of the image tower; 0 for the variant's own.
      groups, steps: groups of steps between two looks at the clock, and steps of a group.
    """

    variant: str
    task: str
    batch: int
    entities: int
    image_size: int = 224
    dtype: str = "bfloat16"
    remat: str = "dots"
    attention: str = "auto"
    unroll: int = -1
    patch_dropout: float = 0.0
    layers: int = 0
    groups: int = 5
    steps: int = 5

    def __str__(self) -> str:
        changes = "" if self.unroll < 0 else f" unroll={self.unroll}"
        changes += f" layers={self.layers}" if self.layers else ""
        changes += f" patch_dropout={self.patch_dropout}" if self.patch_dropout else ""
        return (
            f"{self.variant} {self.image_size}px {self.task} B={self.batch:,} "
            f"remat={self.remat} attention={self.attention}{changes}"
        )


def model_config(case: Case) -> mofi.MofiConfig:
    shape = mofi.VARIANTS[case.variant]
    tower = dataclasses.replace(shape["image"], layers=case.layers or shape["image"].layers)
    return mofi.MofiConfig(
        image_size=case.image_size,
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        eos_id=VOCABULARY - 1,
        dtype=case.dtype,
        remat=case.remat,
        attention=case.attention,
        **shape | {"image": tower},
    )


def task_losses(task: str) -> dict[str, dict[str, Any]]:
    losses: dict[str, dict[str, Any]] = {}
    if task != "contrastive":
        losses["entity"] = {
            "weight": 1.0,
            "scale": 32.0,
            "learn_scale": False,
            "margin": 0.3,
            "margin_kind": "cosface",
            "sample_rate": 1.0,
            "block_size": 0,
        }
    if task != "supervised":
        losses["contrastive"] = {"weight": 1.0, "kind": "softmax", "same_entity": "masked"}
    return losses


def optimizer(batch: int) -> Any:
    """The update rule of configs/mofi.py (which itself needs ml_collections)."""
    values = types.SimpleNamespace(
        kind="adamw",
        learning_rate=5e-4,
        warmup="2000 steps",
        final_fraction=0.0,
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        clip_norm=5.0,
        first_moment_dtype="bfloat16",
        layer_decay=1.0,
        frozen=(),
        table=types.SimpleNamespace(
            learning_rate_multiplier=1.0, clip_norm=5.0, second_moment="full"
        ),
    )
    return optim.make(values, cadence.Clock(batch, 10**9, 439_087))


def random_batch(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    b, size = case.batch, case.image_size
    tokens = rng.integers(0, VOCABULARY - 1, (b, CONTEXT), np.int32)
    tokens[np.arange(b), rng.integers(8, CONTEXT, b)] = VOCABULARY - 1
    return {
        "image": rng.integers(0, 256, (b, size, size, 3), np.uint8),
        "entity_ids": rng.integers(0, case.entities, (b, 1), np.int32),
        "entity_weights": np.ones((b, 1), np.float32),
        "tokens": tokens,
        "text_group": np.arange(b, dtype=np.int32),
        "text_valid": np.ones(b, bool),
    }


def measure(case: Case) -> dict[str, Any]:
    """Compiles the step for all devices and times it.

    Returns:
      seconds: of a step, the median of the groups; compile_seconds; flops: of the model, on all
      devices; peak: bf16 FLOP/s of a device, None where unknown; temporary_gib: of the program;
      loss: of the last step; attention: as chosen for the image tower; platform, device (its kind),
      devices.
    """
    if case.unroll >= 0:
        layers.UNROLLED_LAYERS[jax.default_backend()] = case.unroll
    mesh, model = meshes.make_mesh(), model_config(case)
    losses, tx = task_losses(case.task), optimizer(case.batch)
    rows = class_order.padded_rows(case.entities, mesh)
    init = state_lib.initialiser(model, tx, losses=losses, table_rows=rows)
    state, places = state_lib.create(init, 0, mesh)
    data = global_batch.to_global(mesh, random_batch(case))
    entities = case.entities if "entity" in losses else 0
    context = step.StepContext(model, mesh, losses, entities, patch_dropout=case.patch_dropout)
    update = step.make_train_step(context, tx, places)

    start = time.perf_counter()
    compiled = update.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for group in range(case.groups + 1):
        start = time.perf_counter()
        for _ in range(case.steps):
            state, metrics = compiled(state, data)
        jax.block_until_ready(metrics)
        if group:  # the first one warms up
            seconds.append((time.perf_counter() - start) / case.steps)

    device = jax.devices()[0]
    chip = accelerators.chip_of(device)
    return {
        "seconds": statistics.median(seconds),
        "compile_seconds": compile_seconds,
        "flops": sum(flops.of_step(context, batch_size=case.batch).values()),
        "peak": chip.device_flops if chip else None,
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "loss": float(metrics["loss"]),
        "attention": attention.choose(
            case.attention,
            length=1
            + image.kept_count((case.image_size // model.patch_size) ** 2, case.patch_dropout),
            causal=False,
            head_dim=model.image.width // model.image.heads,
            dtype=jax.numpy.dtype(model.dtype),
            device=device,
        ),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
