"""Recipes that begin with a model, and class folders as their data."""

import json
import shutil
import tarfile

import numpy as np
import pytest

from configs import finetune, i2e
from data_prep import build_i2e, class_folders
from mofi_jax import grow, inference, train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.distributed import meshes
from mofi_jax.interop import huggingface
from mofi_jax.training import checkpoint, settings
from tests import datasets

CLASSES = ("red_circle", "red square", "100 % blue")


@pytest.fixture(autouse=True)
def one_device(monkeypatch, mesh_of):
    monkeypatch.setattr(meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of classes with a picture below one, hidden files, and a picture of no class."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(CLASSES):
        (folder / name / "more").mkdir(parents=True)
        for i in range(5):
            place = folder / name / ("more" if i == 4 else "") / f"{i}.b.JPG"
            place.write_bytes(ops.encode_jpeg(datasets.drawing(number, i, size=40), 95))
        (folder / name / "._0.jpg").write_bytes(b"macOS")
        (folder / name / "notes.txt").write_text("not a picture")
    (folder / "red_circle" / "broken.png").write_bytes(b"no picture")
    (folder / "loose.jpg").write_bytes(b"of no class")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    class_folders.main(str(pictures), str(folder / "PAIRS"), per_tar="6")
    build_i2e.build(i2e.get_config(f"classes={folder / 'PAIRS'}"), str(folder / "W"))
    return folder


def test_class_folders_become_labelled_records(data):
    result = json.loads((data / "PAIRS/result.json").read_text())
    assert result == {"classes": 3, "pictures": 16}
    assert len(list((data / "PAIRS").glob("*.tar"))) == 3
    source = records.open_source(str(data / "W"), "i2e")
    vocabulary = records.read_entities(source.directory / records.ENTITIES_FILE)
    assert sorted(vocabulary.names) == ["100 % blue", "red circle", "red square"]
    assert set(vocabulary.qids) == {
        *("class:100%20%25%20blue", "class:red_circle", "class:red%20square")
    }
    assert sorted(vocabulary.counts) == [5, 5, 5]
    found = source.read(range(len(source)))
    assert len(found) == 15  # the broken one is rejected
    for record in found:
        [entity] = record["entity_ids"]
        assert record["text"] == vocabulary.names[entity]


def test_packing_again_does_nothing_and_takes_no_others_folder(pictures, data, tmp_path):
    before = (data / "PAIRS/result.json").stat().st_mtime_ns
    class_folders.main(str(pictures), str(data / "PAIRS"))
    assert (data / "PAIRS/result.json").stat().st_mtime_ns == before
    with tarfile.open(data / "PAIRS/00000.tar") as tar:
        assert tar.getnames()[:3] == ["00000000.jpg", "00000000.txt", "00000000.json"]
    for folder, out, words in (
        (pictures, data, "is not empty"),
        (pictures / "red_circle/more", tmp_path / "x", "holds no pictures in folders"),
        (pictures / "loose.jpg", tmp_path / "x", "cannot be read as an uncompressed .tar"),
    ):
        with pytest.raises(BadInput, match=words):
            class_folders.main(str(folder), str(out))
    assert not (tmp_path / "x").exists()


def recipe(text, **changes):
    config = finetune.get_config(text)
    config.update_from_flattened_dict(
        {"batch_size": 16, "log_every": "1 steps", "data.threads": 1} | changes
    )
    return config


def test_own_classes(trained, data, tmp_path):
    config = recipe(f"recipe=classes,model={trained / 'run'},data={data / 'W'},total=2 steps")
    assert config.data.eval_ops == "mofi"
    train.main(config, str(tmp_path))
    tuned = inference.read(tmp_path)
    assert set(tuned.params) == {"image", "entity_table"}
    before = inference.read(trained / "run").params["image"]["position_embedding"]
    np.testing.assert_allclose(tuned.params["image"]["position_embedding"], before, atol=1e-3)


def test_another_resolution(trained, tmp_path):
    text = f"recipe=resolution,model={trained / 'run'},data={trained / 'data'},res=24,total=1 step"
    train.main(recipe(text, **{"optimizer.learning_rate": 1e-30}), str(tmp_path))
    found, before = inference.read(tmp_path), inference.read(trained / "run")
    assert found.config.image_size == 24
    np.testing.assert_array_equal(
        found.params["text"]["token_embedding"], before.params["text"]["token_embedding"]
    )
    operations = "decode|resize_short(16)|center_crop(16)"
    larger = finetune.at_size(operations, 16, 24)
    assert larger == "decode|resize_short(24)|center_crop(24)"


@pytest.mark.parametrize(
    "towers", [pytest.param(("image", "text"), marks=pytest.mark.slow), ("image",)]
)
def test_a_text_tower_on_a_locked_one(trained, tmp_path, towers):
    saved = inference.read(trained / "run")
    params = {name: saved.params[name] for name in towers}
    params |= {"logit_scale": saved.params["logit_scale"]} if "text" in towers else {}
    saved = huggingface.Clip(saved.config, params, saved.tokenizer, None, saved.preprocess)
    huggingface.write(tmp_path / "clip", saved)
    text = f"recipe=lit,model={tmp_path / 'clip'},data={trained / 'data'},total=2 steps"
    config = recipe(text, **{"model.dtype": "float32"})
    assert config.model.text.width == (16 if "text" in towers else 512)
    config.model.text.update({"width": 16, "layers": 1, "heads": 2})
    train.main(config, str(tmp_path / "lit"))
    found = checkpoint.restore_params(tmp_path / "lit")
    for name in ("position_embedding", "class_embedding"):
        np.testing.assert_array_equal(found["image"][name], saved.params["image"][name])
    assert set(found) == {"image", "text", "logit_scale"}


@pytest.mark.slow
def test_new_entities(trained, tmp_path):
    new = datasets.write(tmp_path / "new", entities=9)
    old = trained / "run" / records.TOKENIZER_FILE
    shutil.copy(old, new / records.TOKENIZER_FILE)
    grow.main(str(trained / "run"), str(tmp_path / "new"), str(tmp_path / "grown"))
    text = f"recipe=entities,model={tmp_path / 'grown'},data={tmp_path / 'new'}"
    with pytest.raises(BadInput, match="write total=DURATION, longer than its 20 steps"):
        finetune.get_config(text)
    config = finetune.get_config(f"{text},total=21 steps")
    assert config.batch_size == 16
    train.main(config, str(tmp_path / "grown"))
    assert checkpoint.last_step(tmp_path / "grown") == 21


def test_recipes_that_cannot_be(trained, tmp_path):
    for text, words in (
        ("recipe=everything,model=x", "Unknown recipe 'everything': choose from classes"),
        ("recipe=lit", "no model to begin with: write model=FOLDER"),
        (f"recipe=lit,model={tmp_path}", "config.json"),
        (f"recipe=entities,model={tmp_path}", "name a run that `mofi grow` has grown"),
    ):
        with pytest.raises(BadInput, match=words):
            finetune.get_config(text)
    for name in finetune.RECIPES:
        config = finetune.get_config(f"recipe={name},model={trained / 'run'},total=9 steps")
        settings.validate(config)
