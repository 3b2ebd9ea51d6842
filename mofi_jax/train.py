"""Trains MOFI: supervised, contrastive or both at once.

    mofi train --config mofi:task=multitask,variant=B/16 --workdir W
    mofi train --config quickstart:task=supervised --config.optimizer.learning_rate=3e-4 --workdir W

Reads from top to bottom: devices, data, model, evaluators, checkpoint, logging, input, loop.  The
same command with the same ``--workdir`` resumes; a run killed at any moment ends in the parameters
of an uninterrupted one, bit for bit.  For what the folder W holds, see `training.run_folder`.
"""

from mofi_jax.common import console
from mofi_jax.distributed import preemption

if __name__ == "__main__":
    # A machine may be taken away during the imports that follow, which take seconds.
    preemption.exit_on_sigterm()
    console.begin("training: loading jax and the libraries for data")

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from mofi_jax import inference, telemetry
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, pipeline, prefetch, training_set
from mofi_jax.distributed import global_batch, hosts, meshes, sharding
from mofi_jax.evaluators import suite as evaluation
from mofi_jax.evaluators.features import embedding
from mofi_jax.inference import warm_start
from mofi_jax.telemetry import accelerators, flops
from mofi_jax.training import (
    cadence,
    checkpoint,
    optim,
    run_folder,
    run_lock,
    settings,
    setup,
    state,
)
from mofi_jax.training import step as step_lib


def main(
    config: Any,
    workdir: str,
    profile: str = "",
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> None:
    """Trains; a save that is under way is finished even if an exception cuts the run.

    Args:
      workdir: folder of the run, one that all hosts share; the same command with it resumes.
      profile: N:M traces the updates from step N to step M into the workdir.
      coordinator, processes, process: HOST:PORT of process 0, how many there are, and which one
        this is, counted from 0; left out where jax finds them by itself.

    Raises:
      BadInput: what cannot work, in one sentence, before anything is written where possible.
      Preempted: raised after a preemption checkpoint.
    """
    settings.validate(config)
    telemetry.require_wandb(config.telemetry.wandb)
    workdir = files.output_folder(workdir, "--workdir", bucket=True)
    console.now("opening the devices")
    hosts.start(config.distributed, coordinator, processes, process, config.start_timeout)
    with run_folder.storage_errors(workdir), contextlib.ExitStack() as cleanup:
        train(config, workdir, profile, cleanup)


def train(config: Any, workdir: epath.Path, profile: str, cleanup: contextlib.ExitStack) -> None:
    # As a program, the process and its imports are this run's; elsewhere it begins here.
    goodput = telemetry.Goodput(telemetry.process_start() if __name__ == "__main__" else None)
    cleanup.callback(goodput.close)
    cleanup.callback(console.close)
    guard = cleanup.enter_context(preemption.guard_preemption())

    # ---------------------------------------------------------------------- hosts and devices
    mesh = meshes.make_mesh(**config.mesh)
    setup.check_batch(config, mesh)
    watchdog = telemetry.Watchdog(config.telemetry.hang_minutes)
    cleanup.callback(watchdog.close)
    logging.info("devices: %s", meshes.in_words(mesh))

    # ---------------------------------------------------------------------- data
    console.now("opening the data")
    data = hosts.all_or_none(lambda: open_data(config))
    builder = pipeline.ExampleBuilder(
        image_ops=ops.expand(config.data.train_ops, config.model.image_size),
        text_sources=config.data.text_sources.to_dict(),
        tokenizer_path=str(data.texts.path),
        context_length=config.model.context_length,
        entities=data.entities,
        max_labels=config.data.max_labels,
    )
    fingerprint = run_folder.agreed_fingerprint(config, data.parts, data.texts)
    logging.info("data: %s", data.in_words())

    # ---------------------------------------------------------------------- model
    console.now("shaping the model")
    train_setup = setup.make(config, mesh, **data.sizes)
    structs, shardings = state.abstract(train_setup.init, mesh)
    optim.check_frozen(structs.params, config.optimizer.frozen)
    slices = meshes.count_slices(mesh.devices.flat)
    memory = accelerators.memory_of(jax.local_devices()[0])
    lies, much = sharding.layout(mesh, structs, slices=slices, memory=memory)
    context, clock = train_setup.context, train_setup.clock
    model, num_entities = context.model, context.num_entities
    parameters = telemetry.parts_of(structs.params, {sharding.ENTITY_TABLE: "class table"})
    logging.info("model: %s; %s", model.in_words(), parameters)
    logging.log(logging.WARNING if much else logging.INFO, "memory: %s", lies)
    logging.info("run: %s", train_setup.in_words())
    for stage in train_setup.stages if config.stages else ():
        logging.info("stage of %s", stage)
    for sentence in settings.warnings(config, clock, eos_id=model.eos_id):
        logging.warning("%s", sentence)
    profiler = telemetry.Profile(profile, workdir, total_steps=clock.total_steps)
    cleanup.callback(profiler.close)

    # ---------------------------------------------------------------------- evaluators
    console.now("opening the evaluation sets")
    towers = inference.Towers(
        config=model,
        tokenizer=data.texts if "contrastive" in config.losses else None,
        entities=data.entities if num_entities else None,
        preprocess=config.data.eval_ops,
        mesh=mesh,
        batch_size=embedding.BATCH_SIZE * mesh.size,
    )
    evaluators = config.evaluators.to_dict()
    eval_every = {
        name: clock.steps(options.pop("every", "10 percent"), key=f"config.evaluators.{name}.every")
        for name, options in evaluators.items()
    }
    selected = {name: evaluators[name] for name in evaluators if eval_every[name]}
    suite = hosts.all_or_none(lambda: evaluation.build_all(towers, selected))
    for name in sorted(evaluators.keys() - suite.evaluators.keys()):
        reason = suite.skipped.get(name, "its `every` is 0")
        logging.info("config.evaluators.%s is left out: %s", name, reason)
    running = {name: eval_every[name] for name in suite.evaluators}
    logging.info("evaluators: %s", telemetry.periods_in_words(running) or "none")
    keep_best = config.checkpoint.keep_best
    if keep_best and keep_best.partition("/")[0] not in suite.evaluators:
        raise BadInput(
            f"config.checkpoint.keep_best={keep_best} names no evaluator that runs: write "
            f"EVALUATOR/METRIC, of {', '.join(suite.evaluators) or 'config.evaluators'}."
        )

    # ---------------------------------------------------------------------- checkpoint
    console.now("looking at the workdir")
    description = run_folder.describe_model(model, config.data.eval_ops, num_entities > 0)
    start = checkpoint.Position(0, fingerprint, {}, run_folder.as_json(config))
    verify = config.checkpoint.verify
    cleanup.enter_context(run_lock.held(workdir))
    existing = run_folder.check(workdir, description, structs, start, verify=verify)
    position, resumed, first = existing.position, existing.step is not None, existing.step or 0
    if first > clock.total_steps:
        raise BadInput(
            f"{workdir} is at step {first}, beyond config.total={config.total!r} "
            f"({clock.total_steps} steps): raise the total, or choose another --workdir."
        )
    if first >= clock.total_steps and existing.finished:
        logging.info("%s is finished: %d steps", workdir, first)
        return
    warm = None
    if config.init.model and not resumed:
        folder, parts = config.init.model, tuple(config.init.parts)
        warm = warm_start.read(folder, parts, structs.params, data.entities, data.texts)
    if config.compile_cache:
        hosts.keep_programs(workdir / config.compile_cache)
    entities_path = data.entities_path if num_entities else None
    run_folder.prepare(workdir, existing, config, description, data.texts.path, entities_path)
    checkpointer = checkpoint.Checkpointer(
        workdir, keep=config.checkpoint.keep, keep_every=train_setup.keep_every, verify=verify
    )
    cleanup.callback(checkpointer.close)
    console.now("reading the checkpoint" if resumed else "making the first state")
    if resumed:
        train_state = checkpoint.restore(workdir, first, structs)
        logging.info("resumed at step %d, %d examples", first, position.examples)
    else:
        train_state, _ = state.create(train_setup.init, config.seed, mesh)
        train_state = warm_start.apply(train_state, warm) if warm else train_state

    # ---------------------------------------------------------------------- logging
    goodput.resume(workdir, position.seconds)
    batch_size, examples = config.batch_size, position.examples

    def keys_of(step: int) -> list[str]:
        before = position.examples + (step - 1 - first) * batch_size
        return pipeline.batch_keys(data.parts, config.seed, before, batch_size, config.data.block)

    metrics = telemetry.Metrics(
        workdir,
        resume_step=first if resumed else -1,
        keys=keys_of,
        wandb=telemetry.open_wandb(config.telemetry.wandb, workdir, config),
    )
    cleanup.callback(metrics.abandon)
    chip = accelerators.chip_of(jax.devices()[0])
    peak_flops = chip.device_flops * mesh.size if chip else None
    contrasted = batch_size if "contrastive" in config.losses else 0
    meter = telemetry.Meter(
        goodput,
        images_per_step=batch_size,
        tokens_per_step=contrasted * config.model.context_length,
        peak_flops=peak_flops,
    )

    costs = {
        stage: sum(flops.of_step(train_setup.context_of(stage), batch_size=batch_size).values())
        for stage in train_setup.stages
    }

    def work(start: int, end: int) -> float:
        """Model FLOPs of the steps from one up to another."""
        return sum(
            cost * max(0, min(end, stage.end) - max(start, stage.first))
            for stage, cost in costs.items()
        )

    progress = telemetry.Progress(
        goodput,
        first=first,
        total=clock.total_steps,
        batch_size=batch_size,
        work=work,
        pauses={"eval": [*running.values()], "checkpoint": [train_setup.save_every]},
        peak_flops=peak_flops,
    )

    # ---------------------------------------------------------------------- input
    console.now("starting the input")

    def begin(
        stage: cadence.Stage,
    ) -> tuple[Callable[..., Any], Iterator[dict[str, jax.Array]]]:
        """A stage's update, and its batches from the next example on."""
        of_stage = train_setup.context_of(stage)
        image_ops = ops.expand(config.data.train_ops, stage.image_size)
        stream = hosts.all_or_none(
            lambda: pipeline.training_stream(
                data.parts,
                dataclasses.replace(builder, image_ops=image_ops),
                seed=config.seed,
                start=examples,
                block=config.data.block,
                batch_size=batch_size,
                rows=global_batch.batch_rows(mesh, batch_size),
                threads=config.data.threads,
                workers=config.data.workers,
            )
        )
        batches = prefetch.DeviceBatches(stream, mesh, config.data.prefetch)
        cleanup.callback(batches.close)
        return step_lib.make_train_step(of_stage, train_setup.tx, shardings), batches

    stage = train_setup.stage_at(first)
    train_step, batches = begin(stage)

    # ---------------------------------------------------------------------- loop
    scores: dict[str, float] = {}
    best = position.best
    total = clock.total_steps
    values = previous = None
    goodput.enter("step")
    for step in range(first, total + 1):
        # Evaluate, save, and only then draw the next batch: what is on disk is the state before
        # the batch that follows it, and nothing is in flight.
        preempted = step != total and guard.requested()
        due = {
            name: evaluator
            for name, evaluator in suite.evaluators.items()
            # A resumed run has these scores in its metrics already, unless it is the end.
            if (step == 0 or clock.due(step, eval_every[name]))
            and (step != first or first in (0, total) or not position.evaluated)
        }
        # The state after the last step is always saved.
        scheduled = step == total or clock.due(step, train_setup.save_every)
        saving = step != first and (preempted or scheduled)
        if due or saving:
            jax.block_until_ready(values)  # a step in flight is no part of what follows
            progress.show(step, metrics.flush())
        if due and not preempted:
            with progress.pause(f"evaluating {', '.join(due)}"), goodput.phase("eval"):
                embedder = embedding.Embedder(towers, train_state.evaluated)
                scores = evaluation.run_all(due, embedder, watchdog.progress)
            metrics.write(step, scores)
            shown = "  ".join(f"{name} {score:.3f}" for name, score in scores.items())
            logging.info("step %d %s", step, shown)
            # Agreed upon, as a save takes all hosts.
            find = functools.partial(checkpoint.find_best, keep_best, best, step, scores)
            best = hosts.agree(find)
            saving = saving or (step != first and best is not None and best["step"] == step)
        if saving:
            metrics.require_finite(step, values)
            metrics.store()
            with progress.pause(f"saving step {step}"), goodput.phase("checkpoint"):
                reached = dataclasses.replace(
                    start,
                    examples=examples,
                    seconds=goodput.save(),
                    evaluated=not preempted,
                    best=best,
                )
                checkpointer.save(step, train_state, reached)
        if preempted:
            with goodput.phase("checkpoint"):
                checkpointer.wait()
            raise guard.preempted(
                f"{workdir} is saved at step {step}: the same command resumes from there."
            )
        with goodput.phase("profile"):
            profiler.at(step, in_flight=values)
        if step == total:
            break
        if step == stage.end:
            with goodput.phase("input"):
                stage = train_setup.stage_at(step)
                batches.close()
                train_step, batches = begin(stage)
            logging.info("stage of %s", stage)
        if step == first:
            console.now("compiling the training step")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            with goodput.phase("input"):
                batch = next(batches)
            with jax.transfer_guard("disallow"):
                train_state, values = train_step(train_state, batch)
        guard.defer_exit()  # until here nothing could be lost by exiting at once
        examples += batch_size
        # One update in flight hides the host's work.  More would hold more batches in the devices'
        # memory, and waiting for them would look like waiting for input.
        jax.block_until_ready(previous)
        previous = values
        progress.at(step)
        watchdog.progress()
        checkpointer.check()
        metrics.watch(step + 1, values)
        progress.show(step, metrics.flush())
        if clock.due(step + 1, train_setup.log_every):
            measured = {
                **train_setup.learning_rates(step),
                **meter.read(step - first, work(first, step)),
            }
            metrics.push(step + 1, {**values, **measured})
            goodput.heartbeat()
    console.now("saving")
    progress.show(total, metrics.flush())
    metrics.close()
    with goodput.phase("checkpoint"):
        checkpointer.wait()

    # ---------------------------------------------------------------------- result
    split = goodput.finish()
    trained = split["input"] + split["step"]
    result = {
        "steps": total,
        "examples": examples,
        "seconds": round(trained, 3),
        "images_per_second": round(examples / max(trained, 1e-9), 1),
        "goodput": {phase: round(s, 3) for phase, s in split.items()},
        "entities": num_entities,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(train_state.params)),
        "scores": scores,
    }
    if jax.process_index() == 0:
        files.write_json(workdir / "result.json", result)
    logging.info("finished %s: %d steps in %.0f s", workdir, total, trained)
    logging.info("%s", goodput.line())


def open_data(config: Any) -> training_set.TrainingSet:
    """The training data of this host, tried on their first record."""
    data = training_set.open_training_set(config)
    pipeline.check_shards(data.parts, jax.process_count())
    training_set.check_operations(config, data.primary[0]["image"])
    return data


if __name__ == "__main__":
    cli.run(main)
