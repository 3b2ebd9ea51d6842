"""The training stream: one order for any number of hosts, exact from any point."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys

import grain
import numpy as np
import psutil
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.data import limits, pipeline, records
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


def example_of(build, record, position=0):
    return build.examples(0, [(position, record)])[0]


def alone(folder, name="i2e"):
    return [pipeline.Part(name, records.open_source(folder, name))]


def batches(
    folder, count, *, parts=None, name="i2e", start=0, host=0, hosts=1, batch_size=8, **options
):
    stream = pipeline.training_stream(
        parts or alone(folder, name),
        builder(folder, name),
        seed=3,
        start=start,
        host=host,
        hosts=hosts,
        batch_size=batch_size,
        **{"threads": 2, "workers": 0, **options},
    )
    drawn = list(itertools.islice(stream, count))
    stream.close()
    return drawn


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


@pytest.mark.parametrize("block", [1, 5])
def test_any_number_of_hosts_draws_the_same_global_batches(folder, block):
    """Their rows together are the batch of one host."""
    whole = batches(folder, 8, block=block)
    for hosts in (2, 4):
        parts = [batches(folder, 8, host=h, hosts=hosts, block=block) for h in range(hosts)]
        for step, batch in enumerate(whole):
            assert_same(merged(part[step] for part in parts), batch)


def merged(parts):
    parts = list(parts)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def test_continues_exactly_also_on_other_host_counts(folder):
    whole = batches(folder, 10)
    for start in (1, 7):
        assert_same(batches(folder, 1, start=8 * start)[0], whole[start])
    rest = batches(folder, 2, start=32, host=1, hosts=2)
    np.testing.assert_array_equal(rest[0]["image"], whole[4]["image"][4:])


@pytest.mark.parametrize(("workers", "block"), [(3, 1), (0, 5), (2, 5)])
def test_worker_processes_change_nothing(folder, monkeypatch, workers, block):
    """From an odd step on, where batches are split into several groups."""
    monkeypatch.setattr(pipeline, "_GROUPS", (3, 3))
    there = batches(folder, 4, start=24, workers=workers, block=block)
    for a, b in zip(batches(folder, 7, block=block)[3:], there, strict=True):
        assert_same(a, b)


def test_a_signal_to_all_processes_leaves_the_workers_to_the_run(folder):
    """As SLURM and Ctrl-C send it: the run still has to finish its step."""
    options = {"seed": 3, "start": 0, "batch_size": 8, "threads": 1, "workers": 1}
    stream = pipeline.training_stream(alone(folder), builder(folder), **options)
    next(stream)
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    # More than can wait.
    assert len(list(itertools.islice(stream, 20))) == 20
    stream.close()
    assert not multiprocessing.active_children()


def test_workers_end_when_the_run_is_killed(folder):
    script = f"""
import multiprocessing, pathlib, time
from tests import test_pipeline as t
options = {{"seed": 3, "start": 0, "batch_size": 8, "threads": 1, "workers": 2}}
folder = pathlib.Path({str(folder)!r})
stream = t.pipeline.training_stream(t.alone(folder), t.builder(folder), **options)
next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
    assert len(workers) >= 2
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_two_hosts_of_workers_and_the_one_that_goes_on_see_every_example_once(folder):
    """Six steps of 8 are an epoch of 48: three on two hosts, the rest on one."""
    apart = [batches(folder, 3, host=h, hosts=2, workers=2 * h, block=100) for h in range(2)]
    rest = batches(folder, 3, start=24, workers=1, block=100)
    whole = batches(folder, 6, block=100)
    for step in range(3):
        assert_same(merged(part[step] for part in apart), whole[step])
    for a, b in zip(rest, whole[3:], strict=True):
        assert_same(a, b)
    keys = [
        key
        for step in range(6)
        for key in pipeline.batch_keys(alone(folder), 3, 8 * step, 8, block=100)
    ]
    assert len(set(keys)) == 48


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (15, 1), (250, 2), (18, 2)])
def test_batches_of_any_size(folder, batch_size, hosts):
    """Cut out of the same order, whatever the groups that make them."""
    found = batches(folder, 2, batch_size=batch_size, hosts=hosts)
    one_by_one = batches(folder, 2 * batch_size, batch_size=1)
    local = batch_size // hosts
    assert [len(batch["tokens"]) for batch in found] == [local] * 2
    for step, batch in enumerate(found):
        own = one_by_one[step * batch_size :][:local]
        assert_same(batch, merged(own))


def test_groups_split_a_batch_evenly(folder):
    parts, build = alone(folder), builder(folder)
    places = pipeline._order(parts, 0, 1)
    for local, per_batch in ((15, 2), (9, 2), (1, 1), (1000, 125), (33, 5)):
        rows = np.arange(1, 3 * local, 3)
        groups = pipeline._Groups(parts, places, build, 0, 100, 3 * local, rows, per_batch)
        found = [groups.positions(i) for i in range(3 * per_batch)]
        assert [p for group in found for p in group] == list(range(101, 101 + 9 * local, 3))
        sizes = [len(group) for group in found]
        assert max(sizes) - min(sizes) <= 1
    assert "Q000" not in str(grain.MapDataset.range(3).map(groups))


@pytest.mark.parametrize(
    ("local", "threads", "workers", "expected"),
    [
        (64, 2, 0, (2, 4, 0)),
        (15, 4, 0, (1, 8, 0)),
        (1024, 2, 8, (8, 4, 4224)),
        (1024, 16, 8, (32, 32, 1056)),
        (16, 1, 2, (1, 2, 144)),
    ],
)
def test_two_batches_wait_over_all_processes(local, threads, workers, expected):
    held = pipeline.buffers(local, threads, workers)
    assert held == expected
    assert max(1, workers) * held.ahead >= 2 * held.groups


def test_too_little_shared_memory_is_told_before_workers_start(folder, monkeypatch):
    full = shutil._ntuple_diskusage(2**20, 2**20, 0)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: full)
    words = r"config.data.workers=2 need \d+ MiB of shared memory, and /dev/shm has 0 MiB free"
    with pytest.raises(BadInput, match=words):
        batches(folder, 1, workers=2)
    batches(folder, 1)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """One shard each with a record that is no record, a broken picture, and bytes overwritten."""
    folder = tmp_path_factory.mktemp("damaged")
    for kind in ("record", "picture", "shard"):
        datasets.write(folder / kind, examples=3, shards=1)
        source = records.open_source(folder / kind, "i2e")
        [path] = source.files
        if kind == "shard":
            data = bytearray(path.read_bytes())
            at = data.index(source[1]["image"])
            data[at : at + 100] = bytes(100)
            path.write_bytes(data)
        else:
            examples = [records.serialize(source[i]) for i in range(3)]
            broken = source[1] | {"image": b"\xff\xd8\xff and no more"}
            examples[1] = b"no record" if kind == "record" else records.serialize(broken)
            datasets.write_shard(path, examples)
    return folder


@pytest.mark.parametrize(
    ("kind", "workers", "words"),
    [
        ("record", 0, "Record 1 of .*-00000-of-00001 cannot be read .*: the shard is damaged"),
        ("shard", 0, "Record 1 of .*-00000-of-00001 cannot be read .*: the shard is damaged"),
        ("picture", 0, "'000001', has a picture that cannot be decoded .*remove_keys"),
        ("picture", 1, r"Record 1 of .*-00000-of-00001, '000001', .* \(not_a_picture\)"),
    ],
)
def test_damaged_records_are_named(damaged, kind, words, workers):
    """Bad input also where a thread or another process meets it, so that the exit code is 2."""
    with pytest.raises(BadInput, match=words):
        batches(damaged / kind, 1, batch_size=3, workers=workers)


def test_every_epoch_has_every_example_in_another_order(folder):
    groups = [b["entity_ids"][:, 0] for b in batches(folder, 12)]
    first, second = np.concatenate(groups[:6]), np.concatenate(groups[6:])
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert (first != second).any()


def test_labels_and_texts_of_one_record(folder):
    source = records.open_source(folder, "i2e")
    record = next(r for r in source if len(r["entity_ids"]) == 2)
    build = builder(folder, max_labels=3)
    example = example_of(build, record)
    np.testing.assert_array_equal(example["entity_ids"], [*record["entity_ids"], -1])
    np.testing.assert_array_equal(example["entity_weights"], [0.5, 0.5, 0])
    one = example_of(builder(folder, max_labels=1), record)
    np.testing.assert_array_equal(one["entity_ids"], record["entity_ids"][:1])
    assert {int(example_of(build, record, i)["text_group"]) for i in range(20)} == set(
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
    tokens = example_of(build, record)["tokens"]
    np.testing.assert_array_equal(tokens, build._tokenizer([expected])[0])


def test_unlabelled_pairs_use_their_words_and_group_by_them(folder):
    source = records.open_source(folder, "i2t")
    build = builder(folder, "i2t")
    groups = {}
    for record in source:
        example = example_of(build, record)
        assert (example["entity_ids"] == -1).all()
        assert example["entity_weights"].sum() == 0
        assert example["text_group"] < 0
        groups.setdefault(record["text"], set()).add(int(example["text_group"]))
    assert all(len(g) == 1 for g in groups.values())
    assert len({g.copy().pop() for g in groups.values()}) == len(groups)


def test_empty_captions_are_marked(folder):
    record = dict(records.open_source(folder, "i2t")[0], text="  ")
    assert not example_of(builder(folder, "i2t"), record)["text_valid"]


def test_labels_beyond_the_vocabulary(folder):
    record = dict(records.open_source(folder, "i2e")[0])
    record["entity_ids"] = np.array([99], np.int32)
    record["entity_scores"] = np.array([0.5], np.float32)
    with pytest.raises(BadInput, match="entity id 99, beyond the vocabulary of 7 entities"):
        example_of(builder(folder), record)


def test_builder_pickles_without_its_tokenizer(folder):
    build = builder(folder)
    record = records.open_source(folder, "i2e")[0]
    before = example_of(build, record, 1)
    assert_same(example_of(pickle.loads(pickle.dumps(build)), record, 1), before)


# ------------------------------------------------------------------------------- several data sets


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    """The primary set, one of ten entities whose ids run the other way, and one without labels.

    Of those ten entities Q006, ..., Q000 are known to the primary set; Q009, Q008, Q007 are not.
    """
    other = tmp_path_factory.mktemp("other")
    version = datasets.write(other, examples=30, entities=10)
    vocabulary = records.Entities(
        qids=[f"Q{i:03d}" for i in range(9, -1, -1)],
        names=["unused"] * 10,
        descriptions=[""] * 10,
        counts=np.arange(10, 0, -1),
    )
    records.write_entities(version / records.ENTITIES_FILE, vocabulary)
    extra = {
        "reversed": {"dir": str(other), "name": "i2e", "weight": 0.5},
        "pairs": {"dir": str(folder), "name": "i2t", "weight": 0.25},
    }
    entities = builder(folder).entities
    return [*alone(folder), *pipeline.open_extra(extra, entities)]


def test_sets_come_in_the_order_of_their_names_and_are_remapped_by_qid(mixed):
    assert [(part.name, part.weight) for part in mixed] == [
        ("i2e", 1.0),
        ("pairs", 0.25),
        ("reversed", 0.5),
    ]
    np.testing.assert_array_equal(mixed[2].remap, [-1, -1, -1, 6, 5, 4, 3, 2, 1, 0])
    # Record 2 names entity 2, which is Q007 there; record 5 names 5 and 6, which are Q004 and Q003.
    read = [mixed[2].records([i])[0] for i in (2, 5)]
    assert [r["entity_ids"].tolist() for r in read] == [[], [4, 3]]
    assert [len(r["entity_scores"]) for r in read] == [0, 2]


def test_labels_that_are_dropped_are_counted_in_the_log(mixed, folder, caplog):
    wanted = {"dir": str(mixed[2].source.directory.parent.parent), "name": "i2e", "weight": 1}
    with caplog.at_level("INFO"):
        pipeline.open_extra({"more": wanted}, builder(folder).entities)
    # The counts of the three unknown ones are 10, 9 and 8, those of all 10 + 9 + ... + 1.
    assert "more: 3 of 10 entities are not in the primary vocabulary" in caplog.text
    assert "27 labels of 55 are dropped" in caplog.text


def test_shares_follow_the_weights(folder, mixed):
    keys = pipeline.batch_keys(mixed, 3, 0, 700)
    counts = [sum(key.startswith(f"{part.name}:") for key in keys) for part in mixed]
    np.testing.assert_allclose(counts, [400, 100, 200], atol=2)
    # So also in every stretch: no batch is of one set.
    assert all(
        abs(sum(k.startswith("i2e:") for k in keys[i : i + 70]) - 40) <= 2
        for i in range(0, 700, 70)
    )


def test_an_epoch_shows_every_primary_example_once(mixed):
    epoch = pipeline.examples_per_epoch(mixed)
    assert epoch == 84  # 48 x 1.75
    for first in (0, epoch):
        keys = [k for k in pipeline.batch_keys(mixed, 5, first, epoch) if k.startswith("i2e:")]
        assert len(keys) == len(set(keys)) == 48


@pytest.mark.parametrize("block", [1, 7])
def test_a_mixture_is_the_same_for_any_hosts_and_continues_exactly(folder, mixed, block):
    options = {"parts": mixed, "block": block}
    whole = batches(folder, 8, **options)
    parts = [batches(folder, 8, host=h, hosts=4, **options) for h in range(4)]
    for step, batch in enumerate(whole):
        assert_same(merged(part[step] for part in parts), batch)
    assert_same(batches(folder, 1, start=40, **options)[0], whole[5])
    rest = batches(folder, 2, start=48, host=1, hosts=2, **options)
    np.testing.assert_array_equal(rest[1]["image"], whole[7]["image"][4:])


def test_a_mixture_in_worker_processes(folder, mixed):
    here, there = (batches(folder, 3, parts=mixed, workers=w) for w in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("which", "block"), [("alone", 1), ("mixed", 1), ("mixed", 6)])
def test_batch_keys_name_what_the_stream_gave(folder, mixed, which, block):
    """Each example rebuilt from the record of its key, whichever batch and host it was in."""
    parts = mixed if which == "mixed" else alone(folder)
    by_name = {part.name: part for part in parts}
    plain = builder(folder, image_ops="decode|resize_short(16)")
    rows = np.array([0, 3, 4, 7, 9, 10, 13, 14])  # of a host whose devices lie scattered
    stream = pipeline.training_stream(
        parts, plain, seed=3, start=24, batch_size=16, rows=rows, threads=2, workers=0, block=block
    )
    batch = next(itertools.islice(stream, 2, 3))
    stream.close()
    all_keys = pipeline.batch_keys(parts, 3, 24 + 2 * 16, 16, block)
    keys = [all_keys[row] for row in rows]
    assert len(set(keys)) > 4
    for i, key in enumerate(keys):
        name, _, number = key.partition(":")
        part = by_name[name]
        record = part.records([int(number)])[0]
        example = example_of(plain, record)
        np.testing.assert_array_equal(batch["image"][i], example["image"])
        np.testing.assert_array_equal(batch["entity_ids"][i], example["entity_ids"])


def test_text_and_picture_are_drawn_anew_each_epoch(folder):
    """Position decides the draws: the same record has other texts and views in later epochs."""
    drawn = batches(folder, 24)
    texts, views = {}, {}
    for step, batch in enumerate(drawn):
        keys = pipeline.batch_keys(alone(folder), 3, step * 8, 8)
        for key, tokens, image in zip(keys, batch["tokens"], batch["image"], strict=True):
            texts.setdefault(key, set()).add(tokens.tobytes())
            views.setdefault(key, set()).add(image.tobytes())
    assert len(texts) == 48
    assert all(len(seen) == 4 for seen in views.values())  # four epochs
    # Alt-text, name, or both with the description: few keep to one in four draws.
    assert sum(len(seen) > 1 for seen in texts.values()) > 40


def test_text_sources_are_drawn_by_their_weights(folder):
    build = builder(folder, text_sources=TEXT)
    record = next(r for r in records.open_source(folder, "i2e") if len(r["entity_ids"]) == 1)
    rng = np.random.default_rng(0)
    texts = [build._text(record, record["entity_ids"], rng)[0] for _ in range(4000)]
    name = build.entities.names[record["entity_ids"][0]]
    expected = {record["text"]: 0.4, f"{name}, a drawing": 0.3, name: 0.3}
    for text, share in expected.items():
        assert texts.count(text) / 4000 == pytest.approx(share, abs=0.03)
    silent = record | {"text": ""}  # without a caption the entity is told instead
    texts = {build._text(silent, record["entity_ids"], rng)[0] for _ in range(100)}
    assert texts == {f"{name}, a drawing", name}


def test_an_unknown_text_source_is_named(folder):
    with pytest.raises(BadInput, match=r"text_sources has 'names': choose from name, "):
        builder(folder, text_sources={"alt_text": 0.5, "names": 0.5})


def test_an_unlabelled_primary_set_takes_captions_alone(folder, mixed):
    entities_there = {"dir": str(folder), "name": "i2e", "weight": 1.0}
    parts = [*alone(folder, "i2t"), *pipeline.open_extra({"labelled": entities_there}, None)]
    [batch] = batches(folder, 1, parts=parts, name="i2t", batch_size=16)
    assert (batch["entity_ids"] == -1).all()
    assert (batch["text_group"] < 0).all()


def test_labels_of_a_set_without_a_vocabulary_are_refused(folder, tmp_path):
    version = datasets.write(tmp_path, examples=8)
    (version / records.ENTITIES_FILE).unlink()
    extra = {"bare": {"dir": str(tmp_path), "name": "i2e", "weight": 1.0}}
    [part] = pipeline.open_extra(extra, builder(folder).entities)
    with pytest.raises(BadInput, match="beyond the vocabulary of 0 entities"):
        part.records([0])


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"weight": 0.0}, r"config\.data\.extra\.x\.weight=0\.0 is not positive"),
        ({"weight": float("nan")}, "is not positive"),
        ({"dir": "no/where"}, "There is no data set 'i2e' in no/where"),
        ({"wieght": 1}, "has the keys dir, name, weight, wieght: give it dir, name and weight"),
    ],
)
def test_extra_sets_that_cannot_be(folder, wanted, sentence):
    extra = {"x": {"dir": str(folder), "name": "i2e", "weight": 1.0, **wanted}}
    with pytest.raises(BadInput, match=sentence):
        pipeline.open_extra(extra, builder(folder).entities)


def test_fewer_shards_than_hosts(folder, mixed):
    pipeline.check_shards(mixed, datasets.SHARDS)
    with pytest.raises(BadInput, match=r"has 4 shards for 5 hosts.*smaller config\.shard_examples"):
        pipeline.check_shards(mixed, 5)
