"""Layouts of picture sets that are not GPR1200's (those are in test_evaluate)."""

import json
import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.data.pictures import parquets, tree
from mofi_jax.evaluators.sets import pictures as picture_sets
from tests import datasets


def picture(number):
    return ops.encode_jpeg(np.full((6, 7, 3), number, np.uint8), 90)


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(len(name)))
    return root


def as_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "set")
    return path


CLASSES = ("cat/17841400008460056123456789012345_n.JPG", "cat/b.png", "dog/0_x.jpg", "dog/1_x.jpg")


# ---------------------------------------------------------------------------------- class folders


def test_a_folder_for_each_class_is_told_from_numbered_names(tmp_path):
    root = write(tmp_path / "one/set", *CLASSES)
    (root / "README.txt").write_text("")
    (root / "dog/.DS_Store").write_text("")
    folder = picture_sets.read_set(tmp_path / "one")  # folders around all of them do not count
    tar = picture_sets.read_set(as_tar(root, tmp_path / "set.tar"))
    for pictures in (folder, tar):
        assert pictures.names == CLASSES
        np.testing.assert_array_equal(pictures.classes, [0, 0, 1, 1])
        assert pictures.labels == {0: "cat", 1: "dog"}
        assert pictures.read(1) == picture(len("cat/b.png"))
    assert folder.sha256() == tar.sha256()
    classes = picture_sets.read_classes("", folder)
    assert classes[1] == picture_sets.Class("", "dog")


def test_class_folders_that_cannot_be_right(tmp_path):
    root = write(tmp_path / "set", *CLASSES)
    (root / "empty").mkdir()
    for hidden in ("", ".DS_Store"):  # what macOS leaves fills no folder
        if hidden:
            (root / "empty" / hidden).touch()
        for path in (root, as_tar(root, tmp_path / "empty.tar")):
            with pytest.raises(BadInput, match=r"Class (set/)?empty of .* holds no pictures \(1 s"):
                picture_sets.read_set(path)
    shutil.rmtree(root / "empty")
    write(root, "a.jpg")
    for path in (root, as_tar(root, tmp_path / "loose.tar")):
        with pytest.raises(BadInput, match=r"class folders and beside them \(a.jpg, 1 such"):
            picture_sets.read_set(path)
    write(tmp_path / "lone", "dog/a.jpg")
    with pytest.raises(BadInput, match=r"a.jpg in .* is not named .* into a folder for each class"):
        picture_sets.read_set(tmp_path / "lone")
    with pytest.raises(BadInput, match="have no names of their own: set `classes`"):
        picture_sets.read_classes("", picture_sets.read_set(write(tmp_path / "gpr", "1_a.jpg")))


def test_links_are_followed_and_told_where_they_lead_nowhere(tmp_path):
    root = write(tmp_path / "set", *CLASSES)
    write(tmp_path / "elsewhere", "fox/a.jpg")
    (root / "fox").symlink_to(tmp_path / "elsewhere/fox")
    (root / "dog/2_x.jpg").symlink_to("1_x.jpg")
    os.link(root / "cat/b.png", root / "cat/c.png")
    folder = picture_sets.read_set(root)
    assert set(folder.names) - {*CLASSES} == {"fox/a.jpg", "dog/2_x.jpg", "cat/c.png"}
    (root / "fox").unlink()  # into another tree, where a tar cannot follow it
    tar = picture_sets.read_set(as_tar(root, tmp_path / "set.tar"))
    assert tar.sha256() == picture_sets.read_set(root).sha256()
    assert "dog/2_x.jpg" in tar.names

    (root / "dog/3_x.jpg").symlink_to("nowhere.jpg")
    for path in (root, as_tar(root, tmp_path / "nowhere.tar")):
        with pytest.raises(BadInput, match=r"dog/3_x.jpg in .* is a link to nothing"):
            picture_sets.read_set(path)
    (root / "dog/3_x.jpg").unlink()
    (root / "dog/up").symlink_to(root)
    with pytest.raises(BadInput, match=r"dog/up in .* is a link to a folder that it lies in"):
        picture_sets.read_set(root)


def test_a_tar_that_is_damaged_in_its_middle_is_told(tmp_path):
    """To tarfile a header that it cannot read is the end: the rest would be no part of the set."""
    path = as_tar(write(tmp_path / "set", *CLASSES), tmp_path / "set.tar")
    with tarfile.open(path) as tar:
        place = tar.getmembers()[-2].offset
    data = bytearray(path.read_bytes())
    data[place + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=rf"cannot be read .*bad checksum at byte {place}\)"):
        picture_sets.read_set(path)


def test_a_path_is_no_pattern(tmp_path):
    write(tmp_path / "set", *CLASSES)
    for name in ("s*", "set/[cd]*", "se?"):
        with pytest.raises(BadInput, match="no picture set at"):
            picture_sets.read_set(tmp_path / name)
    odd = write(tmp_path / "a[b]x*", *CLASSES)
    assert len(picture_sets.read_set(odd)) == 4


# ------------------------------------------------------------------------------------------ parquet


def hugging_face(path, labels, names=("cat", "dog"), column="label", rows=None, **others):
    """As the library `datasets` writes it, in row groups of two."""
    rows = rows or [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(len(labels))]
    feature = {"names": list(names or ()), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, column: feature}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(rows, kind), column: pa.array(labels), **others})
    facts = json.dumps({"info": {"features": features if names else {}}})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": facts}), path, row_group_size=2
    )


def test_hugging_face_parquet(tmp_path):
    data = tmp_path / "data"
    hugging_face(data / "test-00000-of-00002.parquet", [1, 0, 1])
    hugging_face(data / "test-00001-of-00002.parquet", [0, 0])
    for path in (data, data / "test"):
        pictures = picture_sets.read_set(path)
        np.testing.assert_array_equal(pictures.classes, [1, 0, 1, 0, 0])
        assert pictures.labels == {0: "cat", 1: "dog"}
        assert pictures.names[3] == "00000003_0.jpg"
        assert [pictures.read(i) for i in (4, 0, 2)] == [picture(1), picture(0), picture(2)]
    one = picture_sets.read_set(data / "test-00001-of-00002.parquet")
    assert len(one) == 2

    hugging_face(data / "train-00000-of-00001.parquet", [1])
    # Of a set of splits the one to measure on; it can be named from above data/ as well.
    assert picture_sets.read_set(data).path == data / "test"
    assert picture_sets.read_set(tmp_path).path == data / "test"
    assert len(picture_sets.read_set(tmp_path, tree.TO_LEARN)) == 1
    for path in (data, tmp_path):
        assert len(picture_sets.read_set(path / "train")) == 1
    hugging_face(data / "test_b.parquet", [1])
    with pytest.raises(
        BadInput, match=r"holds the splits test, test_b: name one, as in .*/data/test"
    ):
        picture_sets.read_set(data)
    (data / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(BadInput, match="is one of 2 files and 1 of them"):
        picture_sets.read_set(data / "test")


def test_labels_of_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    hugging_face(path, [3, 1], names=None)
    assert picture_sets.read_set(path).labels == {}
    hugging_face(path, ["b", "a"], names=None)
    assert picture_sets.read_set(path).labels == {0: "a", 1: "b"}
    # CIFAR-100's: of two columns of labels the finer one.
    hugging_face(path, [0, 1], column="fine_label", coarse_label=pa.array([5, 5]))
    np.testing.assert_array_equal(picture_sets.read_set(path).classes, [0, 1])
    wrong = {
        "has no label": {"labels": [0, -1]},
        "no column of labels that is known": {"labels": [1, 2], "column": "height", "names": None},
        "has no picture": {"labels": [0], "rows": [{"bytes": None, "path": "a.jpg"}]},
        "classes 0 to 2 and names for 2": {"labels": [0, 2]},
        "classes -2 to 0 and names for 2": {"labels": [0, -2]},
    }
    for sentence, arguments in wrong.items():
        hugging_face(path, **arguments)
        with pytest.raises(BadInput, match=sentence):
            picture_sets.read_set(path).read(0)
    hugging_face(path, [0])
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 36 + data[40:])  # the first page of the pictures
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        picture_sets.read_set(path).read(0)
    path.write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        picture_sets.read_set(path)


def test_row_groups_are_unpacked_once_while_they_fit(tmp_path, monkeypatch):
    hugging_face(tmp_path / "x.parquet", [0] * 6)  # three groups of two
    unpacked = []
    inner = parquets.Rows._read_group
    monkeypatch.setattr(
        parquets.Rows, "_read_group", lambda self, i: unpacked.append(i) or inner(self, i)
    )
    pictures = picture_sets.read_set(tmp_path / "x.parquet")
    for i in (0, 2, 1, 3, 4, 0):  # as two devices read
        assert pictures.read(i) == picture(i)
    assert unpacked == [0, 1, 2]
    monkeypatch.setattr(parquets, "_KEPT_BYTES", 0)
    for i in (5, 4, 0, 4):
        assert pictures.read(i) == picture(i)
    assert unpacked == [0, 1, 2, 0, 2]


def test_row_groups_too_large_to_be_read_picture_by_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("mofi_jax.data.pictures.parquets._GROUP_BYTES", 100)
    hugging_face(tmp_path / "x.parquet", [0, 1])
    with pytest.raises(BadInput, match=r"row group of .*too much to read pictures one by one"):
        picture_sets.read_set(tmp_path / "x.parquet")


# ------------------------------------------------------------------------------------------- shards


def test_our_own_shards_with_entities_as_classes(tmp_path):
    version = datasets.write(tmp_path, examples=10, entities=4)
    for path in (version, version / "train", f"tfds:i2e:train@{tmp_path}"):
        pictures = picture_sets.read_set(path)
        np.testing.assert_array_equal(pictures.classes, np.arange(10) % 4)
        assert pictures.labels[1] == datasets.name_of(1)
        assert pictures.names[3] == "00000003_000003"
        assert ops.decode_rgb(pictures.read(9)).shape == (24, 24, 3)
    assert len(picture_sets.read_set(f"tfds:i2e:train[:40%]@{tmp_path}")) == 4


def test_sets_of_tfds(tmp_path, monkeypatch):
    from tensorflow_datasets.proto import tf_example_pb2

    version = tmp_path / "cifar100/3.0.2"
    version.mkdir(parents=True)
    records = []
    for i in range(3):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(picture(i))
        feature["label"].int64_list.value.append(2 - i)
        feature["id"].bytes_list.value.append(f"test_{i}".encode())
        records.append(example.SerializeToString())
    datasets.write_shard(version / "cifar100-test.array_record-00000-of-00001", records)
    info = {
        "name": "cifar100",
        "version": "3.0.2",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": "test",
                "shardLengths": ["3"],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (version / "dataset_info.json").write_text(json.dumps(info))
    (version / "label.labels.txt").write_text("apple\naquarium_fish\nbaby\n")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    pictures = picture_sets.read_set("tfds:cifar100:test")
    np.testing.assert_array_equal(pictures.classes, [2, 1, 0])
    assert pictures.labels == {0: "apple", 1: "aquarium_fish", 2: "baby"}
    assert pictures.names[0] == "00000000_test_0"
    assert pictures.read(2) == picture(2)
    with pytest.raises(BadInput, match=r"no data set sop.*`tfds build .* prepares it"):
        picture_sets.read_set("tfds:sop:test")
    with pytest.raises(BadInput, match="names no split: write tfds:NAME:SPLIT"):
        picture_sets.read_set("tfds:cifar100")
    with pytest.raises(BadInput, match="choose from test"):
        picture_sets.read_set("tfds:cifar100:train")
