"""The entity softmax as three programs on the same inputs: naive, exact in blocks, sampled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.losses import blocks, class_order, entity, entity_sampling

SCALE, MARGIN = 32.0, 0.3
RATE = 0.1
CLASSES = P(meshes.ALL_AXES)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One size of the loss; `classes` need not divide over anything."""

    batch: int
    classes: int
    dim: int
    labels: int
    dtype: str

    def __str__(self) -> str:
        return f"B={self.batch:,} C={self.classes:,} D={self.dim} K={self.labels} {self.dtype}"


def make_mesh(devices: list[Any]) -> Mesh:
    shape = (1, len(devices), 1)
    return Mesh(np.array(devices).reshape(shape), meshes.ALL_AXES, (AxisType.Auto,) * 3)


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    batch = global_batch.batch_sharding(mesh)
    return {"x": batch, "table": NamedSharding(mesh, CLASSES), "ids": batch, "weights": batch}


def shapes(problem: Problem, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    b, d, k = problem.batch, problem.dim, problem.labels
    kinds = {
        "x": ((b, d), jnp.float32),
        "table": ((class_order.padded_rows(problem.classes, mesh), d), jnp.float32),
        "ids": ((b, k), jnp.int32),
        "weights": ((b, k), jnp.float32),
    }
    where = shardings(mesh)
    return {n: jax.ShapeDtypeStruct(*kind, sharding=where[n]) for n, kind in kinds.items()}


def inputs(problem: Problem, mesh: Mesh, noise: float = 1.0) -> dict[str, jax.Array]:
    """Random rows and embeddings around the row of their first label, drawn where they will live.

    Args:
      noise: how much longer than a row what is added to it is; 1 makes a cosine of 0.71.
    """
    rows = class_order.padded_rows(problem.classes, mesh)

    @functools.partial(jax.jit, out_shardings=shardings(mesh))
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        table = jax.random.normal(keys[0], (rows, problem.dim))
        ids = jax.random.randint(keys[1], (problem.batch, problem.labels), 0, problem.classes)
        x = table[ids[:, 0]] + noise * jax.random.normal(keys[2], (problem.batch, problem.dim))
        x /= jnp.linalg.norm(x, axis=1, keepdims=True)
        weights = jnp.full(ids.shape, 1.0 / problem.labels)
        return {"x": x, "table": table, "ids": ids, "weights": weights}

    return draw(jax.random.key(0))


# ---------------------------------------------------------------------------- the versions


def naive_step(problem: Problem, mesh: Mesh) -> Callable[..., Any]:
    """Value and gradients with all logits in memory, as one would write it; one label a row."""
    dtype = jnp.dtype(problem.dtype)

    def mean(x, table, ids):
        unit = table * jax.lax.rsqrt(jnp.sum(table * table, axis=1, keepdims=True))
        cos = blocks.dot("bd,cd->bc", x, unit, dtype)
        cos = jax.lax.with_sharding_constraint(cos, NamedSharding(mesh, P(None, meshes.ALL_AXES)))
        columns = jnp.arange(cos.shape[1])
        hit = columns == ids
        logits = jnp.where(columns < problem.classes, SCALE * (cos - MARGIN * hit), -1e30)
        target = jnp.sum(jnp.where(hit, logits, 0.0), axis=1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - target)

    def run(x, table, ids, weights):
        del weights
        return jax.value_and_grad(mean, (0, 1))(x, table, ids)

    return run


def exact_step(problem: Problem, mesh: Mesh) -> Callable[..., Any]:
    """Value and gradients in blocks of classes."""

    def mean(x, table, ids, weights):
        result = entity.entity_softmax(x, table, ids, weights, mesh=mesh, **options(problem))
        return result.total / jnp.maximum(result.count, 1)

    return jax.value_and_grad(mean, (0, 1))


def sampled_step(problem: Problem, mesh: Mesh) -> Callable[..., Any]:
    """Draws, takes the rows, value and gradients by embeddings and by these rows."""

    def run(x, table, ids, weights):
        sample = entity_sampling.draw(
            jax.random.key(1),
            ids,
            table_rows=table.shape[0],
            num_entities=problem.classes,
            rate=RATE,
            mesh=mesh,
        )

        def mean(x, rows):
            result = entity.entity_softmax(
                x, rows, ids, weights, mesh=mesh, sample=sample, **options(problem)
            )
            return result.total / jnp.maximum(result.count, 1)

        rows = entity_sampling.take_rows(table, sample.rows, mesh)
        return jax.value_and_grad(mean, (0, 1))(x, rows)

    return run


def options(problem: Problem) -> dict[str, Any]:
    return {
        "num_entities": problem.classes,
        "scale": SCALE,
        "margin": MARGIN,
        "compute_dtype": problem.dtype,
    }


VERSIONS = {"naive": naive_step, "exact": exact_step, "sampled": sampled_step}


def compile_version(name: str, problem: Problem, mesh: Mesh) -> Any:
    where = shardings(mesh)
    out = (sharding.replicated(mesh), (where["x"], where["table"]))
    run = jax.jit(VERSIONS[name](problem, mesh), out_shardings=out)
    return run.lower(*shapes(problem, mesh).values()).compile()


def mib(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 2**20
