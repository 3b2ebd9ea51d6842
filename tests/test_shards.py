"""Shards: read back by TFDS by name, the same bytes for any workers and after a kill."""

import hashlib
import io
import json
import signal
import subprocess
import sys

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import engine
from data_prep.dataset import shards, vocabulary
from data_prep.filters import stage as filters_stage
from data_prep.selection import choose, embed
from mofi_jax.common import errors
from mofi_jax.data import ops, records, tokenizer
from tests import label_tables, workdirs


def _prepare(folder, monkeypatch, **changes):
    """Everything before the shards, by the real stages; returns (workdir, config, pairs)."""
    workdir, pairs = workdirs.write(folder)
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda folder, batch_size: model)
    (folder / "clip").mkdir()
    (folder / "clip/model.json").write_text("{}")
    config = workdirs.config(clip=str(folder / "clip"), **changes)
    choose.run(config, engine.Engine(workdir))
    filters_stage.run(config, engine.Engine(workdir))
    vocabulary.run(config, engine.Engine(workdir))
    return workdir, config, pairs


def _digests(workdir, dataset):
    folder = workdir / dataset / records.VERSION
    return {path.name: engine.sha256(path) for path in sorted(folder.iterdir())}


def test_i2e_reads_back_by_name(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    workdir, config, pairs = _prepare(tmp_path, monkeypatch)
    manifests = shards.run(config, engine.Engine(workdir), "i2e")
    source = tfds.data_source("i2e", data_dir=workdir, split="train")
    entities = records.read_entities(workdir / "i2e/1.0.0/entities.parquet")
    right = {pair.key: pair for pair in pairs if pair.named == pair.colour}
    assert {example["key"].decode() for example in source} == set(right)
    for example in source:
        pair = right[example["key"].decode()]
        [entity] = example["entity_ids"]
        assert entities.names[entity] == workdirs.NAMES[pair.colour]
        assert example["text"].decode() == workdirs.caption(pair)
        assert example["source"] == b"colours"
        assert example["image"].shape == (example["height"], example["width"], 3)
        colour = np.array(list(workdirs.COLOURS.values())[pair.colour])
        assert np.abs(example["image"].mean((0, 1)) - colour).max() < 60
    assert entities.counts.tolist() == sorted(entities.counts, reverse=True)
    assert entities.counts.sum() == len(source) == engine.total_counts(manifests)["records"]
    info = json.loads((workdir / "i2e/1.0.0/dataset_info.json").read_text())
    [split] = info["splits"]
    assert int(split["numBytes"]) == engine.total_counts(manifests)["record_bytes"]
    lengths = [int(length) for length in split["shardLengths"]]
    assert max(lengths) <= config.shard_examples
    assert max(lengths) - min(lengths) <= 1
    words = tokenizer.Tokenizer(workdir / "i2e/1.0.0/tokenizer.json", 16)
    assert words(["gold thing"]).shape == (1, 16)


def test_i2t_holds_all_valid_pairs_in_hash_order(tmp_path):
    workdir, pairs = workdirs.write(tmp_path)
    shards.run(workdirs.config(seed=3), engine.Engine(workdir), "i2t")
    source = records.open_source(workdir, "i2t")
    keys = [example["key"] for example in source]
    in_hash_order = sorted(
        (hashlib.md5(f"3/{pair.key}".encode()).hexdigest(), pair.key) for pair in pairs
    )
    assert keys == [key for _, key in in_hash_order]
    assert all(len(example["entity_ids"]) == 0 for example in source)
    assert not (workdir / "i2t/1.0.0/entities.parquet").exists()


def test_a_picture_that_broke_since_costs_its_record_alone(tmp_path):
    workdir, pairs = workdirs.write(tmp_path)
    row = engine.read_table(workdir / "pairs/colours-00001-00000.parquet").to_pylist()[3]
    with open(row["path"], "r+b") as file:
        file.seek(row["offset"])
        file.write(bytes(row["length"]))
    manifests = shards.run(workdirs.config(), engine.Engine(workdir), "i2t")
    source = records.open_source(workdir, "i2t")
    written = [example["key"] for example in map(source.__getitem__, range(len(source)))]
    assert sorted([*written, row["key"]]) == sorted(pair.key for pair in pairs)
    assert engine.total_counts(manifests)["records"] == len(source) == len(pairs) - 1
    rejects = [
        r for p in engine.listed(workdir / "rejects") for r in engine.read_table(p).to_pylist()
    ]
    assert rejects == [{"key": row["key"], "stage": "shards-i2t", "reason": "picture_unreadable"}]
    keys = engine.read_table(workdir / "i2t/1.0.0/keys.parquet")
    assert keys["key"].to_pylist() == written
    lengths = np.bincount(keys["shard"].to_numpy())
    assert keys["index"].to_pylist() == [i for length in lengths for i in range(length)]


def test_small_jpegs_are_kept_and_others_become_small_jpegs(tmp_path):
    workdir, pairs = workdirs.write(tmp_path)
    shards.run(workdirs.config(), engine.Engine(workdir), "i2t")
    by_key = {pair.key: pair for pair in pairs}
    for example in records.open_source(workdir, "i2t"):
        pair = by_key[example["key"]]
        if int(pair.key) % 2:
            assert example["image"] == workdirs.picture(pair, "jpg")
        else:  # PNG of 90x60, shorter side shrunk to 48
            assert (example["width"], example["height"]) == (72, 48)
            original = ops.decode_rgb(workdirs.picture(pair, "png"))
            expected = cv2.resize(original, (72, 48), interpolation=cv2.INTER_AREA)
            assert example["image"] == ops.encode_jpeg(expected, 90)


def test_same_bytes_for_any_workers_and_another_order_for_another_seed(tmp_path, monkeypatch):
    workdir, config, _ = _prepare(tmp_path, monkeypatch, shard_examples=7)
    digests = []
    for changes, workers in (({}, 1), ({}, 2), ({"seed": 1}, 1)):
        changed = config.copy_and_resolve_references()
        changed.update(changes)
        shards.run(changed, engine.Engine(workdir, workers), "i2e")
        digests.append(_digests(workdir, "i2e"))
        for stage in ("plan-i2e", "shards-i2e", "metadata-i2e", "i2e"):
            for path in sorted((workdir / stage).rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    assert len([name for name in digests[0] if "array_record" in name]) == 7
    assert digests[0] == digests[1]
    assert digests[0].keys() == digests[2].keys()
    assert digests[0] != digests[2]


_RUN_AND_DIE = """
import os, signal
from data_prep import engine
from data_prep.dataset import shards
from data_prep.pairs import stage as pairs_stage
from tests import label_tables, workdirs

read_pictures, shards_begun = pairs_stage.read_pictures, 0

def read_and_die(*arguments):
    global shards_begun
    shards_begun += 1
    for row, data in read_pictures(*arguments):
        yield row, data
        if shards_begun == 5:
            os.kill(os.getpid(), signal.SIGKILL)

pairs_stage.read_pictures = read_and_die
shards.run(workdirs.config(shard_examples=2), engine.Engine({workdir!r}), "i2t")
"""


def test_same_bytes_after_kill(tmp_path):
    clean, _ = workdirs.write(tmp_path / "clean")
    shards.run(workdirs.config(shard_examples=2), engine.Engine(clean), "i2t")
    killed, _ = workdirs.write(tmp_path / "killed")
    code = _RUN_AND_DIE.format(workdir=str(killed))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (killed / "i2t/1.0.0").iterdir()}
    assert len(finished) == 4
    shards.run(workdirs.config(shard_examples=2), engine.Engine(killed), "i2t")
    assert _digests(killed, "i2t") == _digests(clean, "i2t")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_fewer_pairs_leave_no_stale_shard(tmp_path):
    workdir, _ = workdirs.write(tmp_path)
    shards.run(workdirs.config(shard_examples=7), engine.Engine(workdir), "i2t")
    shards.run(workdirs.config(shard_examples=30), engine.Engine(workdir), "i2t")
    found = sorted(path.name for path in (workdir / "i2t/1.0.0").glob("*array_record*"))
    assert found == [records.shard_name("i2t", "train", i, 2) for i in range(2)]
    assert len(records.open_source(workdir, "i2t")) == 60


def test_nothing_to_write_is_told(tmp_path):
    workdir, _ = workdirs.write(tmp_path)
    for path in (workdir / "pairs").glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 1), path)
    keys = [row["key"] for row in label_tables.read(workdir, "pairs/*.parquet")]
    (tmp_path / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    config = workdirs.config(dataset="i2t", removed=(str(tmp_path / "keys.txt"),))
    filters_stage.drop_pictures(config, engine.Engine(workdir))
    with pytest.raises(errors.BadInput, match=r"No pair is left of 3 pairs \(3 are removed\)"):
        shards.run(config, engine.Engine(workdir), "i2t")


def _encode(rgb, mode="RGB", form="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(buffer, form)
    return buffer.getvalue()


def test_to_jpeg_formats():
    rgb = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    small = _encode(rgb)
    assert shards.to_jpeg(small, 30, 90) == (small, 50, 30)
    for data in (_encode(rgb, "CMYK"), _encode(rgb, "L"), _encode(rgb, "P", "GIF")):
        jpeg, width, height = shards.to_jpeg(data, 30, 90)
        assert (width, height) == (50, 30)
        with Image.open(io.BytesIO(jpeg)) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (50, 30))
    jpeg, width, height = shards.to_jpeg(small, 10, 90)
    assert (width, height) == (17, 10)
    assert ops.decode_rgb(jpeg).shape == (10, 17, 3)
    _, width, height = shards.to_jpeg(_encode(rgb[:, :1], form="PNG"), 1, 90)
    assert (width, height) == (1, 30)
    with pytest.raises(ops.UndecodableImage):
        shards.to_jpeg(b"GIF89a, or so it says", 30, 90)
