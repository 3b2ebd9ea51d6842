"""Trains MOFI: supervised, contrastive or both at once.

    python -m mofi_jax.train --config configs/mofi.py:task=multitask,variant=B/16 --workdir W

Reads from top to bottom: hosts, data, model, what is already there, update, evaluators, loop.  The
same command with the same ``--workdir`` resumes; a run killed at any moment ends in the parameters
of an uninterrupted one, bit for bit.  The folder W holds ``model.json``, ``tokenizer.json``,
``entities.parquet`` (with a class table), ``config.json``, ``checkpoints/``, ``metrics.jsonl``,
``tensorboard/`` and, once finished, ``result.json``.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mofi_jax import cli, inference, partition, telemetry
from mofi_jax.data import ops, pipeline, prefetch, records, tokenizer
from mofi_jax.errors import BadInput
from mofi_jax.evaluators import common as evaluation
from mofi_jax.model import mofi
from mofi_jax.training import cadence, checkpoint, optim, settings, state, step


def main(config: Any, workdir: str) -> None:
    """Trains; a save that is under way is finished even if an exception cuts the run."""
    with contextlib.ExitStack() as cleanup:
        train(config, workdir, cleanup)


def train(config: Any, workdir: str, cleanup: contextlib.ExitStack) -> None:
    settings.validate(config)
    if "://" in workdir:
        raise BadInput(
            f"--workdir={workdir} is a remote path: mount the bucket (gcsfuse), or name a folder."
        )
    workdir = epath.Path(workdir)

    # ---------------------------------------------------------------------- hosts and devices
    if config.distributed:
        jax.distributed.initialize()
    lead = jax.process_index() == 0
    mesh = partition.make_mesh(**config.mesh)
    pieces = partition.batch_shards(mesh) * config.microbatches
    if config.batch_size % pieces:
        raise BadInput(
            f"config.batch_size={config.batch_size} does not divide over the "
            f"{partition.batch_shards(mesh)} devices of the batch axes in "
            f"config.microbatches={config.microbatches} parts each: choose a multiple of {pieces}."
        )
    logging.info("mesh %s over %d %s", dict(mesh.shape), mesh.size, jax.devices()[0].device_kind)

    # ---------------------------------------------------------------------- data
    source = records.open_source(config.data.dir, config.data.name)
    tokenizer_path = source.directory / records.TOKENIZER_FILE
    texts = tokenizer.Tokenizer(tokenizer_path, config.model.context_length)
    entities_path = source.directory / records.ENTITIES_FILE
    entities = records.read_entities(entities_path) if entities_path.exists() else None
    if "entity" in config.losses and entities is None:
        raise BadInput(
            f"{source.directory} has no entities, which the entity loss needs: name a labelled "
            "data set in config.data, or train with task=contrastive."
        )
    parts = [
        pipeline.Part(config.data.name, source),
        *pipeline.open_extra(config.data.extra.to_dict(), entities),
    ]
    pipeline.check_shards(parts, jax.process_count())
    clock = cadence.make_clock(
        config.total,
        batch_size=config.batch_size,
        examples_per_epoch=pipeline.examples_per_epoch(parts),
    )
    builder = pipeline.ExampleBuilder(
        image_ops=config.data.train_ops,
        text_sources=config.data.text_sources.to_dict(),
        tokenizer_path=str(tokenizer_path),
        context_length=config.model.context_length,
        entities=entities,
        max_labels=config.data.max_labels,
    )
    fingerprint = data_fingerprint(config, parts, texts)

    # ---------------------------------------------------------------------- model
    model = settings.model_config(config.model, vocab_size=texts.vocab_size, eos_id=texts.eos_id)
    num_entities = len(entities) if entities and "entity" in config.losses else 0
    tx = optim.make(config.optimizer, clock)
    losses = config.losses.to_dict()
    init = state.initialiser(
        model,
        tx,
        losses=losses,
        table_rows=partition.padded_rows(num_entities, mesh),
    )

    # ---------------------------------------------------------------------- evaluators
    towers = inference.Towers(
        config=model,
        tokenizer=texts if "contrastive" in config.losses else None,
        entities=entities if num_entities else None,
        preprocess=config.data.eval_ops,
        mesh=mesh,
    )
    wanted = config.evaluators.to_dict()
    periods = {
        name: clock.steps(
            wanted[name].pop("every", "10 percent"), key=f"config.evaluators.{name}.every"
        )
        for name in wanted
    }
    suite = evaluation.build_all(towers, wanted)
    log_every = clock.steps(config.log_every, key="config.log_every")
    save_every = clock.steps(config.checkpoint.every, key="config.checkpoint.every")
    try_operations(config, source[0]["image"])

    # ---------------------------------------------------------------------- what is already there
    check_workdir(workdir, config, model)
    if lead:
        prepare_workdir(workdir, config, model, tokenizer_path, entities_path, num_entities)
    checkpointer = checkpoint.Checkpointer(workdir, keep=config.checkpoint.keep)
    cleanup.callback(checkpointer.close)
    resumed = checkpointer.latest_step() is not None
    first = checkpointer.latest_step()
    if first is None:
        first, position = 0, checkpoint.Position(0, fingerprint, 0.0)
        train_state, shardings = state.create(init, config.seed, mesh)
    else:
        structs, shardings = state.abstract(init, mesh)
        train_state, position = checkpointer.restore(first, structs)
        changed = differences(position.data_fingerprint, fingerprint)
        if changed:
            raise BadInput(
                f"{workdir} was trained on other data ({changed}): restore that config, or choose "
                "another --workdir."
            )
        logging.info("resumed at step %d, %d examples", first, position.examples)
    if first > clock.total_steps:
        raise BadInput(
            f"{workdir} stands at step {first}, beyond config.total={config.total!r} "
            f"({clock.total_steps} steps): raise the total, or choose another --workdir."
        )
    if first >= clock.total_steps and (workdir / "result.json").exists():
        logging.info("%s is finished: %d steps", workdir, first)
        return

    # ---------------------------------------------------------------------- update
    update = step.make_update(
        step.Setting(model, mesh, num_entities, config.microbatches),
        losses,
        tx,
        seed=config.seed,
        shardings=shardings,
    )
    schedule = optim.schedule(config.optimizer, clock)

    # ---------------------------------------------------------------------- loop
    metrics = telemetry.Metrics(workdir, resume_step=first if resumed else -1)
    cleanup.callback(metrics.abandon)
    examples, seconds = position.examples, position.seconds
    stream = pipeline.training_stream(
        parts,
        builder,
        seed=config.seed,
        start=examples,
        host=jax.process_index(),
        hosts=jax.process_count(),
        batch_size=config.batch_size,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    batches = prefetch.to_devices(stream, mesh, config.data.prefetch)
    cleanup.callback(batches.close)
    scores: dict[str, float] = {}
    evaluated = 0.0
    total = clock.total_steps
    bar = telemetry.progress(total * config.batch_size, first * config.batch_size)
    began = time.monotonic()
    with bar:
        for now in range(first, total + 1):
            # Evaluate, save, and only then draw the next batch: what is on disk is the state
            # before the batch that follows it, and nothing is in flight.
            due = {
                name: evaluator
                for name, evaluator in suite.evaluators.items()
                # A resumed run has these scores in its metrics already, unless it is the end.
                if (now == 0 or cadence.due(now, periods[name], last=total))
                and (now != first or first in (0, total))
            }
            if due:
                bar.set_postfix_str("evaluating")
                start = time.monotonic()
                scores = evaluation.run_all(due, train_state.params)
                metrics.flush()
                metrics.write(now, scores)
                evaluated += time.monotonic() - start
                logging.info("step %d %s", now, brief(scores))
            if now != first and cadence.due(now, save_every, last=total):
                metrics.flush()
                metrics.require_finite(now, values)
                elapsed = seconds + time.monotonic() - began - evaluated
                checkpointer.save(
                    now, train_state, checkpoint.Position(examples, fingerprint, elapsed)
                )
            if now == total:
                break
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                train_state, values = update(train_state, batch)
            examples += config.batch_size
            if cadence.due(now + 1, log_every, last=total):
                written = metrics.push(now + 1, {**values, "learning_rate": schedule(now)})
                if written:
                    bar.set_postfix_str(brief(written, ("loss", "entity_accuracy")))
            bar.update(config.batch_size)
    metrics.close()
    checkpointer.wait()

    # ---------------------------------------------------------------------- result
    trained = seconds + time.monotonic() - began - evaluated
    if lead:
        telemetry.write_json(
            workdir / "result.json",
            {
                "steps": total,
                "examples": examples,
                "seconds": round(trained, 3),
                "images_per_second": round(examples / max(trained, 1e-9), 1),
                "entities": num_entities,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(train_state.params)),
                "scores": scores,
            },
        )
    logging.info("finished %s: %d steps in %.0f s", workdir, total, trained)


def data_fingerprint(
    config: Any, parts: Sequence[pipeline.Part], texts: tokenizer.Tokenizer
) -> dict[str, Any]:
    """What decides which examples come in which order and what is in them."""

    def described(part: pipeline.Part) -> dict[str, Any]:
        files = {"dataset_info": "dataset_info.json", "entities": records.ENTITIES_FILE}
        paths = {name: part.source.directory / file for name, file in files.items()}
        return {"examples": len(part.source)} | {
            name: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
            for name, path in paths.items()
        }

    primary, *extra = parts
    return {
        "dataset": config.data.name,
        **described(primary),
        "extra": {part.name: {"weight": part.weight, **described(part)} for part in extra},
        "tokenizer": texts.fingerprint,
        "seed": config.seed,
        "train_ops": config.data.train_ops,
        "text_sources": config.data.text_sources.to_dict(),
        "max_labels": config.data.max_labels,
    }


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Every key whose value differs, in words; empty if none does."""
    return "; ".join(
        f"{key} was {saved.get(key)!r} and is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    )


def try_operations(config: Any, picture: bytes) -> None:
    """Runs both specifications on one picture, so that a wrong one is told before anything starts.

    Raises:
      BadInput: a specification that fails, or ends in another size than the model takes.
    """
    size = config.model.image_size
    for key in ("train_ops", "eval_ops"):
        run = ops.build(config.data[key])
        try:
            shape = run({"image": picture}, np.random.default_rng(0))["image"].shape
        except Exception as error:
            raise BadInput(
                f"config.data.{key}={config.data[key]!r} fails on the first picture "
                f"({type(error).__name__}: {' '.join(str(error).split())}): correct its arguments."
            ) from error
        if shape != (size, size, 3):
            raise BadInput(
                f"config.data.{key} ends in a picture of shape {shape}, the model takes "
                f"{(size, size, 3)}: change its last operation or config.model.image_size."
            )


def check_workdir(workdir: epath.Path, config: Any, model: mofi.MofiConfig) -> None:
    """Refuses a folder of another model, on every host; tells what else differs from last time."""
    path = workdir / "model.json"
    if not path.exists():
        return
    description = inference.describe(
        model, config.data.eval_ops, classified="entity" in config.losses
    )
    changed = differences(json.loads(path.read_text()), description)
    if changed:
        raise BadInput(
            f"{workdir} holds another model ({changed}): restore that config, or choose another "
            "--workdir."
        )
    saved = json.loads((workdir / "config.json").read_text())
    changed = differences(saved, json.loads(config.to_json_best_effort()))
    if changed:
        logging.warning("the config is not that of the last run in %s: %s", workdir, changed)


def prepare_workdir(
    workdir: epath.Path,
    config: Any,
    model: mofi.MofiConfig,
    tokenizer_path: epath.Path,
    entities_path: epath.Path,
    num_entities: int,
) -> None:
    """Writes what makes the folder readable on its own."""
    workdir.mkdir(parents=True, exist_ok=True)
    telemetry.write_text(workdir / records.TOKENIZER_FILE, tokenizer_path.read_text())
    if num_entities:
        entities_path.copy(workdir / records.ENTITIES_FILE, overwrite=True)
    telemetry.write_text(workdir / "config.json", config.to_json_best_effort(indent=2) + "\n")
    description = inference.describe(
        model, config.data.eval_ops, classified="entity" in config.losses
    )
    telemetry.write_json(workdir / "model.json", description)


def brief(values: dict[str, float], names: tuple[str, ...] | None = None) -> str:
    """The chosen values on one line."""
    return "  ".join(f"{name} {values[name]:.3f}" for name in (names or values) if name in values)


if __name__ == "__main__":
    cli.run(main)
