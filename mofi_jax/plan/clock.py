"""The TPU compiler's clock: how long a compiled step takes by its estimate, and on what.

The compiler notes cycles at each fusion and copy.  Kernels of one's own cost the bundles that it
schedules, or the bytes that they move if these take longer; collectives cost their bytes over the
links, unless arithmetic runs beside them, which hides them.
"""

import collections
import re

from mofi_jax.plan import hlo, kernels
from mofi_jax.telemetry import accelerators

# By a `jax.named_scope` around all that an operation belongs to, whatever it does.
SCOPES = {
    "patch_embedding": "embedding",
    "token_embedding": "embedding",
    "entity_softmax": "entity softmax",
    "contrastive": "contrastive loss",
    "optimizer": "optimizer",
}
ATTENTION, PRODUCTS, COPIES = "attention", "matrix products", "copies and casts"
REST, EXPOSED = "norms, activations, rest", "collectives not hidden"

# Operations that change where a value lies or how it is written, not what it is.
_MOVES = {
    *("bitcast", "bitcast-convert", "broadcast", "concatenate", "constant", "convert", "copy"),
    *("dynamic-slice", "dynamic-update-slice", "fusion", "get-tuple-element", "iota", "pad"),
    *("parameter", "reshape", "reverse", "slice", "transpose", "tuple"),
}
_UNKNOWN = 2**63 - 1  # what the compiler writes at a copy that it has no estimate of
_OP_NAME = r'op_name="([^"]*)"'


def seconds(
    program: hlo.Program,
    collectives: tuple[hlo.Collective, ...],
    chip: accelerators.Chip,
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Estimated seconds of one execution by cause, largest first, and what has no estimate."""
    spent, unknown = collections.Counter(), []
    own = kernels.cycles(program, chip)
    for name, times in program.executions.items():
        computation = program.computations[name]
        for key, instruction in computation.items():
            noted = int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            if key in own or noted == _UNKNOWN:
                moved = instruction.hbm_bytes
                moved += sum(computation[operand].hbm_bytes for operand in instruction.operands)
                least = moved * chip.devices / chip.hbm_bandwidth
                cycles = own.get(key)
                took = max(least, (cycles or 0) / chip.clock)
                if cycles is None:
                    unknown.append(instruction.attribute(_OP_NAME) or key)
            elif noted:
                took = noted / chip.clock
            else:
                continue
            spent[cause(program, computation, instruction)] += times * took
    if chip.link_bandwidth:
        spent[EXPOSED] = sum(c.exposed_bytes for c in collectives) / chip.outgoing_bandwidth
    return dict(spent.most_common()), tuple(dict.fromkeys(unknown))


def cause(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> str:
    """What an operation is for, by jax's name of it (``op_name``), or by what it does."""
    beside = (i for i in program.inside(instruction) if i.opcode not in hlo.KINDS)
    inside = [instruction, *beside]
    product = next((i for i in inside if i.opcode in ("convolution", "dot")), None)
    operation = _named(inside if product is None else [product, *inside], computation)
    words = set(re.findall(r"\w+", operation))
    if scope := next((scope for scope in SCOPES if scope in words), None):
        return SCOPES[scope]
    if kernels.is_kernel(instruction):
        return ATTENTION if any(word.startswith("attention") for word in words) else REST
    if product is not None:
        # Queries and keys, or weights and values: an axis of both operands stays in the result.
        einsum = re.search(r"(\w+),(\w+)->(\w+)", operation)
        return ATTENTION if einsum and set.intersection(*map(set, einsum.groups())) else PRODUCTS
    if all(i.opcode in _MOVES for i in inside if any(shape for _, shape in i.arrays)):
        return COPIES
    return ATTENTION if "softmax" in words else REST


def _named(instructions: list[hlo.Instruction], computation: hlo.Computation) -> str:
    """The first name in these, or that of what the first one reads."""
    for instruction in instructions:
        if name := instruction.attribute(_OP_NAME):
            return name
    source = instructions[0]
    while source.operands and source.operands[0] in computation:
        source = computation[source.operands[0]]
        if name := source.attribute(_OP_NAME):
            return name
    return ""
