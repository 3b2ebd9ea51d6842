"""Contrastive loss: SigLIP, a yes or no for every pair of the global batch, around a ring.

`siglip_dense` is the definition, with b x b logits, differentiated by jax.  `siglip` computes the
same numbers: the texts of each batch shard travel around the ring of all shards, and each device
judges its images against the visitors, a tile at a time.  No device ever sees more than one shard
of texts besides its own, forward or backward.

The loss of Zhai et al. (arXiv 2303.15343), which needs no normalisation over the batch::

    z_ij  = scale * cos(image_i, text_j) + bias
    total = -sum_ij log_sigmoid(y_ij * z_ij)      y = 1 for positive pairs, -1 for others

What becomes of pairs that share an entity is told by `relations.SAME_ENTITY`: y = -1 (off), no
term (masked), or y = 1 (positive).  The paper starts from scale 10 and bias -10, so that the b - 1
negatives of each row do not outweigh its one positive.

This file knows nothing of models, of how scale and bias are learned, or of the weight of a task.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mofi_jax.distributed import global_batch, meshes
from mofi_jax.losses import base, blocks, relations


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
) -> base.LossSum:
    """The definition of `siglip`, with all b x b logits in memory."""
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
    image, text = relations.real_rows(image, valid), relations.real_rows(text, valid)
    cos = relations.dot("id,jd->ij", image, text)
    z = logit_scale_exp * cos + logit_bias
    losses = -jax.nn.log_sigmoid(jnp.where(pairs.positive, z, -z))
    pair, best_wrong = jnp.diagonal(cos), jnp.where(pairs.wrong, cos, relations.LOWEST)
    hits = sum(0.5 * (pair > jnp.max(best_wrong, axis=axis)) for axis in (1, 0))
    return base.LossSum(
        total=jnp.sum(jnp.where(pairs.in_denominator, losses, 0.0)),
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
        cosine=jnp.sum(jnp.where(valid, pair, 0.0)),
    )


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
) -> base.LossSum:
    """SigLIP loss over the global batch; a device holds one shard of texts and a tile of logits.

    Gradients are exact for image, text, logit_scale_exp and logit_bias.  Collectives: permutations
    of one shard of texts or of their gradient, all-reduce of scalars.

    Args:
      image: L2-normalised image embeddings, fp32 or bf16; batch over `meshes.BATCH_AXES`.
      text: L2-normalised text embeddings; row i belongs to image i.
      logit_scale_exp: factor of the cosines, the exponential already taken and capped.
      logit_bias: added to every logit.
      mesh: the mesh of `meshes.make_mesh`.
      valid: rows that take part; a row with 0 is in no pair.
      image_entities: everything each image shows, as for `contrastive.clip_softmax`.
      text_entity: what each text is about, as for `contrastive.clip_softmax`.
      same_entity: what related pairs other than the own ones are, see `relations.SAME_ENTITY`.
      block_size: texts per tile; None chooses it from the shapes and the kind of device.

    Returns:
      Sums over the pairs (total) and the valid rows (count, correct): total / count is the paper's
      loss.  `correct` is that of `contrastive.clip_softmax`.

    Raises:
      BadInput: the batch does not divide over the mesh's batch axes, one of image_entities and
        text_entity is missing, or an unknown same_entity.
    """
    relations.check(image.shape[0], image_entities, text_entity, same_entity, mesh)
    static = relations.Static(mesh, same_entity, block_size)
    scale, bias = (jnp.asarray(x, jnp.float32) for x in (logit_scale_exp, logit_bias))
    return _siglip_sharded(static, image, text, scale, bias, valid > 0, image_entities, text_entity)


# Without labels, image_entities and text_entity are None: an empty tree to shard_map.
_INPUTS = (blocks.BATCH, blocks.BATCH, P(), P(), blocks.BATCH, blocks.BATCH, blocks.BATCH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _siglip_sharded(static, image, text, scale, bias, valid, image_entities, text_entity):
    return _siglip_forward(static, image, text, scale, bias, valid, image_entities, text_entity)[0]


def _siglip_forward(static, *inputs):
    run = blocks.shard_map(
        functools.partial(_forward_shard, static),
        static.mesh,
        in_specs=_INPUTS,
        out_specs=base.LossSum(P(), P(), P(), P()),
    )
    return run(*inputs), inputs


def _siglip_backward(static, inputs, cotangent):
    run = blocks.shard_map(
        functools.partial(_backward_shard, static),
        static.mesh,
        in_specs=(*_INPUTS, P()),
        out_specs=(blocks.BATCH, blocks.BATCH, P(), P()),
    )
    return *run(*inputs, cotangent.total), None, None, None


_siglip_sharded.defvjp(_siglip_forward, _siglip_backward)


class _Texts(NamedTuple):
    """The texts of one shard, in their own dtype: as bf16 they are half as long under way."""

    rows: Array
    valid: Array
    text_entity: Array | None


def _around(
    mesh: Mesh,
    visit: Callable[[Any, _Texts, Any, bool], tuple[Any, Any]],
    kept: Any,
    texts: _Texts,
    luggage: Any,
) -> tuple[Any, Any]:
    """Sends every shard's texts once around the ring of batch shards.

    Args:
      visit: ``kept, luggage = visit(kept, texts, luggage, at_home)`` at every device that the texts
        come to; at_home for the first, where they belong.
      kept: what stays on this device.
      texts: this device's.
      luggage: what travels with these texts and changes on the way.

    Returns:
      kept after all visitors, and the luggage of this device's texts after all their visits.
    """
    shards = global_batch.batch_shards(mesh)
    kept, home_luggage = visit(kept, texts, luggage, True)
    if shards == 1:
        return kept, home_luggage

    def move(tree: Any) -> Any:
        ring = [(i, (i + 1) % shards) for i in range(shards)]
        return lax.ppermute(tree, meshes.BATCH_AXES, ring)

    def hop(_: Any, carry: Any) -> Any:
        kept, texts, luggage = carry
        # The next texts leave, and the luggage follows its texts, before this visit: neither needs
        # its result, so that both are under way while the tiles are computed.
        arriving, sums = move(texts), move(luggage)
        kept, luggage = visit(kept, texts, sums, False)
        return kept, arriving, luggage

    kept, _, luggage = lax.fori_loop(1, shards, hop, (kept, move(texts), home_luggage))
    return kept, move(luggage)


def _tile(static, image, valid, image_entities, texts, start, size, at_home):
    """Cosines of this device's images with some of the visiting texts; and those texts."""
    part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), texts)
    own = jnp.arange(image.shape[0])[:, None] == start + jnp.arange(size)[None, :]
    pairs = relations.pairs_of(
        own & at_home,
        image_valid=valid,
        text_valid=part.valid,
        image_entities=image_entities,
        text_entity=part.text_entity,
        same_entity=static.same_entity,
    )
    return relations.dot("id,jd->ij", image, part.rows), pairs, part.rows


class _Kept(NamedTuple):
    """Sums over the texts of each image."""

    loss: Array
    pair: Array  # cosine with the own text
    best_wrong: Array


def _forward_shard(static, image, text, scale, bias, valid, image_entities, text_entity):
    image, texts = relations.real_rows(image, valid), relations.real_rows(text, valid)
    mine = image.shape[0]
    block = static.block(mine, mine)

    def visit(kept, texts, best_wrong, at_home):
        def body(carry, start, size):
            kept, best_wrong = carry
            cos, pairs, _ = _tile(static, image, valid, image_entities, texts, start, size, at_home)
            z = scale * cos + bias
            losses = jax.nn.softplus(jnp.where(pairs.positive, -z, z))
            wrong = jnp.where(pairs.wrong, cos, relations.LOWEST)
            kept = _Kept(
                loss=kept.loss + jnp.sum(jnp.where(pairs.in_denominator, losses, 0.0), axis=1),
                pair=kept.pair + jnp.sum(jnp.where(pairs.own, cos, 0.0), axis=1),
                best_wrong=jnp.maximum(kept.best_wrong, jnp.max(wrong, axis=1)),
            )
            before = lax.dynamic_slice_in_dim(best_wrong, start, size)
            now = jnp.maximum(before, jnp.max(wrong, axis=0))
            return kept, lax.dynamic_update_slice_in_dim(best_wrong, now, start, 0)

        return blocks.over_blocks(mine, block, body, (kept, best_wrong))

    zeros, lowest = jnp.zeros(mine), jnp.full(mine, relations.LOWEST, jnp.float32)
    kept, best_wrong = _around(
        static.mesh, visit, _Kept(zeros, zeros, lowest), _Texts(texts, valid, text_entity), lowest
    )
    hits = 0.5 * (kept.pair > kept.best_wrong) + 0.5 * (kept.pair > best_wrong)
    local = base.LossSum(
        total=jnp.sum(kept.loss),
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
        cosine=jnp.sum(jnp.where(valid, kept.pair, 0.0)),
    )
    return lax.psum(local, meshes.BATCH_AXES)


def _backward_shard(static, image, text, scale, bias, valid, image_entities, text_entity, d_total):
    images, texts = relations.real_rows(image, valid), relations.real_rows(text, valid)
    mine = image.shape[0]
    block = static.block(mine, mine)

    def visit(kept, texts, d_texts, at_home):
        def body(carry, start, size):
            (d_images, d_scale, d_bias), d_texts = carry
            cos, pairs, rows = _tile(
                static, images, valid, image_entities, texts, start, size, at_home
            )
            z = scale * cos + bias
            d_z = jnp.where(pairs.positive, -jax.nn.sigmoid(-z), jax.nn.sigmoid(z))
            d_z = jnp.where(pairs.in_denominator, d_total * d_z, 0.0)
            d_cos = scale * d_z
            d_images += relations.dot("ij,jd->id", d_cos, rows)
            d_rows = lax.dynamic_slice_in_dim(d_texts, start, size)
            d_rows += relations.dot("ij,id->jd", d_cos, images)
            d_texts = lax.dynamic_update_slice_in_dim(d_texts, d_rows, start, 0)
            d_scale += jnp.sum(d_z * cos, axis=1)
            return (d_images, d_scale, d_bias + jnp.sum(d_z, axis=1)), d_texts

        return blocks.over_blocks(mine, block, body, (kept, d_texts))

    zeros, rows = jnp.zeros(mine), jnp.zeros(image.shape, jnp.float32)
    (d_images, d_scale, d_bias), d_texts = _around(
        static.mesh, visit, (rows, zeros, zeros), _Texts(texts, valid, text_entity), rows
    )
    # Over the axes that split the batch only: along "tensor" all devices have the same sums.
    d_scale, d_bias = lax.psum((jnp.sum(d_scale), jnp.sum(d_bias)), meshes.BATCH_AXES)
    return d_images.astype(image.dtype), d_texts.astype(text.dtype), d_scale, d_bias
