"""Noisy pairs in, retrieval score and exported model out: every main, on a part of the sample."""

import contextlib
import gzip
import json
import pathlib
import tarfile

import numpy as np
import pytest

from configs import eval as eval_config
from configs import i2e as i2e_config
from data_prep import build_i2e, label_quality
from mofi_jax import evaluate, export, inference, train
from mofi_jax.distributed import meshes
from tests import datasets

SAMPLE = pathlib.Path(__file__).parents[1] / "data_prep/sample"
PAIRS = 150


@pytest.fixture(scope="module")
def one_device(mesh_of):
    """Eight simulated devices on few cores are slow to train on."""

    @contextlib.contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
            yield

    return patched


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """The whole recipe with towers of a few thousand parameters and 30 steps each."""
    out = tmp_path_factory.mktemp("run")
    (out / "pairs").mkdir()
    for shard in range(2):
        with (
            tarfile.open(SAMPLE / f"pairs/{shard:05d}.tar.gz") as source,
            tarfile.open(out / f"pairs/{shard:05d}.tar", "w") as target,
        ):
            for info in source.getmembers()[: 3 * PAIRS]:
                target.addfile(info, source.extractfile(info))
    data = out / "data"

    def prepare(arguments, **changes):
        kb = SAMPLE / "knowledge_base.jsonl.gz"
        config = i2e_config.get_config(f"folder={out / 'pairs'},kb={kb},{arguments}")
        config.update({"min_images": 2, "vocab_size": 500, "workers": 1} | changes)
        build_i2e.main(config, str(data))

    prepare("dataset=i2t")
    config = datasets.tiny_config(data, "task=contrastive,data=i2t", steps=30)
    with one_device():
        train.main(config, str(out / "clip"))
    prepare("dataset=i2e", clip=str(out / "clip"))
    config = datasets.tiny_config(data, "task=multitask", steps=30)
    config.evaluators = {
        "retrieval_unseen": {
            "kind": "retrieval",
            "images": str(SAMPLE / "unseen.tar"),
            "every": "30 steps",
        }
    }
    with one_device():
        train.main(config, str(out / "multitask"))
    return out


def test_labels_can_be_measured(run, tmp_path):
    with gzip.open(SAMPLE / "truth.jsonl.gz", "rt") as truth:
        rows = [json.loads(line) for line in truth]
    # The truth of the pairs that were read: the first ones of two shards of 500.
    rows = rows[:PAIRS] + rows[500 : 500 + PAIRS]
    (tmp_path / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (str(tmp_path / "truth.jsonl"), str(SAMPLE / "classes.jsonl"))
    quality = label_quality.measure_workdir(str(run / "data"), *files)
    assert 0.2 < quality["text_only"]["precision"] < 1
    assert quality["ceiling"] > 0.97
    assert 0 < quality["selected"]["chosen"] <= quality["text_only"]["chosen"]


def test_data_card(run):
    page = (run / "data/report/index.html").read_text()
    card = json.loads((run / "data/report/report.json").read_text())
    assert card["funnel"]["read"] == 2 * PAIRS
    assert page.startswith("<!doctype html>")
    assert "data:image" in page


def test_training_measured_retrieval_in_the_loop(run):
    scores = json.loads((run / "multitask/result.json").read_text())["scores"]
    assert 0.15 < scores["retrieval_unseen/map"] <= 1


def test_evaluate_gives_the_score_of_the_loop(run, one_device, tmp_path):
    config = eval_config.get_config("sample")
    config.evaluators = {
        name: {
            **config.evaluators[name],
            "images": str(SAMPLE / f"{name.split('_')[1]}.tar"),
            "classes": str(SAMPLE / "classes.jsonl"),
        }
        for name in ("retrieval_unseen", "zeroshot_unseen", "entity_seen")
    }
    with one_device():
        evaluate.main(config, model=str(run / "multitask"), out=str(tmp_path))
    metrics = json.loads((tmp_path / "result.json").read_text())["models"][0]["metrics"]
    in_loop = json.loads((run / "multitask/result.json").read_text())["scores"]
    assert metrics["retrieval_unseen"]["map"] == pytest.approx(
        in_loop["retrieval_unseen/map"], abs=1e-6
    )
    assert 0 < metrics["entity_seen"]["coverage"] <= 1


def test_exported_model_reads_back_in_transformers(run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export.main(model=str(run / "multitask"), out=str(tmp_path / "export"))
    report = json.loads((tmp_path / "export/result.json").read_text())
    assert "transformers" in " ".join(report["reader"])
    assert report["max_abs_diff"] <= 1e-4

    ours = inference.load(run / "multitask", mesh=meshes.make_mesh())
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    texts = ["a red apple icon", "Mount Fuji"]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        features = theirs.get_text_features(input_ids=ids)
        features = getattr(features, "pooler_output", features).numpy()
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours.embed_texts(texts), features, atol=1e-4)


def test_names_entities_of_a_picture(run):
    model = inference.load(run / "multitask", mesh=meshes.make_mesh())
    with tarfile.open(SAMPLE / "seen.tar") as tar:
        picture = tar.extractfile(tar.getmembers()[0]).read()
    [named] = model.name_entities(picture, 3)
    scores = [entity.score for entity in named]
    assert scores == sorted(scores, reverse=True)
    assert all(entity.name and entity.qid for entity in named)
