"""Reads the text of a compiled program (`Compiled.as_text`): one device's, after partitioning.

Its loops, and what the device sends, by kind of collective.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from absl import logging

# Collectives.
KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

# "%name = types opcode(operands), attributes": types of operands may have parentheses too.
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, [\w\-]+=|, /|\s*$)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str  # as in "all-gather-start"
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dimensions, of the result
    operands: tuple[str, ...]  # names of instructions of the same computation
    text: str  # the whole line

    @property
    def array_bytes(self) -> tuple[int, ...]:
        """Bytes of each array of the result."""
        bits = ((re.search(r"\d+", dtype), math.prod(shape)) for dtype, shape in self.arrays)
        return tuple(-(-size * int(found[0] if found else 8) // 8) for found, size in bits)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the arrays of the result that the TPU compiler left in the main memory."""
        types = self.text[: self.text.index(f" {self.opcode}(")]
        layouts = re.findall(r"[a-z]\w*\[[\d,<=]*\](\{[^}]*\})?", types)
        spaces = zip(layouts, self.array_bytes, strict=True)
        return sum(size for layout, size in spaces if not re.search(r"S\([1-9]", layout))

    @property
    def called(self) -> list[str]:
        """Computations that it runs: of a loop the body alone, of a conditional every branch."""
        one = r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
        branches = self.attribute(r"branch_computations=\{([^}]*)\}") or ""
        return re.findall(one, self.text) + re.findall(r"[\w.\-]+", branches)

    def attribute(self, pattern: str) -> str | None:
        """The group of a pattern in its text."""
        found = re.search(pattern, self.text)
        return found and found[1]


Computation = dict[str, Instruction]


class Program:
    """A program's text: its computations by name, and how often each runs (`executions`)."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        # A loop of unknown trip count counts once.
        self.executions: collections.Counter[str] = collections.Counter()
        entry = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line):
                current = self.computations[header[2]] = {}
                entry = header[2] if header[1] else entry
            elif match := _LINE.match(line):
                name, types, opcode, operands = match.groups()
                arrays = tuple(
                    (dtype, tuple(map(int, re.findall(r"\d+", dimensions))))
                    for dtype, dimensions in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", types)
                )
                operands = tuple(re.findall(r"%([\w.\-]+)", operands))
                current[name] = Instruction(opcode, arrays, operands, line)
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.executions[name] += times
        computation = self.computations[name]
        for key, instruction in computation.items():
            trips = 1
            if instruction.opcode == "while":
                trips = self.trip_count(instruction, computation)
                if trips is None:
                    logging.warning("the loop %s has no constant trip count: it counts once", key)
                    trips = 1
            for called in self.computations.keys() & instruction.called:
                self._visit(called, times * trips)

    def trip_count(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a while loop of the computation `caller` runs, None if unknown.

        As the compiler notes it or, as the one for TPUs does not, from the counter: an element of
        the loop's tuple that starts at a constant and grows by another until it reaches a third.
        """
        if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(noted)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)")]
        test, result, start = _root(condition), _root(body), caller[loop.operands[0]]
        if "direction=LT" not in test.text or {result.opcode, start.opcode} != {"tuple"}:
            return None
        counter, limit = (_source(name, condition) for name in test.operands)
        index = counter.attribute(r"index=(\d+)")
        if index is None:
            return None
        added = _source(result.operands[int(index)], body)
        terms = [_source(name, body) for name in added.operands]
        step = next((n for n in map(_constant, terms) if n), None)
        first = _constant(_source(start.operands[int(index)], caller))
        limit = _constant(limit)
        grows = added.opcode == "add" and index in [i.attribute(r"index=(\d+)") for i in terms]
        if not grows or None in (first, limit, step):
            return None
        return max(0, -(-(limit - first) // step))

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """All that the computations called by an instruction hold, and those that they call."""
        for name in self.computations.keys() & instruction.called:
            for inner in self.computations[name].values():
                yield inner
                yield from self.inside(inner)


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.text.lstrip().startswith("ROOT "))


def _source(name: str, computation: Computation) -> Instruction:
    """The instruction of this name, or what it is a copy of."""
    while computation[name].opcode in ("copy", "bitcast"):
        name = computation[name].operands[0]
    return computation[name]


def _constant(instruction: Instruction) -> int | None:
    value = instruction.attribute(r" constant\((-?\d+)\)")
    return int(value) if value else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one of KINDS does on groups of ``group`` devices."""

    kind: str
    group: int
    count: int  # executions
    sent_bytes: float  # by one device, with the ring algorithm of each kind
    exposed_bytes: float  # of these, sent while the device does nothing else


def collectives(program: Program, *, devices: int) -> tuple[Collective, ...]:
    """All collectives of a program that `devices` run, most bytes first."""
    counts, sent, exposed = collections.Counter(), collections.Counter(), collections.Counter()
    everything = [i for computation in program.computations.values() for i in computation.values()]
    asynchronous = {name for i in everything if i.opcode.endswith("-start") for name in i.called}
    for name, times in program.executions.items():
        computation = program.computations[name].values()
        starts = any("AsyncCollectiveStart" in instruction.text for instruction in computation)
        for instruction in computation:
            kind = instruction.opcode.removesuffix("-start")
            # To run a collective beside arithmetic, the TPU compiler writes it into every fusion
            # that it overlaps with; the one that starts it says so.
            if kind in KINDS and (starts or "chain_id=" not in instruction.text):
                group = _group_size(instruction.text, devices)
                counts[kind, group] += times
                size = times * _sent_bytes(instruction, kind, group)
                sent[kind, group] += size
                hidden = kind != instruction.opcode or starts or name in asynchronous
                exposed[kind, group] += 0.0 if hidden else size
    return tuple(
        Collective(*key, counts[key], total, exposed[key]) for key, total in sent.most_common()
    )


def _group_size(text: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        group = 1
        # An axis, or a part of it as 'axis':(before)size.
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]):
            group *= int(part or sizes[axis])
        return group
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(listed[1])
    spelled = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(spelled[1].split(",")) if spelled else devices


def _sent_bytes(instruction: Instruction, kind: str, group: int) -> float:
    """What one of `group` devices sends around a ring."""
    sizes = instruction.array_bytes
    # What a start gives is its operands, its results and bookkeeping; an all-reduce's results only.
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        operands = len(instruction.operands)
        sizes = sizes[operands : 2 * operands]
    if kind.startswith("collective-"):
        return float(sum(sizes))
    factor = {"all-reduce": 2, "reduce-scatter": group}.get(kind, 1)
    return factor * sum(sizes) * (group - 1) / group
