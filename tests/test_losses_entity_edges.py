"""The entity softmax at its edges: padding, no labels, certainty, and input it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.losses import entity, margins
from tests import pairwise
from tests.entity_batch import BATCH, ENTITIES, make_batch, reference_loss, relative


def mean_and_grads(mesh, x, table, ids, weights, scale=20.0, margin=0.3, kind="cosface"):
    def mean(x, table, scale):
        result = entity.entity_softmax(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=scale,
            margin=margin,
            margin_kind=kind,
            mesh=mesh,
            block_size=50,
            compute_dtype="float32",
        )
        return result.total / jnp.maximum(result.count, 1.0)

    return jax.jit(jax.value_and_grad(mean, (0, 1, 2)))(x, table, jnp.float32(scale))


def test_devices_with_nothing_but_padding(mesh_of):
    x, table, ids, weights = make_batch(3)
    options = {
        "num_entities": 11,  # of 16 rows, two a device: the last two devices have no real class
        "margin": 0.3,
        "compute_dtype": "float32",
    }
    blocks = functools.partial(
        entity.entity_softmax, mesh=mesh_of["2x2x2"], block_size=1, **options
    )
    dense_loss = functools.partial(entity.entity_softmax_dense, **options)

    def run(function):
        def total(x, table, scale):
            return function(x, table, ids % 11, weights, scale=scale).total

        step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
        return jax.tree.leaves(step(x, table[:16], jnp.float32(30.7)))

    for a, b in zip(run(blocks), run(dense_loss), strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize(("scale", "margin"), [(100.0, 0.0), (10_000.0, 0.4)])
def test_certain_predictions_stay_finite(mesh_of, scale, margin):
    x, table, ids, weights = make_batch(1)
    unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    x = unit[jnp.maximum(ids[:, 0], 0)]
    table = table.at[7].set(0.0)  # a row that cannot be normalised

    def total(x, table, scale):
        return entity.entity_softmax(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=scale,
            margin=margin,
            mesh=mesh_of["1x8x1"],
            block_size=50,
            compute_dtype="float32",
        ).total

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, table, jnp.float32(scale))
    assert all(np.isfinite(g).all() for g in grads)
    if margin == 0:
        assert 0 <= float(value) < 1e-4 * BATCH
    else:
        expected = reference_loss(x, table.at[7].set(1e-30), ids, weights, scale, margin)[0]
        assert np.isfinite(value)
        assert float(value) == pytest.approx(expected, rel=1e-3)


def test_ids_out_of_range_are_padding(mesh_of):
    x, table, ids, weights = make_batch(3)
    far = ids.at[0, 1].set(ENTITIES).at[8, 2].set(2**31 - 1).at[9, 0].set(-7)
    dropped = weights.at[0, 1].set(0).at[8, 2].set(0).at[9, 0].set(0)
    options = {
        "num_entities": ENTITIES,
        "scale": 20.0,
        "margin": 0.1,
        "compute_dtype": "float32",
    }
    blocks = functools.partial(
        entity.entity_softmax, mesh=mesh_of["2x2x2"], block_size=64, **options
    )
    want = entity.entity_softmax_dense(x, table, ids, dropped, **options)
    for function in (blocks, functools.partial(entity.entity_softmax_dense, **options)):
        got = jax.jit(function)(x, table, far, weights)
        assert float(got.total) == pytest.approx(float(want.total), rel=1e-6)
        assert got.count == want.count


def test_bad_shapes_are_refused(mesh_of):
    x, table, ids, weights = make_batch(1)
    call = functools.partial(
        entity.entity_softmax,
        scale=20.0,
        margin=0.0,
        mesh=mesh_of["1x8x1"],
        block_size=64,
        compute_dtype="float32",
    )
    with pytest.raises(BadInput, match="a table of 1003 rows on 8 devices"):
        call(x, table[:ENTITIES], ids, weights, num_entities=ENTITIES)
    with pytest.raises(BadInput, match="num_entities=1009 and a table of 1008 rows"):
        call(x, table, ids, weights, num_entities=1009)
    with pytest.raises(BadInput, match="batch of 15 does not divide over 8"):
        call(x[:15], table, ids[:15], weights[:15], num_entities=ENTITIES)
    with pytest.raises(BadInput, match="margin_kind='sphere': choose from cosface, arcface"):
        call(x, table, ids, weights, num_entities=ENTITIES, margin_kind="sphere")


def test_no_labels_at_all(mesh_of):
    """A batch in which nothing is labelled costs nothing and moves nothing."""
    x, table, ids, weights = make_batch(3)
    for no_ids, no_weights in ((jnp.full_like(ids, -1), weights), (ids, jnp.zeros_like(weights))):
        value, grads = mean_and_grads(mesh_of["2x2x2"], x, table, no_ids, no_weights)
        assert value == 0
        assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize("kind", margins.KINDS)
def test_embedding_without_length(mesh_of, kind):
    """A row of zeros has cosine 0 with every class: the loss is that of a guess."""
    x, table, ids, weights = make_batch(1)
    alone = jnp.zeros_like(weights).at[0].set(1.0)
    value, grads = mean_and_grads(
        mesh_of["2x2x2"], x.at[0].set(0.0), table, ids, alone, margin=0.0, kind=kind
    )
    assert float(value) == pytest.approx(np.log(ENTITIES), rel=1e-6)
    assert all(np.isfinite(g).all() for g in grads)
    assert np.any(grads[0][0]), "it can still learn"


@pytest.mark.parametrize(
    ("kind", "sign", "scale"), pairwise.product(margins.KINDS, [1.0, -1.0], [20.0, 100.0])
)
def test_cosines_of_one_and_minus_one(mesh_of, kind, sign, scale):
    x, table, ids, weights = make_batch(1)
    unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    x = sign * unit[jnp.maximum(ids[:, 0], 0)]
    value, grads = mean_and_grads(mesh_of["2x2x2"], x, table, ids, weights, scale, 0.4, kind)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
