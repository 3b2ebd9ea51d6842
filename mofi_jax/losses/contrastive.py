"""Contrastive loss: CLIP softmax over the global batch, with negatives that know their labels.

`clip_softmax_dense` is the definition, with b x b logits, differentiated by jax.  `clip_softmax`
computes the same numbers with each device holding the logits of its own images only.

Symmetric InfoNCE as in axlearn's ``vision/clip.py`` and CLIP (arXiv 2103.00020): every image
picks its text among the texts of the batch, every text its image, both directions averaged.  When
texts are entity names many rows of a batch share one, and a row must not be pushed away from its
own text: rows of one group are no negatives of each other.

This file knows nothing of models, temperature caps or the weight of a task.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mofi_jax import partition
from mofi_jax.errors import BadInput
from mofi_jax.losses import base

# The logit of a pair that takes no part: finite, so that rows without any pair stay finite.
_MASKED = -1e30


def _allowed(valid: Array, groups: Array, columns_valid: Array, columns_groups: Array, own: Array):
    """Pairs that stand in a denominator: the pair itself and rows of other groups, all valid."""
    strangers = groups[:, None] != columns_groups[None, :]
    return valid[:, None] & columns_valid[None, :] & (own | strangers)


def _rows_of_batch(valid: Array, groups: Array | None) -> tuple[Array, Array]:
    """Valid as booleans; every row a group of its own unless groups are given."""
    return valid > 0, jnp.arange(valid.shape[0]) if groups is None else groups


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    # fp32 means fp32 (no TF32, no bf16 passes): this loss is a per mille of a step's FLOPs, and
    # logits of up to 100 leave bf16 a resolution of 0.5.
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def clip_softmax_dense(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    *,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    groups: Int[Array, " b"] | None = None,
) -> base.LossSum:
    """The definition of `clip_softmax`, with all b x b logits in memory."""
    valid, groups = _rows_of_batch(valid, groups)
    own = jnp.eye(image.shape[0], dtype=bool)
    cos = _dot("id,jd->ij", image.astype(jnp.float32), text.astype(jnp.float32))
    allowed = _allowed(valid, groups, valid, groups, own)
    logits = jnp.where(allowed, logit_scale_exp * cos, _MASKED)
    to_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    to_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    negatives = jnp.where(own, _MASKED, logits)
    pair = jnp.diagonal(logits)
    hits = (pair > jnp.max(negatives, axis=1)) * 0.5 + (pair > jnp.max(negatives, axis=0)) * 0.5
    return base.LossSum(
        total=-jnp.sum(jnp.where(valid, 0.5 * (to_text + to_image), 0.0)),
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
    )


def clip_softmax(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    logit_scale_exp: float | Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, " b"] | Float[Array, " b"],
    groups: Int[Array, " b"] | None = None,
) -> base.LossSum:
    """CLIP loss over the global batch; logits [b / batch shards, b] fp32 per device.

    Gradients are exact for image, text and logit_scale_exp.  Collectives: all-gather of the
    texts, all-reduce of [b] vectors and scalars, reduce-scatter of the texts' gradient.

    Args:
      image: L2-normalised image embeddings; batch over `partition.BATCH_AXES`.
      text: L2-normalised text embeddings; row i belongs to image i.
      logit_scale_exp: factor of the cosines, the exponential already taken and capped.
      mesh: the mesh of `partition.make_mesh`.
      valid: rows that take part; a row with 0 is neither a row nor anyone's negative.
      groups: rows with equal ids are no negatives of each other (an entity's id where the text is
        its name); None, like ids that all differ, is the plain CLIP loss.

    Returns:
      Sums over the valid rows; a row's loss is the mean of its two directions, and a row correct
      in one direction counts a half.

    Raises:
      BadInput: the batch does not divide over the mesh's batch axes.
    """
    if image.shape[0] % partition.batch_shards(mesh):
        raise BadInput(
            f"a batch of {image.shape[0]} does not divide over {partition.batch_shards(mesh)} "
            "batch shards: choose a multiple of that number."
        )
    valid, groups = _rows_of_batch(valid, groups)
    scale = jnp.asarray(logit_scale_exp, jnp.float32)
    return _clip_sharded(mesh, image, text, scale, valid, groups)


_BATCH = P(partition.BATCH_AXES)


def _shard_map(function: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    # Autodiff never crosses these maps (custom_vjp outside), so the replication check, which
    # takes gathered arrays for different ones on each device, has nothing to guard.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _clip_sharded(mesh, image, text, scale, valid, groups):
    return _clip_forward(mesh, image, text, scale, valid, groups)[0]


def _clip_forward(mesh, image, text, scale, valid, groups):
    run = _shard_map(
        _forward_shard,
        mesh,
        in_specs=(_BATCH, _BATCH, P(), _BATCH, _BATCH),
        out_specs=(base.LossSum(P(), P(), P()), _BATCH, P()),
    )
    loss, row_lse, column_lse = run(image, text, scale, valid, groups)
    return loss, (image, text, scale, valid, groups, row_lse, column_lse)


def _clip_backward(mesh, residuals, cotangent):
    run = _shard_map(
        _backward_shard,
        mesh,
        in_specs=(_BATCH, _BATCH, P(), _BATCH, _BATCH, _BATCH, P(), P()),
        out_specs=(_BATCH, _BATCH, P()),
    )
    d_image, d_text, d_scale = run(*residuals, cotangent.total)
    return d_image, d_text, d_scale, None, None


_clip_sharded.defvjp(_clip_forward, _clip_backward)


def _gather(x: Array) -> Array:
    """The rows of all batch shards, on every device."""
    return lax.all_gather(x, partition.BATCH_AXES, axis=0, tiled=True)


def _local_logits(image, texts, valid, groups):
    """Cosines of this device's images with all texts, which take part, and which are the pairs."""
    b = image.shape[0]
    first = lax.axis_index(partition.BATCH_AXES) * b
    own = first + jnp.arange(b)[:, None] == jnp.arange(texts.shape[0])[None, :]
    cos = _dot("id,jd->ij", image, texts)
    allowed = _allowed(valid, groups, _gather(valid), _gather(groups), own)
    return cos, allowed, own


def _own_rows(vector: Array, b: int) -> Array:
    """This device's part of a [b global] vector."""
    return lax.dynamic_slice_in_dim(vector, lax.axis_index(partition.BATCH_AXES) * b, b)


def _forward_shard(image, text, scale, valid, groups):
    image, texts = image.astype(jnp.float32), _gather(text.astype(jnp.float32))
    cos, allowed, own = _local_logits(image, texts, valid, groups)
    logits = jnp.where(allowed, scale * cos, _MASKED)
    pair = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
    negatives = jnp.where(own, _MASKED, logits)

    row_lse = jax.nn.logsumexp(logits, axis=1)
    top, best_negative = lax.pmax(
        (jnp.max(logits, axis=0), jnp.max(negatives, axis=0)), partition.BATCH_AXES
    )
    exp_sum = lax.psum(jnp.sum(jnp.exp(logits - top), axis=0), partition.BATCH_AXES)
    column_lse = top + jnp.log(exp_sum)

    b = image.shape[0]
    losses = 0.5 * (row_lse + _own_rows(column_lse, b)) - pair
    hits = 0.5 * (pair > jnp.max(negatives, axis=1)) + 0.5 * (pair > _own_rows(best_negative, b))
    local = base.LossSum(
        total=jnp.sum(jnp.where(valid, losses, 0.0)),
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
    )
    return lax.psum(local, partition.BATCH_AXES), row_lse, column_lse


def _backward_shard(image, text, scale, valid, groups, row_lse, column_lse, d_total):
    images, texts = image.astype(jnp.float32), _gather(text.astype(jnp.float32))
    cos, allowed, own = _local_logits(images, texts, valid, groups)
    logits = jnp.where(allowed, scale * cos, _MASKED)
    # Both directions in one residual; a masked pair, and so a row without any, contributes 0.
    p_rows = jnp.exp(logits - row_lse[:, None])
    p_columns = jnp.exp(logits - column_lse)
    residual = jnp.where(allowed, 0.5 * d_total * (p_rows + p_columns - 2.0 * own), 0.0)
    d_cos = scale * residual
    d_image = _dot("ij,jd->id", d_cos, texts)
    d_texts = _dot("ij,id->jd", d_cos, images)
    d_text = lax.psum_scatter(d_texts, partition.BATCH_AXES, scatter_dimension=0, tiled=True)
    d_scale = lax.psum(jnp.sum(residual * cos), partition.BATCH_AXES)
    return d_image.astype(image.dtype), d_text.astype(text.dtype), d_scale
