"""The claim's experiment: its runs, what it keeps of them, and the intervals."""

import json
import shutil

import numpy as np
import pytest

from configs import claim
from experiments import claim_photos
from mofi_jax import train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.distributed import meshes
from mofi_jax.training import run_folder, settings
from tests import datasets


@pytest.fixture
def config(trained, tmp_path):
    """The trained fixture's model, on pictures of what it was trained on and of others."""
    made = datasets.tiny_config(trained / "data", steps=20)
    made.evaluators = {}
    for name, first in (("seen", 0), ("unseen", 7)):
        (tmp_path / name).mkdir()
        for entity in range(first, first + 3):
            for view in range(3):
                picture = ops.encode_jpeg(datasets.drawing(entity, 100 + view), 95)
                (tmp_path / name / f"{entity}_{view}.jpg").write_bytes(picture)
        images = str(tmp_path / name)
        made.evaluators[name] = {"kind": "retrieval", "images": images, "every": "0 steps"}
    return made.lock()


def test_each_run_is_trained_once_and_measured_by_query(
    config, trained, tmp_path, mesh_of, monkeypatch, capsys
):
    monkeypatch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
    configs = []

    def fake(own, workdir):
        configs.append(own)
        shutil.copytree(trained / "run", workdir)

    monkeypatch.setattr(train, "main", fake)
    out = tmp_path / "out"
    claim_photos.main(config, str(out), runs="multitask", seeds="0")
    claim_photos.main(config, str(out), seeds="0")
    assert len(configs) == 4
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"run": "multitask", "se')  # killed while writing
    claim_photos.main(config, str(out), seeds="0,1")
    assert [own.seed for own in configs] == [0] * 4 + [1] * 4
    claim_photos.main(config, str(out), seeds="0,1")
    assert len(configs) == 8
    assert not list((out / "trainings").glob("*-[01]"))

    text = (out / "runs.jsonl").read_text()
    [first] = [
        json.loads(line) for line in text.split("\n") if '"contrastive_raw", "seed": 0' in line
    ]
    result = json.loads((out / "result.json").read_text())
    assert result["seeds"] == {"raw_pixels": [0], **{n: [0, 1] for n in claim_photos.RUNS}}
    assert len(first["precision"]["seen_no_self"]) == 9
    score = np.mean(first["precision"]["unseen"])
    assert result["scores"]["contrastive_raw"]["unseen"] == pytest.approx([score] * 2)
    # One and the same model four times: nothing differs.
    assert result["differences"]["multitask - contrastive_raw"]["unseen"] == [0, 0, 0]
    assert "multitask - contrastive_raw | +0.0000 [" in capsys.readouterr().out


def test_runs_differ_in_losses_and_texts_alone():
    base = claim.get_config("data=D").lock()
    runs = {name: claim_photos.of_run(base, name, 3, "", "programs") for name in claim_photos.RUNS}
    for own in runs.values():
        settings.validate(own)
        assert (own.seed, own.compile_cache, own.data.dir) == (3, "programs", "D")
    raw, i2e, supervised, multitask = (run_folder.as_json(own) for own in runs.values())
    # No label decides anything.
    assert raw["losses"] == {
        "contrastive": {"weight": 1.0, "kind": "softmax", "same_entity": "off"}
    }
    assert raw["data"].pop("text_sources") == {"alt_text": 1.0}
    assert i2e["data"].pop("text_sources") == multitask["data"].pop("text_sources")
    assert raw["data"] == i2e["data"]
    assert list(supervised["losses"]) == ["entity"]
    assert supervised["losses"]["entity"]["weight"] == 1.0
    assert multitask["losses"] == run_folder.as_json(base)["losses"]
    assert i2e["losses"]["contrastive"]["same_entity"] == "masked"
    apart = claim_photos.of_run(base, "contrastive_raw", 0, "P", "programs")
    assert (apart.data.dir, apart.data.name) == ("P", "i2t")
    assert apart.losses.contrastive.same_entity == "masked"  # by equal captions


def test_interval_is_that_of_the_class_means():
    rng = np.random.default_rng(1)
    classes = np.repeat(np.arange(50), 10)
    of_class = rng.normal(0.02, 0.1, 50)
    # Queries of a class rise and fall together: they are no 500 draws.
    mean, low, high = claim_photos.bootstrap(of_class[classes][None], classes)
    assert mean == pytest.approx(of_class.mean())
    assert high - low == pytest.approx(2 * 1.96 * of_class.std() / 50**0.5, rel=0.03)
    # Seeds that disagree widen it.
    seeds = np.array([[-0.2], [0.0], [0.2]])
    _, low_of_seeds, high_of_seeds = claim_photos.bootstrap(of_class[classes] + seeds, classes)
    assert high_of_seeds - low_of_seeds > 3 * (high - low)


def test_interval_weighs_classes_by_their_queries():
    classes = np.array([0, 0, 0, 1, 2])
    differences = np.array([[0.1, 0.1, 0.1, 0.5, np.nan]])  # the last has nothing to find
    mean, low, high = claim_photos.bootstrap(differences, classes)
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.1, 0.5))


def test_bad_input_is_told_before_anything_is_written(config, tmp_path):
    with pytest.raises(BadInput, match="--seeds=0;1"):
        claim_photos.main(config, str(tmp_path / "out"), seeds="0;1")
    with pytest.raises(BadInput, match="--runs has 'all'"):
        claim_photos.main(config, str(tmp_path / "out"), runs="all")
    with config.unlocked():
        del config.evaluators.unseen
    with pytest.raises(BadInput, match="no 'unseen'"):
        claim_photos.main(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
