"""The order of the data: permutations of blocks, and what they cost in reads."""

import itertools
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mofi_jax.data import order, pipeline, records
from tests import datasets


@given(length=st.integers(100, 400), block=st.integers(2, 500), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_an_epoch_is_a_permutation_of_blocks(length, block, seed):
    places = order.example_order([length], [1.0], seed=seed, block=block)
    size = min(block, length)
    for epoch in range(2):
        found = [places[epoch * length + i][1] for i in range(length)]
        assert sorted(found) == list(range(length))
        for first in range(0, length, size):
            run = np.array(found[first : first + size])
            np.testing.assert_array_equal(run, (run[0] + np.arange(len(run))) % length)


def test_epochs_differ_in_order_and_in_the_borders_of_blocks():
    places = order.example_order([100], [1.0], seed=0, block=8)
    epochs = [[places[100 * e + i][1] for i in range(100)] for e in range(2)]
    first_records = [{epoch[i] % 8 for i in range(0, 96, 8)} for epoch in epochs]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert first_records[0] != first_records[1]


@pytest.mark.parametrize("length", [1, 3, 47])
def test_single_records_come_in_the_order_of_grains_shuffle(length):
    """So that runs of versions without blocks go on."""
    seed = int(np.random.SeedSequence((7, 1)).generate_state(1)[0])
    plain = order.grain.MapDataset.range(length).shuffle(seed=seed).repeat()
    places = order.example_order([length], [1.0], seed=7, block=1)
    assert [places[i] for i in range(2 * length)] == [(0, plain[i]) for i in range(2 * length)]


def test_a_mixture_draws_runs_of_each_set():
    lengths, block = [96, 60], 12
    places = order.example_order(lengths, [1.0, 0.5], seed=1, block=block)
    drawn = [places[i] for i in range(180)]
    for number, count in enumerate((120, 60)):
        found = [record for of, record in drawn if of == number]
        assert len(found) == count
        assert len(set(found[: lengths[number]])) == min(count, lengths[number])
        for first in range(0, 60, block):
            run = np.array(found[first : first + block])
            np.testing.assert_array_equal(run, (run[0] + np.arange(block)) % lengths[number])


@given(start=st.integers(0, 10_000), hosts=st.sampled_from([1, 2, 4]), batch=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_any_position_and_hosts_name_the_same_records(start, hosts, batch):
    """Each host's groups, made anew as a run that resumes makes them."""
    places = order.example_order([130, 50], [1.0, 0.3], seed=5, block=16)
    size = 4 * batch
    expected = [places[i] for i in range(start, start + 2 * size)]
    again = pickle.loads(pickle.dumps(places))
    rows = np.array_split(np.arange(size), hosts)
    builder = pipeline.ExampleBuilder("decode", {"alt_text": 1.0}, "", 3, None, 1)
    groups = [
        pipeline._Groups([], again, builder, 5, start, size, own, min(2, len(own))) for own in rows
    ]
    found = [
        again[p]
        for step in range(2)
        for own in groups
        for group in range(own.per_batch)
        for p in own.positions(step * own.per_batch + group)
    ]
    assert found == expected


def _reads() -> int:
    """Read requests of this process so far, and one more for asking."""
    fields = dict(
        line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().split("\n")[:-1]
    )
    return int(fields["syscr"])


def test_a_run_of_records_is_one_read_of_each_shard(tmp_path):
    datasets.write(tmp_path, examples=64, shards=2)
    source = records.open_source(tmp_path, "i2e")
    keys = [source[i]["key"] for i in range(64)]  # both shards are open now
    asking = -_reads() + _reads()
    before = _reads()
    found = source.read(range(10, 50))
    assert _reads() - before - asking == 2
    assert [record["key"] for record in found] == keys[10:50]
    before = _reads()
    found = source.read([3, 4, 5, 40, 41, 0, 63, 4])
    assert _reads() - before - asking == 5
    assert [record["key"] for record in found] == [keys[i] for i in (3, 4, 5, 40, 41, 0, 63, 4)]


def test_the_stream_reads_a_run_at_once(tmp_path, monkeypatch):
    datasets.write(tmp_path, examples=128, shards=1)
    source = records.open_source(tmp_path, "i2e")
    runs = []
    read = records.Source._read_run
    monkeypatch.setattr(
        records.Source,
        "_read_run",
        lambda self, shard, run: (runs.append(len(run)), read(self, shard, run))[1],
    )
    keys = [
        pipeline.batch_keys([pipeline.Part("i2e", source)], 0, start, 32, block=16)
        for start in range(0, 128, 32)
    ]
    assert len(set(itertools.chain.from_iterable(keys))) == 128
    assert sum(runs) == 128
    assert len(runs) <= 9  # eight blocks, one of them over the end of the set
