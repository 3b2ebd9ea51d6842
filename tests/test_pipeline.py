"""The training stream: one order for any number of hosts, exact from any point."""

import itertools
import pickle

import numpy as np
import pytest

from mofi_jax.data import pipeline, records
from mofi_jax.errors import BadInput
from tests import datasets

TEXT = {"alt_text": 0.4, "name_and_description": 0.3, "name": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.write(folder, name="i2e")
    datasets.write(folder, name="i2t")
    return folder


def builder(folder, name="i2e", **changes):
    version = folder / name / records.VERSION
    entities = records.read_entities(version / "entities.parquet") if name == "i2e" else None
    settings = {
        "image_ops": "decode|new_view(16)|flip",
        "text_sources": TEXT,
        "tokenizer_path": str(version / "tokenizer.json"),
        "context_length": 12,
        "entities": entities,
        "max_labels": 2,
    }
    return pipeline.ExampleBuilder(**{**settings, **changes})


def batches(folder, count, *, name="i2e", start=0, host=0, hosts=1, batch_size=8, workers=0):
    stream = pipeline.training_stream(
        records.open_source(folder, name),
        builder(folder, name),
        seed=3,
        start=start,
        host=host,
        hosts=hosts,
        batch_size=batch_size,
        threads=2,
        workers=workers,
    )
    return list(itertools.islice(stream, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_shapes_and_types(folder):
    [batch] = batches(folder, 1)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((8, 16, 16, 3), "uint8"),
        "tokens": ((8, 12), "int32"),
        "text_group": ((8,), "int32"),
        "text_valid": ((8,), "bool"),
        "entity_ids": ((8, 2), "int32"),
        "entity_weights": ((8, 2), "float32"),
    }


def test_any_number_of_hosts_draws_the_same_global_batches(folder):
    """Host h takes every n-th example: the union over hosts is the batch of one host."""
    whole = batches(folder, 8)
    for hosts in (2, 4):
        parts = [batches(folder, 8, host=h, hosts=hosts) for h in range(hosts)]
        for step, batch in enumerate(whole):
            merged = {
                key: np.stack([part[step][key] for part in parts], 1).reshape(batch[key].shape)
                for key in batch
            }
            assert_same(merged, batch)


def test_continues_exactly_also_on_other_host_counts(folder):
    whole = batches(folder, 10)
    for start in (1, 7):
        assert_same(batches(folder, 1, start=8 * start)[0], whole[start])
    rest = batches(folder, 2, start=32, host=1, hosts=2)
    np.testing.assert_array_equal(rest[0]["image"], whole[4]["image"][1::2])


def test_worker_processes_change_nothing(folder):
    for a, b in zip(batches(folder, 3), batches(folder, 3, workers=1), strict=True):
        assert_same(a, b)


def test_every_epoch_has_every_example_in_another_order(folder):
    groups = [b["entity_ids"][:, 0] for b in batches(folder, 12)]
    first, second = np.concatenate(groups[:6]), np.concatenate(groups[6:])
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert (first != second).any()


def test_labels_and_texts_of_one_record(folder):
    source = records.open_source(folder, "i2e")
    record = next(r for r in source if len(r["entity_ids"]) == 2)
    build = builder(folder, max_labels=3)
    example = build(record, np.random.default_rng(0))
    np.testing.assert_array_equal(example["entity_ids"], [*record["entity_ids"], -1])
    np.testing.assert_array_equal(example["entity_weights"], [0.5, 0.5, 0])
    one = builder(folder, max_labels=1)(record, np.random.default_rng(0))
    np.testing.assert_array_equal(one["entity_ids"], record["entity_ids"][:1])
    assert {int(build(record, np.random.default_rng(i))["text_group"]) for i in range(20)} == set(
        record["entity_ids"].tolist()
    )


@pytest.mark.parametrize("source", pipeline.TEXT_SOURCES)
def test_each_text_source(folder, source):
    build = builder(folder, text_sources={source: 1.0})
    record = next(r for r in records.open_source(folder, "i2e") if len(r["entity_ids"]) == 1)
    entity = record["entity_ids"][0]
    expected = {
        "alt_text": record["text"],
        "name": build.entities.names[entity],
        "name_and_description": f"{build.entities.names[entity]}, a drawing",
    }[source]
    tokens = build(record, np.random.default_rng(0))["tokens"]
    np.testing.assert_array_equal(tokens, build._tokenizer([expected])[0])


def test_unlabelled_pairs_use_their_words_and_group_by_them(folder):
    source = records.open_source(folder, "i2t")
    build = builder(folder, "i2t")
    groups = {}
    for record in source:
        example = build(record, np.random.default_rng(0))
        assert (example["entity_ids"] == -1).all()
        assert example["entity_weights"].sum() == 0
        assert example["text_group"] < 0
        groups.setdefault(record["text"], set()).add(int(example["text_group"]))
    assert all(len(g) == 1 for g in groups.values())
    assert len({g.copy().pop() for g in groups.values()}) == len(groups)


def test_empty_captions_are_marked(folder):
    record = dict(records.open_source(folder, "i2t")[0], text="  ")
    assert not builder(folder, "i2t")(record, np.random.default_rng(0))["text_valid"]


def test_labels_beyond_the_vocabulary(folder):
    record = dict(records.open_source(folder, "i2e")[0])
    record["entity_ids"] = np.array([99], np.int32)
    record["entity_scores"] = np.array([0.5], np.float32)
    with pytest.raises(BadInput, match="entity id 99, beyond the vocabulary of 7 entities"):
        builder(folder)(record, np.random.default_rng(0))


def test_builder_pickles_without_its_tokenizer(folder):
    build = builder(folder)
    record = records.open_source(folder, "i2e")[0]
    before = build(record, np.random.default_rng(1))
    assert_same(pickle.loads(pickle.dumps(build))(record, np.random.default_rng(1)), before)


def test_batch_must_divide_over_the_hosts(folder):
    with pytest.raises(BadInput, match="does not divide over 3 hosts"):
        batches(folder, 1, hosts=3)
