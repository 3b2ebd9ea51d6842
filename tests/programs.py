"""What compiled programs of the losses consist of: shapes and collectives."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import meshes

# Sizes no two of which are equal, so that a shape in the program says what it is.
B, D, K, C, BLOCK, N = 48, 24, 3, 1008, 40, 8

BATCH_SPEC = P(meshes.BATCH_AXES)
ARRAYS = {
    "x": ((B, D), jnp.float32, BATCH_SPEC),
    "table": ((C, D), jnp.float32, P(meshes.ALL_AXES)),
    "ids": ((B, K), jnp.int32, BATCH_SPEC),
    "weights": ((B, K), jnp.float32, BATCH_SPEC),
    "scale": ((), jnp.float32, P()),
}


def compiled(function, mesh, *specs):
    """The optimised program of function over arrays that are already where they belong."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in specs
    ]
    return jax.jit(function).lower(*arguments).compile().as_text()


def shapes(program: str) -> set[tuple[int, ...]]:
    found = re.findall(r"\b(?:pred|bf16|[sfu]\d+)\[([\d,]*)\]", program)
    return {tuple(int(s) for s in dims.split(",") if s) for dims in found}


def collectives(program: str) -> dict[str, set[tuple[int, ...]]]:
    """Result shapes by kind of collective."""
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    result = {}
    for kind_line in re.finditer(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        result.setdefault(kind_line[2], set()).update(shapes(kind_line[1]))
    return result


def no_large_tensor(program: str) -> None:
    for shape in shapes(program):
        assert not {B, C} <= set(shape), f"all logits: {shape}"
        assert not {B, C // N} <= set(shape), f"a shard of all logits: {shape}"
        assert C not in shape, f"the whole table: {shape}"
