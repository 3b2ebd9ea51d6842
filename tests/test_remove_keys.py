"""Removal from a published data set: what stays keeps its bytes, its order and its ids."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.dataset import files as dataset_files
from data_prep.dataset import remove, versions
from data_prep.filters import removed
from mofi_jax.common import errors
from mofi_jax.data import metadata, records

ROOT = pathlib.Path(__file__).parents[1]
JPEG = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
KEYS = [["a", "ä b", "c"], ["d", "e"], ["f"], ["g", "h"]]
LABELS = {"a": [0, 1], "ä b": [0], "c": [0, 2], "d": [1], "e": [0], "f": [2], "g": [1], "h": []}


def write_data_set(folder, index=True, name="i2e"):
    """A labelled data set of four shards; returns the folder of its version."""
    from array_record.python import array_record_module

    version = folder / name / "1.0.0"
    version.mkdir(parents=True)
    num_bytes, rows = 0, []
    for shard, keys in enumerate(KEYS):
        path = version / records.shard_name(name, "train", shard, len(KEYS))
        writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
        for position, key in enumerate(keys):
            example = {"key": key, "image": JPEG, "text": f"text {key}", "source": "tests"}
            example |= {"entity_ids": LABELS[key], "entity_scores": [0.5] * len(LABELS[key])}
            record = records.serialize(example | {"width": 8, "height": 8})
            num_bytes += len(record)
            rows.append((key, shard, position))
            writer.write(record)
        writer.close()
    entities = records.Entities(
        ["Q1", "Q2", "Q3"], ["x", "y", "z"], ["", "why", ""], np.array([4, 3, 2])
    )
    records.write_entities(version / records.ENTITIES_FILE, entities)
    (version / records.TOKENIZER_FILE).write_text('{"a": "tokenizer"}')
    (version / "LICENSE").write_text("free")
    if index:
        types = (pa.string(), pa.int32(), pa.int32())
        columns = zip(*rows, strict=True)
        arrays = [pa.array(c, t) for c, t in zip(columns, types, strict=True)]
        pq.write_table(pa.table(arrays, names=["key", "shard", "index"]), version / "keys.parquet")
    lengths = [len(keys) for keys in KEYS]
    dataset_files.write_metadata(
        version, name=name, shard_lengths=lengths, num_bytes=num_bytes, description="words"
    )
    return version


def key_file(folder, *keys):
    path = folder / "keys.txt"
    path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    return path


def raw(version):
    """key -> the record's bytes, in order."""
    info = versions.read_info(version)
    found = {}
    for number, length in enumerate(info.shard_lengths):
        for record in versions.read_shard(info.shard(version, number), length):
            found[records.parse(record)["key"]] = record
    return found


def snapshot(version):
    return {path.name: path.read_bytes() for path in version.iterdir()}


@pytest.mark.parametrize("index", [True, False])
def test_what_stays_keeps_bytes_order_and_ids(tmp_path, index):
    import tensorflow_datasets as tfds

    old = write_data_set(tmp_path, index)
    before, files = raw(old), snapshot(old)
    result = remove.remove(old, key_file(tmp_path, "ä b", "f", "c", "nobody", "", "c"))
    new = old.parent / "1.0.1"
    assert snapshot(old) == files
    assert result == json.loads((new / "result.json").read_text())
    assert result["removed"] == 3
    assert (result["version"], result["made_from"], result["unknown"]) == (
        *("1.0.1", "1.0.0"),
        ["nobody"],
    )
    assert (result["shards_rewritten"], result["records"]) == (2, 5)
    after = raw(new)
    assert list(after.items()) == [(k, v) for k, v in before.items() if k not in ("ä b", "c", "f")]
    info = versions.read_info(new)
    assert info.shard_lengths == [1, 2, 0, 2]
    assert info.num_bytes == sum(map(len, after.values()))
    assert info.description == "words"
    # Untouched shards are the same file; ids mean what they meant.
    names = [records.shard_name("i2e", "train", number, 4) for number in range(4)]
    assert [(old / name).samefile(new / name) for name in names] == [False, True, False, True]
    entities = records.read_entities(new / records.ENTITIES_FILE)
    assert entities.qids == ["Q1", "Q2", "Q3"]
    assert entities.counts.tolist() == [2, 3, 0]
    assert result["entities_without_images"] == 1
    assert (new / "LICENSE").read_text() == "free"
    assert (new / records.TOKENIZER_FILE).read_text() == '{"a": "tokenizer"}'
    listed = (new / "removed_keys.txt").read_text(encoding="utf-8").splitlines()
    assert listed == ["c", "f", f"sha256:{hashlib.sha256(JPEG).hexdigest()}", "ä b"]
    # Readers take the newest version, by name, through TFDS too.
    assert [e["key"] for e in records.open_source(tmp_path, "i2e")] == list(after)
    read = tfds.data_source("i2e", data_dir=tmp_path, split="train")
    assert [e["key"].decode() for e in read] == list(after)
    # The index fits: the next removal may rely on it.
    rows = pq.read_table(new / "keys.parquet").to_pylist()
    where = [
        (k, s, i) for s, keys in enumerate([["a"], "de", [], "gh"]) for i, k in enumerate(keys)
    ]
    assert [(row["key"], row["shard"], row["index"]) for row in rows] == where
    assert pq.read_schema(new / "keys.parquet").field("index").type == pa.int32()


def test_again_is_harmless_and_versions_build_on_one_another(tmp_path):
    old = write_data_set(tmp_path)
    first = remove.remove(old, key_file(tmp_path, "a", "d"))
    files = snapshot(old.parent / "1.0.1")
    assert remove.remove(old, key_file(tmp_path, "d", "a")) == first
    assert snapshot(old.parent / "1.0.1") == files
    # Other keys from the old version would bring back those that are gone.
    with pytest.raises(errors.BadInput, match=r"1\.0\.1 exists already.*newest version"):
        remove.remove(old, key_file(tmp_path, "e"))
    # What is gone already is neither unknown nor a reason for a new version.
    again = remove.remove(old.parent / "1.0.1", key_file(tmp_path, "d", "a", "zz"))
    assert (again["removed"], again["already_removed"], again["unknown"]) == (0, 2, ["zz"])
    assert again["version"] == "1.0.1"
    remove.remove(old.parent / "1.0.1", key_file(tmp_path, "d", "h"))
    assert sorted(os.listdir(old.parent)) == ["1.0.0", "1.0.1", "1.0.2"]
    assert removed.read([old.parent / "1.0.2/removed_keys.txt"], "list").keys == {*"adh"}
    assert list(raw(old.parent / "1.0.2")) == ["ä b", "c", "e", "f", "g"]


def test_unlabelled_set_in_a_folder_elsewhere_that_cannot_be_linked(tmp_path, monkeypatch):
    old = write_data_set(tmp_path, name="i2t")
    (old / records.ENTITIES_FILE).unlink()

    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    remove.remove(old, key_file(tmp_path, "a"), tmp_path / "other/i2t/2.0.0")
    assert list(raw(tmp_path / "other/i2t/2.0.0")) == ["ä b", *"cdefgh"]
    assert len(records.open_source(tmp_path / "other", "i2t")) == 7
    assert not (old.parent / "1.0.1").exists()


@pytest.mark.parametrize("moment", ["shard", "index", "vocabulary", "metadata", "rename"])
def test_a_kill_leaves_no_half_version(tmp_path, moment):
    old = write_data_set(tmp_path)
    keys = key_file(tmp_path, "a", "f")
    die = {
        "shard": "remove._link",
        "index": "remove._write_index",
        "vocabulary": "remove._write_vocabulary",
        "metadata": "dataset_files.write_metadata",
        "rename": "os.rename",
    }[moment]
    code = (
        "import os\nfrom data_prep.dataset import remove\n"
        "from data_prep.dataset import files as dataset_files\n"
        f"{die} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        f"remove.remove({str(old)!r}, {str(keys)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert metadata.find_directory(tmp_path, "i2e") == old
    assert not (old.parent / "1.0.1").exists()
    remove.remove(old, keys)
    assert sorted(os.listdir(old.parent)) == ["1.0.0", "1.0.1"]
    uninterrupted = write_data_set(tmp_path / "other")
    remove.remove(uninterrupted, keys)
    assert snapshot(old.parent / "1.0.1") == snapshot(uninterrupted.parent / "1.0.1")


def test_the_command(tmp_path):
    old = write_data_set(tmp_path)
    command = [sys.executable, "-m", "data_prep.remove_keys", f"--dataset={old}"]
    keys = key_file(tmp_path, "a", "who")
    run = subprocess.run(
        [*command, f"--keys={keys}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "1 keys are not in the data set: 'who'" in run.stderr
    assert "version 1.0.1: 1 records removed (0 of them copies), 1 shards written" in run.stderr
    bad = subprocess.run(
        [*command, "--keys=nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert "--keys=nowhere cannot be read" in bad.stderr


def test_bad_input_is_named_and_nothing_is_written(tmp_path):
    old = write_data_set(tmp_path)
    keys = key_file(tmp_path, "a")

    def refused(match, dataset=old, keys=keys, out=None):
        with pytest.raises(errors.BadInput, match=match):
            remove.remove(dataset, keys, out)
        assert sorted(os.listdir(old.parent)) == ["1.0.0"]

    refused("no finished version", dataset=old.parent)
    (tmp_path / "empty.txt").write_text("\n\n")
    refused("holds no key", keys=tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused("not UTF-8", keys=tmp_path / "latin.txt")
    refused("name it by three numbers", out=tmp_path / "new")
    refused("three numbers", out=old)
    (tmp_path / "all").mkdir()
    refused("names all 8 records", keys=key_file(tmp_path / "all", *LABELS))
    index = pq.read_table(old / "keys.parquet")
    pq.write_table(index.slice(1), old / "keys.parquet")
    refused("does not list the 8 records")
    swapped = index.set_column(0, "key", pa.array([*"habcdefg"]))
    pq.write_table(swapped, old / "keys.parquet")
    refused("does not belong to")
    (old / "keys.parquet").write_bytes(b"PAR1 no")
    refused("is damaged or")
    (old / "keys.parquet").unlink()
    shard = old / records.shard_name("i2e", "train", 1, 4)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("cut short or damaged")
    shard.unlink()
    refused("00001-of-00004 is missing")
    shard.write_bytes(whole)
    (old / "dataset_info.json").write_text("{}")
    refused("does not describe one split")
