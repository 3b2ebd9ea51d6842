"""One jitted update: a dict of weighted task losses on one shared embedding (paper section 3)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.losses import class_order, contrastive, entity, entity_sampling, siglip
from mofi_jax.model import image, mofi
from mofi_jax.training import class_table, optim
from mofi_jax.training.state import TrainState, updated_ema

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# In a batch inside the step: the patches that patch dropout keeps.
KEPT = "kept_patches"


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What all tasks of a step share.

    Attributes:
      losses: task name -> {"weight": ..., options of the task}, as in ``config.losses``.
      num_entities: real rows of the class table, 0 without one.
      microbatches: parts in which the towers process a batch (`in_microbatches`).
      frozen: parts of the parameters that are constants (`optim.in_parts`).
      ema_decay: of the moving average of the parameters, 0 for none (`state.updated_ema`).
      seed: of what a step draws, with its number: classes of a sampled entity loss, and patches.
      patch_dropout: share of each picture's patches that a step does not look at, drawn anew for
        each picture and step (`image.kept_patches`).
    """

    model: mofi.MofiConfig
    mesh: Mesh
    losses: Mapping[str, Mapping[str, Any]]
    num_entities: int
    microbatches: int = 1
    frozen: tuple[str, ...] = ()
    ema_decay: float = 0.0
    seed: int = 0
    patch_dropout: float = 0.0


def entity_task(
    context: StepContext, params: Any, batch: Batch, images: jax.Array, sample: entity.Sample | None
) -> tuple[jax.Array, Metrics]:
    """Classification over the entity vocabulary (margin softmax, paper section 3.1)."""
    options = context.losses["entity"]
    learned = options["learn_scale"]
    scale = mofi.capped_exp(params["entity_log_scale"]) if learned else options["scale"]
    loss = entity.entity_softmax(
        images,
        params[sharding.ENTITY_TABLE],
        class_order.table_rows(batch["entity_ids"], context.num_entities),
        batch["entity_weights"],
        num_entities=context.num_entities,
        scale=scale,
        margin=options["margin"],
        margin_kind=options["margin_kind"],
        mesh=context.mesh,
        block_size=options["block_size"] or None,
        compute_dtype=jnp.dtype(context.model.dtype),
        sample=sample,
    )
    rows = jnp.maximum(loss.count, 1.0)
    metrics = {
        "entity_accuracy": loss.correct / rows,
        "target_cosine": loss.cosine / rows,
        "labelled_share": loss.count / images.shape[0],
    }
    if learned:
        metrics["entity_scale"] = scale
    if sample is not None:
        metrics["sample_overflow"] = sample.overflow
    return loss.total / rows, metrics


def contrastive_task(
    context: StepContext, params: Any, batch: Batch, images: jax.Array, sample: entity.Sample | None
) -> tuple[jax.Array, Metrics]:
    """Image against text over the global batch (CLIP or SigLIP, paper section 3.2)."""
    del sample
    options = context.losses["contrastive"]
    texts = in_microbatches(
        lambda tokens: mofi.embed_texts(context.model, params, tokens, context.mesh),
        [batch["tokens"]],
        context,
    )
    scale = mofi.logit_scale(context.model, params)
    text_entity = batch["text_group"]
    relations = {
        "valid": batch["text_valid"],
        "text_entity": text_entity,
        # A picture shows its entities; without any, what its words say.
        "image_entities": jnp.where(
            batch["entity_ids"] >= 0, batch["entity_ids"], text_entity[:, None]
        ),
        "same_entity": options["same_entity"],
        "mesh": context.mesh,
    }
    metrics = {"logit_scale": scale}
    if options["kind"] == "sigmoid":
        metrics["logit_bias"] = params["logit_bias"]
        loss = siglip.siglip(images, texts, scale, params["logit_bias"], **relations)
    else:
        loss = contrastive.clip_softmax(images, texts, scale, **relations)
    pairs = jnp.maximum(loss.count, 1.0)
    metrics["contrastive_accuracy"] = loss.correct / pairs
    metrics["pair_cosine"] = loss.cosine / pairs
    return loss.total / pairs, metrics


TASKS = {"entity": entity_task, "contrastive": contrastive_task}


def in_microbatches(
    function: Callable[..., jax.Array], inputs: Sequence[jax.Array], context: StepContext
) -> jax.Array:
    """function(*inputs) with gradient accumulation: a part of the batch at a time, both ways.

    The losses compare all rows of the global batch, so its size must not depend on the memory of
    the towers' activations.  Only each part's inputs and results are kept; the backward pass
    recomputes the activations part by part (GradCache, arXiv 2101.06983).  Values and gradients are
    those of one pass up to rounding.  Every device cuts its own rows: nothing is exchanged.
    """
    parts, mesh = context.microbatches, context.mesh
    if parts == 1:
        return function(*inputs)
    shards = global_batch.batch_shards(mesh)

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    axes = meshes.BATCH_AXES

    def cut(x: jax.Array) -> jax.Array:
        x = place(x.reshape(shards, parts, -1, *x.shape[1:]), axes)
        return place(x.swapaxes(0, 1), None, axes)

    run = jax.checkpoint(function, prevent_cse=False)

    def part(cuts: Sequence[jax.Array]) -> jax.Array:
        result = run(*(place(x.reshape(-1, *x.shape[2:]), axes) for x in cuts))
        return place(result.reshape(shards, -1, *result.shape[1:]), axes)

    results = place(jax.lax.map(part, [cut(x) for x in inputs]), None, axes).swapaxes(0, 1)
    results = place(results, axes)
    return place(results.reshape(-1, *results.shape[3:]), axes)


def make_loss(context: StepContext) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The weighted sum of the task losses, a function of (params, batch, sample=None)."""

    def loss_fn(
        params: Any, batch: Batch, sample: entity.Sample | None = None
    ) -> tuple[jax.Array, Metrics]:
        # A frozen tower has no backward pass.
        params = jax.tree.map_with_path(
            lambda path, leaf: (
                jax.lax.stop_gradient(leaf)
                if optim.in_parts(sharding.path_name(path), context.frozen)
                else leaf
            ),
            params,
        )
        images = in_microbatches(
            lambda pixels, kept=None: mofi.embed_images(
                context.model, params, pixels, context.mesh, kept
            ),
            [batch[name] for name in ("image", KEPT) if name in batch],
            context,
        )
        total, metrics = jnp.zeros(()), {}
        for name, options in context.losses.items():
            value, extra = TASKS[name](context, params, batch, images, sample)
            total += options["weight"] * value
            metrics |= {f"loss_{name}": value, **extra}
        return total, {"loss": total, **metrics}

    return loss_fn


def make_train_step(
    context: StepContext, tx: optax.GradientTransformation, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the incoming state, sharded as `state.abstract` says, is donated."""
    mesh, losses = context.mesh, context.losses
    grad_fn = jax.value_and_grad(make_loss(context), has_aux=True)
    rate = losses["entity"]["sample_rate"] if "entity" in losses else 1.0

    def random_key(purpose: int, step: jax.Array) -> jax.Array:
        # Keys 0 to 2 of this seed made the towers and the table (`state.initialiser`).
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(context.seed), purpose), step)

    @jax.named_scope("optimizer")
    def optimizer(state: TrainState, grads: Any) -> tuple[TrainState, Metrics]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = mofi.capped(context.model, params, context.frozen)
        groups = optim.clipped_groups(grads)
        norms = {f"gradient_norm/{name}": optax.tree.norm(part) for name, part in groups.items()}
        # Of the difference, not of the updates: XLA for TPUs then passes over parameters and
        # moments once, where it would compute the updates twice and copy the moments.
        moved = optax.tree.sub(params, state.params)
        norms |= {"gradient_norm": optax.tree.norm(norms), "update_norm": optax.tree.norm(moved)}
        ema = updated_ema(state.ema, params, state.step, context.ema_decay)
        return TrainState(state.step + 1, params, opt_state, ema), norms

    def dense_step(
        state: TrainState, batch: Batch, sample: entity.Sample | None = None
    ) -> tuple[TrainState, Metrics]:
        if context.patch_dropout:
            side = batch["image"].shape[1] // context.model.patch_size
            kept = image.kept_patches(
                random_key(4, state.step), len(batch["image"]), side**2, context.patch_dropout
            )
            batch = {**batch, KEPT: global_batch.over_batch(kept, mesh)}
        (_, metrics), grads = grad_fn(state.params, batch, sample)
        new_state, norms = optimizer(state, grads)
        return new_state, metrics | norms

    def sampled_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        sample = entity_sampling.draw(
            random_key(3, state.step),
            class_order.table_rows(batch["entity_ids"], context.num_entities),
            table_rows=state.params[sharding.ENTITY_TABLE].shape[0],
            num_entities=context.num_entities,
            rate=rate,
            mesh=mesh,
        )
        small = class_table.take(state, sample.rows, mesh)
        small = class_table.catch_up_ema(small, context.ema_decay)
        small, metrics = dense_step(small, batch, sample)
        return class_table.put(state, small, sample.rows, mesh), metrics

    return jax.jit(
        dense_step if rate == 1 else sampled_step,
        donate_argnums=0,
        in_shardings=(shardings, global_batch.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
