"""Batches on the devices ahead of need: order, depth, exceptions, a clean end."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from mofi_jax.data import prefetch
from mofi_jax.distributed import global_batch


def batch(i):
    return {"x": np.full((8, 3), i, np.int32), "y": np.arange(8, dtype=np.float32) + i}


class Counted:
    """A stream that tells how far it was read and whether it was closed."""

    def __init__(self, stream):
        self._stream = iter(stream)
        self.read = 0
        self.closed = False

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self._stream)
        self.read += 1
        return item

    def close(self):
        self.closed = True


def settled(stream, wanted):
    """Whether exactly `wanted` batches are read and no more follow."""
    deadline = time.monotonic() + 10
    while stream.read < wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    return stream.read == wanted


def threads():
    return [t for t in threading.enumerate() if t.name == "to_devices" and t.is_alive()]


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_order_and_arrays_are_those_of_to_global(mesh_of, mesh):
    batches = prefetch.DeviceBatches(map(batch, range(5)), mesh_of[mesh], 2)
    for i, found in enumerate(batches):
        expected = global_batch.to_global(mesh_of[mesh], batch(i))
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].sharding == expected[name].sharding
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))
    assert i == 4
    batches.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_works_ahead_by_its_depth_and_no_further(mesh_of, depth):
    stream = Counted(map(batch, itertools.count()))
    batches = prefetch.DeviceBatches(stream, mesh_of["1x1x1"], depth)
    assert settled(stream, depth)
    for taken in range(1, 4):
        assert int(next(batches)["x"][0, 0]) == taken - 1
        assert settled(stream, depth + taken)
    batches.close()


def test_an_exception_comes_after_the_batches_before_it_and_again(mesh_of):
    def failing():
        yield batch(0)
        yield batch(1)
        raise OSError("the disk is gone")

    batches = prefetch.DeviceBatches(failing(), mesh_of["1x1x1"], 2)
    assert [int(next(batches)["x"][0, 0]) for _ in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    batches.close()
    assert not threads()


def test_a_batch_that_does_not_divide_over_the_mesh_is_an_exception_too(mesh_of):
    batches = prefetch.DeviceBatches(iter([{"x": np.zeros((3, 2))}]), mesh_of["1x8x1"], 1)
    with pytest.raises(ValueError, match="local_data"):
        next(batches)
    batches.close()


def test_close_ends_thread_and_stream_whatever_waits(mesh_of):
    stream = Counted(map(batch, itertools.count()))
    batches = prefetch.DeviceBatches(stream, mesh_of["1x1x1"], 2)
    next(batches)
    assert threads()
    batches.close()
    assert not threads()
    assert stream.closed
    assert next(batches, None) is None
    batches.close()


def test_close_lets_a_waiting_taker_go(mesh_of):
    wait = threading.Event()

    def slow():
        wait.wait(10)
        yield batch(0)

    batches = prefetch.DeviceBatches(slow(), mesh_of["1x1x1"], 1)
    found = []
    taker = threading.Thread(target=lambda: found.append(next(batches, None)))
    taker.start()
    closer = threading.Thread(target=batches.close)
    closer.start()
    taker.join(10)
    assert found == [None]
    wait.set()
    closer.join(10)
    assert not closer.is_alive()


def test_transfers_are_allowed_where_the_taker_forbids_them(mesh_of):
    """The loop forbids implicit transfers around its step; the thread's are not its business."""
    with jax.transfer_guard("disallow"):
        batches = prefetch.DeviceBatches(map(batch, range(3)), mesh_of["1x1x1"], 2)
        assert len(list(batches)) == 3
    batches.close()
