"""The nearest classes: against the dense version and float64, ties, padding, the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.losses import class_order, entity_topk
from tests.entity_batch import ENTITIES, make_batch
from tests.programs import ARRAYS, BLOCK, B, D, N, collectives, compiled, no_large_tensor


@pytest.mark.parametrize(("mesh", "k", "block_size"), [("1x1x1", 5, 100), ("2x2x2", 5, 50)])
def test_topk(mesh_of, mesh, k, block_size):
    x, table, _, _ = make_batch(1)
    # Equal cosines, the lower row first; the exchange brings the shards in another order.
    table = table.at[300].set(table[3]).at[200].set(table[3])
    x = x.at[0].set(table[3] / jnp.linalg.norm(table[3]))
    table = table.at[ENTITIES:].set(x[0])  # padding would win, were it not masked
    table = table[: class_order.padded_rows(ENTITIES, mesh_of[mesh])]
    find = functools.partial(
        entity_topk.entity_topk,
        num_entities=ENTITIES,
        k=k,
        mesh=mesh_of[mesh],
        block_size=block_size,
    )
    rows, cosines = jax.jit(find)(x, table)
    unit = np.asarray(table, np.float64)[:ENTITIES]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.asarray(x, np.float64) @ unit.T
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(cosines, np.take_along_axis(expected, rows, 1), atol=1e-6)
    assert rows[0, :3].tolist() == [3, 200, 300]
    assert all(len(set(row)) == k for row in rows.tolist())
    sums = functools.partial(entity_topk.entity_log_sum, **find.keywords | {"scale": 30.0})
    del sums.keywords["k"]
    expected = np.log(np.exp(30.0 * expected).sum(1))
    np.testing.assert_allclose(jax.jit(sums)(x, table), expected, rtol=1e-6)


def test_topk_of_fewer_classes_than_devices_times_k(mesh_of):
    x, table, _, _ = make_batch(1)
    find = functools.partial(entity_topk.entity_topk, num_entities=11, k=11, mesh=mesh_of["1x8x1"])
    rows, cosines = jax.jit(find)(x, table[:16])
    assert all(sorted(row) == list(range(11)) for row in rows.tolist())
    assert np.all(np.diff(cosines, axis=1) <= 0)


def test_more_than_there_are(mesh_of):
    x, table, _, _ = make_batch(1)
    with pytest.raises(BadInput, match="k=1004"):
        entity_topk.entity_topk(x, table, num_entities=ENTITIES, k=1004, mesh=mesh_of["1x8x1"])


def test_only_the_best_are_exchanged(mesh_of):
    def find(x, table):
        return entity_topk.entity_topk(
            x, table, num_entities=ENTITIES, k=5, mesh=mesh_of["2x2x2"], block_size=BLOCK
        )

    program = compiled(find, mesh_of["2x2x2"], ARRAYS["x"], ARRAYS["table"])
    no_large_tensor(program)
    found = collectives(program)
    assert found.pop("all-gather") == {(B, D), (B // 4, 5 * N)}
    # The best five of each device, in whatever layout the exchange takes.
    assert all(np.prod(s) <= B * 5 for kind in found.values() for s in kind)
    assert set(found) == {"all-to-all"}
