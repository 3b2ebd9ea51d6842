"""One jitted update: a dict of weighted task losses on one shared embedding (paper section 3)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mofi_jax import partition
from mofi_jax.losses import contrastive, entity
from mofi_jax.model import mofi
from mofi_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def entity_task(
    params: Any, batch: Batch, images: jax.Array, *, model, mesh, num_entities, settings
) -> tuple[jax.Array, Metrics]:
    """Classification over the entity vocabulary (margin softmax, paper section 3.1)."""
    loss = entity.entity_softmax(
        images,
        params["entity_table"],
        batch["entity_ids"],
        batch["entity_weights"],
        num_entities=num_entities,
        scale=settings["scale"],
        margin=settings["margin"],
        mesh=mesh,
        block_size=settings["block_size"],
        compute_dtype=jnp.dtype(model.dtype),
    )
    rows = jnp.maximum(loss.count, 1.0)
    return loss.total / rows, {
        "entity_accuracy": loss.correct / rows,
        "labelled_share": loss.count / images.shape[0],
    }


def contrastive_task(
    params: Any, batch: Batch, images: jax.Array, *, model, mesh, num_entities, settings
) -> tuple[jax.Array, Metrics]:
    """Image against text over the global batch (CLIP softmax, paper section 3.2)."""
    del num_entities, settings
    texts = mofi.embed_texts(model, params, batch["tokens"])
    scale = mofi.logit_scale(params)
    loss = contrastive.clip_softmax(
        images, texts, scale, mesh=mesh, valid=batch["text_valid"], groups=batch["text_group"]
    )
    return loss.total / jnp.maximum(loss.count, 1.0), {"logit_scale": scale}


TASKS: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
    "entity": entity_task,
    "contrastive": contrastive_task,
}


def make_loss(
    model: mofi.MofiConfig,
    losses: Mapping[str, Mapping[str, Any]],
    *,
    mesh: Mesh,
    num_entities: int,
) -> Callable[[Any, Batch], tuple[jax.Array, Metrics]]:
    """The weighted sum of the task losses as a function of (params, batch).

    Args:
      losses: task name -> {"weight": ..., settings of the task}.
    """

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        images = mofi.embed_images(model, params, batch["image"])
        total, metrics = jnp.zeros(()), {}
        for name, settings in losses.items():
            value, extra = TASKS[name](
                params,
                batch,
                images,
                model=model,
                mesh=mesh,
                num_entities=num_entities,
                settings=settings,
            )
            total += settings["weight"] * value
            metrics |= {f"loss_{name}": value, **extra}
        return total, {"loss": total, **metrics}

    return loss_fn


def make_update(
    model: mofi.MofiConfig,
    losses: Mapping[str, Mapping[str, Any]],
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    num_entities: int,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the incoming state is donated."""
    loss_fn = make_loss(model, losses, mesh=mesh, num_entities=num_entities)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(shardings, partition.batch_sharding(mesh)),
        out_shardings=(shardings, partition.replicated(mesh)),
    )
