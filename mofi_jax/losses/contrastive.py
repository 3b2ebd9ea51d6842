"""Contrastive loss: CLIP softmax over the global batch, with negatives that know their labels.

`clip_softmax_dense` is the definition, with b x b logits, differentiated by jax.  `clip_softmax`
computes the same numbers from the logits of each device's own images, a tile at a time: one tile
serves both directions, forward and backward, and is then forgotten.

Symmetric InfoNCE as in axlearn's ``vision/clip.py`` and CLIP (arXiv 2103.00020): every image
picks its text among the texts of the batch, every text its image, both directions averaged.  What
becomes of pairs that share an entity is told by `relations.SAME_ENTITY`; where they are positive,
all of a row's targets have equal weight, the logarithm outside of their mean (UniCL, arXiv
2204.03610; the "out" form of SupCon, arXiv 2004.11362).

This file knows nothing of models, temperature caps or the weight of a task.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mofi_jax.distributed import meshes
from mofi_jax.losses import base, blocks, relations

# ---------------------------------------------------------------------------- dense reference


def clip_softmax_dense(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    *,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    image_entities: Int[Array, "b k"] | None = None,
    text_entity: Int[Array, " b"] | None = None,
    same_entity: str = "masked",
) -> base.LossSum:
    """The definition of `clip_softmax`, with all b x b logits in memory."""
    relations.check(image.shape[0], image_entities, text_entity, same_entity)
    valid = valid > 0
    pairs = relations.pairs_of(
        jnp.eye(image.shape[0], dtype=bool),
        image_valid=valid,
        text_valid=valid,
        image_entities=image_entities,
        text_entity=text_entity,
        same_entity=same_entity,
    )
    cos = relations.dot(
        "id,jd->ij", relations.real_rows(image, valid), relations.real_rows(text, valid)
    )
    pair = jnp.diagonal(cos)
    logits = jnp.where(pairs.in_denominator, logit_scale_exp * cos, relations.LOWEST)
    total, correct = 0.0, 0.0
    for axis in (1, 0):  # image -> text, text -> image
        log_p = jnp.where(pairs.positive, jax.nn.log_softmax(logits, axis=axis), 0.0)
        targets = jnp.maximum(jnp.sum(pairs.positive, axis=axis), 1)
        total -= 0.5 * jnp.sum(jnp.sum(log_p, axis=axis) / targets)
        best_wrong = jnp.max(jnp.where(pairs.wrong, cos, relations.LOWEST), axis=axis)
        correct += 0.5 * jnp.sum(valid & (pair > best_wrong))
    cosine = jnp.sum(jnp.where(valid, pair, 0.0))
    return base.LossSum(total, jnp.sum(valid, dtype=jnp.float32), correct, cosine)


# ---------------------------------------------------------------------------- sharded, in tiles


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
) -> base.LossSum:
    """CLIP loss over the global batch; a device holds [b / batch shards, block] logits at a time.

    Gradients are exact for image, text and logit_scale_exp.  Collectives: all-gather of the
    texts, all-reduce of [b] vectors and scalars, reduce-scatter of the texts' gradient.

    Args:
      image: L2-normalised image embeddings, fp32 or bf16; batch over `meshes.BATCH_AXES`.
      text: L2-normalised text embeddings; row i belongs to image i.
      logit_scale_exp: factor of the cosines, > 0, the exponential already taken and capped.
      mesh: the mesh of `meshes.make_mesh`.
      valid: rows that take part; a row with 0 is neither a row nor anyone's negative.
      image_entities: everything each image shows, as ids of entities; fill a row up by repeating
        one of its own.  None, like ids that occur in no `text_entity`, relates no image to another
        image's text.
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
    relations.check(image.shape[0], image_entities, text_entity, same_entity, mesh)
    static = relations.Static(mesh, same_entity, block_size)
    scale = jnp.asarray(logit_scale_exp, jnp.float32)
    return _clip_sharded(static, image, text, scale, valid > 0, image_entities, text_entity)


# Without labels, image_entities and text_entity are None: an empty tree to shard_map.
_INPUTS = (blocks.BATCH, blocks.BATCH, P(), blocks.BATCH, blocks.BATCH, blocks.BATCH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _clip_sharded(static, image, text, scale, valid, image_entities, text_entity):
    return _clip_forward(static, image, text, scale, valid, image_entities, text_entity)[0]


def _clip_forward(static, *inputs):
    run = blocks.shard_map(
        functools.partial(_forward_shard, static),
        static.mesh,
        in_specs=_INPUTS,
        out_specs=(base.LossSum(P(), P(), P(), P()), blocks.BATCH, P()),
    )
    loss, rows, columns = run(*inputs)
    return loss, (*inputs, rows, columns)


def _clip_backward(static, residuals, cotangent):
    run = blocks.shard_map(
        functools.partial(_backward_shard, static),
        static.mesh,
        in_specs=(*_INPUTS, blocks.BATCH, P(), P()),
        out_specs=(blocks.BATCH, blocks.BATCH, P()),
    )
    d_image, d_text, d_scale = run(*residuals, cotangent.total)
    return d_image, d_text, d_scale, None, None, None


_clip_sharded.defvjp(_clip_forward, _clip_backward)


class _Sums(NamedTuple):
    """One direction: over the texts of each image, or over the images of each text."""

    # The largest cosine and not the largest logit: scale * (cos - top) is as exact as the cosines
    # are, whereas the difference of two logits of 100 is off by 1e-5.
    top: Array  # of the counted pairs
    exp_sum: Array  # exp(scale * (cos - top)) of the counted pairs
    target_sum: Array  # cosines of the positive pairs
    targets: Array  # how many these are
    best_wrong: Array

    def losses(self, scale: Array) -> Array:
        mean = self.target_sum / self.targets
        return scale * (self.top - mean) + jnp.log(self.exp_sum)


def _tile_sums(cos: Array, pairs: relations.Pairs, scale: Array, axis: int) -> _Sums:
    top = jnp.max(jnp.where(pairs.in_denominator, cos, relations.LOWEST), axis=axis, keepdims=True)
    p = jnp.where(pairs.in_denominator, jnp.exp(scale * (cos - top)), 0.0)
    return _Sums(
        top=jnp.squeeze(top, axis),
        exp_sum=jnp.sum(p, axis=axis),
        target_sum=jnp.sum(jnp.where(pairs.positive, cos, 0.0), axis=axis),
        targets=jnp.sum(pairs.positive, axis=axis, dtype=jnp.float32),
        best_wrong=jnp.max(jnp.where(pairs.wrong, cos, relations.LOWEST), axis=axis),
    )


def _no_sums(rows: int) -> _Sums:
    lowest, zeros = jnp.full(rows, relations.LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32)
    return _Sums(lowest, zeros, zeros, zeros, lowest)


def _add(a: _Sums, b: _Sums, scale: Array) -> _Sums:
    top = jnp.maximum(a.top, b.top)
    return _Sums(
        top=top,
        exp_sum=a.exp_sum * jnp.exp(scale * (a.top - top))
        + b.exp_sum * jnp.exp(scale * (b.top - top)),
        target_sum=a.target_sum + b.target_sum,
        targets=a.targets + b.targets,
        best_wrong=jnp.maximum(a.best_wrong, b.best_wrong),
    )


def _add_over_devices(sums: _Sums, scale: Array) -> _Sums:
    top, best_wrong = lax.pmax((sums.top, sums.best_wrong), meshes.BATCH_AXES)
    exp_sum, target_sum, targets = lax.psum(
        (sums.exp_sum * jnp.exp(scale * (sums.top - top)), sums.target_sum, sums.targets),
        meshes.BATCH_AXES,
    )
    return _Sums(top, exp_sum, target_sum, targets, best_wrong)


def _part(tree: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def _with_part(tree: Any, part: Any, start: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


class _Texts(NamedTuple):
    rows: Array
    valid: Array
    text_entity: Array | None


def _all_texts(text, valid, text_entity):
    # In their own dtype: as bf16 they are half as long under way.
    return jax.tree.map(
        blocks.gather_batch, _Texts(relations.real_rows(text, valid), valid, text_entity)
    )


def _tile(static, image, valid, image_entities, texts, start):
    """Cosines of this device's images with texts start, start + 1, ... of the batch."""
    first = lax.axis_index(meshes.BATCH_AXES) * image.shape[0]
    own_text = first + jnp.arange(image.shape[0])
    pairs = relations.pairs_of(
        own_text[:, None] == start + jnp.arange(texts.rows.shape[0])[None, :],
        image_valid=valid,
        text_valid=texts.valid,
        image_entities=image_entities,
        text_entity=texts.text_entity,
        same_entity=static.same_entity,
    )
    return relations.dot("id,jd->ij", image, texts.rows), pairs


def _forward_shard(static, image, text, scale, valid, image_entities, text_entity):
    image, texts = relations.real_rows(image, valid), _all_texts(text, valid, text_entity)
    mine, everyone = image.shape[0], texts.rows.shape[0]

    def body(carry, start, size):
        rows, columns, pair = carry
        cos, pairs = _tile(static, image, valid, image_entities, _part(texts, start, size), start)
        rows = _add(rows, _tile_sums(cos, pairs, scale, axis=1), scale)
        columns = _with_part(columns, _tile_sums(cos, pairs, scale, axis=0), start)
        return rows, columns, pair + jnp.sum(jnp.where(pairs.own, cos, 0.0), axis=1)

    carry = _no_sums(mine), _no_sums(everyone), jnp.zeros(mine, jnp.float32)
    block = static.block(mine, everyone)
    rows, columns, pair = blocks.over_blocks(everyone, block, body, carry)
    columns = _add_over_devices(columns, scale)
    own = _part(columns, lax.axis_index(meshes.BATCH_AXES) * mine, mine)
    losses = 0.5 * (rows.losses(scale) + own.losses(scale))
    hits = 0.5 * (pair > rows.best_wrong) + 0.5 * (pair > own.best_wrong)
    local = base.LossSum(
        total=jnp.sum(jnp.where(valid, losses, 0.0)),
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
        cosine=jnp.sum(jnp.where(valid, pair, 0.0)),
    )
    return lax.psum(local, meshes.BATCH_AXES), rows, columns


def _backward_shard(
    static, image, text, scale, valid, image_entities, text_entity, rows, columns, d_total
):
    images, texts = relations.real_rows(image, valid), _all_texts(text, valid, text_entity)
    mine, everyone = image.shape[0], texts.rows.shape[0]

    def body(carry, start, size):
        d_images, d_texts, d_scale = carry
        part, column = _part(texts, start, size), _part(columns, start, size)
        cos, pairs = _tile(static, images, valid, image_entities, part, start)
        # Both directions in one tile.  What is not counted is nan or inf until the last line.
        p = jnp.exp(scale * (cos - rows.top[:, None])) / rows.exp_sum[:, None]
        p += jnp.exp(scale * (cos - column.top)) / column.exp_sum
        target = jnp.where(pairs.positive, 1 / rows.targets[:, None] + 1 / column.targets, 0.0)
        d_logits = jnp.where(pairs.in_denominator, 0.5 * d_total * (p - target), 0.0)
        d_cos = scale * d_logits
        d_images += relations.dot("ij,jd->id", d_cos, part.rows)
        d_part = relations.dot("ij,id->jd", d_cos, images)
        d_texts = lax.dynamic_update_slice_in_dim(d_texts, d_part, start, 0)
        return d_images, d_texts, d_scale + jnp.sum(d_logits * cos, axis=1)

    carry = (
        jnp.zeros(image.shape, jnp.float32),
        jnp.zeros(texts.rows.shape, jnp.float32),
        jnp.zeros(mine, jnp.float32),
    )
    block = static.block(mine, everyone)
    d_images, d_texts, d_scale = blocks.over_blocks(everyone, block, body, carry)
    d_text = lax.psum_scatter(d_texts, meshes.BATCH_AXES, scatter_dimension=0, tiled=True)
    # Over the axes that split the batch only: along "tensor" all devices have the same sum.
    d_scale = lax.psum(jnp.sum(d_scale), meshes.BATCH_AXES)
    return d_images.astype(image.dtype), d_text.astype(text.dtype), d_scale
