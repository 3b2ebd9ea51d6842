"""A batch with labels for the entity softmax, its loss by definition, dense and in blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax.losses import class_order, entity

ENTITIES = 1003  # no multiple of 8 devices or of any block size of the tests
ROWS = 1008
BATCH = 16
DIM = 32


def make_batch(labels: int, batch: int = BATCH, dim: int = DIM, rows: int = ROWS):
    """Embeddings near their label (so that p(target) spreads), ids and weights with padding."""
    rng = np.random.default_rng(labels)
    table = rng.normal(size=(rows, dim)).astype(np.float32)
    table *= rng.uniform(0.01, 10, size=(rows, 1)).astype(np.float32)
    ids = rng.integers(0, ENTITIES, size=(batch, labels)).astype(np.int32)
    ids[1, 0] = ENTITIES - 1  # the last real class, beside the padded ones
    weights = rng.uniform(0.2, 1, size=(batch, labels)).astype(np.float32)
    if labels > 1:
        weights[2, 1:] = 0  # padded by weight
        ids[3, 1:] = -1  # padded by id
        weights[3, 1:] = 0
        ids[4, 1] = ids[4, 0]  # the same label twice
    weights /= weights.sum(1, keepdims=True)
    ids[5], weights[5] = -1, 0  # rows without labels, in both spellings
    weights[6] = 0
    near = table[np.maximum(ids[:, 0], 0)]
    x = near / np.linalg.norm(near, axis=1, keepdims=True) + 0.3 * rng.normal(size=(batch, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(table), jnp.asarray(ids), jnp.asarray(weights)


def reference_loss(x, table, ids, weights, scale, margin):
    """The definition in float64, one row at a time: (total, count, correct, cosine)."""
    x, table = np.asarray(x, np.float64), np.asarray(table, np.float64)[:ENTITIES]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    total = count = correct = cosine = 0
    for row, row_ids, row_weights in zip(x, np.asarray(ids), np.asarray(weights), strict=True):
        labels = [(i, w) for i, w in zip(row_ids, row_weights, strict=True) if i >= 0 and w > 0]
        if not labels:
            continue
        cos = unit @ row
        z = scale * cos
        for i in {i for i, _ in labels}:
            z[i] -= scale * margin
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        total -= sum(float(w) * log_p[i] for i, w in labels)
        count += 1
        correct += int(np.argmax(cos)) in {i for i, _ in labels}
        cosine += max(cos[i] for i, _ in labels)
    return total, count, correct, cosine


def relative(a, b):
    """Largest difference over the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def value_and_grads(loss):
    """(LossSum, gradients of the mean by embeddings, table and scale) of a loss of those."""

    def mean(x, table, scale):
        result = loss(x, table, scale)
        return result.total / result.count, result

    (_, result), grads = jax.jit(jax.value_and_grad(mean, (0, 1, 2), has_aux=True))(*loss.arguments)
    return result, grads


@functools.cache
def dense(labels: int, margin: float, scale: float, rows: int = ROWS, kind: str = "cosface"):
    function = functools.partial(entity.entity_softmax_dense, margin_kind=kind)
    return value_and_grads(bind(function, labels, margin, scale, rows))


def bind(
    function, labels, margin, scale, rows=ROWS, dtype="float32", *, fixed_scale=False, **kwargs
):
    x, table, ids, weights = make_batch(labels)

    def loss(x, table, traced_scale):
        return function(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=scale if fixed_scale else traced_scale,
            margin=margin,
            compute_dtype=dtype,
            **kwargs,
        )

    loss.arguments = (x, table[:rows], jnp.float32(scale))
    return loss


def compare(mesh, labels, margin, scale, kind="cosface", *, fixed_scale, **kwargs):
    """Blocks against dense; 1e-6 for the loss, 1e-5 of the largest for each gradient."""
    rows = class_order.padded_rows(ENTITIES, mesh)
    expected, expected_grads = dense(labels, margin, scale, rows, kind)
    blocks = bind(
        functools.partial(entity.entity_softmax, margin_kind=kind, mesh=mesh, **kwargs),
        labels,
        margin,
        scale,
        rows,
        fixed_scale=fixed_scale,
    )
    result, grads = value_and_grads(blocks)
    assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert (result.count, result.correct) == (expected.count, expected.correct)
    assert relative(grads[0], expected_grads[0]) <= 1e-5
    assert relative(grads[1], expected_grads[1]) <= 1e-5
    if fixed_scale:
        assert grads[2] == 0, "a fixed scale has a gradient"
    else:
        assert relative(grads[2], expected_grads[2]) <= 1e-5
