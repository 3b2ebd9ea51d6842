"""Time, memory and exactness of the entity softmax in blocks, against the dense one.

    python -m benchmarks.entity_softmax [--quick]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was
asked for does not hold.  Both losses run in this one process, turn by turn, so that a busy machine
slows both: ratios are medians over these pairs.  The dense loss is given its best layout, logits
sharded over the classes; left to itself XLA may reshuffle all of them.

On a machine without accelerator 8 simulated CPU devices share the cores: their ratios carry over,
their seconds do not.  Exactness is always measured on simulated CPU devices, in fp32.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import figures
from mofi_jax import partition
from mofi_jax.losses import base, entity

SIMULATED = 8
SCALE, MARGIN = 32.0, 0.3


@dataclasses.dataclass(frozen=True)
class Problem:
    """One size of the loss; `classes` need not divide over anything."""

    batch: int
    classes: int
    dim: int
    labels: int
    block_size: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"B={self.batch:,} C={self.classes:,} D={self.dim} K={self.labels} "
            f"block {self.block_size:,} {self.dtype}"
        )


def make_mesh(devices: list[Any]) -> Mesh:
    shape = (1, len(devices), 1)
    return Mesh(np.array(devices).reshape(shape), partition.ALL_AXES, (AxisType.Auto,) * 3)


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    batch = partition.batch_sharding(mesh)
    table = NamedSharding(mesh, P(partition.ALL_AXES))
    return {"x": batch, "table": table, "ids": batch, "weights": batch}


def shapes(problem: Problem, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    b, d, k = problem.batch, problem.dim, problem.labels
    kinds = {
        "x": ((b, d), jnp.float32),
        "table": ((partition.padded_rows(problem.classes, mesh), d), jnp.float32),
        "ids": ((b, k), jnp.int32),
        "weights": ((b, k), jnp.float32),
    }
    where = shardings(mesh)
    return {n: jax.ShapeDtypeStruct(*kind, sharding=where[n]) for n, kind in kinds.items()}


def inputs(problem: Problem, mesh: Mesh) -> dict[str, jax.Array]:
    """Random rows and embeddings near the row of their first label, drawn where they will live."""
    rows = partition.padded_rows(problem.classes, mesh)

    @functools.partial(jax.jit, out_shardings=shardings(mesh))
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        table = jax.random.normal(keys[0], (rows, problem.dim))
        ids = jax.random.randint(keys[1], (problem.batch, problem.labels), 0, problem.classes)
        x = table[ids[:, 0]] + jax.random.normal(keys[2], (problem.batch, problem.dim))
        x /= jnp.linalg.norm(x, axis=1, keepdims=True)
        weights = jnp.full(ids.shape, 1.0 / problem.labels)
        return {"x": x, "table": table, "ids": ids, "weights": weights}

    return draw(jax.random.key(0))


def loss_functions(problem: Problem, mesh: Mesh) -> dict[str, Callable[..., base.LossSum]]:
    options = {
        "num_entities": problem.classes,
        "margin": MARGIN,
        "compute_dtype": problem.dtype,
    }

    def dense(x, table, ids, weights, *, scale):
        # Features gathered and classes sharded: the only layout of the logits that then needs no
        # further exchange is [b, classes / devices].
        x = jax.lax.with_sharding_constraint(x, partition.replicated(mesh))
        table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P(partition.ALL_AXES)))
        return entity.entity_softmax_dense(x, table, ids, weights, scale=scale, **options)

    blocks = functools.partial(
        entity.entity_softmax, mesh=mesh, block_size=problem.block_size, **options
    )
    return {"dense": dense, "blocks": blocks}


def train_step(loss: Callable[..., base.LossSum], mesh: Mesh) -> Callable[..., Any]:
    """Mean loss and its gradients by embeddings, table and scale, jitted."""
    where = shardings(mesh)
    whole = partition.replicated(mesh)

    def mean(x, table, scale, ids, weights):
        result = loss(x, table, ids, weights, scale=scale)
        return result.total / jnp.maximum(result.count, 1)

    def step(x, table, ids, weights):
        scale = jnp.float32(SCALE)
        return jax.value_and_grad(mean, (0, 1, 2))(x, table, scale, ids, weights)

    return jax.jit(step, out_shardings=(whole, (where["x"], where["table"], whole)))


def compile_steps(problem: Problem, mesh: Mesh) -> dict[str, Any]:
    arguments = shapes(problem, mesh)
    return {
        name: train_step(loss, mesh).lower(**arguments).compile()
        for name, loss in loss_functions(problem, mesh).items()
    }


def largest_difference(problem: Problem, mesh: Mesh) -> float:
    """Blocks against dense: worst of loss and gradients, max |a - b| / max |b|."""
    arguments = inputs(problem, mesh)
    steps = compile_steps(problem, mesh)
    ours = jax.tree.leaves(steps["blocks"](**arguments))
    theirs = jax.tree.leaves(steps["dense"](**arguments))
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def interleaved(steps: dict[str, Any], arguments: Any, pairs: int) -> dict[str, list[float]]:
    """Seconds per call, one call of each in turn, after one unmeasured turn."""
    seconds = {name: [] for name in steps}
    for turn in range(pairs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(**arguments))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def mib(step: Any) -> float:
    return step.memory_analysis().temp_size_in_bytes / 2**20


def exactness(report: figures.Report, quick: bool) -> None:
    cpus = jax.devices("cpu")
    # A prime number of classes divides over neither the devices nor the blocks.
    classes = 10_007 if quick else 65_537
    problem = Problem(batch=64, classes=classes, dim=64, labels=3, block_size=1000, dtype="float32")
    for count in (1, SIMULATED):
        report.add(
            f"blocks vs dense, {count} device{'s'[: count - 1]}, {problem}",
            largest_difference(problem, make_mesh(cpus[:count])),
            "max rel",
            f"cpu x{count} simulated",
            asked="<= 1e-5",
        )


def speed_and_memory(report: figures.Report, problem: Problem, pairs: int) -> None:
    devices = jax.devices()
    device = f"{devices[0].device_kind} x{len(devices)}"
    if devices[0].platform == "cpu":
        device += " simulated"
    mesh = make_mesh(devices)
    steps = compile_steps(problem, mesh)
    seconds = interleaved(steps, inputs(problem, mesh), pairs)
    ratios = [b / d for b, d in zip(seconds["blocks"], seconds["dense"], strict=True)]
    best = min(seconds["blocks"])
    tflops = 8 * problem.batch * problem.classes * problem.dim / best / 1e12

    add = functools.partial(report.add, device=device)
    add(f"time, blocks / dense, {problem}", statistics.median(ratios), "x")
    add(f"time, blocks, {problem}", best * 1e3, "ms")
    add(f"rate of 8BCD, blocks, {problem}", tflops, "TFLOP/s")
    add(f"temporary memory per device, dense, {problem}", mib(steps["dense"]), "MiB")
    add(f"temporary memory per device, blocks, {problem}", mib(steps["blocks"]), "MiB")
    larger = dataclasses.replace(problem, classes=4 * problem.classes)
    growth = mib(compile_steps(larger, mesh)["blocks"]) / mib(steps["blocks"])
    add(f"temporary memory, blocks, 4C / C, {problem}", growth, "x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    quick = parser.parse_args().quick
    jax.config.update("jax_num_cpu_devices", SIMULATED)

    report = figures.Report()
    exactness(report, quick)
    if jax.default_backend() != "cpu":
        problems = [Problem(8192, 262_144, 512, 1, 4096, "bfloat16")]
    elif quick:
        problems = [Problem(256, 32_768, 128, 1, 1024, "float32")]
    else:
        problems = [Problem(1024, c, 256, 1, 4096, "float32") for c in (65_536, 262_144)]
    for problem in problems:
        speed_and_memory(report, problem, pairs=3 if quick else 7)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
