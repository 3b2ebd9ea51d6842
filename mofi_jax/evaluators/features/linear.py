"""Linear classifiers over features that lie split over the devices.

The rows pass in blocks, each device over its own: logits exist for one block at a time, and only
sums over the rows, or the answers, are exchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from mofi_jax.distributed import meshes, sharding
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.losses import blocks

NO_LABEL = -1  # of rows that take no part
_SPLIT = P(meshes.ALL_AXES)


def labels_of(features: Features, labels: Int32[np.ndarray, " n"]) -> Int32[jax.Array, " padded"]:
    """Labels beside the rows of `features`, `NO_LABEL` for padding."""
    rows = len(features.rows)
    padded = np.full(rows, NO_LABEL, np.int32)
    padded[: len(labels)] = labels
    split = NamedSharding(features.mesh, _SPLIT)
    return jax.make_array_from_callback(padded.shape, split, padded.__getitem__)


def answers(
    features: Features, weights: Float[np.ndarray, "d c"], bias: Float[np.ndarray, " c"]
) -> Int32[np.ndarray, " n"]:
    """The class with the highest logit for each row, on every host; of equals the lowest."""
    model = sharding.put(features.mesh, (np.float32(weights), np.float32(bias)))
    return np.asarray(_answers(features.rows, *model, mesh=features.mesh))[: len(features)]


@functools.partial(jax.jit, static_argnames="mesh")
def _answers(rows, weights, bias, *, mesh: Mesh):
    def shard(rows, weights, bias):
        def body(found, start, size):
            part = blocks.slice_rows(rows, start, size)
            logits = blocks.dot("nd,dc->nc", part, weights) + bias
            best = jnp.argmax(logits, axis=1).astype(jnp.int32)
            return blocks.update_rows(found, best, start)

        found = jnp.zeros(len(rows), jnp.int32)
        block = _block(mesh, len(bias))
        found = blocks.over_blocks(len(rows), block, body, found)
        return lax.all_gather(found, meshes.ALL_AXES, tiled=True)

    return blocks.shard_map(shard, mesh, (_SPLIT, P(), P()), P())(rows, weights, bias)


def _block(mesh: Mesh, classes: int) -> int:
    return max(128, blocks.tile_logits(mesh) // classes)


def log_loss(
    rows: Float32[Array, "padded d"],
    labels: Int32[Array, " padded"],
    weights: Float32[Array, "d c"],
    bias: Float32[Array, " c"],
    *,
    mesh: Mesh,
) -> tuple[Float[Array, ""], Float[Array, "d c"], Float[Array, " c"]]:
    """Inside jit: sum of the softmax losses and its gradients by weights and bias, in one pass.

    Rows labelled `NO_LABEL` take no part.
    """

    def shard(rows, labels, weights, bias):
        def body(sums, start, size):
            part, label = blocks.slice_rows((rows, labels), start, size)
            logits = blocks.dot("nd,dc->nc", part, weights) + bias
            target = label[:, None] == jnp.arange(len(bias))
            log_sum = jax.nn.logsumexp(logits, axis=1, keepdims=True)
            real = label != NO_LABEL
            loss = jnp.where(real, log_sum[:, 0] - jnp.sum(target * logits, axis=1), 0.0)
            error = jnp.where(real[:, None], jnp.exp(logits - log_sum) - target, 0.0)
            update = jnp.sum(loss), blocks.dot("nd,nc->dc", part, error), jnp.sum(error, axis=0)
            return jax.tree.map(jnp.add, sums, update)

        sums = (jnp.zeros(()), jnp.zeros_like(weights), jnp.zeros_like(bias))
        sums = blocks.over_blocks(len(rows), _block(mesh, len(bias)), body, sums)
        return lax.psum(sums, meshes.ALL_AXES)

    specs = (_SPLIT, _SPLIT, P(), P())
    return blocks.shard_map(shard, mesh, specs, P())(rows, labels, weights, bias)


@functools.partial(jax.jit, static_argnames="mesh")
def moments(
    rows: Float32[Array, "padded d"], labels: Int32[Array, " padded"], *, mesh: Mesh
) -> tuple[Float[Array, ""], Float[Array, " d"], Float[Array, "d d"]]:
    """Number, sum and sum of outer products of the rows that take part, on all devices."""

    def shard(rows, labels):
        def body(sums, start, size):
            part, label = blocks.slice_rows((rows, labels), start, size)
            part = jnp.where(label[:, None] != NO_LABEL, part, 0.0)
            count = jnp.sum(label != NO_LABEL, dtype=jnp.float32)
            update = count, jnp.sum(part, axis=0), blocks.dot("nd,ne->de", part, part)
            return jax.tree.map(jnp.add, sums, update)

        dim = rows.shape[1]
        sums = (jnp.zeros(()), jnp.zeros(dim), jnp.zeros((dim, dim)))
        sums = blocks.over_blocks(len(rows), _block(mesh, dim), body, sums)
        return lax.psum(sums, meshes.ALL_AXES)

    return blocks.shard_map(shard, mesh, (_SPLIT, _SPLIT), P())(rows, labels)
