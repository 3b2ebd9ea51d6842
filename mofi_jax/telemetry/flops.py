"""Model FLOPs of a training step, what MFU divides: its matrix products, counted by hand.

A forward pass and twice that for the gradients, without what is recomputed to save memory
(rematerialisation, microbatches, the backward pass of the losses).  2 FLOP for each multiplication
and addition; norms, softmax and the optimizer would be a few percent more.  The convention of PaLM
(arXiv 2204.02311, appendix B), attention included; a causal mask saves nothing, as the masked
logits are computed too.
"""

from typing import Any

from mofi_jax.losses import class_order, entity_sampling
from mofi_jax.model import image, mofi

TRAINED, FROZEN = 3, 1  # forward, and the gradients of inputs and of weights


def of_step(context: Any, *, batch_size: int) -> dict[str, float]:
    """Model FLOPs of one step over the global batch, on all devices together.

    Args:
      context: `training.step.StepContext`; a frozen tower has no backward pass, and dropped
        patches cost nothing.

    Returns:
      "image" and "text", the towers with their projections; "classes", cosines with the class
      table; "pairs", cosines of images with texts.
    """
    model, losses = context.model, context.losses
    classes = text = pairs = 0.0
    times = {name: FROZEN if name in context.frozen else TRAINED for name in mofi.TOWERS}
    # The pixels have no gradient, so their projection has one pass less.
    dropout = context.patch_dropout
    backward_free = image_input(model, dropout) if "image" not in context.frozen else 0.0
    pictures = batch_size * (times["image"] * image_forward(model, dropout) - backward_free)
    if "entity" in losses:
        rows, rate = context.num_entities, losses["entity"]["sample_rate"]
        if rate < 1:  # rows of the class table that a step compares each picture with
            padded = class_order.padded_rows(rows, context.mesh)
            rows = entity_sampling.places(padded, rate, context.mesh) * context.mesh.size
        classes = TRAINED * 2.0 * batch_size * rows * model.embed_dim
    if "contrastive" in losses:
        # Token embeddings are looked up.
        one = _tower(model.text, model.context_length, model.embed_dim)
        text = batch_size * times["text"] * one
        pairs = TRAINED * 2.0 * batch_size**2 * model.embed_dim
    return {"image": pictures, "text": text, "classes": classes, "pairs": pairs}


def image_forward(model: mofi.MofiConfig, dropout: float = 0.0) -> float:
    """FLOPs of one picture through the image tower, a share of its patches left out."""
    patches, first = _patches(model, dropout), image_input(model, dropout)
    if model.family == "clip":
        return first + _tower(model.image, patches + 1, model.embed_dim)
    # Attention pooling (`mofi_jax.model.pooling`): logits, means, and value, out and MLP of these.
    tower, width = model.image, model.image.width
    pooling = 2 * patches * tower.heads + 2 * width + 2 * tower.hidden_width
    return first + _tower(tower, patches, 0) + 2.0 * width * pooling


def image_input(model: mofi.MofiConfig, dropout: float = 0.0) -> float:
    """FLOPs of one picture's patch embedding."""
    return 2.0 * _patches(model, dropout) * 3 * model.patch_size**2 * model.image.width


def _patches(model: mofi.MofiConfig, dropout: float) -> int:
    return image.kept_count((model.image_size // model.patch_size) ** 2, dropout)


def _tower(tower: mofi.TowerConfig, tokens: int, embed_dim: int) -> float:
    """The blocks, and the projection of the pooled token."""
    width = tower.width
    # Query, key, value and out; both layers of the MLP.
    weights = 4 * width**2 + 2 * tower.hidden_width * width
    attention = 2 * tokens * width
    return 2.0 * (tower.layers * tokens * (weights + attention) + width * embed_dim)
