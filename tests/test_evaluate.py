"""Picture sets, class tables, the suite of evaluators, and the main that runs them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import eval as eval_config
from mofi_jax import evaluate, inference
from mofi_jax.data import records, tokenizer
from mofi_jax.errors import BadInput
from mofi_jax.evaluators import common
from mofi_jax.model import mofi

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_prep/sample"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first 12 pictures of unseen.tar as a folder, and beside it as a tar."""
    root = tmp_path_factory.mktemp("pictures")
    with tarfile.open(SAMPLE / "unseen.tar") as tar:
        tar.extractall(root / "set", members=tar.getmembers()[:12], filter="data")
    with tarfile.open(root / "set.tar", "w") as tar:
        for path in sorted((root / "set").iterdir(), reverse=True):
            tar.add(path, f"inner/{path.name}")
    return root / "set"


# ----------------------------------------------------------------------------------- picture sets


def test_folder_and_tar_are_the_same_set(folder):
    one, other = common.read_set(folder), common.read_set(folder.with_suffix(".tar"))
    assert one.names == other.names
    assert len(one) == 12
    np.testing.assert_array_equal(one.classes, [340] * 6 + [341] * 6)
    assert [one.read(i) for i in range(12)] == [other.read(i) for i in range(12)]
    assert one.sha256() == other.sha256()


def test_hash_sees_names_and_contents(folder, tmp_path):
    for change in ("rename", "content"):
        copy = shutil.copytree(folder, tmp_path / change)
        if change == "rename":
            (copy / "340_0.jpg").rename(copy / "340_9.jpg")
        else:
            shutil.copy(copy / "341_0.jpg", copy / "340_0.jpg")
        assert common.read_set(copy).sha256() != common.read_set(folder).sha256()


@settings(max_examples=30, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2000), st.from_regex(r"\A[a-z0-9]{1,6}\Z")), min_size=1))
def test_order_is_by_number_then_name(tmp_path_factory, entries):
    """Not by text, by which 10 comes before 9; and whatever order the directory lists."""
    root = tmp_path_factory.mktemp("order")
    for number, name in entries:
        (root / f"{number}_{name}.jpg").write_bytes(b"")
    pictures = common.read_set(root)
    found = [tuple(name.removesuffix(".jpg").split("_")) for name in pictures.names]
    assert [(int(number), name) for number, name in found] == sorted(
        entries, key=lambda entry: (entry[0], f"{entry[0]}_{entry[1]}.jpg")
    )


def test_files_that_are_no_pictures_are_passed_over(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    for name in ("README.txt", ".DS_Store", "._340_0.jpg"):
        (copy / name).write_bytes(b"x")
    assert common.read_set(copy).names == common.read_set(folder).names


def test_unusable_picture_sets(folder, tmp_path):
    with pytest.raises(BadInput, match="no picture set at .*nowhere"):
        common.read_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no pictures"):
        common.read_set(tmp_path / "empty")
    copy = shutil.copytree(folder, tmp_path / "named")
    (copy / "cat.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match=r"cat.jpg in .* is not named .*1 such"):
        common.read_set(copy)
    whole = folder.with_suffix(".tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(BadInput, match="short.tar cannot be read as a .tar"):
        common.read_set(tmp_path / "short.tar")
    with tarfile.open(tmp_path / "zipped.tar.gz", "w:gz") as tar:
        tar.add(folder / "340_0.jpg", "340_0.jpg")
    with pytest.raises(BadInput, match="cannot be read as a .tar"):
        common.read_set(tmp_path / "zipped.tar.gz")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for inner in ("a", "b"):
            tar.add(folder / "340_0.jpg", f"{inner}/340_0.jpg")
    with pytest.raises(BadInput, match=r"holds 340_0.jpg twice"):
        common.read_set(tmp_path / "twice.tar")


def test_a_picture_that_cannot_be_decoded_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    data = (copy / "341_2.jpg").read_bytes()
    (copy / "341_2.jpg").write_bytes(data[:200])
    with pytest.raises(BadInput, match=r"341_2.jpg in .*cannot be decoded"):
        common.embed_pictures(inference.RawPixels(8), {}, common.read_set(copy))


def test_class_tables(tmp_path):
    table = common.read_classes(SAMPLE / "classes.jsonl")
    assert table[0] == common.Class("n02691156", "airplane")
    published = tmp_path / "GPR1200_categoryNumber_to_text.json"
    published.write_text('{"0": "Eldorado National Forest", "9": "Löderups kyrka"}', "utf-8")
    assert common.read_classes(published)[9] == common.Class("", "Löderups kyrka")
    with pytest.raises(BadInput, match="no class table at"):
        common.read_classes(tmp_path / "nowhere.jsonl")
    for line in ("not json", '{"class": 1}', '{"class": "x", "label": "y"}', "[1]"):
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"class": 0, "label": "a"}\n' + line)
        with pytest.raises(BadInput, match="Entry 2 of the class table"):
            common.read_classes(broken)


# ------------------------------------------------------------------------------------ the suite


def test_building(folder):
    towers = inference.RawPixels(8)
    assert common.kinds() == ["classification", "retrieval", "zeroshot"]
    with pytest.raises(BadInput, match="Evaluator x: Unknown evaluator kind 'knn': choose from"):
        common.build_all(towers, {"x": {"kind": "knn"}})
    with pytest.raises(BadInput, match="has no key 'image': it takes images, classes"):
        common.build("retrieval", towers, image="typo")
    with pytest.raises(BadInput, match="needs the key 'images'"):
        common.build("retrieval", towers)
    named = {"images": str(folder), "classes": str(SAMPLE / "classes.jsonl")}
    suite = common.build_all(
        towers,
        {
            "pictures": {"kind": "retrieval", **named},
            "words": {"kind": "zeroshot", **named},
            "entities": {"kind": "classification", **named},
        },
    )
    assert list(suite.evaluators) == ["pictures"]
    assert suite.skipped == {
        "words": "the model has no tokenizer",
        "entities": "the model has no entities",
    }


def test_pictures_are_embedded_once_for_all_evaluators_and_anew_for_new_parameters(folder):
    seen = []

    class Counting(inference.RawPixels):
        def embed_images(self, params, images):
            seen.append(len(images))
            return super().embed_images(params, images)

    config = {name: {"kind": "retrieval", "images": str(folder)} for name in ("a", "b")}
    suite = common.build_all(Counting(8), config)
    first = {"version": 1}
    scores = common.run_all(suite.evaluators, first)
    assert sorted(scores) == ["a/map", "a/map_no_self", "b/map", "b/map_no_self"]
    assert seen == [12]
    common.run_all(suite.evaluators, {"version": 2})
    assert seen == [12, 12]


def test_errors_carry_the_name_of_the_evaluator():
    class Failing:
        def __init__(self, error):
            self.error = error

        def run(self, params):
            yield "fine", 1.0
            raise self.error

    with pytest.raises(RuntimeError, match="evaluator broken failed: division") as caught:
        common.run_all({"broken": Failing(ZeroDivisionError("division"))}, {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(BadInput, match="Evaluator bad: no pictures"):
        common.run_all({"bad": Failing(BadInput("no pictures"))}, {})


# ------------------------------------------------------------------------------------ the main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small untrained model with text tower and class table."""
    root = tmp_path_factory.mktemp("model")
    classes = common.read_classes(SAMPLE / "classes.jsonl")
    names = [classes[i].label for i in range(340)]
    qids = [classes[i].qid for i in range(340)]
    tokenizer.train_bpe(names, 300, root / "tokenizer.json")
    texts = tokenizer.Tokenizer(root / "tokenizer.json", 8)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(width=16, layers=1, heads=2),
        text=mofi.TowerConfig(width=16, layers=1, heads=2),
        vocab_size=texts.vocab_size,
        context_length=8,
        eos_id=texts.eos_id,
        embed_dim=16,
        dtype="float32",
    )
    loaded = inference.load.__globals__  # the real functions, with weights that need no training
    del loaded
    entities = records.Entities(qids, names, [""] * 340, np.full(340, 5, np.int64))
    from mofi_jax import partition

    towers = inference.Towers(
        config=config,
        tokenizer=texts,
        entities=entities,
        preprocess="decode|resize_short(16)|center_crop(16)",
        mesh=partition.make_mesh(),
    )
    params = mofi.create(config, jax.random.key(0))
    params["entity_table"] = np.random.default_rng(0).normal(size=(340, 16)).astype(np.float32)
    return inference.Model(towers, towers.put(params), "untrained")
