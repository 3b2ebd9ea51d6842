"""What a training config comes to: model, optimizer, state and step, for a run, a plan or growth.

It needs sizes and no data: a run reads them from its data set, a plan gets them from flags.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import cadence, optim, state, step


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a training config comes to on one mesh."""

    context: step.StepContext
    tx: optax.GradientTransformation
    init: Callable[[jax.Array], state.TrainState]  # of a uint32 seed, see `state.create`
    clock: cadence.Clock
    stages: tuple[cadence.Stage, ...]  # from the first step to the last
    log_every: int  # periods in steps, 0 for never
    save_every: int
    keep_every: int
    learning_rates: Callable[[int], dict[str, jax.Array]]  # by step, as they are logged

    def in_words(self) -> str:
        """How long the run is, and what a step sees."""
        batch, epoch = self.clock.batch_size, self.clock.examples_per_epoch
        losses = " and ".join(self.context.losses)
        return (
            f"{self.clock.total_steps:,} steps of {batch:,} pictures, "
            f"{self.clock.total_steps * batch / epoch:.3g} epochs; losses: {losses}"
        )

    def stage_at(self, step: int) -> cadence.Stage:
        """The stage of the update from a step on; at the end of the run, its last."""
        return next((stage for stage in self.stages if step < stage.end), self.stages[-1])

    def context_of(self, stage: cadence.Stage) -> step.StepContext:
        """The context of a stage's updates; parameters are those of the model all the same."""
        model = dataclasses.replace(self.context.model, image_size=stage.image_size)
        return dataclasses.replace(self.context, model=model, patch_dropout=stage.patch_dropout)


def make(
    config: Any,
    mesh: Mesh,
    *,
    vocab_size: int,
    eos_id: int,
    num_entities: int,
    examples_per_epoch: int,
) -> TrainSetup:
    """Builds the parts of the step; no array is made.

    Args:
      config: a training config that `settings.validate` has passed.
      vocab_size, eos_id: of the tokenizer.
      num_entities: ignored without the entity loss.

    Raises BadInput: a duration or a size of the model that does not fit the others.
    """
    sizes = {"vocab_size": vocab_size, "eos_id": eos_id}
    sizes["dtype"] = dtype_on(config.model.dtype, mesh.devices.flat[0].platform)
    model = mofi.MofiConfig.from_dict(config.model.to_dict() | sizes)
    clock = cadence.make_clock(
        config.total, batch_size=config.batch_size, examples_per_epoch=examples_per_epoch
    )
    saves, entity_loss = config.checkpoint, "entity" in config.losses
    save_every = clock.steps(saves.every, key="config.checkpoint.every")
    keep_every = clock.steps(saves.keep_every, key="config.checkpoint.keep_every")
    if keep_every and (not save_every or keep_every % save_every):
        raise BadInput(
            f"config.checkpoint.keep_every={saves.keep_every!r} is {keep_every} steps and "
            f"config.checkpoint.every={saves.every!r} is {save_every}: make it a multiple, so that "
            "there is something to keep."
        )
    losses = config.losses.to_dict()
    num_entities = num_entities if entity_loss else 0
    stages = cadence.make_stages(
        config.stages, clock, image_size=model.image_size, patch_size=model.patch_size
    )
    tx = optim.make(config.optimizer, clock, stages)
    return TrainSetup(
        context=step.StepContext(
            model,
            mesh,
            losses,
            num_entities,
            microbatches=config.microbatches,
            frozen=tuple(config.optimizer.frozen),
            ema_decay=config.ema.decay,
            seed=config.seed,
        ),
        tx=tx,
        init=state.initialiser(
            model,
            tx,
            losses=losses,
            table_rows=class_order.padded_rows(num_entities, mesh),
            ema=config.ema.decay > 0,
        ),
        clock=clock,
        stages=stages,
        log_every=clock.steps(config.log_every, key="config.log_every"),
        save_every=save_every,
        keep_every=keep_every,
        learning_rates=optim.learning_rates(
            config.optimizer, clock, stages, entity_loss=entity_loss
        ),
    )


def dtype_on(wanted: str, platform: str) -> str:
    """`config.model.dtype`; auto is float32 on CPUs, which are slow at bfloat16, and else that."""
    return wanted if wanted != "auto" else "float32" if platform == "cpu" else "bfloat16"


def check_batch(config: Any, mesh: Mesh) -> None:
    """Raises BadInput unless the global batch divides over the mesh and its microbatches."""
    shards = global_batch.batch_shards(mesh)
    pieces = shards * config.microbatches
    if config.batch_size % pieces:
        raise BadInput(
            f"config.batch_size={config.batch_size} does not divide over the {shards} devices of "
            f"the batch axes in config.microbatches={config.microbatches} parts each: choose a "
            f"multiple of {pieces}."
        )


def batch_structs(
    config: Any, mesh: Mesh, image_size: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of `data.pipeline.ExampleBuilder` and `global_batch.to_global`, abstract.

    Of pictures of the model's size, or of another stage's.
    """
    size, labels = image_size or config.model.image_size, config.data.max_labels
    sharding = global_batch.batch_sharding(mesh)

    def struct(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)

    return {
        "image": struct(jnp.uint8, size, size, 3),
        "tokens": struct(jnp.int32, config.model.context_length),
        "text_group": struct(jnp.int32),
        "text_valid": struct(jnp.bool_),
        "entity_ids": struct(jnp.int32, labels),
        "entity_weights": struct(jnp.float32, labels),
    }
