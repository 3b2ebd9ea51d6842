"""Checks whether a training can run here, before a pod is spent on finding out.

    mofi doctor --config mofi:variant=B/16 --config.data.dir=DATA --workdir W
    mofi doctor --config quickstart --workdir W --json

Takes the flags of `mofi_jax.train` and is started like it: on every host of a pod at once.  Prints
a line for each check (ok, warning or problem, with the remedy), with ``--json`` an object {"check",
"level", "text"} each.  Nothing stays written.  How long the run takes is measured on a few steps of
a piece of the model.  Exit codes: 0 no problem, 1 at least one, 2 bad flags.
"""

import copy
import importlib.metadata
import json as json_lib
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh

from mofi_jax.common import cli, console, files
from mofi_jax.data import limits, pipeline, records, training_set
from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.doctor import machine, pace
from mofi_jax.doctor.machine import Report
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.training import checkpoint, optim, run_folder, settings, setup, state

GIB, DAY = 2**30, 86_400
# Days from which on a run is no use on a machine, and from which on one should know.
TOO_LONG = ((365, "problem"), (30, "warning"))
REQUIREMENTS = pathlib.Path(__file__).parents[2] / "requirements.txt"


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
      workdir: folder of the training to come.
      coordinator, processes, process: as `mofi train` takes them.
      json: a line of JSON for each check.
    """
    # The devices belong to the process that looks at them; this one needs shapes alone.
    jax.config.update("jax_platforms", "cpu")
    report = examine(config, workdir, coordinator=coordinator, processes=processes, process=process)
    problems = sum(level == "problem" for _, level, _ in report.checks)
    for name, level, text in report.checks:
        line = json_lib.dumps({"check": name, "level": level, "text": text})
        print(line if json else f"{level:8s} {name:12s} {text}")
    if not json:
        print(f"{problems or 'no'} problem{'s' if problems > 1 else ''}")
    return 1 if problems else 0


def examine(config: Any, workdir: str, **joined: str) -> Report:
    """All checks of this host; ``joined``: coordinator, processes and process."""
    report = Report()
    wanted = (
        REQUIREMENTS.read_text().splitlines()
        if REQUIREMENTS.exists()  # a checkout
        else importlib.metadata.requires("mofi_jax")
    )
    machine.versions(report, wanted or [])
    machine.holders(report)
    found = machine.devices(
        report,
        distributed=bool(config.distributed or any(joined.values())),
        **{"coordinator": "", "processes": "", "process": "", **joined},
        timeout=config.start_timeout,
        mesh=config.mesh.to_dict(),
    )
    if found is None or found["platform"] == "cpu":
        machine.unseen(report)
    place: pathlib.Path | epath.Path | None = None
    with report.about("workdir"):
        place = files.output_folder(workdir, "--workdir", bucket=True)
        if not files.is_remote(place):  # in a bucket it has just tried an object
            place = machine.folder(report, pathlib.Path(place))
    readers = {"images": picture_sets.read_set, "classes": picture_sets.read_classes}
    for name, options in config.evaluators.items():
        for key, read in readers.items():
            if options.get(key):  # which would be read hours into the run
                with report.about("evaluators", f"config.evaluators.{name}.{key}: "):
                    read(options[key])
    with report.about("config"):
        settings.validate(config)
        with report.about("data"):
            data = check_data(report, config, found["processes"] if found else 1)
            with report.about("model"):
                check_run(report, config, epath.Path(workdir), data, found, place)
    return report


def check_data(report: Report, config: Any, hosts: int) -> training_set.TrainingSet:
    """Opens the training data as a training does, and looks at the first record."""
    data = training_set.open_training_set(config)
    count = sum(len(part.source) for part in data.parts)
    report.add("data", "ok", f"{count:,} examples, {data.primary.directory}")
    with report.about("shards"):
        pipeline.check_shards(data.parts, hosts)
    with report.about("shared memory"):
        local, workers = -(-config.batch_size // hosts), config.data.workers
        held = pipeline.buffers(local, config.data.threads, workers).shared
        sizes = [stage.get("image_size", 0) for stage in config.stages]
        largest = max(config.model.image_size, *sizes, 0)
        limits.require_shared_memory(held * largest**2 * 3, workers)
    with report.about("first record"):
        first = data.primary[0]
        training_set.check_operations(config, first["image"])
        if data.entities is not None:
            records.validate_entity_ids(first["entity_ids"], len(data.entities), first["key"])
        report.add("first record", "ok", f"{first['key']!r} decodes to the model's size")
    return data


def check_run(
    report: Report,
    config: Any,
    workdir: epath.Path,
    data: training_set.TrainingSet,
    found: dict[str, Any] | None,
    place: pathlib.Path | epath.Path | None,
) -> None:
    """The training state against devices and disk, and the folder against the config.

    Args:
      found: by `machine.devices`; None: the rest is checked as on a single device.
      place: where the workdir is or will be, None if it cannot be written.
    """
    sizes = found["mesh"] if found else dict.fromkeys(meshes.ALL_AXES, 1)
    # Shapes need the mesh's sizes; its devices are left alone.
    stand_ins = np.full(tuple(sizes.values()), jax.devices("cpu")[0])
    mesh = Mesh(stand_ins, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with report.about("batch"):
        setup.check_batch(config, mesh)
    own = copy.deepcopy(config)
    if found:  # the stand-ins are CPUs, whose dtype may be another
        own.model.dtype = setup.dtype_on(config.model.dtype, found["platform"])
    train_setup = setup.make(own, mesh, **data.sizes)
    model, clock = train_setup.context.model, train_setup.clock
    structs, _ = state.abstract(train_setup.init, mesh)
    optim.check_frozen(structs.params, config.optimizer.frozen)
    leaves, parameters = jax.tree.leaves(structs), jax.tree.leaves(structs.params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    millions = sum(leaf.size for leaf in parameters) / 1e6
    report.add("model", "ok", f"{millions:,.1f} M parameters, {clock.total_steps:,} steps")
    for sentence in settings.warnings(config, clock, eos_id=model.eos_id):
        report.add("config", "warning", sentence)
    slices, memory = (found["slices"], found["memory"]) if found else (1, None)
    lies, much = sharding.layout(mesh, structs, slices=slices, memory=memory)
    report.add("sharding", "warning" if much else "ok", lies)
    if found:
        check_memory(report, config, train_setup, leaves + parameters, found)
        check_time(report, config, train_setup, data, found)
    if place is None:
        return
    with report.about("workdir"):
        classified = "entity" in config.losses
        description = run_folder.describe_model(model, config.data.eval_ops, classified)
        fingerprint = run_folder.data_fingerprint(config, data.parts, data.texts)
        start = checkpoint.Position(0, fingerprint, {}, run_folder.as_json(config))
        run = run_folder.check(workdir, description, structs, start, config.checkpoint.verify)
        for _, wrong in run.damaged:
            report.add("workdir", "warning", f"a checkpoint is damaged ({wrong})")
        if run.step is not None:
            report.add("workdir", "ok", f"resumes from step {run.step}")
    if files.is_remote(place):  # which has room
        return
    every = train_setup.keep_every
    # One more than are kept: the next is complete before the oldest is deleted.
    count = config.checkpoint.keep + 1 + (clock.total_steps // every if every else 0)
    saved = pathlib.Path(workdir, checkpoint.FOLDER).rglob("*")
    there = sum(file.stat().st_size for file in saved if file.is_file())
    free = shutil.disk_usage(place).free + there
    level = "problem" if count * total > free else "warning" if count * total > 0.8 * free else "ok"
    text = f"{count} checkpoints of {total / GIB:.2f} GiB, {free / GIB:.1f} GiB free or replaceable"
    remedy = "" if level == "ok" else ": make room, or lower config.checkpoint.keep."
    report.add("disk", level, text + remedy)


def check_memory(
    report: Report, config: Any, made: setup.TrainSetup, leaves: list[Any], found: dict[str, Any]
) -> None:
    """The least that a step needs, of a device's memory or of the host's where it is the device.

    Args:
      leaves: of the state, and those of the parameters again for their gradients.
    """
    device = "device memory" if found["memory"] else "memory"
    available = found["memory"] or pace.host_memory() // found["local"]
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    rows = config.batch_size // global_batch.batch_shards(made.context.mesh)
    batch = pace.batch_bytes(
        made.context.model,
        rows,
        texts="contrastive" in config.losses,
        microbatches=config.microbatches,
    )
    text = (
        f"at least {(held + batch) / GIB:.2f} GiB of {available / GIB:.1f} GiB on each device: "
        f"{held / GIB:.2f} of state and gradients, {batch / GIB:.2f} of a batch of {rows:,}"
    )
    fits = held + batch <= available
    few = "--config.batch_size or more --config.microbatches"
    remedy = "" if fits else f": take a smaller {few}, a smaller model, or more devices."
    report.add(device, "ok" if fits else "problem", text + remedy)


def check_time(
    report: Report,
    config: Any,
    made: setup.TrainSetup,
    data: training_set.TrainingSet,
    found: dict[str, Any],
) -> None:
    """How long the steps of the run take on these devices."""
    problems = {name for name, level, _ in report.checks if level == "problem"}
    if problems - {"memory", "device memory"}:
        return  # which may well be why a probe would fail
    console.now("timing steps of a piece of the model", silence=console.WORKING)
    rate, how = pace.rate(run_folder.as_json(config), data.sizes, found)
    console.close()
    if not rate:
        report.add("time", "warning", f"how long the run takes is not known: {how}.")
        return
    seconds = pace.run_seconds(made, rate)
    level = next((level for limit, level in TOO_LONG if seconds > limit * DAY), "ok")
    remedy = ": use more devices, a smaller model, or a smaller --config.total."
    pictures = made.clock.total_steps * config.batch_size / seconds
    text = (
        f"about {console.duration(seconds)} for {made.clock.total_steps:,} steps "
        f"({pictures:,.1f} img/s), without evaluations and saves; {how}"
    )
    report.add("time", level, text + (remedy if level == "problem" else ""))


if __name__ == "__main__":
    cli.run(main)
