"""The order of the class table: every entity has one row, frequent ones are spread out."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mofi_jax.losses import class_order


def test_padded_rows(mesh_of):
    assert class_order.padded_rows(1003, mesh_of["2x2x2"]) == 1008
    assert class_order.padded_rows(1008, mesh_of["1x8x1"]) == 1008
    assert class_order.padded_rows(5, mesh_of["1x1x1"]) == 5


@given(st.integers(1, 20_000))
def test_every_entity_has_one_row_and_back(entities):
    ids = np.arange(-3, entities + 3, dtype=np.int32)
    rows = class_order.table_rows(ids, entities)
    assert rows.dtype == np.int32
    assert sorted(rows[3:-3].tolist()) == list(range(entities))
    np.testing.assert_array_equal(np.r_[rows[:3], rows[-3:]], np.r_[ids[:3], ids[-3:]])
    np.testing.assert_array_equal(class_order.table_entities(rows, entities), ids)


def test_rows_of_entities_on_devices_are_those_of_numpy():
    for entities in (1003, 2_000_003):
        ids = np.r_[np.arange(-1, 5000), entities - 5 : entities + 2].astype(np.int32)
        rows = class_order.table_rows(ids, entities)
        np.testing.assert_array_equal(
            jax.jit(class_order.table_rows, static_argnums=1)(ids, entities), rows
        )
        np.testing.assert_array_equal(
            jax.jit(class_order.table_entities, static_argnums=1)(rows, entities), ids
        )


@pytest.mark.parametrize("devices", [8, 64, 256, 1024])
def test_frequent_entities_are_spread_over_the_devices(devices):
    entities = 2_000_003
    per_device = -(-entities // devices)
    for frequent in (devices, 4096, 100_000):
        owner = class_order.table_rows(np.arange(frequent), entities) // per_device
        counts = np.bincount(owner, minlength=devices)
        assert counts.max() <= 1.1 * frequent / devices + 4, "one device owns too many"
