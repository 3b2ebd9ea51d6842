"""A run's folder: what makes it readable on its own, and whether it fits a config.

W holds ``model.json``, ``tokenizer.json``, ``entities.parquet`` (with a class table),
``config.json``, ``checkpoints/``, with `keep_best` ``best.json``, ``metrics.jsonl`` (in a bucket
``metrics-NUMBER.jsonl``),
``goodput.json``, ``tensorboard/``, ``programs/`` (compiled by XLA) and, once finished,
``result.json``; with ``--profile=N:M`` ``profile/``; while it runs ``run.lock``; after trouble
``nan-batch.txt``.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput, Preempted, StorageFailed, storage_problem
from mofi_jax.data import metadata, ops, records, tokenizer
from mofi_jax.distributed import hosts
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import checkpoint, state

MODEL_FILE = "model.json"

# Of a model's config, what only training uses, and what readers, on other devices, take instead.
TRAINING_ONLY = {"remat": "none", "attention": "auto"}

_LONG, _MANY = 80, 12  # characters of a value, and keys, in a sentence about differences
_BLOCK = 65_536  # of ArrayRecord, in bytes
_READERS = 16  # a bucket answers in tens of milliseconds, a set may have 10,000 shards


def describe_model(
    config: mofi.MofiConfig, preprocess: str, classified: bool = True
) -> dict[str, Any]:
    """The content of model.json; with the order of the class table where there is one."""
    order = {"table_order": class_order.TABLE_ORDER} if classified else {}
    model = {k: v for k, v in config.to_dict().items() if k not in TRAINING_ONLY}
    return {**model, "preprocess": preprocess, **order}


def read_model(run: epath.PathLike) -> dict[str, Any]:
    """The content of a run's model.json; BadInput if it is not there or describes no model.

    Fields that earlier versions did not have are there with their defaults.
    """
    path = epath.Path(run) / MODEL_FILE
    remedy = "put back a copy, or remove it and start the training again, which writes it"
    values = files.read_json_object(path, remedy)
    try:
        model = model_config(values)
        ops.parse(ops.expand(values["preprocess"], model.image_size))
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} does not describe a model ({error}): {remedy}.") from error
    fields = {k: v for k, v in model.to_dict().items() if k not in TRAINING_ONLY}
    return fields | values | {name: fields[name] for name in mofi.TOWERS}


def model_config(description: Mapping[str, Any]) -> mofi.MofiConfig:
    """The model that model.json describes."""
    values = {k: v for k, v in description.items() if k not in ("preprocess", "table_order")}
    return mofi.MofiConfig.from_dict(values | TRAINING_ONLY)


def data_fingerprint(
    config: Any, parts: Sequence[Any], texts: tokenizer.Tokenizer
) -> dict[str, Any]:
    """What decides which examples come in which order and what is in them.

    A shard is identified by its last block, in which ArrayRecord says where its records lie: sizes
    are multiples of whole blocks, and often the same in another shard.

    Args:
      parts: the data sets, `mofi_jax.data.pipeline.Part`.
    """

    def described(part: Any) -> dict[str, Any]:
        names = {"dataset_info": metadata.INFO_FILE, "entities": records.ENTITIES_FILE}
        paths = {key: part.source.directory / name for key, name in names.items()}
        digest = hashlib.sha256()
        with futures.ThreadPoolExecutor(_READERS) as pool:
            ends = pool.map(last_block, part.source.files)
            for file, end in zip(part.source.files, ends, strict=True):
                digest.update(f"{file.name} {hashlib.sha256(end).hexdigest()}\n".encode())
        return {"examples": len(part.source), "shards": digest.hexdigest()} | {
            name: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
            for name, path in paths.items()
        }

    def last_block(file: epath.Path) -> bytes:
        with file.open("rb") as shard:
            shard.seek(-min(_BLOCK, os.path.getsize(file)), os.SEEK_END)
            return shard.read()

    primary, *extra = parts
    return {
        "dataset": config.data.name,
        **described(primary),
        "extra": {part.name: {"weight": part.weight, **described(part)} for part in extra},
        "tokenizer": texts.fingerprint,
        "seed": config.seed,
        "block": config.data.block,
        "train_ops": config.data.train_ops.replace("{size}", str(config.model.image_size)),
        "text_sources": config.data.text_sources.to_dict(),
        "max_labels": config.data.max_labels,
    }


def agreed_fingerprint(
    config: Any, parts: Sequence[Any], texts: tokenizer.Tokenizer
) -> dict[str, Any]:
    """`data_fingerprint`; BadInput on every host where one has other data than host 0."""
    own = hosts.all_or_none(lambda: data_fingerprint(config, parts, texts))
    first = hosts.agree(lambda: own)

    def compare() -> None:
        if changed := differences(first, own):
            raise BadInput(
                f"The data of process {jax.process_index()} are not those of process 0 "
                f"({changed}): give all hosts the same config.data, or a copy of the same files."
            )

    hosts.all_or_none(compare)
    return first


def as_json(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back."""
    return json.loads(config.to_json_best_effort())


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Every key whose value differs, in words; empty if none does."""
    saved, current = _flat(saved), _flat(current)

    def told(values: Mapping[str, Any], key: str) -> str:
        text = repr(values[key]) if key in values else "not set"
        return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."

    keys = [k for k in sorted(saved.keys() | current.keys()) if saved.get(k) != current.get(k)]
    parts = [f"{key} was {told(saved, key)} and is {told(current, key)}" for key in keys[:_MANY]]
    rest = [f"and {len(keys) - _MANY} more"] if len(keys) > _MANY else []
    return "; ".join(parts + rest)


def data_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The differences of two fingerprints; those of earlier versions lack shards and blocks."""
    before, now = {"block": 1} | _flat(saved), _flat(current)
    unknown = {key for key in now if key.rpartition(".")[2] == "shards"} - before.keys()
    return differences(before, {key: now[key] for key in now.keys() - unknown})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, as flags name them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)  # of an empty one there is nothing to tell
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder holds; the same on every host."""

    step: int | None  # the last that can be read
    position: checkpoint.Position  # where to resume
    damaged: Sequence[tuple[int, str]]  # later steps that cannot be read, and why
    finished: bool


def check(
    workdir: epath.Path,
    model: Mapping[str, Any],
    structs: state.TrainState,
    position: checkpoint.Position,
    verify: bool = True,
) -> Contents:
    """Checks that the folder belongs to this config; host 0 reads it for all.

    Compared is what decides shapes, meaning and the order of the data: a run may resume in another
    precision, with other memory settings or workers.

    Args:
      model: what its model.json would hold (`describe_model`).
      structs: the training state of this config, as ShapeDtypeStructs.
      position, verify: of a new run of this config; see `checkpoint.damage`.

    Raises BadInput: names at once all that is of another model, of other data or of other shapes.
    """

    def look() -> dict[str, Any]:
        problems, remedy = [], ""
        if (workdir / MODEL_FILE).exists():
            # Earlier versions wrote what only training uses, too.
            may_change = dict.fromkeys(("dtype", *TRAINING_ONLY))
            changed = differences(read_model(workdir) | may_change, {**model, **may_change})
            problems += [f"it holds another model ({changed})"] if changed else []
        step, damaged = checkpoint.latest_intact(workdir, verify=verify)
        saved = position
        if step is not None:
            saved = checkpoint.read_position(workdir, step)
            # The best may be gone where this step was resumed from because of damage to later ones.
            if saved.best and saved.best["step"] not in checkpoint.saved_steps(workdir):
                saved = dataclasses.replace(saved, best=None)
            changed = data_changes(saved.data_fingerprint, position.data_fingerprint)
            problems += [f"it was trained on other data ({changed})"] if changed else []
            before, now = (p.data_fingerprint.get("examples", 0) for p in (saved, position))
            if before < now:
                remedy = ", or, if its data have grown, " + (
                    "take the run to them with `mofi grow`"
                    if (workdir / records.ENTITIES_FILE).exists()
                    else f"begin a new run with --config.init.model={workdir}"
                )
            wrong = checkpoint.mismatches(workdir, step, structs)
            problems += [f"its checkpoint has other arrays ({'; '.join(wrong)})"] if wrong else []
        if problems:
            raise BadInput(
                f"{workdir} does not fit this config: {', and '.join(problems)}: restore its own "
                f"config, or choose another --workdir{remedy}."
            )
        if changed := differences(saved.config, position.config):
            logging.warning("the config is not that of the last checkpoint: %s", changed)
        return {
            "step": step,
            "position": dataclasses.asdict(saved),
            "damaged": damaged,
            "finished": (workdir / "result.json").exists(),
        }

    values = hosts.agree(look)
    return Contents(**values | {"position": checkpoint.Position(**values["position"])})


def prepare(
    workdir: epath.Path,
    contents: Contents,
    config: Any,
    model: Mapping[str, Any],
    tokenizer_path: epath.Path,
    entities_path: epath.Path | None,
) -> None:
    """Host 0 writes what makes the folder readable on its own; the others check that they see it.

    Damaged steps among the contents are renamed (`checkpoint.set_aside`).  BadInput where another
    host does not see what host 0 has written.
    """

    def write() -> None:
        checkpoint.set_aside(workdir, contents.damaged, contents.step)
        files.write_text(workdir / records.TOKENIZER_FILE, tokenizer_path.read_text())
        if entities_path is not None:
            entities_path.copy(workdir / records.ENTITIES_FILE, overwrite=True)
        files.write_text(workdir / "config.json", config.to_json_best_effort(indent=2) + "\n")
        files.write_json(workdir / MODEL_FILE, dict(model))

    hosts.agree(write)
    if jax.process_count() == 1:
        return
    seen = multihost_utils.process_allgather((workdir / MODEL_FILE).exists())
    if not seen.all():
        missing = ", ".join(str(i) for i, there in enumerate(seen) if not there)
        raise BadInput(
            f"--workdir={workdir} is not the same folder on every host (processes {missing} do not "
            "see it): name one on a file system that all of them share."
        )


@contextlib.contextmanager
def storage_errors(workdir: epath.Path) -> Iterator[None]:
    """Raises `StorageFailed` for errors inside the block which say that the folder is not writable.

    The sentence names the step from which the same command goes on.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, BadInput | Preempted)
        reason = None if known else storage_problem(error, workdir)
        if reason is None:
            raise
        last = "the last checkpoint"
        with contextlib.suppress(Exception):  # a bucket that cannot be read either
            steps = checkpoint.saved_steps(workdir)
            last = f"step {steps[-1]}" if steps else "the start, as nothing is saved yet"
        remote = files.is_remote(workdir)
        remedy = "look at the bucket and its permissions" if remote else "make room"
        failed = StorageFailed(
            f"--workdir={workdir} cannot be written ({reason}): {remedy} or name another folder; "
            f"the same command goes on from {last}."
        )
        failed.exit_code = 1 if remote else 2  # a bucket that is away may be back at the next start
        raise failed from error
