"""The export command: a folder with its parity report, or nothing at all."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import transformers
import yaml
from etils import epath

from data_prep.dataset import files as dataset_files
from mofi_jax import export, inference
from mofi_jax.common import errors
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import meshes
from mofi_jax.interop import huggingface, parity
from mofi_jax.model import mofi


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder with a bfloat16 name on it: the export is float32 all the same."""
    folder = tmp_path_factory.mktemp("source")
    dataset_files.train_bpe(["a photo of a cat", "dogs in the snow"] * 3, 280, folder / "own.json")
    tokenizer = tokenizer_lib.Tokenizer(folder / "own.json", 16)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(16, 2, 2),
        text=mofi.TowerConfig(24, 1, 2),
        vocab_size=tokenizer.vocab_size + 5,  # rounded up, as models do
        context_length=16,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
        activation="gelu_tanh",
    )
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    preprocess = "decode|resize_short(20, 'bilinear')|center_crop(16)"
    clip = huggingface.Clip(config, params, tokenizer, None, preprocess)
    huggingface.write(folder / "model", clip)
    return folder / "model"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_and_report(source, tmp_path):
    out = tmp_path / "runs" / "exported"
    export.main(str(source), str(out), "hf")
    report = json.loads((out / "result.json").read_text())
    assert report["format"] == "hf"
    assert report["reader"] == ["mofi_jax", "transformers", "sentence_transformers"]
    assert report["not_run"] == {}
    assert report["tokens"]["transformers"] == {"texts": len(parity.TEXTS), "differing": 0}
    pixels = report["pixels"]["transformers"]
    assert pixels["sizes"] == len(parity.SIZES)
    assert 0 < report["max_abs_diff"] <= 1e-4
    theirs = report["differences"]["transformers"]
    assert report["differences"]["sentence_transformers"]["text"]["max"] <= 1e-5
    largest = max(d["max"] for by in report["differences"].values() for d in by.values())
    assert report["max_abs_diff"] == largest
    assert theirs["text"]["min_cosine"] == pytest.approx(1)
    ours = report["differences"]["mofi_jax"]
    assert ours["image"]["max"] == ours["text"]["max"] == 0
    assert (
        report["tokenizer"]
        == inference.load(source, mesh=meshes.make_mesh()).towers.tokenizer.fingerprint
    )
    assert report["versions"]["transformers"] == transformers.__version__
    assert _names(out.parent) == ["exported"]
    again = inference.load(out, mesh=meshes.make_mesh())
    assert again.towers.preprocess == "decode|resize_short(20, 'bilinear')|center_crop(16)"
    card = (out / "README.md").read_text()
    assert "2 x 16 / 2" in card
    assert "{" not in card.replace("\\{", "")


def test_exporting_again_replaces(source, tmp_path):
    """Also through a link, which stays."""
    out, link = tmp_path / "exported", tmp_path / "latest"
    link.symlink_to(out)
    for path in (out, link):
        export.main(str(source), f"{path}/", "hf")
    assert _names(tmp_path) == ["exported", "latest"]
    assert link.is_symlink()
    assert {"result.json", "config.json", "model.safetensors"} <= set(_names(out))


def test_difference_is_a_failure_and_leaves_nothing(source, tmp_path, monkeypatch):
    read = huggingface.read

    def wrong(folder):
        clip = read(folder)
        clip.params["text"]["final_norm"]["scale"] *= np.linspace(0.9, 1.1, 24, dtype=np.float32)
        return clip

    saved = inference.read(source)
    monkeypatch.setattr(huggingface, "read", wrong)
    monkeypatch.setattr(inference, "read", lambda *_, **__: saved)
    with pytest.raises(parity.ParityError, match="1e-04 is allowed"):
        export.main(str(source), str(tmp_path / "exported"), "hf")
    assert _names(tmp_path) == []


def test_a_supervised_run_is_an_image_tower(source, tmp_path, monkeypatch):
    saved = inference.read(source)
    saved = dataclasses.replace(saved, params={"image": saved.params["image"]}, tokenizer=None)
    monkeypatch.setattr(inference, "read", lambda *_, **__: saved)
    export.main("supervised", str(tmp_path / "exported"), "hf")
    report = json.loads((tmp_path / "exported" / "result.json").read_text())
    assert {"mofi_jax", "transformers"} <= set(report["reader"])
    assert all(set(found) == {"image"} for found in report["differences"].values())
    assert report["max_abs_diff"] <= 1e-4


def test_bad_flags(source, tmp_path):
    with pytest.raises(errors.BadInput, match="--format=tflite is unknown: choose from hf"):
        export.main(str(source), str(tmp_path / "exported"), "tflite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.BadInput, match="something else than an export"):
        export.main(str(source), str(tmp_path / "mine"), "hf")
    with pytest.raises(errors.BadInput, match="neither a training run"):
        export.main(str(tmp_path), str(tmp_path / "exported"), "hf")
    assert _names(tmp_path) == ["mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_probes_are_always_the_same():
    first, second = (parity.probe_pictures(16) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == parity.PICTURES


def test_an_export_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    out = epath.Path(tmp_path / "out")
    out.mkdir()
    (out / "result.json").write_text('{"max_abs_diff": 0}')

    def write(saved, folder, format, *, keep):
        folder.mkdir()
        return {"reader": ["none"], "max_abs_diff": 0.0}

    rename = type(out).rename

    def refuse(path, target):
        if path.name == "new":
            raise OSError("no room")
        return rename(path, target)

    monkeypatch.setattr(export, "export", write)
    monkeypatch.setattr(export.inference, "read", lambda *_, **__: object.__new__(huggingface.Clip))
    monkeypatch.setattr(type(out), "rename", refuse)
    with pytest.raises(OSError, match="no room"):
        export.main("run", str(out))
    assert [path.name for path in epath.Path(tmp_path).iterdir()] == ["out"]
    assert (out / "result.json").read_text() == '{"max_abs_diff": 0}'


def test_card_says_licence_data_and_scores(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    measured = {
        "model": "elsewhere/model",
        "metrics": {"gpr1200": {"map": 0.71234}},
        "intervals": {"gpr1200": {"map": [0.7, 0.725]}},
        "protocols": {"gpr1200": {"protocol": "GPR1200 | full"}},
    }
    (tmp_path / "model" / "evaluation").mkdir()
    (tmp_path / "model" / "evaluation" / "result.json").write_text(
        json.dumps({"models": [measured]})
    )
    out = tmp_path / "out"
    export.main(str(tmp_path / "model"), str(out), license="apache-2.0", data_card="me/i2e")
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "license": "apache-2.0",
        "datasets": ["me/i2e"],
        "tags": ["clip", "mofi", "image-feature-extraction"],
    }
    assert "[data card](https://huggingface.co/datasets/me/i2e)" in body
    assert "| gpr1200 | map | 0.7123 | 0.7000 to 0.7250 | GPR1200 / full |" in body
    assert "| sentence_transformers |" in body
    export.main(str(tmp_path / "model"), str(out), "open_clip", data_card="https://a.b/c")
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert head["library_name"] == "open_clip"
    assert head.keys() & {"license", "datasets"} == set()
    assert "[data card](https://a.b/c)" in card
    assert "| timm | not run: cannot be imported: No module named 'timm' |" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"license": "Apache 2.0\nx: y"}, "is none of the hub's short names"),
        ({"data_card": "javascript:alert(1)"}, "is neither OWNER/NAME"),
    ],
)
def test_what_a_card_cannot_hold(source, tmp_path, flags, message):
    with pytest.raises(errors.BadInput, match=message):
        export.main(str(source), str(tmp_path / "out"), **flags)
    assert _names(tmp_path) == []


def test_a_scheduler_that_stops_it_leaves_nothing(source, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mofi_jax.export",
        "--model",
        source,
        "--out",
        tmp_path / "out",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not _names(tmp_path):
            time.sleep(0.02)
        process.terminate()
        assert process.wait() != 0
    assert _names(tmp_path) == []
