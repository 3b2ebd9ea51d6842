"""Which pairs are held out of one's own, and the set to measure on that is made of them."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.filters import held_out
from data_prep.filters import stage as filters_stage
from tests import label_tables, workdirs


def write(workdir, pictures):
    """pairs/ of two shards, of {key: picture}, and labels/, in which every third has none."""
    (workdir / "pairs").mkdir(parents=True, exist_ok=True)
    keys = sorted(pictures)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for number, own in enumerate(shards):
        digests = [hashlib.sha256(str(pictures[key]).encode()).hexdigest() for key in own]
        columns = {"key": own, "sha256": digests, "phash": range(len(own))}
        pq.write_table(pa.table(columns), workdir / f"pairs/{number:05d}.parquet")
    labels = [[(key, [1] if int(key) % 3 else []) for key in own] for own in shards]
    label_tables.write(workdir, labels)


def run(workdir, dataset, **changes):
    """The keys that go as held out."""
    config = workdirs.config(dataset=dataset, held_out=5_000, **changes)
    filters_stage.drop_pictures(config, engine.Engine(workdir))
    return {row["key"] for row in label_tables.read(workdir, f"dropped-{dataset}/*.parquet")}


@pytest.fixture
def pictures():
    """Four hundred pairs of two hundred pictures."""
    return {f"{i:04d}": i // 2 for i in range(400)}


def test_pairs_of_about_a_tenth_of_the_pictures_are_held_out_of_both_data_sets(tmp_path, pictures):
    write(tmp_path, pictures)
    raw = run(tmp_path, "i2t")
    assert 10 < len({pictures[key] for key in raw}) < 30
    assert raw == {key for key in pictures if pictures[key] in {pictures[k] for k in raw}}
    assert run(tmp_path, "i2e") == {key for key in raw if int(key) % 3}  # those with a label
    assert run(tmp_path, "i2t", seed=1) != raw
    rejects = label_tables.read(tmp_path, "rejects/dropped-i2e*")
    assert {row["reason"] for row in rejects} == {held_out.REASON}


def test_no_more_than_asked_for_and_none_leaves_nothing(tmp_path, pictures):
    write(tmp_path, pictures)
    config = workdirs.config(dataset="i2t", held_out=3)
    filters_stage.drop_pictures(config, engine.Engine(tmp_path))
    rows = label_tables.read(tmp_path, "dropped-i2t/*.parquet")
    assert len({pictures[row["key"]] for row in rows}) == 3
    config.held_out = 0
    filters_stage.drop_pictures(config, engine.Engine(tmp_path))
    for folder in ("held_out_rows", "held_out", "dropped-i2t", "rejects"):
        assert not [*tmp_path.glob(f"{folder}/*.parquet")]


def test_more_pairs_hold_out_none_that_was_trained_on(tmp_path, pictures):
    write(tmp_path / "before", pictures)
    write(tmp_path / "after", pictures | {f"{i:04d}": i for i in range(1_000, 2_000)})
    before, after = run(tmp_path / "before", "i2t"), run(tmp_path / "after", "i2t")
    assert {key for key in after if key in pictures} == before
    assert len(after) > len(before)
