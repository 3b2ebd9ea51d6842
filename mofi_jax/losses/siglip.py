"""Contrastive loss: SigLIP, a yes or no for every pair of the global batch, around a ring.

`siglip_dense` is the definition, with b x b logits, differentiated by jax.  `siglip` computes the
same numbers: the texts of each batch shard travel around the ring of all shards, and each device
compares them with its images, a tile at a time.  No device ever holds more than one shard of texts
besides its own, forward or backward.

The loss of Zhai et al. (arXiv 2303.15343), which needs no normalisation over the batch::

    z_ij  = scale * cos(image_i, text_j) + bias
    total = -sum_ij log_sigmoid(y_ij * z_ij)      y = 1 for positive pairs, -1 for others

`relations.SAME_ENTITY` says what becomes of pairs that share an entity: y = -1 (off), no term
(masked), or y = 1 (positive).  The paper starts from scale 10 and bias -10, so that the b - 1
negatives of each row do not outweigh its one positive.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mofi_jax.distributed import global_batch, meshes
from mofi_jax.losses import blocks, relations


def siglip_dense(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    logit_bias: float | Float[Array, ""],
    *,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    image_entities: Int[Array, "b k"] | None = None,
    text_entity: Int[Array, " b"] | None = None,
    same_entity: str = "masked",
) -> blocks.LossSum:
    """The definition of `siglip`, with all b x b logits in memory."""
    labels = relations.checked(valid, image_entities, text_entity, same_entity)
    images, texts = relations.sides(image, text, labels)
    cos, pairs, _ = relations.tile(images, texts, 0, image.shape[0], same_entity, 0)
    z = logit_scale_exp * cos + logit_bias
    losses = -jax.nn.log_sigmoid(jnp.where(pairs.positive, z, -z))
    total = jnp.sum(jnp.where(pairs.in_denominator, losses, 0.0))
    wrong = jnp.where(pairs.wrong, cos, blocks.MASKED)
    best_wrong = jnp.max(wrong, axis=1), jnp.max(wrong, axis=0)
    return relations.loss_sum(total, images.valid, jnp.diagonal(cos), best_wrong)


@jax.named_scope("contrastive")
def siglip(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    logit_bias: float | Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    image_entities: Int[Array, "b k"] | None = None,
    text_entity: Int[Array, " b"] | None = None,
    same_entity: str = "masked",
    block_size: int | None = None,
) -> blocks.LossSum:
    """SigLIP loss over the global batch; a device holds one shard of texts and a tile of logits.

    Gradients are exact for image, text, logit_scale_exp and logit_bias.  Collectives: permutations
    of one shard of texts or of their gradient, all-reduce of scalars.

    Arguments are those of `contrastive.clip_softmax`; logit_bias is added to every logit.

    Returns:
      Sums over the pairs (total) and the valid rows (count, correct): total / count is the paper's
      loss.  `correct` is that of `contrastive.clip_softmax`.
    """
    labels = relations.checked(valid, image_entities, text_entity, same_entity)
    blocks.check_batch(image.shape[0], mesh)
    mine = image.shape[0] // global_batch.batch_shards(mesh)
    static = mesh, same_entity, blocks.tile_columns(mesh, mine, mine, block_size)
    scale, bias = (jnp.asarray(x, jnp.float32) for x in (logit_scale_exp, logit_bias))
    return blocks.sharded(
        mesh,
        functools.partial(_forward, *static),
        functools.partial(_backward, *static),
        (image, text, scale, bias, labels),
        (blocks.BATCH, blocks.BATCH, P(), P(), blocks.BATCH),
        residual_specs=(),
        differentiable=4,
    )


def _over_ring(
    mesh: Mesh,
    ring_step: Callable[..., tuple[Any, Any]],
    image_sums: Any,
    texts: relations.Side,
    text_sums: Any,
) -> tuple[Any, Any]:
    """Sends every shard's texts once around the ring of batch shards, their sums with them.

    ``image_sums, text_sums = ring_step(image_sums, texts, text_sums, first_own)`` runs on every
    device that texts come to; first_own as for `relations.tile`.  Returns the sums of this device's
    images over all texts, and of its texts over all images.
    """
    shards = global_batch.batch_shards(mesh)
    image_sums, text_sums = ring_step(image_sums, texts, text_sums, 0)
    if shards == 1:
        return image_sums, text_sums

    def send(tree: Any) -> Any:
        ring = [(i, (i + 1) % shards) for i in range(shards)]
        return lax.ppermute(tree, meshes.BATCH_AXES, ring)

    def hop(_: Any, carry: Any) -> Any:
        image_sums, texts, text_sums = carry
        # The next texts leave, and the sums follow their texts, before this step: neither needs its
        # result, so that both are under way while the tiles are computed.
        next_texts, text_sums = send(texts), send(text_sums)
        image_sums, text_sums = ring_step(image_sums, texts, text_sums, None)
        return image_sums, next_texts, text_sums

    carry = image_sums, send(texts), text_sums
    image_sums, _, text_sums = lax.fori_loop(1, shards, hop, carry)
    return image_sums, send(text_sums)


def _forward(mesh, same_entity, block, image, text, scale, bias, labels):
    images, texts = relations.sides(image, text, labels)
    mine = image.shape[0]

    def ring_step(sums, texts, best_image, first_own):
        def body(carry, start, size):
            (loss, pair, best_text), best_image = carry
            cos, pairs, _ = relations.tile(images, texts, start, size, same_entity, first_own)
            z = scale * cos + bias
            losses = jax.nn.softplus(jnp.where(pairs.positive, -z, z))
            wrong = jnp.where(pairs.wrong, cos, blocks.MASKED)
            loss += jnp.sum(jnp.where(pairs.in_denominator, losses, 0.0), axis=1)
            pair += jnp.sum(jnp.where(pairs.own, cos, 0.0), axis=1)
            best_text = jnp.maximum(best_text, jnp.max(wrong, axis=1))
            best = blocks.slice_rows(best_image, start, size)
            best = jnp.maximum(best, jnp.max(wrong, axis=0))
            return (loss, pair, best_text), blocks.update_rows(best_image, best, start)

        return blocks.over_blocks(mine, block, body, (sums, best_image))

    zeros, lowest = jnp.zeros(mine), jnp.full(mine, blocks.MASKED, jnp.float32)
    # Of each image the loss, the cosine with its own text, and the largest with a wrong text; of
    # each text the largest with a wrong image.
    sums, best_image = _over_ring(mesh, ring_step, (zeros, zeros, lowest), texts, lowest)
    loss, pair, best_text = sums
    local = relations.loss_sum(jnp.sum(loss), images.valid, pair, (best_text, best_image))
    return lax.psum(local, meshes.BATCH_AXES), ()


def _backward(mesh, same_entity, block, image, text, scale, bias, labels, _, d_total):
    images, texts = relations.sides(image, text, labels)
    mine = image.shape[0]

    def ring_step(sums, texts, d_texts, first_own):
        def body(carry, start, size):
            (d_images, d_scale, d_bias), d_texts = carry
            cos, pairs, part = relations.tile(images, texts, start, size, same_entity, first_own)
            z = scale * cos + bias
            d_z = jnp.where(pairs.positive, -jax.nn.sigmoid(-z), jax.nn.sigmoid(z))
            d_z = jnp.where(pairs.in_denominator, d_total * d_z, 0.0)
            d_cos = scale * d_z
            d_images += blocks.dot("ij,jd->id", d_cos, part)
            d_part = blocks.slice_rows(d_texts, start, size)
            d_part += blocks.dot("ij,id->jd", d_cos, images.embeddings)
            d_texts = blocks.update_rows(d_texts, d_part, start)
            d_scale += jnp.sum(d_z * cos, axis=1)
            return (d_images, d_scale, d_bias + jnp.sum(d_z, axis=1)), d_texts

        return blocks.over_blocks(mine, block, body, (sums, d_texts))

    zeros, rows = jnp.zeros(mine), jnp.zeros(image.shape, jnp.float32)
    sums, d_texts = _over_ring(mesh, ring_step, (rows, zeros, zeros), texts, rows)
    d_images, d_scale, d_bias = sums
    # Over the axes that split the batch only: along "tensor" all devices have the same sums.
    d_scale, d_bias = lax.psum((jnp.sum(d_scale), jnp.sum(d_bias)), meshes.BATCH_AXES)
    return d_images.astype(image.dtype), d_texts.astype(text.dtype), d_scale, d_bias
