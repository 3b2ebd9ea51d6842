"""Data sets of TFDS as sources: by name, split and slice, read without TensorFlow."""

import json
import os
import sys

import numpy as np
import pytest

from data_prep import engine
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.formats import tfds_sets
from mofi_jax.common import errors
from mofi_jax.data import ops, records
from tests import datasets
from tests.inputs import make_config, read, tables_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    datasets.write(folder, name="i2t", examples=24, shards=1)
    return folder


def example(fields):
    from tensorflow_datasets.proto import tf_example_pb2

    made = tf_example_pb2.Example()
    lists = {bytes: "bytes_list", np.int64: "int64_list", np.float32: "float_list"}
    for name, value in fields.items():
        getattr(made.features.feature[name], lists[type(value)]).value.append(value)
    return made.SerializeToString()


def run(pattern, workdir, **changes):
    manifests = pairs_stage.run(make_config(pattern, **changes), engine.Engine(workdir))
    return *read(workdir), engine.total_counts(manifests)


def test_pairs_and_their_pointers(data_dir, tmp_path):
    pairs, rejects, counts = run(f"tfds:i2t@{data_dir}", tmp_path / "w")
    assert rejects == {}
    assert (counts["members"], counts["pairs"]) == (24, 24)
    assert [len(shard) for shard in tables_of(tmp_path / "w", "pairs/*")] == [10, 10, 4]
    examples = {example["key"]: example for example in records.open_source(data_dir, "i2t")}
    assert {key: row["text"] for key, row in pairs.items()} == {
        key: example["text"] for key, example in examples.items()
    }
    columns = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    found = dict(pairs_stage.read_pictures(tmp_path / "w", *columns))
    assert [found[i] for i in range(24)] == [example["image"] for example in examples.values()]


def test_slices_and_kept_features(data_dir, tmp_path):
    pattern = f"tfds:i2t:train[5:15]@{data_dir}"
    pairs, _, _ = run(pattern, tmp_path / "w", keep_columns=("width", "source", "image", "none"))
    assert list(pairs) == [f"{i:06d}" for i in range(5, 15)]
    assert pairs["000005"]["offset"] == 5
    assert json.loads(pairs["000005"]["extras"]) == {"source": "tests", "width": 24}


def test_the_folder_of_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(data_dir))
    [found] = pairs_stage.find(["s=tfds:i2t"])
    assert (found.kind, found.span) == ("tfds", (0, 24))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "There is no data set 'none'"),
        ("i2t:test", r"has no such split .*: choose from train"),
        ("i2t:train[", "has no such split"),
    ],
)
def test_what_is_not_there_is_told(data_dir, name, words):
    with pytest.raises(errors.BadInput, match=words):
        pairs_stage.find([f"s=tfds:{name}@{data_dir}"])


def changed_copy(folder, change):
    """A data set whose metadata say something else."""
    version = datasets.write(folder, name="i2t", examples=4, shards=1)
    change(version)
    return folder


def test_another_file_format_is_told(tmp_path):
    def change(version):
        path = version / "dataset_info.json"
        path.write_text(path.read_text().replace("array_record", "tfrecord"))

    changed_copy(tmp_path, change)
    with pytest.raises(errors.BadInput, match="not stored as ArrayRecord: prepare it again"):
        pairs_stage.find([f"s=tfds:i2t@{tmp_path}"])


@pytest.mark.parametrize("name", ["../{SPLIT}", "{SPLIT:999999999}", "{SPLIT.x}", "{0}", "/etc/x"])
@pytest.mark.parametrize("place", ["filepathTemplate", "name", "split"])
def test_shards_are_named_by_words_that_stay_in_the_folder(tmp_path, name, place):
    def change(version):
        path = version / "dataset_info.json"
        content = json.loads(path.read_text())
        (content if place == "name" else content["splits"][0])[place.replace("split", "name")] = (
            name
        )
        path.write_text(json.dumps(content))

    changed_copy(tmp_path, change)
    split = name if place == "split" else "train"
    with pytest.raises(errors.BadInput, match=r"info\.json cannot be read .*cannot be named by"):
        pairs_stage.find([f"s=tfds:i2t:{split}@{tmp_path}"])


def test_features_that_are_not_known_are_told(tmp_path):
    def change(version):
        path = version / "features.json"
        content = json.loads(path.read_text())
        features = content["featuresDict"]["features"]
        features["words"], features["name"] = features.pop("text"), features.pop("source")
        path.write_text(json.dumps(content))

    changed_copy(tmp_path, change)
    with pytest.raises(errors.BadInput, match="has no Text feature that is known by its name"):
        pairs_stage.find([f"s=tfds:i2t@{tmp_path}"])


def test_a_damaged_shard_is_told(tmp_path):
    version = datasets.write(tmp_path, name="i2t", examples=4, shards=1)
    [shard] = (path for path in version.iterdir() if tfds_sets.is_shard(str(path)))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(errors.BadInput, match="is damaged or shorter than its dataset_info"):
        run(f"tfds:i2t@{tmp_path}", tmp_path / "w")


@pytest.mark.parametrize("length", ["5", "1000000000000", "8000000000000000000"])
def test_a_shard_that_should_hold_more_is_told(tmp_path, length):
    version = datasets.write(tmp_path, name="i2t", examples=4, shards=1)
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [length]
    (version / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(errors.BadInput, match="is damaged or shorter than its dataset_info"):
        run(f"tfds:i2t@{tmp_path}", tmp_path / "w")


def test_a_damaged_record_costs_itself(tmp_path):
    """Be it the file that is damaged there, or what was written."""
    version = datasets.write(tmp_path, name="i2t", examples=40, shards=1)
    [shard] = (path for path in version.iterdir() if tfds_sets.is_shard(str(path)))
    kept = [record["key"] for record in records.open_source(tmp_path, "i2t")]
    reader = records.open_shard(shard)
    written = reader.read(0, 40)
    written[3] = b"\xff" + written[3]
    datasets.write_shard(shard, written)
    data = bytearray(shard.read_bytes())
    data[data.index(b"000005")] ^= 1
    shard.write_bytes(data)
    pairs, rejects, counts = run(f"tfds:i2t@{tmp_path}", tmp_path / "w")
    assert list(pairs) == [key for key in kept if key not in ("000003", "000005")]
    assert rejects == {f"{shard.name}/{i:08d}": "broken_record" for i in (3, 5)}
    assert counts["members"] == 40


def test_features_may_hold_values_of_any_kind(tmp_path):
    version = datasets.write(tmp_path, name="i2t", examples=2, shards=1)
    [shard] = (path for path in version.iterdir() if tfds_sets.is_shard(str(path)))
    odd = [
        {"key": np.int64(7), "url": np.float32(1), "text": b"a cat"},
        {"key": b"caf\xe9", "text": np.int64(5)},
    ]
    picture = ops.encode_jpeg(datasets.drawing(0, 0), 95)
    datasets.write_shard(shard, [example(fields | {"image": picture}) for fields in odd])
    pairs, rejects, _ = run(f"tfds:i2t@{tmp_path}", tmp_path / "w")
    assert {key: (row["text"], row["url"]) for key, row in pairs.items()} == {"7": ("a cat", None)}
    assert rejects == {r"caf\xe9": "no_text"}


@pytest.mark.parametrize("legacy", [False, True])
def test_classes_that_metadata_name_are_not_imported(tmp_path, monkeypatch, legacy):
    """Neither as a source nor for training: a file beside the data is nobody's code."""
    version = datasets.write(tmp_path, name="i2t", examples=4, shards=1)
    (tmp_path / "stranger.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    datasets.name_foreign_class(version, "stranger", legacy=legacy)
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace("mofi_jax.data.records", "stranger.sets"))
    pairs, _, _ = run(f"tfds:i2t@{tmp_path}", tmp_path / "w")
    assert len(pairs) == 4
    assert [record["key"] for record in records.open_source(tmp_path, "i2t")] == list(pairs)
    assert not (tmp_path / "ran").exists()
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"featuresDict": {"features": {"a": 1}}}', "[" * 100_000]
)
def test_features_of_another_form_are_told(tmp_path, content):
    changed_copy(tmp_path, lambda version: (version / "features.json").write_text(content))
    with pytest.raises(errors.BadInput, match="does not name the features of a data set"):
        pairs_stage.find([f"s=tfds:i2t@{tmp_path}"])
