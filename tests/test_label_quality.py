"""Label quality: the counts by hand, the files it reads, and that nobody else reads the truth."""

import gzip
import json
import pathlib
import re

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine, label_quality
from data_prep.linking import stage as linking_stage
from data_prep.selection import choose, embed
from mofi_jax.common import errors
from tests import workdirs

ROOT = pathlib.Path(__file__).parents[1]

CLASSES = [
    {"class": 0, "id": "rose", "synsets": ["rose"], "sure": True},
    {"class": 1, "id": "star", "synsets": ["star", "star2"], "sure": False},
]
TRUTH = [
    {"key": "a", "class": 0, "says": ["rose"]},
    {"key": "b", "class": 0, "says": ["tulip"]},  # a wrong caption
    {"key": "c", "class": 1, "says": ["star", "rose"]},
    {"key": "d", "class": 1, "says": ["star"]},
    {"key": "e", "class": 0, "says": []},
]


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def truth_files(tmp_path):
    truth = write_jsonl(tmp_path / "truth.jsonl.gz", TRUTH)
    return truth, write_jsonl(tmp_path / "classes.jsonl", CLASSES)


LABELS = {"a": [0], "b": [], "c": [2], "d": [], "e": [0]}


def write_workdir(folder, labels):
    """Two shards: kb rows 0 rose, 1 tulip, 2 star, 3 star2."""
    for name in ("kb", "links", "labels"):
        (folder / name).mkdir(parents=True)
    qids = ["rose", "tulip", "star", "star2"]
    pq.write_table(pa.table({"qid": qids}), folder / "kb/entities.parquet")
    links = {  # candidates (mention, entity, prior)
        "a": [(0, 1, 0.6), (0, 0, 0.4)],
        "b": [(0, 1, 1.0)],
        "c": [(0, 2, 1.0), (1, 0, 1.0)],
        "d": [],
        "e": [(0, 0, 1.0)],
        "f": [(0, 1, 1.0)],  # a picture that the truth does not know
    }
    for shard, keys in enumerate((["a", "b"], ["c", "d", "e", "f"])):
        mentions, candidates = [], []
        for key in keys:
            numbers = sorted({mention for mention, _, _ in links[key]})
            mentions.append(
                [{"start": m, "end": m + 1, "surface": "x", "kind": "ner"} for m in numbers]
            )
            candidates.append([{"mention": m, "entity": e, "prior": p} for m, e, p in links[key]])
        table = pa.table(
            {
                "key": keys,
                "mentions": pa.array(mentions, linking_stage.mentions_type()),
                "candidates": pa.array(candidates, linking_stage.candidates_type()),
            }
        )
        pq.write_table(table, folder / f"links/{shard:05d}.parquet")
        chosen = pa.array([labels.get(key, [1]) for key in keys], pa.list_(pa.int32()))
        pq.write_table(
            pa.table({"key": keys, "entities": chosen}), folder / f"labels/{shard:05d}.parquet"
        )


def test_main_compares_text_alone_with_the_selection(tmp_path, truth_files, capsys):
    write_workdir(tmp_path / "w", LABELS)
    label_quality.main(str(tmp_path / "w"), *truth_files)
    result = json.loads((tmp_path / "w/label_quality.json").read_text())
    # a: tulip; b: tulip; c: star, rose; e: rose.
    assert result["text_only"] == {
        "precision": pytest.approx(2 / 5),
        "recall": pytest.approx(1 / 3),
        "chosen": 5,
        "right": 2,
        "pictures": 4,
        "named": 3,
        "found": 1,
    }
    assert result["selected"]["precision"] == 1.0
    assert result["selected"]["recall"] == pytest.approx(2 / 3)
    assert result["ceiling"] == pytest.approx(2 / 3)
    assert "sweep" not in result  # these labels were not made by thresholds
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["labels", "precision", "recall", "pairs", "pictures"],
        ["text_only", "0.400", "0.333", "5", "4"],
        ["selected", "1.000", "0.667", "3", "3"],
        ["ceiling", "0.667"],
    ]


def test_precision_and_recall_by_hand(tmp_path, truth_files):
    labels = {
        "a": [0, 1],  # one right, one wrong; found
        "b": [1],  # wrong; its caption does not name it
        "c": [3],  # not sure of the sense: right
        "d": [],
        "e": [0],  # right, though the caption does not name it: no recall
    }
    write_workdir(tmp_path, labels)
    selected = label_quality.measure_workdir(str(tmp_path), *truth_files)["selected"]
    assert selected["precision"] == pytest.approx(3 / 5)
    assert selected["recall"] == pytest.approx(2 / 3)
    assert [selected[name] for name in ("chosen", "right", "pictures")] == [5, 3, 4]


def test_nothing_chosen_has_no_precision(tmp_path, truth_files):
    write_workdir(tmp_path, dict.fromkeys("abcdef", ()))
    selected = label_quality.measure_workdir(str(tmp_path), *truth_files)["selected"]
    assert (selected["precision"], selected["recall"]) == (None, 0)
    nobody = write_jsonl(tmp_path / "nobody.jsonl", [{"key": "z", "class": 0, "says": []}])
    result = label_quality.measure_workdir(str(tmp_path), nobody, truth_files[1])
    assert result["text_only"]["precision"] is result["text_only"]["recall"] is None


def test_truth_that_names_entities_itself_needs_no_classes(tmp_path):
    write_workdir(tmp_path, LABELS)
    rows = [
        {"key": "a", "wnid": "rose", "says": ["rose"]},
        {"key": "c", "wnid": "star2", "says": ["star2", "rose"]},
        {"key": "d", "wnid": "unheard of", "says": ["unheard of"]},
    ]
    truth = write_jsonl(tmp_path / "truth.jsonl", rows)
    selected = label_quality.measure_workdir(str(tmp_path), truth)["selected"]
    assert (selected["chosen"], selected["right"]) == (2, 1)
    assert (selected["named"], selected["found"]) == (3, 1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A work directory whose labels were chosen by picture, its truth, and what was measured."""
    folder = tmp_path_factory.mktemp("swept")
    workdir, pairs = workdirs.write(folder)
    (folder / "clip").mkdir()
    (folder / "clip/model.json").write_text("{}")
    config = workdirs.config(clip=str(folder / "clip"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "load_model", lambda folder, size: workdirs.Model())
        choose.run(config, engine.Engine(workdir))
    rows = [
        {
            "key": pair.key,
            "wnid": f"Q{100 - pair.colour}",
            "says": [] if pair.named is None else [f"Q{100 - pair.named}"],
        }
        for pair in pairs
    ]
    truth = write_jsonl(folder / "truth.jsonl", rows)
    return config, workdir, truth, label_quality.measure_workdir(str(workdir), truth)


def test_other_thresholds_are_measured(swept):
    _config, workdir, _, result = swept
    assert result["selected"]["precision"] == 1.0
    assert result["selected"]["recall"] == 1.0
    for name, rows in result["sweep"].items():
        values = [row["value"] for row in rows]
        assert values == sorted(set(values))
        [now] = [row for row in rows if row["configured"]]
        for count in ("chosen", "right", "pictures", "found"):
            assert now[count] == result["selected"][count]
        pictures = [row["pictures"] for row in rows]
        assert pictures == sorted(pictures, reverse=True), name
    lowest = result["sweep"]["min_z_score"][0]
    assert lowest["pictures"] == result["text_only"]["pictures"]
    assert lowest["precision"] < 1
    text = label_quality.table(result)
    assert text.count("< in force") == 2
    assert "min_score" in text
    image = cv2.imread(str(workdir / "label_quality.png"))
    assert image.shape[1] > 600
    assert (image < 128).any(axis=-1).mean() > 0.01  # something is drawn


def test_the_sweep_is_what_the_stage_would_do(swept):
    config, workdir, truth, result = swept
    rows = result["sweep"]["min_z_score"]
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        changed = workdirs.config(clip=config.clip, min_z_score=row["value"])
        choose.run(changed, engine.Engine(workdir))
        selected = label_quality.measure_workdir(str(workdir), truth)["selected"]
        assert selected == {name: row[name] for name in selected}


def test_files_that_cannot_be_used_are_told(tmp_path, truth_files):
    truth, classes = truth_files
    with pytest.raises(errors.BadInput, match=r"holds no labels/: run data_prep\.build_i2e first"):
        label_quality.main(str(tmp_path / "nothing"), truth, classes)
    with pytest.raises(errors.BadInput, match=r"no\.jsonl does not exist: name a"):
        label_quality.read_truth(str(tmp_path / "no.jsonl"), classes)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(errors.BadInput, match=r"empty\.jsonl is empty"):
        label_quality.read_truth(str(tmp_path / "empty.jsonl"), classes)
    (tmp_path / "broken.jsonl").write_text('{"key": "a", "class": 0}\n')
    with pytest.raises(errors.BadInput, match=r"broken\.jsonl, line 1: 'says' cannot be read"):
        label_quality.read_truth(str(tmp_path / "broken.jsonl"), classes)
    with pytest.raises(errors.BadInput, match=r"line 1: 'wnid' cannot.*or name the --classes"):
        label_quality.read_truth(truth)
    other = write_jsonl(tmp_path / "other.jsonl", [{"key": "a", "class": 7, "says": []}])
    with pytest.raises(errors.BadInput, match=r"has class 7, which .* does not list"):
        label_quality.read_truth(other, classes)


def test_the_truth_of_the_sample_is_whole():
    sample = ROOT / "data_prep/sample"
    truth = label_quality.read_truth(sample / "truth.jsonl.gz", sample / "classes.jsonl")
    assert len(truth) == 1700
    assert sum(known.named for known in truth.values()) == 1333


def test_no_stage_and_no_training_reads_the_truth():
    stages = [
        p for p in ROOT.glob("data_prep/**/*.py") if p.stem not in ("label_quality", "__init__")
    ]
    for path in [*stages, *ROOT.glob("mofi_jax/**/*.py")]:
        assert not re.search(r"truth\.jsonl|label_quality", path.read_text()), path
