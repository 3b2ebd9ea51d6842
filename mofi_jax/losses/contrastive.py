"""Contrastive loss: CLIP softmax over the global batch, with negatives that know their labels.

`clip_softmax_dense` is the definition, with b x b logits, differentiated by jax.  `clip_softmax`
computes the same numbers from the logits of each device's own images, a tile at a time: one tile
serves both directions, forward and backward, and is then forgotten.

Symmetric InfoNCE as in axlearn's ``vision/clip.py`` and CLIP (arXiv 2103.00020): every image
picks its text among the texts of the batch, every text its image, both directions averaged.
`relations.SAME_ENTITY` says what becomes of pairs that share an entity; where they are positive,
all of a row's targets have equal weight, the logarithm outside of their mean (UniCL, arXiv
2204.03610; the "out" form of SupCon, arXiv 2004.11362).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mofi_jax.distributed import global_batch, meshes
from mofi_jax.losses import blocks, relations


def clip_softmax_dense(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    *,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    image_entities: Int[Array, "b k"] | None = None,
    text_entity: Int[Array, " b"] | None = None,
    same_entity: str = "masked",
) -> blocks.LossSum:
    """The definition of `clip_softmax`, with all b x b logits in memory."""
    labels = relations.checked(valid, image_entities, text_entity, same_entity)
    images, texts = relations.sides(image, text, labels)
    cos, pairs, _ = relations.tile(images, texts, 0, image.shape[0], same_entity, 0)
    logits = jnp.where(pairs.in_denominator, logit_scale_exp * cos, blocks.MASKED)
    total, best_wrong = 0.0, []
    for axis in (1, 0):  # image -> text, text -> image
        log_p = jnp.where(pairs.positive, jax.nn.log_softmax(logits, axis=axis), 0.0)
        targets = jnp.maximum(jnp.sum(pairs.positive, axis=axis), 1)
        total -= 0.5 * jnp.sum(jnp.sum(log_p, axis=axis) / targets)
        best_wrong.append(jnp.max(jnp.where(pairs.wrong, cos, blocks.MASKED), axis=axis))
    return relations.loss_sum(total, images.valid, jnp.diagonal(cos), best_wrong)


@jax.named_scope("contrastive")
def clip_softmax(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    image_entities: Int[Array, "b k"] | None = None,
    text_entity: Int[Array, " b"] | None = None,
    same_entity: str = "masked",
    block_size: int | None = None,
) -> blocks.LossSum:
    """CLIP loss over the global batch; a device holds [b / batch shards, block] logits at a time.

    Gradients are exact for image, text and logit_scale_exp.  Collectives: all-gather of the
    texts, all-reduce of [b] vectors and scalars, reduce-scatter of the texts' gradient.

    Args:
      image: L2-normalised image embeddings, fp32 or bf16; batch over `meshes.BATCH_AXES`.
      text: L2-normalised text embeddings; row i belongs to image i.
      logit_scale_exp: factor of the cosines, > 0, the exponential already taken and capped.
      valid: rows that take part; a row with 0 is neither a row nor anyone's negative.
      image_entities: ids of all entities that each image shows; fill a row up by repeating one of
        its own.  None, like ids that occur in no `text_entity`, relates no image to another image's
        text.
      text_entity: what each text is about: the id of an entity or, where there is none, a number
        below 0 that stands for its words.  Image i is related to text j if text_entity[j] is in
        image_entities[i]; to its own text always.
      same_entity: what related pairs other than the own ones are, see `relations.SAME_ENTITY`.
      block_size: texts per tile; None chooses it from the shapes and the kind of device.

    Returns:
      Sums over the valid rows.  A row's loss is the mean of its two directions.  A row counts a
      half as correct in each direction in which its own pair ranks above every wrong one.

    Raises:
      BadInput: the batch does not divide over the mesh's batch axes, one of image_entities and
        text_entity is missing, or an unknown same_entity.
    """
    batch = image.shape[0]
    labels = relations.checked(valid, image_entities, text_entity, same_entity)
    blocks.check_batch(batch, mesh)
    images = batch // global_batch.batch_shards(mesh)
    block = blocks.tile_columns(mesh, images, batch, block_size)
    scale = jnp.asarray(logit_scale_exp, jnp.float32)
    return blocks.sharded(
        mesh,
        functools.partial(_forward, same_entity, block),
        functools.partial(_backward, same_entity, block),
        (image, text, scale, labels),
        (blocks.BATCH, blocks.BATCH, P(), blocks.BATCH),
        residual_specs=(blocks.BATCH, P()),
        differentiable=3,
    )


class _Sums(NamedTuple):
    """One direction: over the texts of each image, or over the images of each text."""

    # The largest cosine and not the largest logit: scale * (cos - top) is as exact as the cosines
    # are, whereas the difference of two logits of 100 is off by 1e-5.
    top: Array  # of the pairs in the denominator
    exp_sum: Array  # exp(scale * (cos - top)) of the pairs in the denominator
    target_sum: Array  # cosines of the positive pairs
    targets: Array  # how many these are
    best_wrong: Array

    def losses(self, scale: Array) -> Array:
        mean = self.target_sum / self.targets
        return scale * (self.top - mean) + jnp.log(self.exp_sum)


def _no_sums(rows: int) -> _Sums:
    lowest, zeros = jnp.full(rows, blocks.MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    return _Sums(lowest, zeros, zeros, zeros, lowest)


def _add_tile(sums: _Sums, cos: Array, pairs: relations.Pairs, scale: Array, axis: int) -> _Sums:
    top = jnp.max(jnp.where(pairs.in_denominator, cos, blocks.MASKED), axis=axis)
    top = jnp.maximum(sums.top, top)
    p = jnp.exp(scale * (cos - jnp.expand_dims(top, axis)))
    p = jnp.sum(jnp.where(pairs.in_denominator, p, 0.0), axis=axis)
    best_wrong = jnp.max(jnp.where(pairs.wrong, cos, blocks.MASKED), axis=axis)
    return _Sums(
        top=top,
        exp_sum=sums.exp_sum * jnp.exp(scale * (sums.top - top)) + p,
        target_sum=sums.target_sum + jnp.sum(jnp.where(pairs.positive, cos, 0.0), axis=axis),
        targets=sums.targets + jnp.sum(pairs.positive, axis=axis, dtype=jnp.float32),
        best_wrong=jnp.maximum(sums.best_wrong, best_wrong),
    )


def _add_over_devices(sums: _Sums, scale: Array) -> _Sums:
    top, best_wrong = lax.pmax((sums.top, sums.best_wrong), meshes.BATCH_AXES)
    exp_sum, target_sum, targets = lax.psum(
        (sums.exp_sum * jnp.exp(scale * (sums.top - top)), sums.target_sum, sums.targets),
        meshes.BATCH_AXES,
    )
    return _Sums(top, exp_sum, target_sum, targets, best_wrong)


def _sides(image, text, labels):
    """This device's images, the texts of all devices, and the place of the first image's own."""
    images, texts = relations.sides(image, text, labels)
    first_own = lax.axis_index(meshes.BATCH_AXES) * image.shape[0]
    return images, blocks.gather_batch(texts), first_own


def _forward(same_entity, block, image, text, scale, labels):
    images, texts, first_own = _sides(image, text, labels)
    mine, everyone = image.shape[0], texts.valid.shape[0]

    def body(carry, start, size):
        rows, columns, pair = carry
        cos, pairs, _ = relations.tile(images, texts, start, size, same_entity, first_own)
        column = _add_tile(_no_sums(size), cos, pairs, scale, axis=0)
        columns = blocks.update_rows(columns, column, start)
        rows = _add_tile(rows, cos, pairs, scale, axis=1)
        return rows, columns, pair + jnp.sum(jnp.where(pairs.own, cos, 0.0), axis=1)

    carry = _no_sums(mine), _no_sums(everyone), jnp.zeros(mine, jnp.float32)
    rows, columns, pair = blocks.over_blocks(everyone, block, body, carry)
    columns = _add_over_devices(columns, scale)
    own = blocks.slice_rows(columns, first_own, mine)
    losses = jnp.where(images.valid, 0.5 * (rows.losses(scale) + own.losses(scale)), 0.0)
    best_wrong = rows.best_wrong, own.best_wrong
    local = relations.loss_sum(jnp.sum(losses), images.valid, pair, best_wrong)
    return lax.psum(local, meshes.BATCH_AXES), (rows, columns)


def _backward(same_entity, block, image, text, scale, labels, sums, d_total):
    images, texts, first_own = _sides(image, text, labels)
    rows, columns = sums

    def body(carry, start, size):
        d_images, d_texts, d_scale = carry
        column = blocks.slice_rows(columns, start, size)
        cos, pairs, part = relations.tile(images, texts, start, size, same_entity, first_own)
        # Both directions in one tile.  What is in no denominator is nan or inf until the mask.
        p = jnp.exp(scale * (cos - rows.top[:, None])) / rows.exp_sum[:, None]
        p += jnp.exp(scale * (cos - column.top)) / column.exp_sum
        target = jnp.where(pairs.positive, 1 / rows.targets[:, None] + 1 / column.targets, 0.0)
        d_logits = jnp.where(pairs.in_denominator, 0.5 * d_total * (p - target), 0.0)
        d_cos = scale * d_logits
        d_images += blocks.dot("ij,jd->id", d_cos, part)
        d_part = blocks.dot("ij,id->jd", d_cos, images.embeddings)
        d_texts = blocks.update_rows(d_texts, d_part, start)
        return d_images, d_texts, d_scale + jnp.sum(d_logits * cos, axis=1)

    everyone, dim = texts.embeddings.shape
    shapes = image.shape, (everyone, dim), image.shape[:1]
    carry = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    d_images, d_texts, d_scale = blocks.over_blocks(everyone, block, body, carry)
    d_text = lax.psum_scatter(d_texts, meshes.BATCH_AXES, scatter_dimension=0, tiled=True)
    # Over the axes that split the batch only: along "tensor" all devices have the same sum.
    d_scale = lax.psum(jnp.sum(d_scale), meshes.BATCH_AXES)
    return d_images.astype(image.dtype), d_text.astype(text.dtype), d_scale
