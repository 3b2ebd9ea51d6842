"""What a training config costs on a TPU slice, from a machine without one.

    python -m mofi_jax.plan --config configs/mofi.py:variant=H/14 --topology v5p:8x8x8

Compiles the real training step for the named slice (``--slices`` of them) and reads what the
compiler made of it: memory of a chip by kind, arithmetic, what goes over the links, and the bound
that these put on the speed.  Nothing runs, so the times are those of a chip that never waits.
``--entities`` and ``--vocab_size`` are the sizes of the data set's vocabulary and tokenizer.
``--largest=yes`` compiles for larger batches too, until one fits that is near the limit.  With
``--out`` the folder gets ``result.json``.  Exits with code 1 when the step does not fit.
"""

import contextlib
import dataclasses
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes, sharding
from mofi_jax.plan import costs, tpu_topology
from mofi_jax.telemetry import accelerators, flops
from mofi_jax.training import class_table, settings, setup, state

# Of the schedule alone, which no shape depends on.
EXAMPLES_PER_EPOCH = 10**9
GIB = 2**30
TRIES = 3  # compiles for the largest batch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one step.  Bytes are those of one chip.

    Attributes:
      topology, slices, devices, chips: what it was compiled for.
      batch_size: global.
      seconds: of compiling.
      memory: bytes by kind; "temporaries" are missing where the step does not fit.
      needed: bytes that the step takes altogether, None where the compiler did not say.
      available: bytes that programs may take, None where it is not known.
      fits: whether the compiler found room, and no more than the chip has.
      counts: arithmetic and traffic of one device, None where the step does not fit.
      xla_flops: the compiler's own count of one device, in which a loop's body counts once.
      model: FLOPs that the model asks for, on all chips together.
      bounds: seconds that a step takes at least, by what limits it.
      hbm_seconds: the time of all that its instructions name in HBM, which is more than they move.
      chip: None where its figures are not known.
    """

    topology: str
    slices: int
    devices: int
    chips: int
    batch_size: int
    seconds: float
    memory: dict[str, int]
    needed: int | None
    available: int | None
    fits: bool
    counts: costs.Costs | None
    xla_flops: float | None
    model: flops.StepFlops
    bounds: dict[str, float]
    hbm_seconds: float | None
    chip: accelerators.Chip | None

    @property
    def mfu_bound(self) -> float | None:
        """Model FLOPs over the peak in the longest of the bounds, which HBM is none of."""
        if not self.bounds or self.chip is None:
            return None
        return self.model.total / (self.chips * self.chip.bf16_flops * max(self.bounds.values()))

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mfu_bound": self.mfu_bound}


def main(
    config: Any,
    topology: str,
    slices: str = "1",
    entities: str = "2000000",
    vocab_size: str = "50272",
    largest: str = "no",
    out: str = "",
) -> None:
    """Plans, prints and writes."""
    settings.validate(config)
    folder = files.output_folder(out, "--out") if out else None
    if largest not in ("yes", "no"):
        raise BadInput(f"--largest={largest}: choose yes or no.")
    sizes = {
        "num_entities": whole_number("entities", entities),
        "vocab_size": whole_number("vocab_size", vocab_size),
    }
    count = whole_number("slices", slices)
    devices = tpu_topology.devices(topology, count)
    mesh = meshes.make_mesh(**config.mesh, devices=devices)
    setup.check_batch(config, mesh)
    found = plan(config, mesh, topology=topology, slices=count, **sizes)
    result = {"config": config.to_dict(), **sizes, **found.to_dict()}
    if largest == "yes":
        options = {"topology": topology, "slices": count, **sizes}
        result["largest_batch"] = largest_batch(config, mesh, found, options)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "result.json", result)
    print(describe(config, found))
    if largest == "yes":
        print(f"largest batch that fits: {result['largest_batch']:,}, compiled")
    if not found.fits:
        sys.exit(1)


def whole_number(flag: str, text: str) -> int:
    if not text.replace("_", "").isdigit() or not int(text):
        raise BadInput(f"--{flag}={text} is not a whole number above 0.")
    return int(text)


# ---------------------------------------------------------------------------- compiling


def plan(
    config: Any,
    mesh: Any,
    *,
    topology: str,
    slices: int,
    num_entities: int,
    vocab_size: int,
) -> Plan:
    """Compiles the step of `config` for `mesh`."""
    made = setup.make(
        config,
        mesh,
        vocab_size=vocab_size,
        eos_id=vocab_size - 1,
        num_entities=num_entities,
        examples_per_epoch=EXAMPLES_PER_EPOCH,
    )
    structs, shardings = state.abstract(made.init, mesh)
    batch = setup.batch_structs(config, mesh)
    chip = accelerators.chip_of(mesh.devices.flat[0])
    share = chip.devices if chip else 1
    memory = {kind: share * size for kind, size in state_bytes(structs, batch).items()}
    model = flops.of_step(made.context, made.losses, batch_size=config.batch_size)
    fixed = {
        "topology": topology,
        "slices": slices,
        "devices": mesh.size,
        "chips": mesh.size // share,
        "batch_size": config.batch_size,
        "model": model,
        "chip": chip,
    }
    start = time.monotonic()
    with progress(f"compiling a batch of {config.batch_size:,} for {mesh.size} devices"):
        lowered = made.make_train_step(shardings).lower(structs, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(str(error)):
                raise
            needed, available = (share * n if n else None for n in memory_in(str(error)))
            return Plan(
                **fixed,
                seconds=time.monotonic() - start,
                memory=memory,
                needed=needed,
                available=available,
                fits=False,
                counts=None,
                xla_flops=None,
                bounds={},
                hbm_seconds=None,
            )
    seconds = time.monotonic() - start
    analysis = compiled.memory_analysis()
    arguments = share * analysis.argument_size_in_bytes
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory |= {
        # What the state takes beyond its elements, in the tiles of the chip's memory.
        "padding of arrays": max(0, arguments - sum(memory.values())),
        "temporaries": share * (analysis.temp_size_in_bytes + max(0, new)),
        "program": share * analysis.generated_code_size_in_bytes,
    }
    counts = costs.costs(compiled.as_text(), devices=mesh.size)
    needed, available = sum(memory.values()), int(chip.hbm_bytes) if chip else None
    return Plan(
        **fixed,
        seconds=seconds,
        memory=memory,
        needed=needed,
        available=available,
        fits=fits(needed, available),
        counts=counts,
        xla_flops=compiled.cost_analysis().get("flops"),
        bounds=lower_bounds(counts, chip),
        hbm_seconds=hbm_seconds(counts, chip),
    )


def state_bytes(structs: state.TrainState, batch: dict[str, Any]) -> dict[str, int]:
    """Bytes on one device of all that a step is given, by kind."""
    kinds = dict.fromkeys(("parameters", "optimizer", "class table", "its moments", "batch"), 0)

    def add(kind: str, struct: jax.ShapeDtypeStruct) -> None:
        shape = struct.sharding.shard_shape(struct.shape)
        kinds[kind] += math.prod(shape) * struct.dtype.itemsize

    for path, leaf in jax.tree_util.tree_flatten_with_path(structs)[0]:
        moment = sharding.path_name(path).startswith("opt_state/")
        if class_table.is_table(path):
            add("its moments" if moment else "class table", leaf)
        else:
            add("optimizer" if moment else "parameters", leaf)
    for leaf in batch.values():
        add("batch", leaf)
    return kinds


def fits(needed: int, available: int | None) -> bool:
    """Whether a program that the compiler has made fits in a chip's memory.

    It has been seen to make programs of 35 GiB for a TPU v6e of 32.
    """
    return available is None or needed <= available


def hbm_seconds(counts: costs.Costs, chip: accelerators.Chip | None) -> float | None:
    """Seconds that one device's HBM takes for all that is counted, more than it moves."""
    return counts.hbm_bytes / (chip.hbm_bandwidth / chip.devices) if chip else None


def lower_bounds(counts: costs.Costs, chip: accelerators.Chip | None) -> dict[str, float]:
    """Seconds that one device needs at least for its arithmetic and for its links."""
    if chip is None:
        return {}
    bounds = {"arithmetic": counts.passes / chip.device_flops}
    if chip.link_bandwidth:
        # Half of what makers state goes out, the other half comes in.
        outgoing = chip.link_bandwidth / chip.devices / 2
        bounds["links"] = sum(c.sent_bytes for c in counts.collectives) / outgoing
    return bounds


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says on stderr what goes on and for how long: a live line, or one a minute in a log."""
    done = threading.Event()
    live = sys.stderr.isatty()

    def tell() -> None:
        start = time.monotonic()
        while not done.wait(1 if live else 60):
            seconds = time.monotonic() - start
            if live:
                print(f"\r{what}: {seconds:.0f} s", end="", file=sys.stderr, flush=True)
            else:
                logging.info("%s: %.0f s so far", what, seconds)

    logging.info("%s", what)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- out of memory


def out_of_memory(message: str) -> bool:
    """Whether a compiler's error is about HBM; its other memories are a matter of the program."""
    return "RESOURCE_EXHAUSTED" in message and bool(re.search(r"\bhbm\b", message, re.IGNORECASE))


def memory_in(message: str) -> tuple[int | None, int | None]:
    """Bytes that a program takes and may take on one device, from the compiler's error."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (
        rf"Used {size} of {size} hbm",
        rf"\({size}\) exceeds available HBM \({size}\)",
    )
    for pattern in patterns:
        if found := re.search(pattern, message, re.IGNORECASE):
            factors = {unit: 1024**power for power, unit in enumerate(("", "K", "M", "G", "T"))}
            first, second = (int(float(found[i]) * factors[found[i + 1].upper()]) for i in (1, 3))
            return first, second
    return None, None


def remedies(config: Any, found: Plan) -> list[str]:
    """What to change, in the order of what it costs; only what the config does not do already."""
    hints = []
    shards = found.devices // config.mesh.get("tensor", 1)
    parts = config.microbatches
    if config.model.remat != "full":
        hints.append("--config.model.remat=full computes activations again: a third more FLOPs")
    more = _further_parts(found, config.batch_size // (shards * parts))
    if more > 1:
        hints.append(
            f"--config.microbatches={parts * more} keeps the activations of a part at a time"
            + (", for one more forward pass" if parts == 1 else "")
        )
    if config.mesh.replica > found.slices:
        hints.append(
            f"--config.mesh.replica={found.slices} splits parameters and moments over more devices"
        )
    if config.optimizer.first_moment_dtype == "float32":
        hints.append("--config.optimizer.first_moment_dtype=bfloat16 halves the first moments")
    table = found.memory["class table"] + found.memory["its moments"]
    if table > 0.2 * sum(found.memory.values()):
        if config.optimizer.table.second_moment == "full":
            hints.append(
                "--config.optimizer.table.second_moment=row keeps one value for each entity"
            )
        if config.losses.entity.sample_rate == 1:
            hints.append(
                "--config.losses.entity.sample_rate=0.1 has a gradient for a tenth of the table"
            )
    if "entity" in config.losses and config.losses.entity.block_size:
        hints.append("--config.losses.entity.block_size=0 chooses tiles that fit")
    if config.batch_size // 2 % (shards * parts) == 0:
        hints.append(f"--config.batch_size={config.batch_size // 2} halves the batch")
    hints.append("a slice with more chips")
    return hints


def _further_parts(found: Plan, rows: int) -> int:
    """In how many parts, a power of two, to cut `rows` of a device so that they may fit."""
    wanted, parts = 2.0, 1
    if found.needed and found.available:
        wanted = max(wanted, found.needed / found.available)
    while parts < wanted and rows % (2 * parts) == 0:
        parts *= 2
    return parts


# ---------------------------------------------------------------------------- the largest batch


def likely_batch(config: Any, found: Plan) -> int | None:
    """A batch that fits as far as one compile tells.

    All temporaries count as if they grew with the batch, so that it is rather too small.
    """
    if not found.fits or found.available is None:
        return None
    grows = found.memory["temporaries"] + found.memory["batch"]
    return _rounded(config, found, config.batch_size * _room(found, grows) / grows)


def largest_batch(config: Any, mesh: Any, found: Plan, options: dict[str, Any]) -> int:
    """The largest batch that a compile has shown to fit, next to the limit of a straight line.

    Args:
      found: the plan of `config` itself.
      options: of `plan`.
    """
    fitting, failing = (found if found.fits else None), (None if found.fits else found)
    previous = None
    for _ in range(TRIES):
        if fitting is None:
            guess = _rounded(config, found, failing.batch_size / 2)
        else:
            grows = fitting.memory["temporaries"] + fitting.memory["batch"]
            a_row = grows / fitting.batch_size
            if previous is not None:
                a_row = (fitting.needed - previous.needed) / (
                    fitting.batch_size - previous.batch_size
                )
            guess = fitting.batch_size + _room(fitting, 0) / max(a_row, 1)
            if failing is not None:
                guess = min(guess, (fitting.batch_size + failing.batch_size) / 2)
            guess = _rounded(config, found, guess)
            if guess <= fitting.batch_size:
                break
        if not guess:
            break
        other = config.copy_and_resolve_references()
        other.batch_size = guess
        tried = plan(other, mesh, **options)
        if tried.fits:
            previous, fitting = fitting, tried
        else:
            failing = tried
    if fitting is None:
        raise BadInput(f"no batch down to {guess} fits on {found.topology}: take a larger slice.")
    return fitting.batch_size


def _room(found: Plan, grows: int) -> float:
    """Bytes left, with those of what grows; the compiler keeps a fiftieth for itself."""
    return 0.98 * found.available - found.needed + grows


def _rounded(config: Any, found: Plan, batch: float) -> int:
    """Down to a multiple of what divides over the mesh; to a tenth at most, for numbers to say."""
    piece = found.devices // config.mesh.get("tensor", 1) * config.microbatches
    coarse = piece
    while coarse * 20 < batch:
        coarse *= 2
    return int(batch // coarse * coarse)


# ---------------------------------------------------------------------------- words


def describe(config: Any, found: Plan) -> str:
    """The plan as a page of text."""
    where = f"{found.slices} x {found.topology}" if found.slices > 1 else found.topology
    lines = [
        f"batch {found.batch_size:,} on {where}: {found.chips} chips, {found.devices} devices, "
        f"compiled in {found.seconds:.0f} s",
        "",
        f"{'memory of a chip':<28} {'GiB':>9}",
    ]
    lines += [f"  {kind:<26} {size / GIB:>9.3f}" for kind, size in found.memory.items() if size]
    if found.needed is not None:
        of = f"of {found.available / GIB:.2f}" if found.available else ""
        lines.append(f"  {'altogether':<26} {found.needed / GIB:>9.3f}  {of}")
    if not found.fits:
        needed = f"{found.needed / GIB:.1f} GiB" if found.needed else "more"
        there = f"{found.available / GIB:.1f} GiB" if found.available else "what there is"
        lines += ["", f"It does not fit: the step needs {needed} a chip of {there}.  Change:"]
        lines += [f"  {hint}" for hint in remedies(config, found)]
        return "\n".join(lines)
    share = found.devices / found.chips
    executed = found.counts.flops * share
    lines += ["", f"{'arithmetic of a step':<28} {'TFLOP':>9}"]
    parts = dataclasses.asdict(found.model)
    lines += [
        f"  {f'model: {name}':<26} {value / 1e12:>9.1f}  all chips"
        for name, value in parts.items()
        if value
    ]
    lines += [
        f"  {'model, altogether':<26} {found.model.total / 1e12:>9.1f}",
        f"  {'executed':<26} {executed * found.chips / 1e12:>9.1f}  with what is computed again",
        f"  {'executed by a chip':<26} {executed / 1e12:>9.3f}",
    ]
    if found.xla_flops:
        lines.append(
            f"  {'the same, loops once':<26} {found.counts.flops_once * share / 1e12:>9.3f}  "
            f"XLA counts {found.xla_flops * share / 1e12:.3f}"
        )
    lines += ["", f"{'collectives of a device':<28} {'MiB sent':>9} {'times':>6} {'group':>6}"]
    lines += [
        f"  {c.kind:<26} {c.sent_bytes / 2**20:>9.1f} {c.count:>6} {c.group:>6}"
        for c in found.counts.collectives
    ]
    if found.counts.unknown_loops:
        lines.append(f"  ({found.counts.unknown_loops} loops of unknown length count once)")
    if found.bounds:
        lines += ["", f"{'a step takes at least':<28} {'ms':>9}"]
        lines += [f"  {what:<26} {value * 1e3:>9.1f}" for what, value in found.bounds.items()]
        lines.append(f"  {'HBM, if all counted moves':<26} {found.hbm_seconds * 1e3:>9.1f}")
        if found.slices > 1:
            lines.append("  (no bound for what crosses slices: the network between them varies)")
        longest = max(found.bounds.values())
        lines.append(
            f"MFU at most {100 * found.mfu_bound:.0f} %, {found.batch_size / longest:,.0f} img/s, "
            "if all else hides behind the longest"
        )
    likely = likely_batch(config, found)
    if likely:
        lines.append(f"a batch of {likely:,} should fit; --largest=yes compiles to find out")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
