"""The sampled softmax: what is drawn, the loss over it against the dense one and the exact one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.losses import class_order, entity, entity_sampling
from tests import pairwise
from tests.entity_batch import ENTITIES, make_batch, relative
from tests.programs import collectives, shapes

MESHES = ["1x1x1", "1x8x1", "2x2x2"]


@functools.cache
def compiled_draw(mesh, rate):
    run = functools.partial(
        entity_sampling.draw,
        table_rows=class_order.padded_rows(ENTITIES, mesh),
        num_entities=ENTITIES,
        rate=rate,
        mesh=mesh,
    )
    return jax.jit(run)


def draw(mesh, ids, rate, seed=0):
    return compiled_draw(mesh, rate)(jax.random.key(seed), ids)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_draw_is_that_of_one_device_after_the_other(mesh_of, mesh, rate):
    _, _, ids, _ = make_batch(3)
    size, rows = mesh_of[mesh].size, class_order.padded_rows(ENTITIES, mesh_of[mesh])
    count = entity_sampling.places(rows, rate, mesh_of[mesh])
    key, share = jax.random.key(0), rows // size
    parts = [
        entity_sampling._draw_share(key, ids, device, share, count, rows, ENTITIES)
        for device in range(size)
    ]
    got = draw(mesh_of[mesh], ids, rate)
    np.testing.assert_array_equal(got.rows, np.concatenate([part.rows for part in parts]))
    log_q = np.concatenate([part.log_q for part in parts])
    np.testing.assert_allclose(got.log_q, log_q, rtol=1e-6)
    assert got.overflow == sum(part.overflow for part in parts)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_drawn(mesh_of, mesh):
    """All positives, others at random, each device from its own rows, ascending, none twice."""
    mesh = mesh_of[mesh]
    _, _, ids, _ = make_batch(3)
    ids = ids.at[7, 2].set(ENTITIES).at[8, 1].set(-5)  # out of range: nobody's positives
    positives = {int(i) for i in ids.flatten() if 0 <= i < ENTITIES}
    rows = class_order.padded_rows(ENTITIES, mesh)
    seen = np.zeros(rows)
    for seed in range(50):
        sample = draw(mesh, ids, 0.3, seed)
        assert sample.overflow == 0
        parts = np.asarray(sample.rows).reshape(mesh.size, -1)
        assert parts.shape[1] == entity_sampling.places(rows, 0.3, mesh)
        share = rows // mesh.size
        for device, part in enumerate(parts):
            assert np.all(np.diff(part) > 0)
            real = part[part < ENTITIES]
            assert np.all((real >= device * share) & (real < (device + 1) * share))
            assert np.all(part[part >= ENTITIES] >= rows), "padding was drawn"
            known = np.isin(real, list(positives))
            log_q = np.asarray(sample.log_q).reshape(mesh.size, -1)[device][part < ENTITIES]
            np.testing.assert_array_equal(log_q[known], 0)
            others = min(share, ENTITIES - device * share) - known.sum()
            np.testing.assert_allclose(
                log_q[~known], np.log(others / (~known).sum()), rtol=1e-5, atol=1e-6
            )
        assert positives <= set(parts.flatten().tolist())
        seen[parts[parts < ENTITIES]] += 1
    drawn = np.delete(seen[:ENTITIES], list(positives))
    # Uniform: a row is drawn in about 0.3 of 50 draws; 6 standard deviations around it.
    assert drawn.min() >= 15 - 6 * 3.3
    assert drawn.max() <= 15 + 6 * 3.3
    assert drawn.std() == pytest.approx(np.sqrt(50 * 0.3 * 0.7), rel=0.25)


def test_the_seed_decides(mesh_of):
    _, _, ids, _ = make_batch(1)
    first, again, other = (draw(mesh_of["2x2x2"], ids, 0.2, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.rows, again.rows)
    assert np.any(first.rows != other.rows)


def test_a_sample_smaller_than_the_positives_of_a_device(mesh_of):
    """What finds no place is counted and left out; a random part stays, not always the same."""
    mesh = mesh_of["1x8x1"]
    ids = jnp.arange(64, dtype=jnp.int32).reshape(16, 4)  # all on the first device (126 rows)
    kept = []
    for seed in range(20):
        sample = draw(mesh, ids, 0.3, seed)  # 40 places
        assert sample.overflow == 24
        rows = np.asarray(sample.rows)[:40]
        assert np.all(rows < 64)
        np.testing.assert_array_equal(np.asarray(sample.log_q)[:40], 0)
        kept.append(rows)
    counts = np.bincount(np.concatenate(kept), minlength=64)
    assert counts.min() > 0, "some positives never find a place"

    x, table, _, _ = make_batch(1)
    weights = jnp.full((16, 4), 0.25)
    loss = functools.partial(
        sampled_loss, mesh, ids=ids, weights=weights, rate=0.3, scale=20.0, margin=0.1
    )
    (result, grads) = loss(x, table)
    present = np.isin(np.asarray(ids), np.asarray(kept[0]))
    assert result.count == present.any(1).sum()
    assert np.isfinite(result.total)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(grads[0][~present.any(1)]), "a row without a label left has a gradient"


def sampled_loss(mesh, x, table, *, ids, weights, rate, scale, margin, seed=0, dense=False):
    """(LossSum, gradients of its total by embeddings and by the whole table)."""
    options = {
        "num_entities": ENTITIES,
        "scale": scale,
        "margin": margin,
        "compute_dtype": "float32",
    }
    table = table[: class_order.padded_rows(ENTITIES, mesh)]

    def total(x, table):
        sample = entity_sampling.draw(
            jax.random.key(seed),
            ids,
            table_rows=table.shape[0],
            num_entities=ENTITIES,
            rate=rate,
            mesh=mesh,
        )
        rows = entity_sampling.take_rows(table, sample.rows, mesh)
        if dense:
            loss = functools.partial(entity.entity_softmax_dense, sample=sample, **options)
        else:
            loss = functools.partial(
                entity.entity_softmax, sample=sample, mesh=mesh, block_size=9, **options
            )
        result = loss(x, rows, ids, weights)
        return result.total, result

    (_, result), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, table)
    return result, grads


@pytest.mark.parametrize(
    ("mesh", "rate", "setting"),
    pairwise.product(MESHES, [0.1, 0.5], [(1, 20.0, 0.0), (3, 64.0, 0.3)]),
)
def test_sampled_blocks_equal_sampled_dense(mesh_of, mesh, rate, setting):
    labels, scale, margin = setting
    x, table, ids, weights = make_batch(labels)
    run = functools.partial(
        sampled_loss,
        mesh_of[mesh],
        x,
        table,
        ids=ids,
        weights=weights,
        rate=rate,
        scale=scale,
        margin=margin,
    )
    (expected, expected_grads), (result, grads) = run(dense=True), run()
    assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert (result.count, result.correct) == (expected.count, expected.correct)
    for a, b in zip(grads, expected_grads, strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("scale", "margin"), [(20.0, 0.15), (100.0, 0.4)])
def test_a_rate_of_one_is_exact(mesh_of, mesh, scale, margin):
    x, table, ids, weights = make_batch(3)
    result, grads = sampled_loss(
        mesh_of[mesh],
        x,
        table,
        ids=ids,
        weights=weights,
        rate=1.0,
        scale=scale,
        margin=margin,
    )

    def total(x, table):
        loss = entity.entity_softmax_dense(
            x,
            table,
            ids,
            weights,
            num_entities=ENTITIES,
            scale=scale,
            margin=margin,
            compute_dtype="float32",
        )
        return loss.total, loss

    rows = class_order.padded_rows(ENTITIES, mesh_of[mesh])
    differentiate = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, expected), expected_grads = differentiate(x, table[:rows])
    assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert (result.count, result.correct) == (expected.count, expected.correct)
    for a, b in zip(grads, expected_grads, strict=True):
        assert relative(a, b) <= 1e-5


def test_the_correction_makes_the_sum_right_on_average(mesh_of):
    """Sum of exponentials over many draws against the exact one; far off without log-Q."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=ENTITIES).astype(np.float32)
    _, _, ids, _ = make_batch(1)
    sums, plain = [], []
    for seed in range(200):
        sample = draw(mesh_of["1x8x1"], ids, 0.1, seed)
        rows = np.asarray(sample.rows)
        real = rows < ENTITIES
        z = logits[rows[real]]
        sums.append(np.exp(z + np.asarray(sample.log_q)[real]).sum())
        plain.append(np.exp(z).sum())
    exact = np.exp(logits).sum()
    spread = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - exact) < 4 * spread < 0.03 * exact
    assert np.mean(plain) < 0.2 * exact


def test_loss_with_the_correction_is_close_to_exact(mesh_of):
    """65,536 classes at a rate of 0.1, embeddings and rows at random: within 5e-4."""
    rng = np.random.default_rng(1)
    classes, batch, dim, mesh = 65_536, 64, 64, mesh_of["1x8x1"]
    x = rng.normal(size=(batch, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x, table = jnp.asarray(x), jnp.asarray(rng.normal(size=(classes, dim)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, classes, (batch, 1)), jnp.int32)
    weights = jnp.ones((batch, 1))
    options = {
        "num_entities": classes,
        "scale": 16.0,
        "margin": 0.2,
        "mesh": mesh,
        "compute_dtype": "float32",
    }
    exact = jax.jit(functools.partial(entity.entity_softmax, **options))(x, table, ids, weights)

    @jax.jit
    def sampled(key):
        sample = entity_sampling.draw(
            key, ids, table_rows=classes, num_entities=classes, rate=0.1, mesh=mesh
        )
        rows = entity_sampling.take_rows(table, sample.rows, mesh)
        return entity.entity_softmax(x, rows, ids, weights, sample=sample, **options)

    means = [float(sampled(jax.random.key(seed)).total) / batch for seed in range(10)]
    assert np.mean(means) == pytest.approx(float(exact.total) / batch, rel=5e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_come_and_go(mesh_of, mesh):
    """Drawn rows are taken and put back, every other row keeps its bits; any rank and dtype."""
    mesh = mesh_of[mesh]
    _, table, ids, _ = make_batch(1)
    rows = class_order.padded_rows(ENTITIES, mesh)
    sample = draw(mesh, ids, 0.1)
    real = np.asarray(sample.rows) < rows
    for array in (table[:rows], jnp.arange(rows), table[:rows].astype(jnp.bfloat16)):
        part = jax.jit(lambda a: entity_sampling.take_rows(a, sample.rows, mesh))(array)
        np.testing.assert_array_equal(part[real], array[np.asarray(sample.rows)[real]])
        np.testing.assert_array_equal(part[~real], 0)
        changed = jax.jit(lambda a, p: entity_sampling.put_rows(a, sample.rows, p, mesh))(
            array, part + 1
        )
        expected = np.array(array)
        expected[np.asarray(sample.rows)[real]] = np.asarray(part + 1)[real]
        np.testing.assert_array_equal(changed, expected)
        assert changed.dtype == array.dtype


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_rates_out_of_range(mesh_of, rate):
    _, _, ids, _ = make_batch(1)
    with pytest.raises(BadInput, match=r"sample_rate=.* must be above 0 and at most 1"):
        draw(mesh_of["1x8x1"], ids, rate)


@pytest.mark.parametrize(("rows", "entities"), [(16, 17), (16, 0), (12, 12)])
def test_a_table_that_does_not_fit(mesh_of, rows, entities):
    """Too many entities for the rows, none at all, rows that eight devices cannot share."""
    with pytest.raises(BadInput, match=f"num_entities={entities} and a table of {rows} rows"):
        entity_sampling.draw(
            jax.random.key(0),
            jnp.zeros((16, 1), jnp.int32),
            table_rows=rows,
            num_entities=entities,
            rate=0.5,
            mesh=mesh_of["1x8x1"],
        )


def test_no_row_leaves_its_device(mesh_of):
    """Collectives of draw, take, loss and put: labels and embeddings, never rows of the table."""
    b, d, k, c, mesh = 48, 24, 3, 1608, mesh_of["2x2x2"]

    def step(key, x, table, ids, weights):
        sample = entity_sampling.draw(
            key, ids, table_rows=c, num_entities=1603, rate=0.1, mesh=mesh
        )

        def total(x, rows):
            return entity.entity_softmax(
                x,
                rows,
                ids,
                weights,
                num_entities=1603,
                scale=20.0,
                margin=0.3,
                mesh=mesh,
                compute_dtype="float32",
                sample=sample,
            ).total

        rows = entity_sampling.take_rows(table, sample.rows, mesh)
        d_x, d_rows = jax.grad(total, (0, 1))(x, rows)
        return d_x, entity_sampling.put_rows(table, sample.rows, rows - d_rows, mesh)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    batch = P(meshes.BATCH_AXES)
    arguments = (
        jax.eval_shape(lambda: jax.random.key(0)),
        struct((b, d), jnp.float32, batch),
        struct((c, d), jnp.float32, P(meshes.ALL_AXES)),
        struct((b, k), jnp.int32, batch),
        struct((b, k), jnp.float32, batch),
    )
    compiled = jax.jit(step, donate_argnums=2).lower(*arguments).compile()
    program = compiled.as_text()
    found = collectives(program)
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == {(b, d), (b, k)}
    assert found["all-reduce"] <= {(b,), (), (b // 4, d)}
    assert all(c not in shape for shape in shapes(program)), "the whole table"
    # The donated table is updated in place.
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * c * d // 8
