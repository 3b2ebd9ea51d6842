"""Initialises a run from another model: a run folder or a Hugging Face CLIP folder.

``config.init`` names the folder and the parts to take.  Position embeddings are resampled to the
run's resolution, rows of the class table move with their entities by QID; everything else has to
fit as it is.  The optimizer state and the data position start from scratch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jaxtyping import Int

from mofi_jax import inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records, tokenizer
from mofi_jax.distributed import sharding
from mofi_jax.model import image
from mofi_jax.training import class_table, optim
from mofi_jax.training.state import TrainState

IMAGE_POSITIONS = "image/position_embedding"
TEXT_POSITIONS = "text/position_embedding"
TOKEN_EMBEDDING = "text/token_embedding"


@dataclasses.dataclass(frozen=True)
class Source:
    """What is taken from another model."""

    # By path, in the shape of this run's parameter; the class table as the other model has it.
    params: Mapping[str, np.ndarray]
    # Row of that table for each row here, -1 for one it does not have; None: no table is taken.
    table_rows: Int[np.ndarray, " e"] | None


def read(
    folder: str,
    parts: Sequence[str],
    structs: Any,
    entities: records.Entities | None,
    texts: tokenizer.Tokenizer | None = None,
) -> Source:
    """Reads the parts and fits them to this run; nothing of it is on a device yet.

    Args:
      folder: ``config.init.model``.
      parts: ``config.init.parts``, beginnings of paths as ``image`` or ``text/blocks``; none for
        everything that both models have.
      structs: this run's parameters, as ShapeDtypeStructs.
      entities: this run's vocabulary.
      texts: this run's tokenizer.

    Raises:
      BadInput: a folder that is no model, a part that one of the two models does not have, arrays
        of other shapes, token embeddings of another tokenizer; names all of them at once.
    """
    saved = inference.read(folder)
    other, own = (traverse_util.flatten_dict(tree, sep="/") for tree in (saved.params, structs))
    problems = [
        f"{model} has no part {part!r}"
        for part in parts
        for model, names in (("that model", other), ("this one", own))
        if not any(optim.in_parts(name, (part,)) for name in names)
    ]
    chosen = [name for name in own if (optim.in_parts(name, parts) if parts else name in other)]
    theirs = saved.tokenizer if TOKEN_EMBEDDING in chosen else None
    if texts and theirs and texts.fingerprint != theirs.fingerprint:
        problems.append(
            f"its tokens are not those of {texts.path}, over which its {theirs.path} may be "
            "copied, as records hold texts"
        )
    params: dict[str, np.ndarray] = {}
    table_rows = None
    for name in chosen:
        if name not in other:
            problems.append(f"that model has no {name}")
            continue
        value, shape = np.asarray(other[name]), tuple(own[name].shape)
        if value.shape[1:] == shape[1:]:
            if name == sharding.ENTITY_TABLE:
                matches = class_table.match(saved.entities.qids, entities.qids)
                table_rows = class_table.rows_of_sources(matches, len(saved.entities))
                shape = value.shape
            elif name == IMAGE_POSITIONS and image.can_resample(len(value), shape[0]):
                value = np.asarray(image.resampled(value, shape[0]))
            elif name == TEXT_POSITIONS and saved.config.family == "clip":
                value = value[: shape[0]]  # a causal tower never looked further
        if value.shape == shape:
            params[name] = value
        else:
            problems.append(f"{name} is {value.shape} there and {shape} here")
    if not params and not problems:
        problems.append("the two models have nothing in common")
    if problems:
        raise BadInput(
            f"config.init.model={folder!r} does not fit: {'; '.join(problems)}: choose another "
            "model, or in config.init.parts only what fits."
        )
    return Source(params, table_rows)


def apply(state: TrainState, source: Source) -> TrainState:
    """The initial state of a run with the parameters taken over, also into their average."""

    def replaced(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = sharding.path_name(path)
        if name not in source.params:
            return leaf
        value = source.params[name]
        if name == sharding.ENTITY_TABLE:
            return _table(leaf, value, source.table_rows)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype)
        )

    params = jax.tree_util.tree_map_with_path(replaced, state.params)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    logging.info("warm start: %d arrays", len(source.params))
    if source.table_rows is not None:
        known = int((source.table_rows >= 0).sum())
        logging.info("warm start: %d of %d entities", known, len(source.table_rows))
    return dataclasses.replace(state, params=params, ema=ema)


def _table(leaf: jax.Array, value: np.ndarray, rows: np.ndarray) -> jax.Array:
    """The table with the other model's rows; entities that it lacks keep their initial ones."""
    initial = {str(shard.index): shard.data for shard in leaf.addressable_shards}

    def fill(index: tuple[slice, ...]) -> np.ndarray:
        part = np.array(initial[str(index)])
        start = index[0].start or 0
        sources = rows[start : start + len(part)]
        known = np.flatnonzero(sources >= 0)
        part[known] = value[sources[known]]
        return part

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, fill)
