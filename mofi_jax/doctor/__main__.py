"""Looks whether a training can run here, before a pod is spent on finding out.

    python -m mofi_jax.doctor --config configs/mofi.py:... --workdir W [--coordinator ...]

Takes the flags of `mofi_jax.train` and is started like it: on every host of a pod at once.  Prints
a line for each check (ok, warning or problem, with the remedy), with ``--json`` an object {"check",
"level", "text"} each.  Nothing stays written and no array is made.  Exit codes: 0 no problem, 1 at
least one, 2 bad flags.
"""

import json as json_lib
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh

from mofi_jax.common import cli, files
from mofi_jax.data import limits, pipeline, records, training_set
from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.doctor import machine
from mofi_jax.doctor.machine import GIB, Report
from mofi_jax.evaluators import picture_sets
from mofi_jax.training import checkpoint, optim, run_folder, settings, setup, state

REQUIREMENTS = pathlib.Path(__file__).parents[2] / "requirements.txt"
# Resident memory without entities and batches: a process that decodes was measured at 246 MiB; the
# training itself has its programs besides, and the quick start's comes to 1.6 GB.
WORKER_BYTES, MAIN_BYTES = 0.25 * GIB, 2.0 * GIB
# Bytes of a short string's Python object beside its characters, and of its place in a list.
STRING_BYTES = 49 + 8


def main(
    config: Any,
    workdir: str,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
    json: bool = False,
) -> int:
    """Prints the report; returns the exit code.

    Args:
      config, workdir, coordinator, processes, process: as for `train.main`.
      json: machine-readable lines instead of the table.
    """
    # The devices belong to the process that looks at them; this one needs shapes alone.
    jax.config.update("jax_platforms", "cpu")
    report = examine(config, workdir, coordinator=coordinator, processes=processes, process=process)
    for check in report.checks:
        if json:
            line = {"check": check.name, "level": check.level, "text": check.text}
            print(json_lib.dumps(line))
        else:
            print(f"{check.level:8s} {check.name:12s} {check.text}")
    if not json:
        count = len(report.problems)
        print(f"{count} problem{'' if count == 1 else 's'}" if count else "no problem")
    return 1 if report.problems else 0


def examine(
    config: Any, workdir: str, *, coordinator: str = "", processes: str = "", process: str = ""
) -> Report:
    """All checks of this host; see `main` for the arguments."""
    report = Report()
    machine.versions(report, requirement_lines())
    valid = False
    with report.about("config"):
        settings.validate(config)
        report.ok("config", "its values can work")
        valid = True

    machine.leftovers(report)
    machine.gpu_memory_in_use(report)
    found = machine.look(
        report,
        distributed=bool(config.distributed or coordinator or processes or process),
        coordinator=coordinator,
        processes=processes,
        process=process,
        timeout=config.start_timeout,
        mesh=config.mesh.to_dict(),
    )
    platform = found["platform"] if found else None
    machine.gpus(report, platform)
    machine.tpus(report, platform)
    # Without devices the rest is looked at as on a single one.
    hosts = found["processes"] if found else 1
    sizes = found["mesh"] if found else dict.fromkeys(meshes.ALL_AXES, 1)
    # Shapes need the mesh's sizes; its devices are left alone.
    stand_ins = np.full(tuple(sizes.values()), jax.devices("cpu")[0])
    mesh = Mesh(stand_ins, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    place = None
    with report.about("workdir"):
        files.output_folder(workdir, "--workdir")
        place = machine.folder(report, "workdir", pathlib.Path(workdir))
    check_evaluators(report, config)
    if not valid:  # nothing can be computed from values that cannot work
        return report
    if found:
        with report.about("batch"):
            setup.check_batch(config, mesh)
            shards = global_batch.batch_shards(mesh)
            report.ok("batch", f"{config.batch_size} = {shards} x {config.batch_size // shards}")
    with report.about("data"):
        data = check_data(report, config, hosts)
        with report.about("model"):
            check_run(report, config, epath.Path(workdir), data, mesh, found, place)
    return report


def requirement_lines() -> list[str]:
    """The core's requirements, of the checkout or of the installed package."""
    if REQUIREMENTS.exists():
        return REQUIREMENTS.read_text().splitlines()
    import importlib.metadata

    return importlib.metadata.requires("mofi_jax") or []


def check_data(report: Report, config: Any, hosts: int) -> training_set.TrainingSet:
    """Opens the training data as a training does, and looks at the first record.

    Raises:
      BadInput: they cannot be read; the sentence names the file.
    """
    data = training_set.open_training_set(config)
    shards = sum(len(part.source.files) for part in data.parts)
    count = sum(len(part.source) for part in data.parts)
    report.ok("data", f"{count:,} examples in {shards} shards, {data.primary.directory}")
    # Every process that decodes opens every shard.
    machine.descriptors(report, shards)
    report.ok("tokenizer", f"{data.texts.vocab_size:,} tokens")
    if data.entities is not None:
        report.ok("entities", f"{len(data.entities):,}")
    with report.about("shards"):
        pipeline.check_shards(data.parts, hosts)
    if workers := config.data.workers:
        with report.about("shared memory"):
            local = -(-config.batch_size // hosts)
            held = pipeline.buffers(local, config.data.threads, workers)
            needed = held.shared * config.model.image_size**2 * 3
            limits.require_shared_memory(needed, workers)
            report.ok("shared memory", f"{needed / 2**20:.0f} MiB for {workers} workers")
    with report.about("first record"):
        first = data.primary[0]
        training_set.check_operations(config, first["image"])
        if data.entities is not None:
            records.validate_entity_ids(first["entity_ids"], len(data.entities), first["key"])
        report.ok("first record", f"{first['key']!r} decodes to the model's size")
    return data


def check_run(
    report: Report,
    config: Any,
    workdir: epath.Path,
    data: training_set.TrainingSet,
    mesh: Mesh,
    found: dict[str, Any] | None,
    place: pathlib.Path | None,
) -> None:
    """The training state against devices, disk and memory, and the folder against the config.

    Args:
      found: what `machine.look` has found.
      place: where the folder is or will be, None if it cannot be written.
    """
    program = setup.make(config, mesh, **data.sizes)
    structs, _ = state.abstract(program.init, mesh)
    optim.check_frozen(structs.params, config.optimizer.frozen)
    total = tree_bytes(structs)
    report.ok(
        "model",
        f"{sum(leaf.size for leaf in jax.tree.leaves(structs.params)) / 1e6:,.1f} M parameters, "
        f"{total / GIB:.2f} GiB of training state, {program.clock.total_steps:,} steps",
    )
    for sentence in settings.warnings(config, program.clock, eos_id=program.model.eos_id):
        report.warning("config", sentence)
    with report.about("sharding"):
        sharding.check_replication(mesh, structs, config.max_replicated)
    if found and found["memory"]:
        check_device_memory(report, structs, found["memory"])

    if place:
        with report.about("workdir"):
            check_folder(report, config, workdir, data, program, structs)
        check_space(report, config, workdir, program, total, place)
    hosts, on_cpu = (found["processes"], found["platform"] == "cpu") if found else (1, False)
    needed, what = host_memory(config, data, total, hosts, on_cpu)
    machine.memory(report, needed, what)


def check_folder(
    report: Report,
    config: Any,
    workdir: epath.Path,
    data: training_set.TrainingSet,
    program: setup.TrainSetup,
    structs: state.TrainState,
) -> None:
    """Whether a run that is there already can go on with this config and these data."""
    description = run_folder.describe_model(
        program.model, config.data.eval_ops, classified="entity" in config.losses
    )
    fingerprint = run_folder.data_fingerprint(config, data.parts, data.texts)
    start = checkpoint.Position(0, fingerprint, {}, run_folder.as_json(config))
    found = run_folder.check(workdir, description, structs, start, verify=config.checkpoint.verify)
    for _, wrong in found.damaged:
        report.warning("workdir", f"a checkpoint is damaged ({wrong})")
    if found.step is not None:
        report.ok("workdir", f"goes on from step {found.step}")


def check_space(
    report: Report,
    config: Any,
    workdir: epath.Path,
    program: setup.TrainSetup,
    state_bytes: int,
    place: pathlib.Path,
) -> None:
    """The disk under ``place`` against the checkpoints that will lie there at once."""
    every = program.clock.steps(config.checkpoint.keep_every, key="config.checkpoint.keep_every")
    # One more than are kept: the next is whole before the oldest goes.
    count = config.checkpoint.keep + 1 + (program.clock.total_steps // every if every else 0)
    folder = pathlib.Path(workdir, checkpoint.FOLDER)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    what = f"{count} checkpoints of {state_bytes / GIB:.2f} GiB"
    machine.space(report, place, count * state_bytes, there, what)


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_device_memory(report: Report, structs: state.TrainState, limit: int) -> None:
    """The state alone against a device's memory; activations come on top (`mofi_jax.plan`)."""

    def per_device(tree: Any) -> int:
        return sum(
            jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size
            * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    own, gradients = per_device(structs), per_device(structs.params)
    text = (
        f"{own / GIB:.2f} GiB of state and {gradients / GIB:.2f} GiB of gradients on each device "
        f"of {limit / GIB:.1f} GiB"
    )
    if own + gradients > limit:
        report.problem("device memory", f"{text}: use more devices, or a smaller model.")
    else:
        report.ok("device memory", f"{text}; mofi_jax.plan tells the rest")


def host_memory(
    config: Any, data: training_set.TrainingSet, state_bytes: int, hosts: int, on_cpu: bool
) -> tuple[float, str]:
    """Bytes that the processes of one host will need, and of what the number is made."""
    workers = config.data.workers
    batch = -(-config.batch_size // hosts)
    example = config.model.image_size**2 * 3 + len(data.primary[0]["image"])
    # One batch more is on its way to the devices.
    held = pipeline.buffers(batch, config.data.threads, workers)
    batches = (held.total + batch) * example
    words = 0
    if data.entities is not None:
        columns = (data.entities.qids, data.entities.names, data.entities.descriptions)
        words = sum(sum(map(len, c)) + len(c) * STRING_BYTES for c in columns)
    # A checkpoint is copied to the host before it is written; on a CPU the state lives there too.
    saved = state_bytes * (3 if on_cpu else 1) / hosts
    total = MAIN_BYTES + workers * WORKER_BYTES + (1 + workers) * words + batches + saved
    parts = f"{workers} workers, {batches / GIB:.1f} of batches, {saved / GIB:.1f} of state"
    return total, parts + f", {(1 + workers) * words / GIB:.1f} of entities"


def check_evaluators(report: Report, config: Any) -> None:
    """The files that evaluators in the loop will ask for, hours into the run."""
    readers = {"images": picture_sets.read_set, "classes": picture_sets.read_classes}
    for name, options in config.evaluators.items():
        for key, read in readers.items():
            if options.get(key):
                with report.about("evaluators", f"config.evaluators.{name}.{key}: "):
                    read(options[key])


if __name__ == "__main__":
    cli.run(main)
