"""The entity softmax: dense by its definition, blocks by the dense one, the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mofi_jax.losses import blocks, class_order, entity, margins
from tests import pairwise
from tests.entity_batch import (
    BATCH,
    ENTITIES,
    ROWS,
    bind,
    compare,
    dense,
    make_batch,
    reference_loss,
    relative,
    value_and_grads,
)
from tests.programs import ARRAYS, BLOCK, B, D, K, collectives, compiled, no_large_tensor, shapes


@pytest.mark.parametrize(
    ("labels", "margin", "scale"), [(1, 0.0, 64.0), (3, 0.15, 20.0), (3, 0.4, 100.0)]
)
def test_dense_is_the_definition(labels, margin, scale):
    total, count, correct, cosine = reference_loss(*make_batch(labels), scale, margin)
    result, _ = dense(labels, margin, scale)
    assert float(result.total) == pytest.approx(total, rel=1e-6)
    assert (float(result.count), float(result.correct)) == (count, correct)
    assert float(result.cosine) == pytest.approx(cosine, rel=1e-6)
    assert count == BATCH - 2
    assert 0 < correct < count, "the rows do not tell right from wrong"


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1", "2x2x2", "8x1x1"])
@pytest.mark.parametrize(
    ("labels", "margin", "scale", "block_size"),
    [
        (1, 0.0, 64.0, 50),  # two blocks of 50 and a tail of 26 in a shard of 126
        (3, 0.15, 20.0, 3),  # errors that grow with the number of blocks would show
        (3, 0.4, 100.0, 126),  # no tail on eight devices
        (1, 0.4, 64.0, 4096),  # nothing but a tail
    ],
)
def test_blocks_equal_dense(mesh_of, mesh, labels, margin, scale, block_size):
    # On one device the table is not padded at all.
    rows = class_order.padded_rows(ENTITIES, mesh_of[mesh])
    assert rows == (ENTITIES if mesh == "1x1x1" else ROWS)
    expected, expected_grads = dense(labels, margin, scale, rows)
    loss = bind(
        entity.entity_softmax,
        labels,
        margin,
        scale,
        rows,
        mesh=mesh_of[mesh],
        block_size=block_size,
    )
    result, grads = value_and_grads(loss)
    assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert result.count == expected.count
    assert result.correct == expected.correct
    assert float(result.cosine) == pytest.approx(float(expected.cosine), rel=1e-6)
    for name, a, b in zip(("embeddings", "table", "scale"), grads, expected_grads, strict=True):
        assert relative(a, b) <= 1e-5, name
    d_x, d_table, _ = grads
    assert not np.any(d_x[5:7]), "a row without labels has a gradient"
    assert not np.any(d_table[ENTITIES:]), "a padded class has a gradient"


@pytest.mark.parametrize(
    ("mesh", "labels", "margin", "scaling"),
    pairwise.product(
        ["1x1x1", "1x2x1", "2x1x2", "2x2x2"],
        [1, 3],
        [0.0, 0.15, 0.4],
        [(20.0, True), (64.0, True), (100.0, False)],
    ),
)
def test_exact_on_any_number_of_devices(mesh_of, mesh, labels, margin, scaling):
    # A scale of 20 is small enough for a fixed bound of the logits, 64 needs the running max.
    scale, fixed_scale = scaling
    compare(mesh_of[mesh], labels, margin, scale, fixed_scale=fixed_scale, block_size=100)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(
    ("margin", "scale", "fixed_scale"),
    [(0.15, 20.0, True), (0.4, 20.0, False), (0.15, 100.0, True), (0.4, 64.0, False)],
)
def test_angular_margin(mesh_of, labels, margin, scale, fixed_scale):
    mesh = mesh_of["2x2x2"]
    compare(mesh, labels, margin, scale, "arcface", fixed_scale=fixed_scale, block_size=100)


@pytest.mark.parametrize("kind", margins.KINDS)
def test_margin_is_the_published_one(kind):
    """Against arccos and cos in float64, beyond angle + margin = pi against insightface's line."""
    margin = 0.4
    cos = np.linspace(-1, 1, 2001)[1:-1]
    ours = np.asarray(margins.margined(jnp.asarray(cos, jnp.float32), margin, kind))
    if kind == "cosface":
        expected, slopes = cos - margin, np.ones_like(cos)
    else:
        angle = np.arccos(cos) + margin
        inside = angle < np.pi
        expected = np.where(inside, np.cos(angle), cos - margin * np.sin(margin))
        slopes = np.where(inside, np.sin(angle) / np.sin(angle - margin), 1.0)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert np.all(np.diff(ours[cos > -np.cos(margin)]) > 0)
    slope = np.asarray(margins.slope(jnp.asarray(cos, jnp.float32), margin, kind))
    smooth = np.abs(cos + np.cos(margin)) > 1e-3  # the two branches meet there
    np.testing.assert_allclose((slope + 0 * cos)[smooth], slopes[smooth], rtol=1e-3)


@pytest.mark.parametrize("scale", [20.0, 64.0])
def test_tiles_of_the_batch(mesh_of, monkeypatch, scale):
    """A tile limit far below one block of all rows cuts the batch too, unevenly."""
    monkeypatch.setitem(blocks.TILE_BYTES, "cpu", 4 * 8 * 128)
    mesh = mesh_of["2x2x2"]
    x, table, _, _ = make_batch(1)
    rows_per_device = table.shape[0] // mesh.size
    assert entity._tile_shape(mesh, x.shape[0], rows_per_device, 96) == (8, 96)
    compare(mesh, 3, 0.3, scale, fixed_scale=True, block_size=96)


def test_tile_fits_its_limit(mesh_of):
    """The chosen tile, at the sizes the losses are made for."""
    mesh = mesh_of["2x2x2"]
    limit = blocks.tile_logits(mesh)
    for batch, classes in [(1024, 8192), (8192, 125_000), (32_768, 39_063), (16, 126), (8, 2**20)]:
        rows, length = entity._tile_shape(mesh, batch, classes, None)
        assert rows * length <= limit or rows == 8, (batch, classes)
        assert length >= min(classes, 2048)
        assert rows <= batch


def test_many_labels_are_scattered(mesh_of):
    """More labels than are worth comparing one by one: the same numbers by another way."""
    labels = entity._COMPARED_LABELS + 3
    for mesh in ("1x1x1", "2x2x2"):
        compare(mesh_of[mesh], labels, 0.3, 20.0, fixed_scale=True, block_size=50)
    total, count, _, _ = reference_loss(*make_batch(labels), 20.0, 0.3)
    result, _ = dense(labels, 0.3, 20.0)
    assert float(result.total) == pytest.approx(total, rel=1e-6)
    assert result.count == count


def test_optax_agrees_without_margin(mesh_of):
    x, table, ids, weights = make_batch(1)
    weights = jnp.ones_like(weights)
    ids = jnp.abs(ids)

    def ours(x, table):
        return entity.entity_softmax(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=20.0,
            margin=0.0,
            mesh=mesh_of["2x2x2"],
            block_size=40,
            compute_dtype="float32",
        ).total

    def theirs(x, table):
        unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
        logits = 20.0 * x @ unit[:ENTITIES].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 0]).sum()

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, table)
    expected, expected_grads = jax.jit(jax.value_and_grad(theirs, (0, 1)))(x, table)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert relative(grads[0], expected_grads[0]) <= 1e-5
    assert relative(grads[1], expected_grads[1]) <= 1e-5


def test_bfloat16_is_close_to_float32(mesh_of):
    expected, expected_grads = dense(3, 0.15, 20.0)
    loss = bind(
        entity.entity_softmax,
        3,
        0.15,
        20.0,
        dtype="bfloat16",
        mesh=mesh_of["2x2x2"],
        block_size=50,
    )
    result, grads = value_and_grads(loss)
    assert float(result.total) == pytest.approx(float(expected.total), rel=5e-3)
    for a, b in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)
    # bf16 embeddings get a bf16 gradient; the table's stays fp32.
    x, table, scale = loss.arguments
    step = jax.jit(jax.grad(lambda x, table: loss(x, table, scale).total, (0, 1)))
    d_x, d_table = step(x.astype(jnp.bfloat16), table)
    assert (d_x.dtype, d_table.dtype) == (jnp.bfloat16, jnp.float32)
    d_x = d_x.astype(np.float32) / result.count
    assert np.linalg.norm(d_x - expected_grads[0]) <= 5e-3 * np.linalg.norm(expected_grads[0])


@pytest.mark.parametrize(("mesh", "batch_shards"), [("1x8x1", 8), ("2x2x2", 4)])
def test_only_the_named_collectives(mesh_of, mesh, batch_shards):
    def total(x, table, ids, weights, scale):
        return entity.entity_softmax(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=scale,
            margin=0.3,
            mesh=mesh_of[mesh],
            block_size=BLOCK,
            compute_dtype="float32",
        ).total

    step = jax.value_and_grad(total, (0, 1, 4))
    program = compiled(step, mesh_of[mesh], *ARRAYS.values())
    no_large_tensor(program)
    assert (B, BLOCK) in shapes(program), "the walk in blocks is not in this text: look again"
    found = collectives(program)
    own_rows = (B // batch_shards, D)
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == {(B, D), (B, K)}
    assert found["reduce-scatter"] == {own_rows}
    # Over the tensor axis, on which the batch is not split, the gradient's rows are added up.
    assert found["all-reduce"] == {(B,), ()} | ({own_rows} if mesh == "2x2x2" else set())
