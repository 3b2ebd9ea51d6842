"""A training config's data, opened: the sets of the mixture, their vocabulary and tokenizer."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import limits, ops, pipeline, records, tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Opened, and nothing read of it but the vocabulary."""

    parts: Sequence[pipeline.Part]  # the primary one first: vocabulary and tokenizer are its
    texts: tokenizer.Tokenizer  # at the model's context length
    entities: records.Entities | None  # None for sets without labels

    @property
    def primary(self) -> records.Source:
        return self.parts[0].source

    @property
    def entities_path(self) -> epath.Path:
        """There only where `entities` are."""
        return self.primary.directory / records.ENTITIES_FILE

    @property
    def sizes(self) -> dict[str, int]:
        """What `mofi_jax.training.setup.make` asks about data."""
        return {
            "vocab_size": self.texts.vocab_size,
            "eos_id": self.texts.eos_id,
            "num_entities": len(self.entities) if self.entities else 0,
            "examples_per_epoch": pipeline.examples_per_epoch(self.parts),
        }

    def in_words(self) -> str:
        """Examples, entities, shards, and where they lie; of each set of the mixture."""
        told = []
        for part in self.parts:
            source = part.source
            words = [f"{len(source):,} examples"]
            if part is self.parts[0] and self.entities:
                words.append(f"{len(self.entities):,} entities")
            size = ""
            if not files.is_remote(source.directory):
                size = f" ({_bytes(sum(os.path.getsize(file) for file in source.files))})"
            words.append(f"{len(source.files):,} shards{size}")
            weight = f", weight {part.weight:g}" if len(self.parts) > 1 else ""
            told.append(f"{', '.join(words)} in {source.directory}{weight}")
        return "; ".join(told)


def _bytes(size: int) -> str:
    for limit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:,.1f} {name}"
    return f"{size / 1e3:,.1f} kB"


def open_training_set(config: Any) -> TrainingSet:
    """Opens ``config.data`` as a training does.

    Raises:
      BadInput: a set that is not there or damaged, or no entities where a loss needs them; names
        the folder.
    """
    source = records.open_source(config.data.dir, config.data.name)
    texts = tokenizer.Tokenizer(
        source.directory / records.TOKENIZER_FILE, config.model.context_length
    )
    path = source.directory / records.ENTITIES_FILE
    entities = records.read_entities(path) if path.exists() else None
    if "entity" in config.losses and entities is None:
        raise BadInput(
            f"{source.directory} has no entities, which the entity loss needs: name a labelled "
            "data set in config.data, or train with task=contrastive."
        )
    extra = pipeline.open_extra(config.data.extra.to_dict(), entities)
    limits.allow_open_files(sum(len(s.files) for s in (source, *(e.source for e in extra))))
    return TrainingSet([pipeline.Part(config.data.name, source), *extra], texts, entities)


def check_operations(config: Any, picture: bytes) -> None:
    """Runs ``train_ops`` and ``eval_ops`` on one picture; raises BadInput for a wrong one.

    ``train_ops`` for the pixels of every stage too.
    """
    own = config.model.image_size
    stages = [("train_ops", stage.get("image_size", own)) for stage in config.stages]
    for key, size in (("eval_ops", own), ("train_ops", own), *stages):
        name = f"config.data.{key}={config.data[key]!r}"
        if size != own:
            name += f" in the stage of {size} pixels, for which {{size}} may stand,"
        rng = np.random.default_rng(0)
        try:
            ops.decode_to(size, config.data[key], picture, rng, name=name)
        except ops.UndecodableImage as error:
            raise BadInput(
                f"{name} cannot take the first picture ({error}): copy the data set again, or "
                "correct its arguments."
            ) from error
