"""The example schema: written here, read back by TFDS by name, and damaged on purpose."""

import pickle
import sys

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dataset import files as dataset_files
from mofi_jax.common import errors
from mofi_jax.data import limits, metadata, records, training_set
from tests import datasets


def _jpeg(seed=0, height=12, width=17):
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.imencode(".jpg", rgb)[1].tobytes()


def _example(i, ids=(3, 1)):
    return {
        "key": f"{i:05d}",
        "image": _jpeg(i),
        "text": f"Ünïcode caption {i} 🎉",
        "entity_ids": list(ids),
        "entity_scores": [0.5 / (n + 1) for n in range(len(ids))],
        "source": "tests",
        "width": 17,
        "height": 12,
    }


def _write(directory, lengths, name="i2e"):
    """Writes a data set with shards of the given lengths; returns the examples."""
    from array_record.python import array_record_module

    folder = directory / name / records.VERSION
    folder.mkdir(parents=True)
    examples, num_bytes = [], 0
    for shard, length in enumerate(lengths):
        path = folder / records.shard_name(name, "train", shard, len(lengths))
        writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
        for _ in range(length):
            examples.append(_example(len(examples), ids=range(len(examples) % 3)))
            record = records.serialize(examples[-1])
            num_bytes += len(record)
            writer.write(record)
        writer.close()
    dataset_files.write_metadata(folder, name=name, shard_lengths=lengths, num_bytes=num_bytes)
    return examples


def test_tfds_opens_it_by_name_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    examples = _write(tmp_path, [4, 3])
    source = tfds.data_source("i2e", data_dir=tmp_path, split="train")
    assert len(source) == 7
    for read, written in zip(source, examples, strict=True):
        assert read["key"].decode() == written["key"]
        assert read["text"].decode() == written["text"]
        assert list(read["entity_ids"]) == written["entity_ids"]
        np.testing.assert_allclose(list(read["entity_scores"]), written["entity_scores"])
        assert (read["height"], read["width"]) == read["image"].shape[:2] == (12, 17)
    sliced = tfds.data_source("i2e", data_dir=tmp_path, split="train[3:5]")
    assert [e["key"].decode() for e in sliced] == ["00003", "00004"]
    assert "tensorflow" not in sys.modules


def test_open_source_reads_every_field(tmp_path):
    examples = _write(tmp_path, [4, 3])
    source = records.open_source(tmp_path, "i2e")
    assert len(source) == len(examples)
    for i, written in enumerate(examples):
        read = source[i]
        assert set(read) == set(written) == set(records.features())
        for field in ("key", "image", "text", "source", "width", "height"):
            assert read[field] == written[field]
        assert read["entity_ids"].dtype == np.int32
        assert read["entity_scores"].dtype == np.float32
        assert read["entity_ids"].tolist() == written["entity_ids"]
    assert [e["key"] for e in records.open_source(tmp_path, "i2e", "train[5:]")] == [
        "00005",
        "00006",
    ]


def test_source_survives_pickling(tmp_path):
    _write(tmp_path, [2, 2])
    source = records.open_source(tmp_path, "i2e")
    clone = pickle.loads(pickle.dumps(source))
    assert [e["key"] for e in clone] == [e["key"] for e in source]


def test_newest_version_wins(tmp_path):
    _write(tmp_path, [1])
    _write(tmp_path / "newer", [2])
    (tmp_path / "newer/i2e/1.0.0").rename(tmp_path / "i2e/1.10.0")
    (tmp_path / "i2e/1.9.0").mkdir()  # unfinished: no metadata
    assert metadata.find_directory(tmp_path, "i2e").name == "1.10.0"
    for too_deep in ("i2e", "i2e/1.10.0"):
        with pytest.raises(errors.BadInput, match=f"give {tmp_path}, which holds it"):
            metadata.find_directory(tmp_path / too_deep, "i2e")


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_shard_cut_short_is_named(tmp_path, keep):
    _write(tmp_path, [3, 3])
    shard = tmp_path / "i2e/1.0.0" / records.shard_name("i2e", "train", 1, 2)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(errors.BadInput, match=r"00001-of-00002.*cut short.*copy it again"):
        records.open_source(tmp_path, "i2e")


def test_shard_with_other_record_count_is_named(tmp_path):
    _write(tmp_path, [3, 3])
    _write(tmp_path / "other", [3, 2])
    name = records.shard_name("i2e", "train", 1, 2)
    (tmp_path / "other/i2e/1.0.0" / name).replace(tmp_path / "i2e/1.0.0" / name)
    with pytest.raises(errors.BadInput, match=r"00001-of-00002 holds 2 records.*promises 3"):
        records.open_source(tmp_path, "i2e")


def test_missing_shard_is_named(tmp_path):
    _write(tmp_path, [3, 3])
    (tmp_path / "i2e/1.0.0" / records.shard_name("i2e", "train", 0, 2)).unlink()
    with pytest.raises(errors.BadInput, match="00000-of-00002 is missing"):
        records.open_source(tmp_path, "i2e")


def test_missing_data_set_split_and_remote_path(tmp_path):
    with pytest.raises(errors.BadInput, match=r"no data set 'i2t'.*mofi labels"):
        records.open_source(tmp_path, "i2t")
    (tmp_path / "i2t").mkdir()
    with pytest.raises(errors.BadInput, match="no finished version"):
        records.open_source(tmp_path, "i2t")
    with pytest.raises(errors.BadInput, match="gcsfuse"):
        records.open_source("gs://bucket/data", "i2e")
    _write(tmp_path, [3])
    with pytest.raises(errors.BadInput, match="'test'"):
        records.open_source(tmp_path, "i2e", "test")
    with pytest.raises(errors.BadInput, match="empty"):
        records.open_source(tmp_path, "i2e", "train[:0]")


def test_labels_beyond_the_vocabulary():
    records.validate_entity_ids(np.array([0, 9], np.int32), 10, "k")
    records.validate_entity_ids(np.array([], np.int32), 10, "k")
    with pytest.raises(
        errors.BadInput, match="'k' carries entity id 10, beyond the vocabulary of 10"
    ):
        records.validate_entity_ids(np.array([0, 10], np.int32), 10, "k")
    with pytest.raises(errors.BadInput, match="-1"):
        records.validate_entity_ids(np.array([-1, 3], np.int32), 10, "k")


_IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(key=_TEXT, text=_TEXT, ids=_IDS, size=st.integers(0, 200))
def test_parse_inverts_serialize(key, text, ids, size):
    example = {
        "key": key,
        "image": b"\xff\xd8\xff" + bytes(size),
        "text": text,
        "entity_ids": ids,
        "entity_scores": np.linspace(-1, 1, len(ids), dtype=np.float32),
        "source": "",
        "width": size,
        "height": 1,
    }
    record = records.serialize(example)
    assert record == records.serialize(dict(reversed(example.items())))
    read = records.parse(record)
    assert read["entity_ids"].tolist() == ids
    np.testing.assert_array_equal(read["entity_scores"], example["entity_scores"])
    for field in ("key", "image", "text", "source", "width", "height"):
        assert read[field] == example[field]


def test_serialize_refuses_what_no_reader_could_use():
    with pytest.raises(ValueError, match="not JPEG"):
        records.serialize(_example(0) | {"image": b"\x89PNG\r\n"})
    with pytest.raises(ValueError, match="unequal"):
        records.serialize(_example(0) | {"entity_scores": []})


def test_parse_names_missing_fields():
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example.FromString(records.serialize(_example(0)))
    del message.features.feature["text"]
    with pytest.raises(ValueError, match="text"):
        records.parse(message.SerializeToString())


def test_entities_round_trip(tmp_path):
    entities = records.Entities(
        qids=["Q7", "Q1", "Q2"],
        names=["cat", "river", "Ō"],
        descriptions=["animal", "", "letter"],
        counts=np.array([9, 4, 4]),
    )
    records.write_entities(tmp_path / "entities.parquet", entities)
    read = records.read_entities(tmp_path / "entities.parquet")
    assert len(read) == 3
    assert (read.qids, read.names) == (entities.qids, entities.names)
    assert read.descriptions == entities.descriptions
    assert read.counts.dtype == np.int64
    assert read.counts.tolist() == [9, 4, 4]
    assert read.text(0) == "cat"
    assert read.text(0, with_description=True) == "cat, animal"
    assert read.text(1, with_description=True) == "river"


def test_a_later_state_of_a_vocabulary_keeps_its_ids(tmp_path):
    path = tmp_path / "entities.parquet"
    old = records.Entities(["Q7", "Q1"], ["cat", "river"], ["", ""], np.array([9, 4]))
    new = records.Entities(["Q7", "Q1"], ["cat", "river"], ["", ""], np.array([0, 3]))
    records.write_entities(path, new, old)
    assert records.read_entities(path).counts.tolist() == [0, 3]
    other = records.Entities(["Q1", "Q7"], ["river", "cat"], ["", ""], np.array([3, 0]))
    with pytest.raises(ValueError, match="keep the ids"):
        records.write_entities(path, other, old)


def test_entities_out_of_order_or_damaged(tmp_path):
    path = tmp_path / "entities.parquet"
    wrong = records.Entities(["Q2", "Q1"], ["a", "b"], ["", ""], np.array([4, 4]))
    with pytest.raises(ValueError, match="descending count"):
        records.write_entities(path, wrong)
    twice = records.Entities(["Q1", "Q1"], ["a", "b"], ["", ""], np.array([4, 4]))
    with pytest.raises(ValueError, match="twice"):
        records.write_entities(path, twice)
    with pytest.raises(errors.BadInput, match="no vocabulary"):
        records.read_entities(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(errors.BadInput, match="not a vocabulary"):
        records.read_entities(path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("image_count", ["x", "y"]),
        ("image_count", [None, 1]),
        ("image_count", [[1], [2]]),
        ("name", [None, "a"]),
        ("qid", [b"\xff", b"Q2"]),
        ("id", [{"a": 1}, {"a": 2}]),
    ],
)
def test_a_vocabulary_of_other_types_is_told(tmp_path, column, values):
    path = tmp_path / "entities.parquet"
    entities = records.Entities(["Q1", "Q2"], ["a", "b"], ["", ""], np.array([4, 3]))
    records.write_entities(path, entities)
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(table.column_names.index(column), column, pa.array(values)), path
    )
    with pytest.raises(errors.BadInput, match="not a vocabulary with the columns"):
        records.read_entities(path)


@pytest.mark.parametrize("content", ["{", '{"fileFormat": 3}', '{"splits": 1}'])
def test_metadata_of_another_form_are_told(tmp_path, content):
    _write(tmp_path, [3])
    (tmp_path / "i2e/1.0.0/dataset_info.json").write_text(content)
    with pytest.raises(errors.BadInput, match=r"dataset_info\.json cannot be read.*copy the data"):
        records.open_source(tmp_path, "i2e")


@pytest.mark.parametrize("name", ["data [v1]", "data*x", "d?", "a{b,c}"])
def test_folders_whose_names_are_patterns(tmp_path, name):
    _write(tmp_path / name, [2, 1])
    assert [e["key"] for e in records.open_source(tmp_path / name, "i2e")] == [
        *("00000", "00001", "00002")
    ]


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    """Told where a set is opened, and for all sets of a mixture together."""
    _write(tmp_path, [1, 1])
    datasets.write(tmp_path / "more", examples=4, shards=2)
    config = datasets.tiny_config(tmp_path / "more")
    config.data.extra = {"x": {"dir": str(tmp_path / "more"), "name": "i2e", "weight": 1.0}}
    limit = limits.OTHER_FILES + 1
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(errors.BadInput, match="2 shards need 258"):
        records.open_source(tmp_path, "i2e")
    limit = limits.OTHER_FILES + 3
    assert len(records.open_source(tmp_path, "i2e")) == 2
    with pytest.raises(errors.BadInput, match="4 shards need 260"):
        training_set.open_training_set(config)


@pytest.mark.parametrize("error", [OSError(5, "x"), RuntimeError("read: Stale file handle")])
def test_a_server_that_is_away_is_no_damage(tmp_path, monkeypatch, error):
    """Whoever starts the run again may have more luck: not the exit code of bad input."""
    _write(tmp_path, [1])
    source = records.open_source(tmp_path, "i2e")

    def read(self, shard, run):
        raise error

    monkeypatch.setattr(records.Source, "_read_run", read)
    with pytest.raises(type(error)) as raised:
        source[0]
    assert raised.value is error
