"""The losses as the real TPU compiler compiles them for slices that one does not have.

    python -m benchmarks.tpu_programs exact_v5e clip_v5e ...

Prints a JSON object a line: memory of a chip, collectives with their shapes, every shape of more
than one dimension in the program.  Needs the package ``libtpu`` (``pip install "jax[tpu]"``), no
TPU.  Run it as a process of its own: it sets up jax for compiling alone.
"""

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import meshes, sharding
from mofi_jax.losses import class_order, contrastive, entity, entity_sampling, siglip
from mofi_jax.plan import hlo, tpu_topology
from mofi_jax.training import class_table

BATCH, CLASSES = P(meshes.BATCH_AXES), P(meshes.ALL_AXES)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, and for how many chips of which kind."""

    topology: str
    build: Callable[..., Any]
    batch: int
    classes: int = 0
    dim: int = 512
    labels: int = 1
    options: tuple[tuple[str, Any], ...] = ()


def struct(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def labels(program: Program, mesh: Mesh) -> tuple[Any, Any]:
    shape = program.batch, program.labels
    return struct(mesh, shape, jnp.int32, BATCH), struct(mesh, shape, jnp.float32, BATCH)


def table(program: Program, mesh: Mesh) -> Any:
    rows = class_order.padded_rows(program.classes, mesh)
    return struct(mesh, (rows, program.dim), jnp.float32, CLASSES)


def entity_loss(program: Program, mesh: Mesh) -> Any:
    """Value and gradients of the exact loss by embeddings and table."""
    dense = dict(program.options).get("dense", False)
    options = {k: v for k, v in program.options if k != "dense"}
    options = {"scale": 32.0, "margin": 0.3, "compute_dtype": "bfloat16"} | options
    traced = options.pop("traced_scale", False)

    def mean(x, table, scale, ids, weights):
        if dense:
            x = jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))
            loss = entity.entity_softmax_dense
        else:
            loss = entity.entity_softmax
            options["mesh"] = mesh
        chosen = options | ({"scale": scale} if traced else {})
        result = loss(x, table, ids, weights, num_entities=program.classes, **chosen)
        return result.total / jnp.maximum(result.count, 1.0)

    x = struct(mesh, (program.batch, program.dim), jnp.float32, BATCH)
    scale = struct(mesh, (), jnp.float32, P())
    arguments = x, table(program, mesh), scale, *labels(program, mesh)
    step = jax.value_and_grad(mean, (0, 1, 2) if traced else (0, 1))
    shardings = (NamedSharding(mesh, BATCH), NamedSharding(mesh, CLASSES))
    shardings += (sharding.replicated(mesh),) if traced else ()
    jitted = jax.jit(step, out_shardings=(sharding.replicated(mesh), shardings))
    return jitted.lower(*arguments)


def sampled_step(program: Program, mesh: Mesh) -> Any:
    """A whole step of the class table: draw, loss, update of the drawn rows, write back."""
    tx = class_table.scale_by_row_adam(
        0.9, 0.98, 1e-6, mu_dtype="bfloat16", second_moment=dict(program.options)["second_moment"]
    )

    def step(state, x, ids, weights, seed):
        sample = entity_sampling.draw(
            jax.random.key(seed),
            ids,
            table_rows=state["params"][sharding.ENTITY_TABLE].shape[0],
            num_entities=program.classes,
            rate=0.1,
            mesh=mesh,
        )
        small = class_table.take(state, sample.rows, mesh)

        def mean(x, params):
            result = entity.entity_softmax(
                x,
                params[sharding.ENTITY_TABLE],
                ids,
                weights,
                num_entities=program.classes,
                scale=32.0,
                margin=0.3,
                compute_dtype="bfloat16",
                mesh=mesh,
                sample=sample,
            )
            return result.total / jnp.maximum(result.count, 1.0)

        d_x, grads = jax.grad(mean, (0, 1))(x, small["params"])
        updates, moments = tx.update(grads, small["moments"])
        updated = {"params": optax.apply_updates(small["params"], updates), "moments": moments}
        return class_table.put(state, updated, sample.rows, mesh), d_x

    params = {sharding.ENTITY_TABLE: table(program, mesh)}
    state = {"params": params, "moments": jax.eval_shape(tx.init, params)}
    shardings = sharding.tree_shardings(mesh, state)
    state = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        state,
        shardings,
    )
    x = struct(mesh, (program.batch, program.dim), jnp.float32, BATCH)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, BATCH)))
    seed = struct(mesh, (), jnp.uint32, P())
    return jitted.lower(state, x, *labels(program, mesh), seed)


def pairs_loss(program: Program, mesh: Mesh) -> Any:
    """Value and gradients of a contrastive loss by both embeddings, temperature and bias."""
    options = dict(program.options)
    sigmoid = options.pop("sigmoid")

    def mean(image, text, scale, bias, valid, image_entities, text_entity):
        relations = {
            "valid": valid,
            "image_entities": image_entities,
            "text_entity": text_entity,
            "mesh": mesh,
            **options,
        }
        if sigmoid:
            result = siglip.siglip(image, text, scale, bias, **relations)
        else:
            result = contrastive.clip_softmax(image, text, scale, **relations)
        return result.total / jnp.maximum(result.count, 1.0)

    embeddings = struct(mesh, (program.batch, program.dim), jnp.float32, BATCH)
    scalar = struct(mesh, (), jnp.float32, P())
    image_entities, _ = labels(program, mesh)
    valid = struct(mesh, (program.batch,), jnp.bool_, BATCH)
    text_entity = struct(mesh, (program.batch,), jnp.int32, BATCH)
    where = NamedSharding(mesh, BATCH)
    whole = sharding.replicated(mesh)
    jitted = jax.jit(
        jax.value_and_grad(mean, (0, 1, 2, 3)),
        out_shardings=(whole, (where, where, whole, whole)),
    )
    return jitted.lower(embeddings, embeddings, scalar, scalar, valid, image_entities, text_entity)


PROGRAMS = {
    "exact_v5e": Program("v5e:4x4", entity_loss, 8192, 2_000_000),
    "dense_v5e": Program("v5e:4x4", entity_loss, 8192, 2_000_000, options=(("dense", True),)),
    "exact_v6e": Program("v6e:16x16", entity_loss, 32_768, 10_000_000),
    "exact_v5p_768": Program("v5p:8x8x4", entity_loss, 32_768, 2_000_000, 768),
    "learned_arcface_v5e": Program(
        "v5e:4x4",
        entity_loss,
        8192,
        2_000_003,
        labels=4,
        options=(("margin_kind", "arcface"), ("traced_scale", True)),
    ),
    "sampled_v5e": Program(
        "v5e:16x16", sampled_step, 32_768, 10_000_000, options=(("second_moment", "full"),)
    ),
    "sampled_row_v5e": Program(
        "v5e:4x4", sampled_step, 8192, 2_000_000, options=(("second_moment", "row"),)
    ),
    "clip_v5e": Program(
        "v5e:16x16",
        pairs_loss,
        32_768,
        labels=4,
        options=(("sigmoid", False), ("same_entity", "masked")),
    ),
    "siglip_v5e": Program(
        "v5e:16x16",
        pairs_loss,
        32_768,
        labels=4,
        options=(("sigmoid", True), ("same_entity", "positive")),
    ),
    "clip_v5e_small": Program(
        "v5e:2x2",
        pairs_loss,
        32_768,
        labels=1,
        options=(("sigmoid", False), ("same_entity", "off")),
    ),
}


def describe(name: str) -> dict[str, Any]:
    program = PROGRAMS[name]
    devices = np.array(tpu_topology.devices(program.topology)).reshape(1, -1, 1)
    mesh = Mesh(devices, meshes.ALL_AXES, (AxisType.Auto,) * 3)
    start = time.perf_counter()
    compiled = program.build(program, mesh).compile()
    memory, text = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    shapes, collectives = set(), collections.defaultdict(set)
    for instruction in (i for c in text.computations.values() for i in c.values()):
        found = {shape for _, shape in instruction.arrays}
        shapes |= found
        if (kind := instruction.opcode.removesuffix("-start")) in hlo.KINDS:
            collectives[kind] |= found
    mib = 2**20
    return {
        "name": name,
        "topology": program.topology,
        "chips": mesh.size,
        "batch": program.batch,
        "classes": program.classes,
        "dim": program.dim,
        "labels": program.labels,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "temporary_mib": round(memory.temp_size_in_bytes / mib, 1),
        "argument_mib": round(memory.argument_size_in_bytes / mib, 1),
        "aliased_mib": round(memory.alias_size_in_bytes / mib, 1),
        "collectives": {kind: sorted(found) for kind, found in collectives.items()},
        "shapes": sorted(shape for shape in shapes if len(shape) > 1),
    }


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PROGRAMS:
        print(json.dumps(describe(chosen)), flush=True)
