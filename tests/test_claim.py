"""The claim's experiment: its data sets, its runs, what it keeps of them, and the intervals."""

import json
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from scipy import stats

from configs import claim
from experiments.claim import __main__ as experiment
from experiments.claim import data, runs, statistics
from mofi_jax import train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.distributed import meshes
from mofi_jax.training import run_folder, settings
from tests import datasets


@pytest.fixture
def config(trained, tmp_path):
    """The trained fixture's model, on pictures of what it was trained on and of others."""
    made = claim.get_config()
    made.train = datasets.tiny_config(trained / "data", steps=20)
    made.train.evaluators = {}
    made.truth, made.classes = str(tmp_path / "truth.jsonl"), None
    qids = pq.read_table(trained / "data/i2e/1.0.0/entities.parquet")["qid"].to_pylist()
    rows = [{"key": f"{i:06d}", "qid": qids[i % 7], "says": []} for i in range(48)]
    (tmp_path / "truth.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, first in (("seen", 0), ("unseen", 7)):
        (tmp_path / name).mkdir()
        for entity in range(first, first + 3):
            for view in range(3):
                picture = ops.encode_jpeg(datasets.drawing(entity, 100 + view), 95)
                (tmp_path / name / f"{entity}_{view}.jpg").write_bytes(picture)
    made.evaluators = {
        name: {"kind": "retrieval", "images": str(tmp_path / name)} for name in ("seen", "unseen")
    }
    return made.lock()


def test_each_run_is_trained_once_and_measured_by_query(
    config, trained, tmp_path, mesh_of, monkeypatch, capsys
):
    monkeypatch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
    monkeypatch.setattr(data.DataSets, "get", lambda *_: (str(trained / "data"), "i2e"))
    few = {name: runs.MAIN[name] for name in ("clip", "multitask", "supervised")}
    monkeypatch.setitem(runs.PARTS, "main", few)
    configs = []

    def fake(own, workdir):
        configs.append(own)
        shutil.copytree(trained / "run", workdir)

    monkeypatch.setattr(train, "main", fake)
    out = tmp_path / "out"
    experiment.main(config, str(out), parts="main", seeds="0")
    assert len(configs) == len(few)
    text = (out / "runs.jsonl").read_text()
    kept = [line for line in text.split("\n") if '"run": "supervised"' not in line]
    (out / "runs.jsonl").write_text("\n".join([*kept, '{"run": "multitask", "se']))  # killed
    experiment.main(config, str(out), parts="main", seeds="0,1")
    assert [own.seed for own in configs[len(few) :]] == [0] + [1] * len(few)
    experiment.main(config, str(out), parts="main", seeds="0,1")
    assert len(configs) == 2 * len(few) + 1
    # The model that chooses labels is still there.
    assert [path.name for path in (out / "trainings").glob("*-[01]")] == ["clip-0"]

    result = json.loads((out / "result.json").read_text())
    assert result["seeds"] == {"raw_pixels": [0], **{n: [0, 1] for n in few}}
    # 47 of 58 labels: every fifth picture has a second one, which is wrong.
    assert result["labels"]["multitask"] == {"pictures": 48, "precision": round(48 / 58, 4)}
    lines = [json.loads(line) for line in text.split("\n") if line]
    [first] = [line for line in lines if line["run"] == "clip"]
    assert len(first["precision"]["seen_no_self"]) == 9
    mean = pytest.approx(np.mean(first["precision"]["unseen"]))
    assert result["scores"]["clip"]["unseen"] == [mean] * 3
    assert 0 <= result["scores"]["clip"]["knn_unseen/dino_best"][0] <= 1
    # One and the same model each time: nothing differs.
    differing = result["differences"]["multitask - clip"]
    assert differing == {"interval": [0, 0, 0], "p": 1, "seeds": 2, "seeds_ahead": 0}
    assert "| +0.000 [+0.000, +0.000] | 1.000 | 0 of 2 |" in capsys.readouterr().out


def test_another_process_takes_other_runs(config, trained, tmp_path, mesh_of, monkeypatch):
    """As if started twice: what the first has begun the second leaves alone."""
    monkeypatch.setattr(meshes, "make_mesh", lambda *_, **__: mesh_of["1x1x1"])
    monkeypatch.setattr(data.DataSets, "get", lambda *_: (str(trained / "data"), "i2e"))
    trained_by = {"first": [], "second": []}
    out = epath.Path(tmp_path / "out")
    planned = [("supervised", 1), ("multitask", 1)]
    second = experiment.Experiment(config, out, planned)

    def fake(by):
        def main(own, workdir):
            trained_by[by].append(epath.Path(workdir).name)
            if trained_by == {"first": ["supervised-1"], "second": []}:
                monkeypatch.setattr(train, "main", fake("second"))
                second.run()
                monkeypatch.setattr(train, "main", fake("first"))
            shutil.copytree(trained / "run", workdir)

        return main

    monkeypatch.setattr(train, "main", fake("first"))
    experiment.Experiment(config, out, planned).run()
    assert trained_by == {"first": ["supervised-1"], "second": ["multitask-1"]}


def test_runs_differ_in_losses_texts_and_data_alone():
    base = claim.get_config().train.lock()
    made = {
        name: runs.config_of(run, base, 3, ("D", "i2e"), "programs")
        for part in runs.PARTS.values()
        for name, run in part.items()
    }
    for own in made.values():
        settings.validate(own)
        assert (own.seed, own.compile_cache, own.data.dir) == (3, "programs", "D")
    as_json = {name: run_folder.as_json(own) for name, own in made.items()}
    same, i2e, multitask = (as_json[n] for n in ("clip_same", "clip_i2e", "multitask"))
    # No label decides anything.
    assert same["losses"] == {
        "contrastive": {"weight": 1.0, "kind": "softmax", "same_entity": "off"}
    }
    assert same["data"].pop("text_sources") == {"alt_text": 1.0}
    assert i2e["data"].pop("text_sources") == multitask["data"].pop("text_sources")
    assert same["data"] == i2e["data"]
    assert list(as_json["supervised"]["losses"]) == ["entity"]
    assert as_json["supervised"]["losses"]["entity"]["weight"] == 1.0
    assert multitask["losses"] == run_folder.as_json(base)["losses"]
    assert as_json["multitask@0.4"] == as_json["multitask_true"] | {"data": multitask["data"]} | {
        "data": as_json["multitask@0.4"]["data"]
    }
    # Each ablation is another recipe.
    changed = [json.dumps(as_json[n]) for n in ("supervised", *runs.ABLATIONS)]
    assert len({*changed}) == len(changed)


def test_parts_and_single_runs_are_planned_seed_by_seed():
    planned = experiment.plan(["noise", "supervised", "margin_0", "clip"], "")
    noise = [(name, seed) for seed in range(3) for name in runs.NOISE]
    assert planned[: len(noise)] == noise
    assert planned[len(noise) :] == [
        (name, seed)
        for seed in range(5)
        for name in ("supervised", "margin_0", "clip")
        if seed < 3 or name != "margin_0"
    ]
    assert experiment.plan(["scale_8"], "7") == [("scale_8", 7)]


def test_an_unknown_part_is_told(config, tmp_path):
    with pytest.raises(BadInput, match="--parts has 'clap': choose from main, noise, ablations, c"):
        experiment.main(config, str(tmp_path / "out"), parts="main,clap")


@pytest.mark.parametrize("towers", ["", ",gpu"])
def test_towers_for_photos(towers):
    made = claim.get_config(f"photos=P,kb=wordnet{towers}")
    settings.validate(made.train)
    assert made.train.model.image.width == (384 if towers else 128)
    assert (made.pairs, made.evaluators.unseen.images) == ("P/train", "P/unseen.tar")


def made_pairs(number=60, things=12):
    return [
        data.Pair(f"{i:03d}", b"", f"a {i % things} of {i}", f"Q{i % things}", i % 10 == 0)
        for i in range(number)
    ]


@pytest.mark.parametrize("share", runs.SHARES)
def test_so_many_captions_are_of_another_thing(share):
    pairs = made_pairs()
    noisy = data.with_noise(pairs, share)
    assert [p.key for p in noisy] == [p.key for p in pairs]
    assert [p.entity for p in noisy] == [p.entity for p in pairs]
    of_another = [f"a {p.entity[1:]} of" not in p.text for p in noisy]
    assert of_another == [p.wrong for p in noisy]
    assert sum(of_another) == round(share * len(pairs))
    # What is wrong stays wrong where more is, and what stays right keeps its caption.
    more = data.with_noise(pairs, min(share + 0.2, 1.0))
    assert all(b.wrong for a, b in zip(noisy, more, strict=True) if a.wrong)
    assert all(a.text == b.text for a, b in zip(noisy, more, strict=True) if not b.wrong)


def test_a_wrong_caption_stays_where_its_thing_has_no_other():
    pairs = [data.Pair("0", b"", "dog", "Q1", True), data.Pair("1", b"", "cat", "Q2", False)]
    assert data.with_noise(pairs, 0.0) == pairs


def test_shuffled_labels_are_the_same_labels_elsewhere(trained, tmp_path):
    pairs = tmp_path / "pairs.parquet"
    data.write_table(pairs, [(f"{i:06d}", b"", "text", ["Q1"]) for i in range(60)])
    labelled = epath.Path(trained / "data")
    rows = [
        pq.read_table(data.relabel(labelled, pairs, tmp_path / "made", shuffled)).to_pylist()
        for shuffled in (True, False)
    ]
    before = data.labels_of(labelled)
    after, true = ({row["key"]: row["entities"] for row in part} for part in rows)
    assert true == {key: ["Q1"] for key in before}
    assert after.keys() == before.keys()  # those without a label are left out
    assert sorted(after.values()) == sorted(before.values())
    assert np.mean([after[key] == before[key] for key in before]) < 0.4


def test_pairs_are_read_with_their_truth(tmp_path):
    (tmp_path / "truth.jsonl").write_text(
        '{"key": "0", "qid": "Q1", "says": ["Q1"]}\n'
        '{"key": "1", "qid": "Q2", "says": ["Q1"], "kind": "wrong"}'
    )
    for name, text in (("0.jpg", "JPEG"), ("0.txt", "né"), ("1.png", "PNG"), ("1.txt", "b")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    with tarfile.open(tmp_path / "00000.tar.gz", "w:gz") as tar:
        for name in ("1.png", "0.txt", "1.txt", "0.jpg"):
            tar.add(tmp_path / name, name)
    truth = str(tmp_path / "truth.jsonl")
    assert data.read_pairs(str(tmp_path), truth, None) == [
        data.Pair("0", b"JPEG", "né", "Q1", False),
        data.Pair("1", b"PNG", "b", "Q2", True),
    ]
    (tmp_path / "truth.jsonl").write_text('{"key": "0", "qid": "Q1", "says": ["Q1"]}\n')
    with pytest.raises(BadInput, match="no line for 1"):
        data.read_pairs(str(tmp_path), truth, None)
    with pytest.raises(BadInput, match="nothing"):
        data.read_pairs(str(tmp_path / "nothing"), truth, None)


@pytest.mark.slow
def test_the_data_sets_of_the_sample(tmp_path):
    """Made by the commands; labels are chosen by what stands in for a model: the text."""
    made = data.DataSets(epath.Path(tmp_path), claim.get_config())
    folder, kind = made.get("raw@0.6", None)
    assert (kind, made.quality((folder, kind))) == ("i2t", {"pictures": 1700})
    text = made.quality(made.get("text", None))
    assert text["pictures"] > 1300
    assert text["precision"] == pytest.approx(0.50, abs=0.03)
    assert made.quality(made.get("text@0.6", None))["precision"] < 0.25
    shutil.copytree(tmp_path / "as_is" / "text" / "i2e", tmp_path / "as_is" / "clip" / "i2e")
    true, shuffled = (made.quality(made.get(labels, None)) for labels in ("true", "shuffled"))
    assert true["precision"] == 1.0
    assert true["pictures"] > 1300
    assert shuffled["precision"] < 0.02
    assert shuffled["pictures"] == text["pictures"]


def test_interval_is_that_of_the_class_means():
    rng = np.random.default_rng(1)
    classes = np.repeat(np.arange(50), 10)
    of_class = rng.normal(0.02, 0.1, 50)
    # Queries of a class rise and fall together: they are no 500 draws.
    mean, low, high = statistics.bootstrap(of_class[classes][None], classes)
    assert mean == pytest.approx(of_class.mean())
    assert high - low == pytest.approx(2 * 1.96 * of_class.std() / 50**0.5, rel=0.03)
    # Seeds that disagree widen it.
    seeds = np.array([[-0.2], [0.0], [0.2]])
    _, low_of_seeds, high_of_seeds = statistics.bootstrap(of_class[classes] + seeds, classes)
    assert high_of_seeds - low_of_seeds > 3 * (high - low)


def test_interval_weighs_classes_by_their_queries():
    classes = np.array([0, 0, 0, 1, 2])
    differences = np.array([[0.1, 0.1, 0.1, 0.5, np.nan]])  # the last has nothing to find
    mean, low, high = statistics.bootstrap(differences, classes)
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.1, 0.5))


def test_interval_and_test_over_seeds_are_students():
    values = np.array([0.40, 0.41, 0.39, 0.42, 0.405])
    mean, low, high = statistics.over_seeds(values)
    assert mean == pytest.approx(0.405)
    # t of 4 degrees of freedom: 2.776
    assert high - mean == pytest.approx(2.776 * values.std(ddof=1) / 5**0.5, rel=1e-3)
    assert mean - low == pytest.approx(high - mean)
    assert statistics.over_seeds(values[:1]) == (0.4, 0.4, 0.4)
    expected = stats.ttest_rel(values, values[::-1] - 0.01).pvalue
    assert statistics.p_value(values - (values[::-1] - 0.01)) == pytest.approx(expected)


def test_bad_input_is_told_before_anything_is_written(config, tmp_path):
    with pytest.raises(BadInput, match="--seeds=0;1"):
        experiment.main(config, str(tmp_path / "out"), seeds="0;1")
    with pytest.raises(BadInput, match="--parts has 'all'"):
        experiment.main(config, str(tmp_path / "out"), parts="all")
    with config.unlocked():
        del config.evaluators.unseen
    with pytest.raises(BadInput, match="no 'unseen'"):
        experiment.main(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
