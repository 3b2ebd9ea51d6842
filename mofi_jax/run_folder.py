"""A run's folder: what makes it readable on its own, and whether it fits the config at hand.

W holds ``model.json``, ``tokenizer.json``, ``entities.parquet`` (with a class table),
``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``goodput.json``, ``tensorboard/``,
``programs/`` (compiled by XLA) and, once finished, ``result.json``; with ``--profile=N:M``
``profile/``; after trouble ``hang-PROCESS.txt`` or ``nan-batch.txt``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mofi_jax import inference, telemetry
from mofi_jax.data import pipeline, records, tokenizer
from mofi_jax.errors import BadInput
from mofi_jax.training import checkpoint, state


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


def as_json(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back."""
    return json.loads(config.to_json_best_effort())


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Every key whose value differs, in words; empty if none does."""
    return "; ".join(
        f"{key} was {saved.get(key)!r} and is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    )


def check(
    workdir: epath.Path,
    model: Mapping[str, Any],
    structs: state.TrainState,
    position: checkpoint.Position,
) -> checkpoint.Position:
    """Whether the folder is that of this run; the same answer on every host.

    Args:
      workdir: the folder, which need not exist.
      model: what its model.json would hold (`inference.describe`).
      structs: the training state of this config, as ShapeDtypeStructs.
      position: of a run of this config that begins.

    Returns:
      The position from which to go on: that of the last checkpoint, or `position`.

    Raises:
      BadInput: it holds another model, was trained on other data, or its checkpoint has other
        arrays; names all of it at once.
    """
    problems = []
    path = workdir / inference.MODEL_FILE
    if path.exists():
        changed = differences(json.loads(path.read_text()), model)
        problems += [f"it holds another model ({changed})"] if changed else []
    steps = checkpoint.saved_steps(workdir)
    if steps:
        saved = checkpoint.read_position(workdir, steps[-1])
        changed = differences(saved.data_fingerprint, position.data_fingerprint)
        problems += [f"it was trained on other data ({changed})"] if changed else []
        wrong = checkpoint.mismatches(workdir, steps[-1], structs)
        problems += [f"its checkpoint has other arrays ({'; '.join(wrong)})"] if wrong else []
    if problems:
        raise BadInput(
            f"{workdir} does not fit this config: {', and '.join(problems)}: restore its own "
            "config, or choose another --workdir."
        )
    if not steps:
        return position
    changed = differences(saved.config, position.config)
    if changed:
        logging.warning("the config is not that of the last checkpoint: %s", changed)
    return saved


def prepare(
    workdir: epath.Path,
    config: Any,
    model: Mapping[str, Any],
    *,
    tokenizer_path: epath.Path,
    entities_path: epath.Path | None,
) -> None:
    """Host 0 writes what makes the folder readable on its own; the others look whether it is there.

    Args:
      entities_path: None for a run without a class table.

    Raises:
      BadInput: another host does not see what host 0 has written.
    """
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        telemetry.write_text(workdir / records.TOKENIZER_FILE, tokenizer_path.read_text())
        if entities_path is not None:
            entities_path.copy(workdir / records.ENTITIES_FILE, overwrite=True)
        telemetry.write_text(workdir / "config.json", config.to_json_best_effort(indent=2) + "\n")
        telemetry.write_json(workdir / inference.MODEL_FILE, dict(model))
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("run folder")
    shared = multihost_utils.process_allgather((workdir / inference.MODEL_FILE).exists())
    if not shared.all():
        missing = ", ".join(str(i) for i, there in enumerate(shared) if not there)
        raise BadInput(
            f"--workdir={workdir} is not the same folder on every host (processes {missing} do not "
            "see it): name one on a file system that all of them share."
        )
