"""The entity softmax: dense by its definition, blocks by the dense one, the compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.losses import blocks, class_order, entity, margins
from tests import pairwise

ENTITIES = 1003  # no multiple of 8 devices or of any block size below
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


def relative(a, b):
    """Largest difference over the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


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
    static = entity._Static(ENTITIES, scale, 0.3, "cosface", mesh, 96, jnp.dtype("float32"), False)
    assert static.tile(x.shape[0], rows_per_device) == (8, 96)
    compare(mesh, 3, 0.3, scale, fixed_scale=True, block_size=96)


def test_tile_fits_its_limit(mesh_of):
    """The chosen tile, at the sizes the losses are made for."""
    mesh = mesh_of["2x2x2"]
    static = entity._Static(10**7, 32.0, 0.3, "cosface", mesh, None, jnp.dtype("bfloat16"), True)
    limit = blocks.tile_bytes(mesh)
    for batch, classes in [(1024, 8192), (8192, 125_000), (32_768, 39_063), (16, 126), (8, 2**20)]:
        rows, length = static.tile(batch, classes)
        assert 4 * rows * length <= limit or rows == 8, (batch, classes)
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


def test_bad_shapes_are_told(mesh_of):
    x, table, ids, weights = make_batch(1)
    call = functools.partial(
        entity.entity_softmax,
        scale=20.0,
        margin=0.0,
        mesh=mesh_of["1x8x1"],
        block_size=64,
        compute_dtype="float32",
    )
    with pytest.raises(BadInput, match="1003 rows, which 8 devices"):
        call(x, table[:ENTITIES], ids, weights, num_entities=ENTITIES)
    with pytest.raises(BadInput, match="1008 rows but num_entities is 1009"):
        call(x, table, ids, weights, num_entities=1009)
    with pytest.raises(BadInput, match="batch of 15 does not divide over 8"):
        call(x[:15], table, ids[:15], weights[:15], num_entities=ENTITIES)
    with pytest.raises(BadInput, match="margin_kind='sphere': choose from cosface, arcface"):
        call(x, table, ids, weights, num_entities=ENTITIES, margin_kind="sphere")


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


# ---------------------------------------------------------------------------- compiled program

# Sizes no two of which are equal, so that a shape in the program says what it is.
B, D, K, C, BLOCK, N = 48, 24, 3, 1008, 40, 8


def compiled(function, mesh, *specs):
    """The optimised program of function over arrays that are already where they belong."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in specs
    ]
    return jax.jit(function).lower(*arguments).compile().as_text()


def shapes(program: str) -> set[tuple[int, ...]]:
    found = re.findall(r"\b(?:pred|bf16|[sfu]\d+)\[([\d,]*)\]", program)
    return {tuple(int(s) for s in dims.split(",") if s) for dims in found}


def collectives(program: str) -> dict[str, set[tuple[int, ...]]]:
    """Result shapes by kind of collective."""
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    result = {}
    for kind_line in re.finditer(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        result.setdefault(kind_line[2], set()).update(shapes(kind_line[1]))
    return result


BATCH_SPEC = P(meshes.BATCH_AXES)
ARRAYS = {
    "x": ((B, D), jnp.float32, BATCH_SPEC),
    "table": ((C, D), jnp.float32, P(meshes.ALL_AXES)),
    "ids": ((B, K), jnp.int32, BATCH_SPEC),
    "weights": ((B, K), jnp.float32, BATCH_SPEC),
    "scale": ((), jnp.float32, P()),
}


def no_large_tensor(program: str) -> None:
    for shape in shapes(program):
        assert not {B, C} <= set(shape), f"all logits: {shape}"
        assert not {B, C // N} <= set(shape), f"a shard of all logits: {shape}"
        assert C not in shape, f"the whole table: {shape}"


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
