"""Label quality: the counts by hand, the files it reads, and that nobody else reads the truth."""

import gzip
import json
import pathlib
import re
import shutil

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine, label_quality
from data_prep.linking import rows as link_rows
from data_prep.linking import stage as linking_stage
from data_prep.quality import counts
from data_prep.quality import truth as ground_truth
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
    {"key": "b", "class": 0, "says": ["tulip"], "kind": "wrong"},
    {"key": "c", "class": 1, "says": ["star", "rose"]},
    {"key": "d", "class": 1, "says": ["star"]},
    {"key": "e", "class": 0, "says": []},
]


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def linking_rows_of(candidates, keys):
    """LinkRows of (row, mention, entity), each with prior 1."""
    row, mention, entity = np.array(candidates).T
    mentions, prior = np.ones(len(keys), np.int64), np.ones(len(row), np.float32)
    return link_rows.LinkRows(pa.array(keys), mentions, row, mention, entity, prior)


@pytest.fixture
def truth_files(tmp_path):
    truth = write_jsonl(tmp_path / "truth.jsonl.gz", TRUTH)
    return truth, write_jsonl(tmp_path / "classes.jsonl", CLASSES)


LABELS = {"a": [0], "b": [], "c": [2], "d": [], "e": [0]}


_IDS = pa.list_(pa.string())


def write_workdir(folder, labels):
    """Two shards: kb rows 0 rose, 1 tulip, 2 star, 3 star2; a rose is a tulip, and that a rose."""
    for name in ("kb", "links", "labels"):
        (folder / name).mkdir(parents=True)
    qids = ["rose", "tulip", "star", "star2"]
    kinds = pa.array(["plant", "plant", "nature", None], pa.string())
    table = {"qid": qids, "kind": kinds, "types": pa.array([["tulip"], [], None, []], _IDS)}
    table["hypernyms"] = pa.array([None, ["rose", "no such"], ["star"], []], _IDS)
    pq.write_table(pa.table(table), folder / "kb/entities.parquet")
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
    expected = {"precision": 2 / 5, "recall": 1 / 3}
    expected |= {"chosen": 5, "right": 2, "pictures": 4, "named": 3, "found": 1}
    assert {name: result["text_only"][name] for name in expected} == pytest.approx(expected)
    assert result["selected"]["precision"] == 1.0
    assert result["selected"]["recall"] == pytest.approx(2 / 3)
    assert result["ceiling"] == pytest.approx(2 / 3)
    assert "sweep" not in result  # these labels were not made by thresholds
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert rows[:4] == [
        ["labels", "precision", "recall", "pairs", "pictures"],
        ["text_only", "0.400", "0.333", "5", "4"],
        ["selected", "1.000", "0.667", "3", "3"],
        ["ceiling", "0.667"],
    ]
    assert ["plant", "1.000", "1.000", "2"] in rows
    # Of a and b the label is what a rose is a kind of; of c a rose is none of a star.
    assert result["text_only"]["or_broader"] == pytest.approx(4 / 5)
    assert ["right,", "or", "a", "broader", "name", "0.800", "1.000"] in rows
    told = ["wrong", "caption,", "label", "refused", "0.000", "1.000", "of", "1"]
    assert told in rows


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
    with pytest.raises(
        errors.BadInput, match=r"knows none of the pictures.*'z', theirs such as 'c"
    ):
        label_quality.measure_workdir(str(tmp_path), nobody, truth_files[1])


def test_pictures_that_are_not_there_are_no_misses(tmp_path, truth_files):
    write_workdir(tmp_path / "w", LABELS)
    more = [*TRUTH, {"key": "z", "class": 0, "says": ["rose"]}]
    truth = write_jsonl(tmp_path / "more.jsonl", more)
    before, after = (
        label_quality.measure_workdir(str(tmp_path / "w"), path, truth_files[1])
        for path in (truth_files[0], truth)
    )
    assert before == after


def test_labels_are_counted_by_kind_and_size_and_caption(tmp_path, truth_files):
    """rose and tulip are plants, star is nature, star2 of no known kind."""
    labels = LABELS | {"a": [0, 1], "b": [1], "d": [3]}
    write_workdir(tmp_path, labels)
    result = label_quality.measure_workdir(str(tmp_path), *truth_files)
    selected = result["selected"]
    kinds = {kind: (row["right"], row["chosen"]) for kind, row in selected["by_kind"].items()}
    assert kinds == {"nature": (1, 1), "plant": (2, 4), "unknown": (1, 1)}
    assert {kind: row["found"] for kind, row in selected["by_kind"].items()} == {
        "nature": 2,  # c and d: what the picture shows is a star, by either id
        "plant": 1,
        "unknown": 0,
    }
    assert list(selected["by_size"]) == [name for name, _ in counts.SIZES]
    assert selected["by_size"]["few (under 20)"]["chosen"] == 6
    assert selected["wrong_captions"] == {
        "pictures": 1,
        "without_its_label": 0.0,
        "without_label": 0.0,
    }
    assert selected["silent_captions"] == {"pictures": 1, "without_label": 0.0}
    assert result["text_only"]["senses"] == {"pictures": 1, "right": 0.0}  # a: rose or tulip
    assert selected["senses"] == {"pictures": 1, "right": 1.0}


def test_the_calibration_by_hand():
    one = counts.Counts(3)
    truth = {"a": ground_truth.Truth(frozenset({"x"}), frozenset({"x"}), False)}
    pictures = counts.Pictures(["a", "b"], truth, {"x": 2}, {})
    links = linking_rows_of([(0, 0, 2), (1, 0, 2)], keys=["a", "b"])
    rows, entities = np.array([0, 0, 1]), np.array([0, 2, 2])
    one.add(pictures, links, counts.Labels(rows, entities, np.array([0.25, 1.0, 0.9])))
    # The second picture is unknown, so that its label is not counted.
    assert one.calibration() == {
        "bins": [
            {"labels": 1, "probability": 0.25, "precision": 0.0},
            {"labels": 1, "probability": 1.0, "precision": 1.0},
        ],
        "error": pytest.approx(0.125),
    }
    assert counts.Counts(3).calibration() is None


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
            "qid": f"Q{100 - pair.colour}",
            "says": [] if pair.named is None else [f"Q{100 - pair.named}"],
        }
        for pair in pairs
    ]
    truth = write_jsonl(folder / "truth.jsonl", rows)
    return config, workdir, truth, label_quality.measure_workdir(str(workdir), truth)


def test_labels_of_two_runs_are_not_measured_as_one(swept, tmp_path, monkeypatch):
    config, workdir, truth, _ = swept
    copy, label = shutil.copytree(workdir, tmp_path / "W"), choose._label_by_clip
    first = min(path.stem for path in (copy / "labels").glob("*.parquet"))

    def stop(task, *rest):
        return 1 / (task.name == first) and label(task, *rest)

    monkeypatch.setattr(choose, "_label_by_clip", stop)
    config = workdirs.config(clip=config.clip, max_labels=1)
    with pytest.raises(engine.ShardError, match="ZeroDivisionError"):
        choose.run(config, engine.Engine(copy))
    with pytest.raises(errors.BadInput, match="not made from its configuration"):
        label_quality.measure_workdir(str(copy), truth)


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
    lowest = result["sweep"]["min_probability"][0]
    assert lowest["pictures"] == result["text_only"]["pictures"]
    assert lowest["precision"] < 1
    text = label_quality.table(result)
    assert text.count("< in force") == 1
    assert "min_probability" in text
    image = cv2.imread(str(workdir / "label_quality.png"))
    assert image.shape[1] > 600
    assert (image < 128).any(axis=-1).mean() > 0.01  # something is drawn


def test_the_sweep_is_what_the_stage_would_do(swept):
    config, workdir, truth, result = swept
    rows = result["sweep"]["min_probability"]
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        changed = workdirs.config(clip=config.clip, min_probability=row["value"])
        choose.run(changed, engine.Engine(workdir))
        selected = label_quality.measure_workdir(str(workdir), truth)["selected"]
        rates = {name for name in row if name not in ("value", "configured")}
        assert {name: row[name] for name in rates} == {name: selected[name] for name in rates}


def test_files_that_cannot_be_used_are_told(tmp_path, truth_files):
    truth, classes = truth_files
    with pytest.raises(errors.BadInput, match="holds no labels/: run `mofi labels` first"):
        label_quality.main(str(tmp_path / "nothing"), truth, classes)
    with pytest.raises(errors.BadInput, match=r"no\.jsonl does not exist: name a"):
        ground_truth.read(str(tmp_path / "no.jsonl"), classes)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(errors.BadInput, match=r"empty\.jsonl is empty"):
        ground_truth.read(str(tmp_path / "empty.jsonl"), classes)
    (tmp_path / "broken.jsonl").write_text('{"key": "a", "class": 0}\n')
    with pytest.raises(errors.BadInput, match=r"broken\.jsonl, line 1: 'says' cannot be read"):
        ground_truth.read(str(tmp_path / "broken.jsonl"), classes)
    for row, field in (
        (b'{"key": "a", "qid": "Q1", "says": "Q1"}', "says"),
        (b'{"key": "a", "qid": "Q1", "says": [["Q1"]]}', "says"),
        (b'{"key": "a", "qid": ["Q1"], "says": []}', "qid"),
        (b'{"key": "\xe9", "qid": "Q1", "says": []}', "key"),
    ):
        (tmp_path / "broken.jsonl").write_bytes(row)
        with pytest.raises(errors.BadInput, match=rf"broken\.jsonl, line 1: '{field}' cannot"):
            ground_truth.read(str(tmp_path / "broken.jsonl"))
    (tmp_path / "cut.gz").write_bytes(pathlib.Path(truth).read_bytes()[:-9])
    with pytest.raises(errors.BadInput, match=r"cut\.gz is damaged"):
        ground_truth.read(str(tmp_path / "cut.gz"), classes)
    with pytest.raises(errors.BadInput, match=r"line 1: 'qid' cannot.*or name the --classes"):
        ground_truth.read(truth)
    other = write_jsonl(tmp_path / "other.jsonl", [{"key": "a", "class": 7, "says": []}])
    with pytest.raises(errors.BadInput, match=r"has class 7, which .* does not list"):
        ground_truth.read(other, classes)


def test_the_truth_of_the_sample_is_whole():
    sample = ROOT / "data_prep/sample"
    truth = ground_truth.read(sample / "truth.jsonl.gz", sample / "classes.jsonl")
    assert len(truth) == 1700
    assert sum(known.named for known in truth.values()) == 1333


def test_no_stage_and_no_training_reads_the_truth():
    stages = [
        p
        for p in ROOT.glob("data_prep/**/*.py")
        if p.parent.name != "quality" and p.stem not in ("label_quality", "__init__")
    ]
    commands = ROOT / "mofi_jax" / "__main__.py"  # it names them all
    for path in [*stages, *({*ROOT.glob("mofi_jax/**/*.py")} - {commands})]:
        assert not re.search(r"truth\.jsonl|label_quality|prep\.quality", path.read_text()), path
