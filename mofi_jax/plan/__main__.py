"""What a training config costs on a TPU slice, from a machine without one.

    mofi plan --config mofi:variant=H/14 --topology v5p:8x8x8
    mofi plan --config mofi:variant=B/16 --topology v6e:16x16 --largest=yes --out PLAN

Compiles the real training step for the named slice (``--slices`` of them) and reads what the
compiler made of it: memory of a chip by kind, what goes over the links, the bound that these and
the model FLOPs put on the speed, and how long it takes by the compiler's own clock, on what.
Nothing runs.
``--entities`` and ``--vocab_size`` are the sizes of the data set's vocabulary and tokenizer.
``--price="4.20 USD"``, of a chip for an hour, adds what the run costs.
``--largest=yes`` compiles for larger batches too, until one fits that is near the limit.  With
``--out`` the folder gets ``result.json``.  Exits with code 1 when the step does not fit.
"""

import dataclasses
import math
import re
import sys
from typing import Any

import jax
from absl import logging

from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes, sharding
from mofi_jax.plan import clock, hlo, tpu_topology
from mofi_jax.telemetry import accelerators, flops
from mofi_jax.training import cadence, settings, setup, state, step

EXAMPLES_PER_EPOCH = 10**9  # of the schedule alone, which no shape depends on
GIB = 2**30
TRIES = 3  # compiles for the largest batch
# The chip's smaller memories are a matter of the program.
OUT_OF_HBM = re.compile(r"RESOURCE_EXHAUSTED.*\bhbm\b", re.IGNORECASE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one step: of a run's stages, of that with the most FLOPs.

    Attributes:
      stage: that stage; shortened: FLOPs of a step on the run's average, over those of this one.
      memory: bytes of a chip by kind; "temporaries" are missing where the compiler found no room.
      mesh: sizes by axis; layout: how the state lies on it, in words (`sharding.layout`).
      needed, available: bytes of a chip; None for what the compiler did not say.
      model: FLOPs that the model asks for, on all chips together (`flops.of_step`).
      collectives: of one device.
      estimate: seconds of a step by cause, as the compiler estimates them (`clock.seconds`).
      not_estimated: operations of which it holds no more than the bytes that they move.
    """

    stage: cadence.Stage
    shortened: float
    slices: int
    devices: int
    chips: int
    chip: accelerators.Chip
    batch_size: int
    mesh: dict[str, int]
    layout: str
    memory: dict[str, int]
    needed: int | None
    available: int
    model: dict[str, float]
    collectives: tuple[hlo.Collective, ...] = ()
    estimate: dict[str, float] = dataclasses.field(default_factory=dict)
    not_estimated: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the compiler found room, and no more than the chip has.

        It has been seen to make programs of 35 GiB for a TPU v6e of 32.
        """
        return "temporaries" in self.memory and self.needed <= self.available

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what limits it."""
        bounds = {"model FLOPs": sum(self.model.values()) / (self.chips * self.chip.bf16_flops)}
        if self.chip.link_bandwidth:
            sent = sum(c.sent_bytes for c in self.collectives)
            bounds["links"] = sent / self.chip.outgoing_bandwidth
        return bounds

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs over the peak in the longest of the bounds."""
        return self.bounds["model FLOPs"] / max(self.bounds.values())

    @property
    def step_seconds(self) -> float:
        """By the compiler's estimate, and no less than the bounds."""
        return max(sum(self.estimate.values()), *self.bounds.values())

    @property
    def mfu_estimate(self) -> float:
        """Model FLOPs over the peak in `step_seconds`."""
        return self.bounds["model FLOPs"] / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        names = ("bounds", "mfu_bound", "step_seconds", "mfu_estimate") if self.fits else ()
        speed = {name: getattr(self, name) for name in names}
        return {**dataclasses.asdict(self), "fits": self.fits, **speed}


def main(
    config: Any,
    topology: str,
    slices: str = "1",
    entities: str = "2000000",
    vocab_size: str = "50272",
    largest: str = "no",
    price: str = "",
    out: str = "",
) -> None:
    """Plans, prints and writes.

    Args:
      topology: the slice, as v5p:8x8x8.
      slices: how many of them.
      entities: of the data set's vocabulary.
      vocab_size: of its tokenizer.
      largest: yes to look for the largest batch that fits.
      price: of one chip for an hour, with or without a currency, as 4.20 or "4.20 USD".
      out: folder of result.json; without it nothing is written.
    """
    settings.validate(config)
    folder = files.output_folder(out, "--out") if out else None
    if largest not in ("yes", "no"):
        raise BadInput(f"--largest={largest}: choose yes or no.")
    for flag, text in {"entities": entities, "vocab_size": vocab_size, "slices": slices}.items():
        if not text.replace("_", "").isdigit() or not int(text):
            raise BadInput(f"--{flag}={text} is not a whole number above 0.")
    per_hour, currency = read_price(price)
    sizes = {"num_entities": int(entities), "vocab_size": int(vocab_size)}
    mesh = meshes.make_mesh(**config.mesh, devices=tpu_topology.devices(topology, int(slices)))
    setup.check_batch(config, mesh)
    planned = plan(config, mesh, **sizes)
    page = describe(config, planned)
    result = {"config": config.to_dict(), "topology": topology, **sizes, **planned.to_dict()}
    if planned.fits:
        result["hours_of"], result["hours"] = run_hours(config, planned)
        result["chip_hours"] = result["hours"] * planned.chips
        page += f"\n{result['chip_hours']:,.0f} chip-hours"
        if price:
            result["cost"] = result["chip_hours"] * per_hour
            page += f", {result['cost']:,.0f}{currency} at {price} a chip-hour"
    if largest == "yes":
        batch = result["largest_batch"] = largest_batch(config, mesh, planned, sizes)
        page += f"\nlargest batch that compiled and fits: {f'{batch:,}' if batch else 'none'}"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "result.json", result)
    print(page)
    if not planned.fits:
        sys.exit(1)


def read_price(text: str) -> tuple[float, str]:
    """The number of ``--price``, and its currency with a space before it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([^\d\s]*)", text or "0")
    if found is None or (text and not float(found[1])):
        raise BadInput(
            f"--price={text!r} is no price: write what a chip costs for an hour, as --price=4.20 "
            "or --price='4.20 USD'."
        )
    return float(found[1]), found[2] and f" {found[2]}"


def plan(config: Any, mesh: Any, *, num_entities: int, vocab_size: int) -> Plan:
    """Compiles the step of `config` for `mesh`."""
    device = mesh.devices.flat[0]
    if (chip := accelerators.chip_of(device)) is None:
        raise BadInput(
            f"mofi_jax/telemetry/accelerators.py has no figures of {device.device_kind}: add them, "
            "or plan for another slice."
        )
    sizes = {"vocab_size": vocab_size, "eos_id": vocab_size - 1, "num_entities": num_entities}
    made = setup.make(config, mesh, **sizes, examples_per_epoch=EXAMPLES_PER_EPOCH)
    structs, shardings = state.abstract(made.init, mesh)
    stage, cost, shortened = largest_stage(made, config.batch_size)
    batch = setup.batch_structs(config, mesh, stage.image_size)
    memory = {kind: chip.devices * n for kind, n in state_bytes(structs, batch).items()}
    needed, available, read = None, int(chip.hbm_bytes), {}
    logging.info("compiling a batch of %d for %d devices", config.batch_size, mesh.size)
    try:
        train_step = step.make_train_step(made.context_of(stage), made.tx, shardings)
        compiled = train_step.lower(structs, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if not OUT_OF_HBM.search(str(error)):
            raise
        if sizes := memory_in(str(error)):
            needed, available = (chip.devices * size for size in sizes)
    else:
        analysis = compiled.memory_analysis()
        arguments = chip.devices * analysis.argument_size_in_bytes
        new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        memory |= {
            # What the state takes beyond its elements, in the tiles of the chip's memory.
            "padding of arrays": max(0, arguments - sum(memory.values())),
            "temporaries": chip.devices * (analysis.temp_size_in_bytes + max(0, new)),
            "program": chip.devices * analysis.generated_code_size_in_bytes,
        }
        needed = sum(memory.values())
        program = hlo.Program(compiled.as_text())
        read = {
            "collectives": hlo.collectives(program, devices=mesh.size),
        }
        read["estimate"], read["not_estimated"] = clock.seconds(program, read["collectives"], chip)
    slices = meshes.count_slices(mesh.devices.flat)
    return Plan(
        stage=stage,
        shortened=shortened,
        slices=slices,
        devices=mesh.size,
        chips=mesh.size // chip.devices,
        chip=chip,
        batch_size=config.batch_size,
        mesh=dict(mesh.shape),
        layout=sharding.layout(mesh, structs, slices=slices)[0],
        memory=memory,
        needed=needed,
        available=available,
        model=cost,
        **read,
    )


def largest_stage(
    made: setup.TrainSetup, batch_size: int
) -> tuple[cadence.Stage, dict[str, float], float]:
    """The stage of a run with the most FLOPs a step, these, and `Plan.shortened`."""
    costs = {
        stage: flops.of_step(made.context_of(stage), batch_size=batch_size) for stage in made.stages
    }
    totals = {stage: sum(cost.values()) for stage, cost in costs.items()}
    largest = max(made.stages, key=totals.get)
    of_run = sum((stage.end - stage.first) * total for stage, total in totals.items())
    return largest, costs[largest], of_run / made.clock.total_steps / totals[largest]


def state_bytes(structs: state.TrainState, batch: dict[str, Any]) -> dict[str, int]:
    """Bytes on one device of all that a step is given, by kind."""
    kinds = dict.fromkeys(("parameters", "optimizer", "class table", "its moments", "batch"), 0)
    for name, leaf in sharding.named_leaves({"state": structs, "batch": batch}).items():
        moment = name.startswith("state/opt_state/")
        if name.startswith("batch/"):
            kind = "batch"
        elif name.endswith(sharding.ENTITY_TABLE):
            kind = "its moments" if moment else "class table"
        else:
            kind = "optimizer" if moment else "parameters"
        kinds[kind] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return kinds


def memory_in(message: str) -> tuple[int, int] | None:
    """Bytes that a program takes and may take on one device, from the compiler's error."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (f"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)"):
        if found := re.search(pattern, message):
            factors = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return tuple(int(float(found[i]) * factors[found[i + 1]]) for i in (1, 3))
    return None


def remedies(config: Any, planned: Plan) -> list[str]:
    """What to change, in the order of what it costs; only what the config does not do already."""
    optimizer, losses, parts = config.optimizer, config.losses, config.microbatches
    pieces = planned.devices // planned.mesh["tensor"] * parts
    # A power of two, as many times as many microbatches as memory is short.
    short, more = max(2.0, (planned.needed or 0) / planned.available), 1
    while more < short and config.batch_size // pieces % (2 * more) == 0:
        more *= 2
    again = ", for one more forward pass" if parts == 1 else ""
    table = planned.memory["class table"] + planned.memory["its moments"]
    large_table = table > 0.2 * sum(planned.memory.values())
    row = large_table and optimizer.table.second_moment == "full"
    sampled = large_table and losses.entity.sample_rate == 1
    tiles = "entity" in losses and losses.entity.block_size
    half = config.batch_size // 2
    replicas = planned.mesh["replica"] > planned.slices
    whole_moments = optimizer.first_moment_dtype == "float32"
    hints = (
        (config.model.remat != "full", "model.remat=full recomputes all: a third more FLOPs"),
        (more > 1, f"microbatches={parts * more} keeps the activations of one of them{again}"),
        (replicas, "mesh.replica=-1 --config.mesh.fsdp=-1 shards parameters over more devices"),
        (whole_moments, "optimizer.first_moment_dtype=bfloat16 halves the first moments"),
        (row, "optimizer.table.second_moment=row keeps one value for each entity"),
        (sampled, "losses.entity.sample_rate=0.1 has a gradient for a tenth of the table"),
        (tiles, "losses.entity.block_size=0 chooses tiles that fit"),
        (half % pieces == 0, f"batch_size={half} halves the batch"),
    )
    return [*(f"--config.{hint}" for applies, hint in hints if applies), "a slice with more chips"]


def largest_batch(config: Any, mesh: Any, planned: Plan, sizes: dict[str, int]) -> int:
    """The largest batch that a compile has shown to fit, 0 for none; `planned` is of `config`."""
    plans = [planned]
    for _ in range(TRIES):
        largest = max((p for p in plans if p.fits), key=lambda p: p.batch_size, default=None)
        failing = min((p.batch_size for p in plans if not p.fits), default=math.inf)
        guess, least = failing / 2, 0
        if largest:
            # As if all temporaries grew with the batch; the compiler keeps a fiftieth for itself.
            grows = largest.memory["temporaries"] + largest.memory["batch"]
            least, room = largest.batch_size, 0.98 * largest.available - largest.needed
            guess = min(least * (1 + room / grows), (least + failing) / 2)
        # Down to what divides over the mesh, and to a round number.
        step = planned.devices // planned.mesh["tensor"] * config.microbatches
        while step * 20 < guess:
            step *= 2
        if guess // step * step <= least:
            break
        other = config.copy_and_resolve_references()
        other.batch_size = int(guess // step * step)
        plans.append(plan(other, mesh, **sizes))
    return max((p.batch_size for p in plans if p.fits), default=0)


def describe(config: Any, planned: Plan) -> str:
    """The plan as a page of text."""
    memory = {**planned.memory, "altogether": planned.needed}
    axes = " x ".join(f"{axis} {size}" for axis, size in planned.mesh.items())
    lines = [
        f"batch {planned.batch_size:,} on {planned.chips} {planned.chip.name}, "
        f"{planned.devices} devices, slices {planned.slices}",
        f"mesh {axes}: {planned.layout}",
        *([f"the largest stage, {planned.stage}"] if config.stages else []),
        *("", f"{'memory of a chip':<28} {'GiB':>9}  of {planned.available / GIB:.1f}"),
        *(f"  {kind:<26} {size / GIB:>9.3f}" for kind, size in memory.items() if size),
        "",
    ]
    if not planned.fits:
        needed = f"{planned.needed / GIB:.1f} GiB" if planned.needed else "more"
        available = f"{planned.available / GIB:.1f} GiB"
        lines.append(f"It does not fit: the step needs {needed} a chip of {available}.  Change:")
        return "\n".join(lines + [f"  {hint}" for hint in remedies(config, planned)])
    model = {**planned.model, "altogether": sum(planned.model.values())}
    lines += [
        f"{'model FLOPs, all chips':<28} {'TFLOP':>9}",
        *(f"  {name:<26} {value / 1e12:>9.1f}" for name, value in model.items() if value),
        *("", f"{'collectives of a device':<28} {'MiB sent':>9} {'times':>6} {'group':>6}"),
        *(
            f"  {c.kind:<26} {c.sent_bytes / 2**20:>9.1f} {c.count:>6} {c.group:>6}"
            for c in planned.collectives
        ),
        *("", f"{'a step takes at least':<28} {'ms':>9}"),
        *(f"  {what:<26} {seconds * 1e3:>9.1f}" for what, seconds in planned.bounds.items()),
    ]
    if planned.slices > 1:
        lines.append("  (no bound for what crosses slices: the network between them varies)")
    total = sum(planned.estimate.values())
    lines += [
        f"MFU at most {100 * planned.mfu_bound:.0f} %, if all else overlaps with the longest",
        *("", f"{'estimated time of a step':<28} {'ms':>9} {'share':>6}"),
        *(
            f"  {cause:<26} {seconds * 1e3:>9.1f} {100 * seconds / total:>4.0f} %"
            for cause, seconds in planned.estimate.items()
        ),
        *(f"  not estimated: {name}, of which the bytes alone" for name in planned.not_estimated),
    ]
    run, hours = run_hours(config, planned)
    rate = planned.batch_size / planned.step_seconds / planned.chips
    lines.append(
        f"by this estimate: MFU {100 * planned.mfu_estimate:.0f} %, {rate:,.0f} img/s a chip, "
        f"{hours:,.1f} hours for {run}"
    )
    return "\n".join(lines)


def run_hours(config: Any, planned: Plan) -> tuple[str, float]:
    """The run's length and its hours by the estimate, other stages by their share of its FLOPs.

    The examples of an epoch are the data set's: in their place, those of a billion examples.
    """
    total = "1e9 examples" if "epoch" in config.total else config.total
    run = cadence.make_clock(total, batch_size=planned.batch_size, examples_per_epoch=1)
    return total, run.total_steps * planned.step_seconds * planned.shortened / 3600


if __name__ == "__main__":
    cli.run(main)
