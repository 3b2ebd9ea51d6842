"""Label quality: the counts by hand, the files it reads, and that nobody else reads the truth."""

import gzip
import json
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import label_quality, linking
from mofi_jax import errors

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


def test_precision_and_recall_by_hand(truth_files):
    truth = label_quality.read_truth(*truth_files)
    chosen = {
        "a": ["rose", "tulip"],  # one right, one wrong; found
        "b": ["tulip"],  # wrong; its caption does not name it
        "c": ["star2"],  # not sure of the sense: right
        "e": ["rose"],  # right, though the caption does not name it: no recall
        "unknown": ["rose"],  # a picture that the truth does not know
    }
    quality = label_quality.measure(chosen, truth)
    assert quality == label_quality.Quality(chosen=5, right=3, named=3, found=2)
    assert quality.precision == pytest.approx(3 / 5)
    assert quality.recall == pytest.approx(2 / 3)


def test_nothing_chosen_has_no_precision():
    quality = label_quality.measure({}, {})
    assert quality.precision is None
    assert quality.recall is None


def write_workdir(folder):
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
    }
    labels = {"a": [0], "b": [], "c": [2], "d": [], "e": [0]}
    for shard, keys in enumerate((["a", "b"], ["c", "d", "e"])):
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
                "mentions": pa.array(mentions, linking.mentions_type()),
                "candidates": pa.array(candidates, linking.candidates_type()),
            }
        )
        pq.write_table(table, folder / f"links/{shard:05d}.parquet")
        chosen = pa.array([labels[key] for key in keys], pa.list_(pa.int32()))
        pq.write_table(
            pa.table({"key": keys, "entities": chosen}), folder / f"labels/{shard:05d}.parquet"
        )


def test_main_compares_text_alone_with_the_selection(tmp_path, truth_files, capsys):
    write_workdir(tmp_path / "w")
    label_quality.main(str(tmp_path / "w"), *truth_files)
    result = json.loads((tmp_path / "w/label_quality.json").read_text())
    # a: tulip; b: tulip; c: star, rose; e: rose.
    assert result["text_only"] == {
        "precision": pytest.approx(2 / 5),
        "recall": pytest.approx(1 / 3),
        "chosen": 5,
        "right": 2,
        "named": 3,
        "found": 1,
    }
    assert result["selected"]["precision"] == 1.0
    assert result["selected"]["recall"] == pytest.approx(2 / 3)
    assert result["ceiling"] == pytest.approx(2 / 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["labels", "precision", "recall", "pairs"],
        ["text_only", "0.400", "0.333", "5"],
        ["selected", "1.000", "0.667", "3"],
        ["ceiling", "0.667"],
    ]


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
        p for p in ROOT.glob("data_prep/*.py") if p.stem not in ("label_quality", "quickstart")
    ]
    for path in [*stages, *ROOT.glob("mofi_jax/**/*.py")]:
        assert not re.search(r"truth\.jsonl|label_quality", path.read_text()), path
