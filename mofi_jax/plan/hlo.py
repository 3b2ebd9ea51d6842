"""Reads the text of a compiled program: its instructions, and how often each is executed.

The text is that of ``compiled.as_text()``: the program of one device, after partitioning.
"""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}


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

    @property
    def number(self) -> int | None:
        """Of a parameter."""
        found = re.search(r" parameter\((\d+)\)", self.text)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str | None:
        """The computation or word after ``name=``."""
        found = re.search(rf"[ ,]{name}=%?([\w.\-]+)", self.text)
        return found and found[1]


Computation = dict[str, Instruction]


class Program:
    """The computations of a program's text, each a dict of its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.unknown_loops: set[str] = set()
        self.entry = ""
        current: Computation = {}
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
                elif instruction.operation in ("call", "call-start"):
                    # The latter: what TPUs from v6e on leave to their SparseCores.
                    visit(instruction.attribute("to_apply") or "", times, fused)
                elif instruction.operation == "async-start":
                    visit(instruction.attribute("calls") or "", times, fused)
                elif instruction.operation == "conditional":
                    # Each branch as if it were taken: an upper bound.
                    for branch in _branches(instruction.text):
                        visit(branch, times, fused)

        visit(self.entry, 1, False)
        return counts

    def turns(self, loop: Instruction, around: Computation) -> int:
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


def _followed(name: str, computation: Computation) -> Instruction | None:
    """The instruction of this name, or what it is a copy of."""
    instruction = computation.get(name)
    while instruction is not None and instruction.operation in ("copy", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _increment(instruction: Instruction | None, body: Computation, place: int) -> int | None:
    """The constant that is added to the counter in each turn."""
    if instruction is None or instruction.operation != "add":
        return None
    operands = [_followed(name, body) for name in instruction.operands]
    if place not in [_index(o) for o in operands]:
        return None
    return next((c for c in map(_constant, operands) if c), None)
