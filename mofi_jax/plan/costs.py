"""What one device computes, moves and sends in one execution of a compiled program.

XLA's own cost analysis counts the body of a loop once, however often it runs, and most of a
training step are loops over layers and blocks.  Here every instruction counts as often as it runs.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from mofi_jax.plan import hlo

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Instructions that name data without touching it.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("while", "conditional", "call", "call-start", "async-start"),
    *("partition-id", "replica-id", "opt-barrier"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one kind of collective does on groups of one size.

    Attributes:
      kind: one of COLLECTIVES.
      group: devices that take part together.
      count: executions.
      result_bytes: of all results on one device.
      sent_bytes: what one device sends, by the ring algorithm of each kind.
    """

    kind: str
    group: int
    count: int
    result_bytes: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in one execution of the program.

    Attributes:
      flops: of matrix products and convolutions, as often as executed.
      passes: the same weighted by how often a matrix unit takes float32 operands apart: 6 times for
        a product asked for in the highest precision, 3 for high.
      flops_once: with loop bodies counted once, as XLA's cost analysis does.
      hbm_bytes: read from and written to HBM by all instructions; an upper bound, as an instruction
        may skip part of its operands.
      collectives: most bytes first.
      unknown_loops: loops whose number of turns could not be read, counted once.
    """

    flops: float
    passes: float
    flops_once: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int


def costs(text: str, *, devices: int) -> Costs:
    """Adds up a compiled program.

    Args:
      devices: how many run it, for collectives over all of them.
    """
    program = hlo.Program(text)
    traffic = _Traffic(program)
    flops = passes = flops_once = hbm_bytes = 0.0
    sums: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for name, (times, fused) in program.executions().items():
        computation = program.computations[name]
        for instruction in computation.values():
            products = _product_flops(instruction, computation)
            flops += times * products
            passes += times * products * _passes(instruction)
            flops_once += products
            if not fused:
                hbm_bytes += times * traffic.of(instruction, computation)
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES and not _continues(instruction, computation):
                group = _group_size(instruction.text, devices)
                result = _result_bytes(instruction)
                entry = sums[kind, group]
                entry[0] += times
                entry[1] += times * result
                entry[2] += times * _sent_bytes(kind, group, result)
    found = (Collective(kind, group, *entry) for (kind, group), entry in sums.items())
    return Costs(
        flops=flops,
        passes=passes,
        flops_once=flops_once,
        hbm_bytes=hbm_bytes,
        collectives=tuple(sorted(found, key=lambda c: -c.sent_bytes)),
        unknown_loops=len(program.unknown_loops),
    )


def _continues(collective: hlo.Instruction, around: hlo.Computation) -> bool:
    """Whether it has begun in another fusion.

    The TPU compiler has a collective go on beside arithmetic by writing it into each fusion that it
    goes on in; the one that begins it says so.
    """
    return "chain_id=" in collective.text and not any(
        'custom_call_target="AsyncCollectiveStart"' in other.text for other in around.values()
    )


class _Traffic:
    """Bytes of HBM that instructions outside of fusions read and write."""

    def __init__(self, program: hlo.Program):
        self.computations = program.computations
        self._using: dict[int, dict[str, list[hlo.Instruction]]] = {}

    def of(self, instruction: hlo.Instruction, around: hlo.Computation) -> int:
        """Bytes of HBM that an instruction outside of fusions reads and writes."""
        operation = instruction.operation
        if operation in _FREE or operation.endswith(("-done", "-update")):
            return 0
        operands = [around[name].arrays for name in instruction.operands if name in around]
        reads = [sum(a.bytes for a in arrays if not a.on_chip) for arrays in operands]
        written = sum(a.bytes for a in instruction.arrays if not a.on_chip)
        if operation == "slice-start":
            source = around[instruction.operands[0]].arrays[0]
            slices = [a for a in instruction.arrays[1:] if a.dtype == source.dtype]
            moved = sum(a.bytes * (2 - a.on_chip) for a in slices)
            return moved - source.on_chip * sum(a.bytes for a in slices)
        if operation.endswith("-start"):
            # Its result names what it reads as well.
            return sum(reads) + sum(a.bytes for a in instruction.arrays[:1] if not a.on_chip)
        if operation in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if operation == "dynamic-update-slice":
            return 2 * (reads[1] if len(reads) > 1 else 0)
        if operation == "fusion":
            inside = self._inside(instruction)
            places = {i.number: i.name for i in inside.values() if i.number is not None}
            sliced = [
                self._sliced(places[place], inside) if size and place in places else None
                for place, size in enumerate(reads)
            ]
            reads = [
                size if part is None else min(size, part)
                for size, part in zip(reads, sliced, strict=True)
            ]
            root = next((i for i in inside.values() if i.root), None)
            parts = [None] if root is None else self._updated(root, inside)
            if len(parts) != len(instruction.arrays):
                parts = [None] * len(instruction.arrays)
            given, kept = self._handed_on(instruction, inside)
            reads = [size for place, size in enumerate(reads) if place not in given]
            written = sum(
                array.bytes if part is None else part
                for place, (part, array) in enumerate(zip(parts, instruction.arrays, strict=True))
                if not array.on_chip and place not in kept
            )
        return sum(reads) + written

    def _handed_on(
        self, fusion: hlo.Instruction, inside: hlo.Computation
    ) -> tuple[set[int], set[int]]:
        """Operands and results of a fusion that are a collective's on its way (`_continues`)."""
        if not any(i.operation in COLLECTIVES and "chain_id=" in i.text for i in inside.values()):
            return set(), set()
        aliased = re.search(r"output_to_operand_aliasing=\{(.*?)\}, \w+=", fusion.text)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", aliased[1] if aliased else "")
        return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}

    def _inside(self, fusion: hlo.Instruction) -> hlo.Computation:
        return self.computations.get(fusion.attribute("calls") or "", {})

    def _users(self, inside: hlo.Computation) -> dict[str, list[hlo.Instruction]]:
        if id(inside) not in self._using:
            using = self._using[id(inside)] = collections.defaultdict(list)
            for instruction in inside.values():
                for operand in dict.fromkeys(instruction.operands):
                    using[operand].append(instruction)
        return self._using[id(inside)]

    def _sliced(self, name: str, inside: hlo.Computation) -> int | None:
        """Bytes that a fusion reads of an array of which it takes slices alone; else None."""
        total = 0
        for user in self._users(inside)[name]:
            if user.operation in ("dynamic-slice", "gather", "slice"):
                part = user.arrays[0].bytes
            elif user.operation == "dynamic-update-slice" and user.operands[0] == name:
                part = 0
            elif user.operation == "bitcast":
                part = self._sliced(user.name, inside)
            elif user.operation == "fusion":
                deeper = self._inside(user)
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                parts = [
                    self._sliced(i.name, deeper) for i in deeper.values() if i.number in places
                ]
                part = None if None in parts or not parts else sum(parts)
            else:
                part = None
            if part is None:
                return None
            total += part
        return total

    def _updated(self, root: hlo.Instruction, inside: hlo.Computation) -> list[int | None]:
        """Of each result of a fusion, bytes of the slice that it updates in place; else None."""
        if root.operation == "tuple":
            return [
                self._updated(inside[name], inside)[0] if name in inside else None
                for name in root.operands
            ]
        if root.operation == "bitcast" and root.operands[0] in inside:
            return self._updated(inside[root.operands[0]], inside)
        if root.operation == "fusion":
            deeper = self._inside(root)
            end = next((i for i in deeper.values() if i.root), None)
            return [None] if end is None else self._updated(end, deeper)
        if root.operation == "dynamic-update-slice" and root.operands[1] in inside:
            return [inside[root.operands[1]].arrays[0].bytes]
        return [None] * len(root.arrays)


# ---------------------------------------------------------------------------- arithmetic


def _product_flops(instruction: hlo.Instruction, around: hlo.Computation) -> float:
    """2 for each multiplication and addition of a matrix product or convolution."""
    if instruction.operation not in ("dot", "convolution"):
        return 0.0
    out = instruction.arrays[0]
    left, right = (around[name].arrays[0] for name in instruction.operands[:2])
    if instruction.operation == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        contracted = [int(d) for d in dims[1].split(",") if d] if dims else []
        return 2.0 * out.size * math.prod(left.shape[d] for d in contracted)
    return 2.0 * _multiplications(instruction.text, left, right, out)


def _multiplications(text: str, left: hlo.Array, right: hlo.Array, out: hlo.Array) -> float:
    """Multiplications of a convolution that do not meet padding or the gaps of a dilation.

    The TPU compiler writes matrix products as convolutions, batch dimensions as spatial ones in
    which each result meets a single element.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    window = re.search(r"window=\{([^}]*)\}", text)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = len(labels[1]) - 2

    def numbers(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * spatial

    total = 1.0
    columns = ("size", "stride", "lhs_dilate", "rhs_dilate", "pad")
    defaults = ("1", "1", "1", "1", "0_0")
    for axis, values in enumerate(zip(*map(numbers, columns, defaults), strict=True)):
        size, stride, lhs_dilate, rhs_dilate = map(int, values[:4])
        low = int(values[4].split("_")[0])
        length = left.shape[labels[1].index(str(axis))]
        results = np.arange(out.shape[labels[3].index(str(axis))])
        places = results[:, None] * stride - low + np.arange(size)[None, :] * rhs_dilate
        inside = (places >= 0) & (places % lhs_dilate == 0) & (places // lhs_dilate < length)
        total *= int(inside.sum())
    # `i` of the right side is already the inputs of one group.
    features = right.shape[labels[2].index("i")] * out.shape[labels[3].index("f")]
    return total * features * out.shape[labels[3].index("b")]


def _passes(instruction: hlo.Instruction) -> int:
    found = re.search(r"operand_precision=\{(\w+),", instruction.text)
    return {"highest": 6, "high": 3}.get(found[1] if found else "", 1)


# ---------------------------------------------------------------------------- collectives


def _group_size(text: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        group = 1
        # An axis, or a part of it as 'axis':(before)size.
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]):
            group *= int(part or sizes[axis])
        return group
    listed = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if listed:
        return int(listed[2])
    spelled = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(spelled[1].split(",")) if spelled else devices


def _result_bytes(instruction: hlo.Instruction) -> int:
    arrays = instruction.arrays
    # What a start gives is its operands, its results and bookkeeping; an all-reduce's results only.
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        arrays = arrays[len(instruction.operands) :][: len(instruction.operands)]
    return sum(a.bytes for a in arrays)


def _sent_bytes(kind: str, group: int, result: int) -> float:
    """What one of `group` devices sends for a result of so many bytes, around a ring."""
    share = (group - 1) / group
    return {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": result * share * group,
        "all-to-all": result * share,
        "ragged-all-to-all": result * share,
    }.get(kind, float(result))
