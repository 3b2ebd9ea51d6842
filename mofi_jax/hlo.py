"""Reads a compiled program's text: what one device computes, moves and sends in one execution.

XLA's own cost analysis counts the body of a loop once, however often it runs, and most of a
training step are loops over layers and blocks.  Here every instruction counts as often as it runs.
The text is that of ``compiled.as_text()``: the program of one device, after partitioning.
"""

import collections
import dataclasses
import math
import re

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
# Instructions that name data without touching it.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
      on_chip: in a memory space other than HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 8)
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    arrays: tuple[Array, ...]
    operation: str
    operands: tuple[str, ...]
    text: str  # the whole line
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation or word after ``name=``."""
        found = re.search(rf"[ ,]{name}=%?([\w.\-]+)", self.text)
        return found and found[1]


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
    program = Program(text)
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
                hbm_bytes += times * program.traffic(instruction, computation)
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
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


class Program:
    """The computations of a program's text, each a dict of its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.unknown_loops: set[str] = set()
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line.rstrip())
            if header and not line.startswith(" "):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith(" ") and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def executions(self) -> dict[str, tuple[int, bool]]:
        """Computation -> (how often it runs, whether inside one fused instruction)."""
        counts: dict[str, tuple[int, bool]] = {}

        def visit(name: str, times: int, fused: bool) -> None:
            if name not in self.computations:
                return
            before, was_fused = counts.get(name, (0, fused))
            counts[name] = before + times, fused and was_fused
            for instruction in self.computations[name].values():
                if instruction.operation == "while":
                    turns = self.turns(instruction, self.computations[name])
                    visit(instruction.attribute("body") or "", times * turns, fused)
                elif instruction.operation == "fusion":
                    visit(instruction.attribute("calls") or "", times, True)
                elif instruction.operation == "call":
                    visit(instruction.attribute("to_apply") or "", times, fused)
                elif instruction.operation == "async-start":
                    visit(instruction.attribute("calls") or "", times, fused)
                elif instruction.operation == "conditional":
                    # Each branch as if it were taken: an upper bound.
                    for branch in _branches(instruction.text):
                        visit(branch, times, fused)

        visit(self.entry, 1, False)
        return counts

    def turns(self, loop: Instruction, around: dict[str, Instruction]) -> int:
        """How often a while loop runs: as the compiler notes it, or from its counter."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if noted:
            return int(noted[1])
        condition = self.computations.get(loop.attribute("condition") or "", {})
        body = self.computations.get(loop.attribute("body") or "", {})
        root = next((i for i in condition.values() if i.root), None)
        if root is None or root.operation != "compare" or "direction=LT" not in root.text:
            return self._unknown(loop)
        counter, bound = (_followed(name, condition) for name in root.operands)
        place, limit = _index(counter), _constant(bound)
        result = next((i for i in body.values() if i.root), None)
        start = around.get(loop.operands[0])
        if place is None or limit is None or result is None or start is None:
            return self._unknown(loop)
        if result.operation != "tuple" or start.operation != "tuple":
            return self._unknown(loop)
        step = _increment(_followed(result.operands[place], body), body, place)
        first = _constant(_followed(start.operands[place], around))
        if step is None or first is None:
            return self._unknown(loop)
        return max(0, -(-(limit - first) // step))

    def _unknown(self, loop: Instruction) -> int:
        self.unknown_loops.add(loop.name)
        return 1

    def traffic(self, instruction: Instruction, around: dict[str, Instruction]) -> int:
        """Bytes of HBM that an instruction outside of fusions reads and writes."""
        operation = instruction.operation
        if operation in _FREE or operation.endswith(("-done", "-update")):
            return 0
        operands = [around[name].arrays for name in instruction.operands if name in around]
        reads = [sum(a.bytes for a in arrays if not a.on_chip) for arrays in operands]
        written = sum(a.bytes for a in instruction.arrays if not a.on_chip)
        if operation in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if operation == "dynamic-update-slice":
            return 2 * (reads[1] if len(reads) > 1 else 0)
        if operation == "fusion":
            inside = self.computations.get(instruction.attribute("calls") or "", {})
            reads, written = _fused_traffic(inside, reads, written)
        return sum(reads) + written


# ---------------------------------------------------------------------------- text


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    called = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not called:
        return None
    start = end + called.end() - 1
    operands = re.findall(r"%([\w.\-]+)", rest[start : _closing(rest, start) + 1])
    return Instruction(
        match[2], _arrays(rest[:end]), called[1], tuple(operands), line, bool(match[1])
    )


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
        for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    )


def _branches(text: str) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", text)
    if found:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)


def _index(instruction: Instruction | None) -> int | None:
    """Which element of the tuple an instruction takes."""
    if instruction is None or instruction.operation != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.text)[1])


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.operation != "constant":
        return None
    found = re.search(r"constant\((-?\d+)\)", instruction.text)
    return int(found[1]) if found else None


def _followed(name: str, computation: dict[str, Instruction]) -> Instruction | None:
    """The instruction of this name, or what it is a copy of."""
    instruction = computation.get(name)
    while instruction is not None and instruction.operation in ("copy", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _increment(
    instruction: Instruction | None, body: dict[str, Instruction], place: int
) -> int | None:
    """The constant that is added to the counter in each turn."""
    if instruction is None or instruction.operation != "add":
        return None
    operands = [_followed(name, body) for name in instruction.operands]
    if place not in [_index(o) for o in operands]:
        return None
    return next((c for c in map(_constant, operands) if c), None)


# ---------------------------------------------------------------------------- arithmetic


def _product_flops(instruction: Instruction, around: dict[str, Instruction]) -> float:
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


def _multiplications(text: str, left: Array, right: Array, out: Array) -> float:
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


def _passes(instruction: Instruction) -> int:
    found = re.search(r"operand_precision=\{(\w+),", instruction.text)
    return {"highest": 6, "high": 3}.get(found[1] if found else "", 1)


# ---------------------------------------------------------------------------- memory


def _fused_traffic(
    inside: dict[str, Instruction], reads: list[int], written: int
) -> tuple[list[int], int]:
    """Bytes of a fusion that reads slices of its operands, or writes a slice of its result."""
    reads = list(reads)
    users = collections.defaultdict(list)
    for instruction in inside.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    for instruction in inside.values():
        number = re.search(r"parameter\((\d+)\)", instruction.text)
        if instruction.operation != "parameter" or not number or int(number[1]) >= len(reads):
            continue
        place, using = int(number[1]), users[instruction.name]
        if not using or not reads[place]:
            continue
        if all(u.operation in ("dynamic-slice", "gather", "slice") for u in using):
            reads[place] = min(reads[place], sum(u.arrays[0].bytes for u in using))
        elif all(
            u.operation == "dynamic-update-slice" and u.operands[0] == instruction.name
            for u in using
        ):
            # Updated in place: only the new part is written.
            updates = sum(
                inside[u.operands[1]].arrays[0].bytes for u in using if u.operands[1] in inside
            )
            written = max(0, written - reads[place]) + updates
            reads[place] = 0
    return reads, written


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


def _result_bytes(instruction: Instruction) -> int:
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
