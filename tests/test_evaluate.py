"""Picture sets, class tables, the suite of evaluators, and the main that runs them."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import eval as eval_config
from data_prep.dataset import files as dataset_files
from mofi_jax import evaluate, inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records, tokenizer
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import suite
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.pages import feature_map
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.evaluators.sets.downloads import adapters
from mofi_jax.interop import huggingface
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


def raw_pixels(params):
    return embedding.Embedder(inference.RawPixels(8, meshes.make_mesh()), params)


# ----------------------------------------------------------------------------------- picture sets


def test_folder_and_tar_are_the_same_set(folder):
    one, other = picture_sets.read_set(folder), picture_sets.read_set(folder.with_suffix(".tar"))
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
        assert picture_sets.read_set(copy).sha256() != picture_sets.read_set(folder).sha256()


@settings(max_examples=30, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 2000), st.from_regex(r"\A[a-z0-9]{1,6}\Z")), min_size=1))
def test_order_is_by_number_then_name(tmp_path_factory, entries):
    """Not by text, by which 10 comes before 9; and whatever order the directory lists."""
    root = tmp_path_factory.mktemp("order")
    for number, name in entries:
        (root / f"{number}_{name}.jpg").write_bytes(b"")
    pictures = picture_sets.read_set(root)
    found = [tuple(name.removesuffix(".jpg").split("_")) for name in pictures.names]
    assert [(int(number), name) for number, name in found] == sorted(
        entries, key=lambda entry: (entry[0], f"{entry[0]}_{entry[1]}.jpg")
    )


def test_files_that_are_no_pictures_are_passed_over(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    for name in ("README.txt", ".DS_Store", "._340_0.jpg"):
        (copy / name).write_bytes(b"x")
    assert picture_sets.read_set(copy).names == picture_sets.read_set(folder).names


def test_unusable_picture_sets(folder, tmp_path):
    with pytest.raises(BadInput, match=r"no picture set at .*nowhere"):
        picture_sets.read_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no pictures"):
        picture_sets.read_set(tmp_path / "empty")
    copy = shutil.copytree(folder, tmp_path / "named")
    for name in ("cat.jpg", "17841400008460056123456_n.jpg", "\u0663_x.jpg", "\u00b2_x.jpg"):
        (copy / name).write_bytes(b"")
        with pytest.raises(BadInput, match=rf"{name} in .* is not named .*1 such"):
            picture_sets.read_set(copy)
        (copy / name).unlink()
    whole = folder.with_suffix(".tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 3])
    with tarfile.open(tmp_path / "zipped.tar.gz", "w:gz") as tar:
        tar.add(folder / "340_0.jpg", "340_0.jpg")
    (tmp_path / "set.zip").write_bytes(b"PK\x03\x04")
    for name in ("short.tar", "zipped.tar.gz", "set.zip"):
        with pytest.raises(BadInput, match=rf"{name} cannot be read as an unc.*: unpack it and"):
            picture_sets.read_set(tmp_path / name)
    for read in (picture_sets.read_set, picture_sets.read_classes):
        with pytest.raises(BadInput, match=r"^gs://b/x is a remote path: copy the "):
            read("gs://b/x")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.add(folder / "340_0.jpg", "a/340_0.jpg")
    with pytest.raises(BadInput, match=r"holds a/340_0.jpg twice"):
        picture_sets.read_set(tmp_path / "twice.tar")


def test_a_config_of_ones_own_says_nothing_of_hosts(tmp_path):
    values = {"preprocess": "", "raw_pixels_size": 8}
    values["evaluators"] = {"mine": {"kind": "retrieval", "images": str(tmp_path / "nowhere")}}
    with pytest.raises(BadInput, match=r"Evaluator mine: There is no picture set at .*nowhere"):
        evaluate.main(ml_collections.ConfigDict(values), "raw_pixels", str(tmp_path / "out"))


def test_class_tables(tmp_path):
    table = picture_sets.read_classes(SAMPLE / "classes.jsonl")
    assert table[0] == picture_sets.Class("n02691156", "airplane")
    published = tmp_path / "GPR1200_categoryNumber_to_text.json"
    published.write_text('{"0": "Eldorado National Forest", "9": "Löderups kyrka"}', "utf-8")
    assert picture_sets.read_classes(published)[9] == picture_sets.Class("", "Löderups kyrka")
    with pytest.raises(BadInput, match="no class table at"):
        picture_sets.read_classes(tmp_path / "nowhere.jsonl")
    wrong = ("not json", '{"class": 1}', '{"class": "x", "label": "y"}', "[1]", "[" * 100_000)
    wrong += ('{"class": 1, "label": null}', '{"class": 0, "label": "y"}')
    for line in (*wrong, '{"class": 1e400, "label": "y"}'):
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"class": 0, "label": "a\u2028b"}\n' + line, "utf-8")
        with pytest.raises(BadInput, match="Entry 2 of the class table"):
            picture_sets.read_classes(broken)


# ------------------------------------------------------------------------------------ the suite


def test_building(folder):
    towers = inference.RawPixels(8, meshes.make_mesh())
    found = {"classification", "image_text", "query_index", "retrieval", "zeroshot"}
    assert found <= set(suite.kinds())
    with pytest.raises(BadInput, match="Evaluator x: Unknown evaluator kind 'sets': choose from"):
        suite.build_all(towers, {"x": {"kind": "sets"}})
    with pytest.raises(BadInput, match="has no key 'image': it takes images, classes"):
        suite.build_all(towers, {"x": {"kind": "retrieval", "image": "typo"}})
    with pytest.raises(BadInput, match="needs the key 'images'"):
        suite.build_all(towers, {"x": {"kind": "retrieval"}})
    named = {"images": str(folder), "classes": str(SAMPLE / "classes.jsonl")}
    built = suite.build_all(
        towers,
        {
            "pictures": {"kind": "retrieval", **named},
            "words": {"kind": "zeroshot", **named},
            "entities": {"kind": "classification", **named},
        },
    )
    assert list(built.evaluators) == ["pictures"]
    assert built.skipped == {
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
    towers = Counting(8, meshes.make_mesh())
    evaluators = suite.build_all(towers, config).evaluators
    told = []
    first = embedding.Embedder(towers, {"version": 1})
    scores = suite.run_all(evaluators, first, lambda: told.append(len(seen)))
    assert sorted(scores) == ["a/map", "a/map_no_self", "b/map", "b/map_no_self"]
    assert len(told) == 4
    assert len(seen) == 1
    suite.run_all(evaluators, embedding.Embedder(towers, {"version": 2}))
    assert len(seen) == 2


def test_errors_carry_the_name_of_the_evaluator():
    class Failing:
        needs = ()

        def __init__(self, error):
            self.error = error

        def run(self, embedder):
            yield "fine", 1.0
            raise self.error

        def card(self):
            return {}

    with pytest.raises(RuntimeError, match="evaluator broken failed: division") as caught:
        suite.run_all({"broken": Failing(ZeroDivisionError("division"))}, raw_pixels({}))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(BadInput, match="Evaluator bad: no pictures"):
        suite.run_all({"bad": Failing(BadInput("no pictures"))}, raw_pixels({}))


# ------------------------------------------------------------------------------------ the main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported model with text tower and class table, untrained, and its embeddings."""
    root = tmp_path_factory.mktemp("model")
    classes = picture_sets.read_classes(SAMPLE / "classes.jsonl")
    trained = sorted((classes[i] for i in range(340)), key=lambda entry: entry.qid)
    names = [entry.label for entry in trained]
    dataset_files.train_bpe(names, 300, root / "bpe.json")
    texts = tokenizer.Tokenizer(root / "bpe.json", 8)
    tower = mofi.TowerConfig(width=16, layers=1, heads=2)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=tower,
        text=tower,
        vocab_size=texts.vocab_size,
        context_length=8,
        eos_id=texts.eos_id,
        embed_dim=16,
        dtype="float32",
    )
    params = jax.jit(functools.partial(mofi.create, config))(jax.random.key(0))
    params["entity_table"] = np.random.default_rng(0).normal(size=(340, 16)).astype(np.float32)
    clip = huggingface.Clip(
        config=config,
        params=params,
        tokenizer=texts,
        entities=records.Entities(
            [entry.qid for entry in trained], names, [""] * 340, np.full(340, 5, np.int64)
        ),
        preprocess="decode|resize_short(16)|center_crop(16)",
    )
    huggingface.write(root / "export", clip)
    return root / "export"


def test_main_on_an_exported_model(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(feature_map, "POINTS", 20)  # t-SNE of more takes seconds
    config = eval_config.get_config("sample").lock()
    evaluate.main(config, str(model), str(tmp_path))
    [result] = json.loads((tmp_path / "result.json").read_text())["models"]
    assert result["left_out"] == {}
    assert sorted(result["metrics"]) == sorted(config.evaluators)
    metrics = result["metrics"]
    # Untrained: entity and zero-shot by chance (1 of 340 entities, 1 of 60 classes), mAP above
    # its floor of 1/2 (pairs) and 1/6 because the query counts.
    assert metrics["entity_seen"]["coverage"] == 1.0
    assert metrics["entity_seen"]["top5"] < 0.1
    assert metrics["zeroshot_unseen"]["top5"] < 0.3
    assert 0.5 <= metrics["retrieval_seen"]["map"] < 0.6
    assert 1 / 6 <= metrics["retrieval_unseen"]["map"] < 0.35
    card = result["protocols"]["retrieval_unseen"]
    assert card["pictures"] == 360
    assert card["preprocessing"] == "decode|resize_short(16)|center_crop(16)"
    assert card["sha256"] == picture_sets.read_set(SAMPLE / "unseen.tar").sha256()
    assert card["ties"] == "mean"
    page = (tmp_path / "index.html").read_text()
    assert 50_000 < len(page) < 2_000_000
    printed = capsys.readouterr().out
    for name, values in metrics.items():
        assert name in printed
        assert all(f"{value:.3f}" in printed for value in values.values())


def test_preprocessing_of_the_config_replaces_that_of_the_model(model, folder, tmp_path):
    config = eval_config.get_config(f"gpr1200={folder}")
    config.preprocess = "decode|resize_short(16, method='bilinear')|center_crop(16)"
    evaluate.main(config, str(model), str(tmp_path))
    [result] = json.loads((tmp_path / "result.json").read_text())["models"]
    assert result["protocols"]["gpr1200"]["preprocessing"] == config.preprocess
    with pytest.raises(BadInput, match="does not apply to raw_pixels"):
        evaluate.main(config, evaluate.RAW_PIXELS, str(tmp_path))


def test_a_model_without_text_tower_is_not_asked_for_words(model, folder, tmp_path, monkeypatch):
    """As a supervised run loads: without the text tower's parameters and without tokenizer."""
    loaded = inference.load(model, mesh=meshes.make_mesh())
    del loaded.params["text"]
    towers = dataclasses.replace(loaded.towers, tokenizer=None)
    loaded = dataclasses.replace(loaded, towers=towers)
    monkeypatch.setattr(inference, "load", lambda path, **options: loaded)
    config = eval_config.get_config(f"gpr1200={folder},classes={SAMPLE / 'classes.jsonl'}")
    evaluate.main(config, str(model), str(tmp_path))
    [result] = json.loads((tmp_path / "result.json").read_text())["models"]
    assert list(result["metrics"]) == ["gpr1200"]
    assert list(result["left_out"]) == ["gpr1200_text", "gpr1200_zeroshot"]


def test_main_on_raw_pixels_leaves_out_what_needs_words(folder, tmp_path, capsys):
    classes = SAMPLE / "classes.jsonl"
    config = eval_config.get_config(f"gpr1200={folder},classes={classes}")
    evaluate.main(config, evaluate.RAW_PIXELS, str(tmp_path))
    [result] = json.loads((tmp_path / "result.json").read_text())["models"]
    assert list(result["metrics"]) == ["gpr1200"]
    reason = "the model has no tokenizer"
    assert result["left_out"] == {"gpr1200_text": reason, "gpr1200_zeroshot": reason}
    printed = capsys.readouterr().out
    assert "gpr1200_zeroshot: left out of raw pixels, the model has no tokenizer" in printed
    del config.evaluators["gpr1200"]
    with pytest.raises(BadInput, match="No evaluator of --config applies"):
        evaluate.main(config, evaluate.RAW_PIXELS, str(tmp_path))


def test_a_picture_that_cannot_be_decoded_is_named_and_counted(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "set")
    data = (copy / "341_2.jpg").read_bytes()
    (copy / "341_2.jpg").write_bytes(data[:200])
    config = eval_config.get_config(f"gpr1200={copy}")
    evaluate.main(config, evaluate.RAW_PIXELS, str(tmp_path / "out"))
    [result] = json.loads((tmp_path / "out/result.json").read_text())["models"]
    assert result["undecodable"] == {str(copy): ["341_2.jpg"]}
    card = result["protocols"]["gpr1200"]
    assert card["undecodable"] == {"pictures": 1, "names": ["341_2.jpg"], "feature": "random"}
    assert card["pictures"] == len(picture_sets.read_set(folder))
    note = f"{copy}: 341_2.jpg cannot be decoded and has a random feature"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "out/index.html").read_text()


def test_names_that_are_no_unicode(folder, tmp_path):
    """As old archives leave them on disk: bytes of Latin-1, which are shown as escapes."""
    copy = shutil.copytree(folder, tmp_path / "set")
    named = os.fsencode(copy) + b"/340_caf\xe9.jpg"
    os.rename(copy / "340_0.jpg", named)
    queries = [{"image": os.fsdecode(b"340_caf\xe9.jpg"), "classes": [340]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, queries)))
    config = eval_config.get_config(f"gpr1200={copy}")
    found = {"kind": "query_index", "protocol": "ilias", "queries": str(tmp_path / "q.jsonl")}
    config.evaluators["found"] = {**found, "index": str(copy), "images": str(copy)}
    evaluate.main(config, evaluate.RAW_PIXELS, str(tmp_path / "out"))
    assert "340_caf\\udce9.jpg" in (tmp_path / "out/index.html").read_text("utf-8")
    as_tar = tmp_path / "set.tar"
    with tarfile.open(as_tar, "w") as tar:
        tar.add(copy, "set")
    assert picture_sets.read_set(as_tar).sha256() == picture_sets.read_set(copy).sha256()


def test_several_models_in_one_table(model, folder, tmp_path, monkeypatch):
    """What one has not is a dash; the best is bold; a set's pictures are in the page once."""
    config = eval_config.get_config(f"gpr1200={folder},classes={SAMPLE / 'classes.jsonl'}")
    models = [str(model), evaluate.RAW_PIXELS]
    evaluate.main(config, out=str(tmp_path), models=models)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [of["model"] for of in result["models"]] == [str(model), "raw pixels"]
    assert {"python", "jax", "numpy", "device"} <= result["versions"].keys()
    ours, pixels = (of["metrics"]["gpr1200"]["map"] for of in result["models"])
    low, high = result["models"][0]["intervals"]["gpr1200"]["map"]
    assert low <= ours <= high
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "| metric | export | raw pixels |"
    [scored] = [line for line in lines if line.startswith("| gpr1200/map |")]
    assert f"**{max(ours, pixels):.3f}** [" in scored
    assert scored.count("**") == 2
    [named] = [line for line in lines if line.startswith("| gpr1200_zeroshot/top1 |")]
    assert named.endswith(" | – |")
    page = (tmp_path / "index.html").read_text()
    assert len(set(re.findall('base64,([^"]*)"', page))) == len(list(folder.iterdir()))


def test_models_are_named_and_found_before_any_is_measured(model, folder, tmp_path, monkeypatch):
    config = eval_config.get_config(f"gpr1200={folder}")
    with pytest.raises(BadInput, match="--models names no model: write --models A B"):
        evaluate.main(config)
    (tmp_path / "link").symlink_to(model)
    for same in (str(model), f"{model}/", str(tmp_path / "link")):
        with pytest.raises(BadInput, match="--models names a model twice"):
            evaluate.main(config, out=str(tmp_path), models=[str(model), same])
    with pytest.raises(BadInput, match="--out is missing: several models"):
        evaluate.main(config, models=[str(model), "raw_pixels"])
    monkeypatch.setattr(inference, "load", None)
    with pytest.raises(BadInput, match="nowhere is neither a training run"):
        evaluate.main(config, out=str(tmp_path), models=[str(model), str(tmp_path / "nowhere")])


def test_config_needs_one_data_set(tmp_path):
    for arg in ("", "sample,gpr1200=somewhere", "sets=here,gpr1200=somewhere"):
        with pytest.raises(BadInput, match="one of `sample`, `gpr1200=PATH` and `sets=FOLDER`"):
            eval_config.get_config(arg)
    with pytest.raises(BadInput, match=r"There is no folder .*nowhere"):
        eval_config.get_config(f"sets={tmp_path / 'nowhere'}")
    with pytest.raises(BadInput, match="has no evaluation set: name the folder of those that"):
        eval_config.get_config(f"sets={tmp_path}")


def test_pictures_of_ones_own_in_several_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "train").mkdir(parents=True)
        for tar in ("seen.tar", "unseen.tar", ".x.tar"):
            (tmp_path / name / tar).write_text("")
    (tmp_path / "a/classes.jsonl").write_text('{"class": 0, "lemmas": ["x"]}\n')
    (tmp_path / "b/classes.jsonl").write_text('{"class": 0, "label": "x", "id": "Q1"}\n')
    evaluators = eval_config.get_config(f"sets={tmp_path / 'a'}+{tmp_path / 'b'}").evaluators
    kinds = ("retrieval", "zeroshot")
    names = {f"{k}_{f}_{s}" for k in kinds for f in "ab" for s in ("seen", "unseen")}
    assert set(evaluators) == names | {"entity_b_seen"}
    assert evaluators.entity_b_seen.unseen == str(tmp_path / "b/unseen.tar")
    with pytest.raises(BadInput, match="comes twice in sets="):
        eval_config.get_config(f"sets={tmp_path / 'a'}+{tmp_path / 'a'}")


def test_every_set_that_can_be_made_is_measured(tmp_path):
    """With keys that its kind of evaluator has."""
    files = ("images.tar", "queries.tar", "queries.jsonl", "captions.jsonl")
    for name in adapters.ADAPTERS:
        (tmp_path / name).mkdir()
        texts = {"ilias", "inquire"} & {name} and {"text_queries.jsonl"}
        for file in {*files, *texts} - ({"queries.jsonl"} if name == "inquire" else set()):
            (tmp_path / name / file).touch()
    evaluators = eval_config.get_config(f"sets={tmp_path}").evaluators.to_dict()
    for name, entry in evaluators.items():
        kind = entry.pop("kind")
        assert suite._evaluator_class(kind, entry), name
    measured = {
        path.split("/")[-2]
        for e in evaluators.values()
        for path in map(str, e.values())
        if path.startswith(str(tmp_path))
    }
    assert measured == set(adapters.ADAPTERS)
    assert {"inquire_text", "ilias_text", "ilias", "imagenet_knn"} <= set(evaluators)
    assert "inquire" not in evaluators


def test_main_on_sets_in_their_layouts(model, folder, tmp_path):
    """Boxes, queries in words, captions and names of categories, by one config."""
    names = sorted(path.name for path in folder.iterdir())
    queries = [
        {"image": name, "box": [0, 0, 50, 50], "positives": {"easy": [other]}, "junk": [name]}
        for name, other in itertools.pairwise(names)
    ]
    tables = {
        "gpr1200/classes": [{"class": c, "label": f"thing {c}"} for c in (340, 341)],
        "roxford5k/queries": queries,
        "ilias/text_queries": [{"text": "a drawing", "classes": [340]}],
        "flickr30k/captions": [{"image": name, "captions": [name, "a thing"]} for name in names],
    }
    for table, lines in tables.items():
        path = tmp_path / "sets" / f"{table}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, lines)))
        shutil.copy(folder.with_suffix(".tar"), path.parent / "images.tar")
    shutil.copy(folder.with_suffix(".tar"), tmp_path / "sets" / "roxford5k" / "queries.tar")
    evaluate.main(eval_config.get_config(f"sets={tmp_path / 'sets'}"), str(model), str(tmp_path))
    [result] = json.loads((tmp_path / "result.json").read_text())["models"]
    metrics = result["metrics"]
    assert set(metrics["roxford5k"]) == {
        f"{m}_easy" for m in ("map", "mp_at_1", "mp_at_5", "mp_at_10")
    }
    assert set(metrics["ilias_text"]) == {"map_at_1000"}
    assert {"text_to_image_recall_at_1", "image_to_text_recall_at_10"} <= set(metrics["flickr30k"])
    assert metrics["flickr30k"]["image_to_text_recall_at_10"] <= 1
    assert "text_to_image_map" in metrics["gpr1200_text"]
    assert result["protocols"]["roxford5k"]["boxes"] == len(queries)
    assert "map" in result["intervals"]["gpr1200"]


def test_command_line_tells_bad_input_in_one_line(tmp_path):
    command = [sys.executable, "-m", "mofi_jax.evaluate", "--config", "configs/eval.py:sample"]
    command += ["--models", "raw_pixels", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
