"""What one device sends in one execution of a compiled program, by kind of collective."""

import collections
import dataclasses
import re

from mofi_jax.plan import hlo

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one of KINDS does on groups of ``group`` devices."""

    kind: str
    group: int
    count: int  # executions
    sent_bytes: float  # by one device, with the ring algorithm of each kind


def collectives(program: hlo.Program, *, devices: int) -> tuple[Collective, ...]:
    """All collectives of a program that `devices` run, most bytes first."""
    counts, sent = collections.Counter(), collections.Counter()
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
                sent[kind, group] += times * _sent_bytes(instruction, kind, group)
    return tuple(Collective(*key, counts[key], total) for key, total in sent.most_common())


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


def _sent_bytes(instruction: hlo.Instruction, kind: str, group: int) -> float:
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
