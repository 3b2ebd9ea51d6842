"""Building the knowledge base: what the folder holds, bad rows, identical bytes."""

import gzip
import json
import pathlib

import ml_collections
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs import kb
from data_prep import build_kb, engine, kb_build, knowledge_base
from mofi_jax import errors

SAMPLE = pathlib.Path(__file__).parents[1] / "data_prep/sample/knowledge_base.jsonl.gz"

ROWS = [
    {"id": "n1", "label": "rose", "aliases": ["rosebush"], "sense_rank": [1, 1]},
    {"id": "n2", "label": "rosé", "aliases": ["rose", "blush wine"], "sense_rank": [1, 3, 1]},
    {"id": "n3", "label": "alarm clock", "description": "it wakes"},
    {"qid": "Q4", "label": "clock radio", "sitelinks": 9},
    {"qid": "Q5", "label": "clock", "aliases": ["Clock Radio", "!!!"], "sitelinks": 39},
    {"id": "n6", "label": "irons", "aliases": ["chains"]},
    {"id": "n7", "label": "chain"},
    {"id": "n8", "label": "Paris, Texas"},
    {"id": "n9", "label": "Paris"},
    {"id": "n10", "label": "Texas", "hypernyms": ["n9"]},
    {"id": "n11", "label": "tomato"},
    {"id": "n12", "label": "东京"},
]
QIDS = [row.get("id") or row["qid"] for row in ROWS]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_folder_holds_what_it_promises(tmp_path):
    manifest = kb_build.build(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "kb")
    assert {path.name for path in (tmp_path / "kb").iterdir() if path.name[0] != "."} == {
        "entities.parquet",
        "aliases.marisa",
        "alias_offsets.npy",
        "cand_entity.npy",
        "cand_prior.npy",
        "cand_case.npy",
        "rejects.parquet",
        "manifest.json",
    }
    assert json.loads((tmp_path / "kb/manifest.json").read_text()) == manifest
    offsets = np.load(tmp_path / "kb/alias_offsets.npy")
    priors = np.load(tmp_path / "kb/cand_prior.npy")
    entities = np.load(tmp_path / "kb/cand_entity.npy")
    assert (offsets.dtype, priors.dtype, entities.dtype) == (np.int64, np.float32, np.int32)
    assert np.all(np.diff(offsets) >= 1)
    np.testing.assert_allclose(np.add.reduceat(priors, offsets[:-1]), 1, rtol=1e-6)
    assert manifest["counts"]["entities"] == len(ROWS)
    assert manifest["counts"]["empty_names"] == 1  # "!!!"
    assert manifest["counts"]["aliases"] == len(offsets) - 1
    table = knowledge_base.read_entities(tmp_path / "kb")
    assert table["qid"].to_pylist() == QIDS
    assert table["hypernyms"].to_pylist()[9] == ["n9"]
    assert table["description"].to_pylist()[2] == "it wakes"


def test_bad_rows_are_counted_with_their_line_and_reason(tmp_path):
    good = json.dumps({"id": "a", "label": "apple"}).encode()
    lines = [
        good,
        b"{broken",
        b'{"id": "b"}',
        b'{"label": "c"}',
        b"",
        b"[1]",
        b'{"id": "d", "label": "d", "aliases": "text"}',
        b'{"id": "e", "label": "e", "aliases": ["f"], "sense_rank": [1]}',
        b'{"id": "g", "label": "g", "sense_rank": [0]}',
        b'{"id": "h", "label": "h", "sitelinks": "many"}',
        b'{"id": "i", "label": "i", "sitelinks": -2}',
        b'{"id": "j", "label": "\xff"}',
        good,
        b'{"id": "k", "label": "  "}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    manifest = kb_build.build(tmp_path / "rows.jsonl", tmp_path / "kb")
    rejects = pq.read_table(tmp_path / "kb/rejects.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in rejects] == [
        ("line 2", "broken_json"),
        ("line 3", "no_label"),
        ("line 4", "no_id"),
        ("line 6", "no_object"),
        ("line 7", "wrong_type"),
        ("line 8", "wrong_sense_rank"),
        ("line 9", "wrong_sense_rank"),
        ("line 10", "wrong_type"),
        ("line 11", "wrong_sitelinks"),
        ("line 12", "not_utf8"),
        ("line 13", "duplicate_id"),
        ("line 14", "no_label"),
    ]
    assert manifest["counts"]["rejected"] == 12
    assert manifest["counts"]["entities"] == 1


def test_sources_that_cannot_be_used_are_told(tmp_path):
    with pytest.raises(errors.BadInput, match="has no usable row in 1: give one JSON object a"):
        kb_build.build(write(tmp_path / "none.jsonl", [{"id": "a"}]), tmp_path / "kb")
    assert not (tmp_path / "kb/manifest.json").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(errors.BadInput, match="has no usable row in 0"):
        kb_build.build(tmp_path / "empty.jsonl", tmp_path / "kb")
    with pytest.raises(errors.BadInput, match=r"nowhere\.jsonl does not exist: name a"):
        kb_build.build(tmp_path / "nowhere.jsonl", tmp_path / "kb")
    (tmp_path / "kb.csv").touch()
    with pytest.raises(errors.BadInput, match=r"kb\.csv has an unknown suffix: give a \.jsonl"):
        kb_build.build(tmp_path / "kb.csv", tmp_path / "kb")
    cut = gzip.compress(json.dumps(ROWS[0]).encode() * 100)[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(errors.BadInput, match=r"cut\.jsonl\.gz is damaged after line \d+"):
        kb_build.build(tmp_path / "cut.jsonl.gz", tmp_path / "kb")


def test_only_the_most_likely_are_stored(tmp_path):
    rows = [{"id": f"n{i}", "label": "thing", "sitelinks": i} for i in range(50)]
    kb_build.build(write(tmp_path / "rows.jsonl", rows), tmp_path / "kb")
    candidates = knowledge_base.KnowledgeBase(tmp_path / "kb").candidates("thing", 100)
    assert [entity for entity, _ in candidates] == list(range(49, 19, -1))
    assert sum(prior for _, prior in candidates) == pytest.approx(1)


def test_built_twice_it_is_the_same_bytes(tmp_path):
    first = kb_build.build(SAMPLE, tmp_path / "one")
    second = kb_build.build(SAMPLE, tmp_path / "two")
    digests = [[output["sha256"] for output in m["outputs"]] for m in (first, second)]
    assert digests[0] == digests[1]


def test_build_kb_writes_the_folder_and_its_result(tmp_path):
    for _ in range(2):
        build_kb.main(kb.get_config(), dump=str(SAMPLE), out=str(tmp_path / "kb"))
    result = json.loads((tmp_path / "kb/result.json").read_text())
    assert result["counts"]["entities"] == 2443
    for output in result["knowledge_base"]:
        assert engine.sha256(tmp_path / output["path"]) == output["sha256"]


def test_prepare_builds_a_file_and_links_a_folder(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    kb_build.build(source, tmp_path / "elsewhere")

    def prepare(workdir, given):
        config = ml_collections.ConfigDict({"knowledge_base": str(given), "workers": 1})
        kb_build.prepare(config, tmp_path / workdir)
        kb = knowledge_base.KnowledgeBase(tmp_path / workdir / "kb")
        assert kb.candidates("rosebush", 1) == [(0, 1.0)]

    prepare("linked", tmp_path / "elsewhere")
    assert (tmp_path / "linked/kb").is_symlink()
    prepare("linked", tmp_path / "elsewhere")
    prepare("linked", source)
    assert not (tmp_path / "linked/kb").is_symlink()
    with pytest.raises(
        errors.BadInput, match=r"kb was built from a file, but .* is a folder: name"
    ):
        prepare("linked", tmp_path / "elsewhere")
    with pytest.raises(errors.BadInput, match="knowledge_base is not set: write kb=PATH"):
        prepare("other", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.BadInput, match="folder is no finished knowledge base: make it"):
        prepare("other", tmp_path / "folder")
