"""Minimum and maximum images per entity, on labels written by hand."""

import collections
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import engine
from data_prep.filters import frequency
from data_prep.filters import stage as filters_stage
from mofi_jax.common import errors
from tests import label_tables, workdirs

_SHARDS = [
    [("a", [1, 2]), ("b", [2]), ("c", [3]), ("d", [])],
    [("e", [2, 4]), ("f", [4, 1]), ("g", [5, 3])],
]


@pytest.mark.parametrize("workers", [1, 2])
def test_rare_entities_go_and_so_do_pictures_left_without_label(tmp_path, workers):
    label_tables.write(tmp_path, _SHARDS)
    manifests = filters_stage.run(workdirs.config(min_images=2), engine.Engine(tmp_path, workers))
    kept = {row["key"]: row for row in label_tables.read(tmp_path, "labels_final/*.parquet")}
    assert {key: row["entities"] for key, row in kept.items()} == {
        "a": [1, 2],
        "b": [2],
        "c": [3],
        "e": [2, 4],
        "f": [4, 1],
        "g": [3],
    }
    assert kept["g"]["z_scores"] == [3.0]
    assert kept["g"]["scores"] == pytest.approx([0.3])
    assert [m["counts"]["labelled"] for m in manifests] == [3, 3]

    filters_stage.run(workdirs.config(min_images=3), engine.Engine(tmp_path, workers))
    kept = {
        row["key"]: row["entities"] for row in label_tables.read(tmp_path, "labels_final/*.parquet")
    }
    assert kept == {"a": [2], "b": [2], "e": [2]}
    rejects = {
        row["key"]: row["reason"] for row in label_tables.read(tmp_path, "rejects/labels_final-*")
    }
    assert rejects == dict.fromkeys("cfg", "rare_entity")


def test_one_pass_is_the_fix_point(tmp_path):
    label_tables.write(tmp_path, _SHARDS)
    filters_stage.run(workdirs.config(min_images=3), engine.Engine(tmp_path))
    first = label_tables.read(tmp_path, "labels_final/*.parquet")
    again = tmp_path / "again"
    (tmp_path / "labels_final").rename(tmp_path / "moved")
    (again / "labels").mkdir(parents=True)
    (tmp_path / "pairs").rename(again / "pairs")
    for path in (tmp_path / "moved").glob("*.parquet"):
        path.rename(again / "labels" / path.name)
    filters_stage.run(workdirs.config(min_images=3), engine.Engine(again))
    assert label_tables.read(again, "labels_final/*.parquet") == first
    assert label_tables.read(again, "rejects/*.parquet") == []


def test_nothing_left_is_an_empty_shard_and_not_an_error(tmp_path):
    label_tables.write(tmp_path, [[("a", [1])], []])
    filters_stage.run(workdirs.config(min_images=9), engine.Engine(tmp_path))
    assert label_tables.read(tmp_path, "labels_final/*.parquet") == []
    assert len(label_tables.read(tmp_path, "rejects/*.parquet")) == 1


def test_near_duplicates_count_once_for_the_minimum_and_for_the_cap(tmp_path):
    """A placeholder of entity 1 in two shards; pictures of entity 2 and one of them of 3."""
    hashes = {"a": 7, "b": 7, "c": 7, "d": 8, "e": 9, "f": -7}
    shards = [[("a", [1]), ("b", [1]), ("d", [2])], [("c", [1, 2]), ("e", [2]), ("f", [3])]]
    (tmp_path / "pairs").mkdir()
    for number, rows in enumerate(shards):
        table = {"key": [key for key, _ in rows], "phash": [hashes[key] for key, _ in rows]}
        pq.write_table(pa.table(table), tmp_path / f"pairs/{number:05d}.parquet")
    assert _final(tmp_path, shards, min_images=2) == {"c": [2], "d": [2], "e": [2]}
    # Once is below a cap of one: all of them stay.
    filters_stage.run(workdirs.config(min_images=1, max_images=1), engine.Engine(tmp_path))
    final = {r["key"] for r in label_tables.read(tmp_path, "labels_final/*.parquet")}
    assert {"a", "b", "c", "f"} <= final


# ------------------------------------------------------------------------------------- feedback


def _final(workdir, shards, **changes):
    label_tables.write(workdir, shards)
    filters_stage.run(workdirs.config(**changes), engine.Engine(workdir))
    return {r["key"]: r["entities"] for r in label_tables.read(workdir, "labels_final/*.parquet")}


def test_dropping_pictures_makes_others_rare(tmp_path):
    # 1 is rare; its picture takes one of 2, then 2 is rare and takes one of 3.
    shards = [[("a", [1, 2]), ("b", [2, 3])], [("c", [3, 4]), ("d", [4]), ("e", [4])]]
    picture = {"min_images": 2, "rare_entity_drops": "picture"}
    once = _final(tmp_path / "once", shards, **picture)
    assert once == {"b": [2, 3], "c": [3, 4], "d": [4], "e": [4]}
    settled = {**picture, "min_images_feedback": "converge"}
    assert _final(tmp_path / "all", shards, **settled) == {"d": [4], "e": [4]}
    rounds = {n for n in os.listdir(tmp_path / "all") if n[:8] == "frequent" and n[-5:] != "parts"}
    assert rounds == {"frequent", "frequent-2", "frequent-3", "frequent-4"}
    rejects = {r["key"]: r["reason"] for r in label_tables.read(tmp_path / "all", "rejects/*")}
    assert rejects == dict.fromkeys("abc", "rare_entity")
    filters_stage.run(workdirs.config(**picture), engine.Engine(tmp_path / "all"))
    assert not list((tmp_path / "all/frequent-4").glob("*.parquet"))
    # Where labels go and pictures stay, once is all it takes.
    label = {"min_images": 2, "rare_entity_drops": "label"}
    first = _final(tmp_path / "label", shards, **label)
    assert first == {"a": [2], "b": [2, 3], "c": [3, 4], "d": [4], "e": [4]}
    assert _final(tmp_path / "same", shards, **label, min_images_feedback="converge") == first


def _brute_force(pictures, least, converge):
    """The pictures left when those with a rare entity go, once or until none does."""
    while True:
        counts = collections.Counter(
            entity for entities in pictures.values() for entity in entities
        )
        left = {k: e for k, e in pictures.items() if all(counts[x] >= least for x in e)}
        if left == pictures or not converge:
            return left
        pictures = left


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sets(st.integers(0, 8), max_size=4), max_size=25),
    st.integers(1, 5),
    st.sampled_from(filters_stage.FEEDBACKS),
)
def test_pictures_left_are_those_of_brute_force(tmp_path_factory, labels, least, feedback):
    pictures = {f"{i:02d}": sorted(entities) for i, entities in enumerate(labels)}
    shards = [list(pictures.items())[i::3] for i in range(3)]
    changes = {"rare_entity_drops": "picture", "min_images_feedback": feedback}
    final = _final(tmp_path_factory.mktemp("W"), shards, min_images=least, **changes)
    labelled = {key: entities for key, entities in pictures.items() if entities}
    assert final == _brute_force(labelled, least, feedback == "converge")


# ------------------------------------------------------------------------------------------ cap


def _many(count=3000):
    """Entity 0 is everywhere, 1 in a third, every hundredth picture also has a rare one."""
    pictures = []
    for i in range(count):
        entities = [0, *([1] if i % 3 == 0 else []), *([100 + i // 100] if i % 100 == 0 else [])]
        pictures.append((f"key{i}", entities))
    return pictures


def test_cap_keeps_a_sample_whose_size_follows_the_rarest_entity(tmp_path):
    pictures = _many()
    final = _final(tmp_path, [pictures[:1000], pictures[1000:]], min_images=1, max_images=500)
    counts = collections.Counter(len(final[key]) for key in final)
    # Only entity 0: 500 in 3000. With entity 1: 500 in 1000. With one of a kind: all.
    rare = {key for key, entities in pictures if entities[-1] >= 100}
    assert rare <= final.keys()
    alone = sum(1 for entities in final.values() if entities == [0])
    both = sum(1 for entities in final.values() if entities == [0, 1])
    assert abs(alone - 1980 / 6) < 5 * np.sqrt(1980 * 1 / 6 * 5 / 6)
    assert abs(both - 990 / 2) < 5 * np.sqrt(990 / 4)
    assert sum(counts.values()) == len(final)
    rejects = label_tables.read(tmp_path, "rejects/capped-*")
    assert {r["reason"] for r in rejects} == {"over_cap"}
    assert {r["key"] for r in rejects} == {key for key, _ in pictures} - final.keys()


@pytest.mark.parametrize("workers", [1, 2])
def test_cap_depends_on_seed_and_keys_alone(tmp_path, workers):
    def kept(name, shards, seed=0):
        label_tables.write(tmp_path / name, shards)
        config = workdirs.config(min_images=1, max_images=100, seed=seed)
        filters_stage.run(config, engine.Engine(tmp_path / name, workers))
        return {r["key"] for r in label_tables.read(tmp_path / name, "labels_final/*.parquet")}

    pictures = _many(900)
    one = kept("one", [pictures])
    assert kept("three", [pictures[2::3], pictures[1::3], pictures[::3]]) == one
    other = kept("other", [pictures], seed=1)
    assert other != one
    # Independent draws: the overlap is what chance gives.
    share = len(one & other) / len(one)
    assert share < 0.4


def test_a_draw_is_uniform_and_no_other_hash_of_the_key():
    draws = np.array([frequency.draw(0, str(i)) / 2**64 for i in range(4000)])
    histogram = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert histogram.sum() == 4000
    assert (abs(histogram - 400) < 100).all()


def test_cap_comes_before_the_minimum_and_what_is_dropped_counts_for_neither(tmp_path):
    pictures = [(f"k{i}", [0]) for i in range(40)] + [("x", [1]), ("y", [1])]
    workdir = tmp_path / "W"
    label_tables.write(workdir, [pictures])
    digests = [f"{i:064x}" for i in range(40)] + ["f" * 64] * 2
    keys, hashes = [key for key, _ in pictures], range(len(pictures))
    table = pa.table({"key": keys, "sha256": digests, "phash": hashes})
    pq.write_table(table, workdir / "pairs/00000.parquet")
    config = workdirs.config(min_images=2, max_images=10)
    config.filters.duplicates = "exact"
    counts = engine.total_counts(filters_stage.run(config, engine.Engine(workdir)))
    # y is a copy of x: entity 1 has one picture, too few.
    assert (counts["duplicate"], counts["rare_entity"]) == (1, 1)
    assert counts["labelled"] + counts["over_cap"] == 40
    assert 2 <= counts["labelled"] <= 20
    rejects = label_tables.read(workdir, "rejects/*")
    assert len({r["key"] for r in rejects}) == len(rejects) == 42 - counts["labelled"]

    config.max_images = None
    config.filters.duplicates = "keep"
    counts = engine.total_counts(filters_stage.run(config, engine.Engine(workdir)))
    assert counts == {"labelled": 42, "rare_entity": 0}
    assert label_tables.read(workdir, "rejects/*") == []


def test_a_shard_that_a_filter_leaves_out_is_left_out_of_all(tmp_path):
    label_tables.write(tmp_path, [[("a", [1])], [("b", [1])], [("c", [2])]])
    for number, key in enumerate("abc"):
        table = pa.table({"key": [key], "url": ["https://good.example/"], "phash": [number]})
        pq.write_table(table, tmp_path / f"pairs/{number:05d}.parquet")
    (tmp_path / "pairs/00001.parquet").write_bytes(b"damaged")
    (tmp_path / "domains").write_text("bad.example\n")
    config = workdirs.config(min_images=1)
    config.filters.safety.blocked_domains = str(tmp_path / "domains")
    work = engine.Engine(tmp_path, failure_budget=0.5)
    filters_stage.run(config, work)
    assert work.quarantined == {"unsafe/00001": 1}
    assert [r["key"] for r in label_tables.read(tmp_path, "labels_final/*.parquet")] == ["a", "c"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_images", 0),
        ("min_images_feedback", "twice"),
        ("rare_entity_drops", "all"),
        ("max_images", 2),
        ("filters.max_hamming", 7),
        ("filters.eval_false_positives", -0.001),
        ("filters.eval_false_positives", 0.1),
        ("filters.duplicates", "near"),
    ],
)
def test_values_that_cannot_be_used_are_named(key, value):
    config = workdirs.config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(errors.BadInput, match=f"config.{key}={value!r} cannot be used"):
        filters_stage.check(config)
