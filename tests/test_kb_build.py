"""Building the knowledge base: what the folder holds, bad rows, identical bytes."""

import gzip
import json
import pathlib
import re
import subprocess
import sys

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import kb
from data_prep import build_kb, engine
from data_prep.engine import executors
from data_prep.kb import build as kb_build
from data_prep.kb import closure, forms, lookup, names, ranking
from data_prep.kb import merge as kb_merge
from mofi_jax.common import errors
from tests import inputs

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
    manifest = kb_build.build(
        write(tmp_path / "rows.jsonl", ROWS), tmp_path / "kb", inputs.kb_rules()
    )
    assert {path.name for path in (tmp_path / "kb").iterdir() if path.name[0] != "."} == {
        "entities.parquet",
        "aliases.marisa",
        "alias_offsets.npy",
        "cand_entity.npy",
        "cand_prior.npy",
        "cand_case.npy",
        "cand_form.npy",
        "cand_languages.npy",
        "alias_linked.npy",
        "parts.marisa",
        "part_offsets.npy",
        "part_entity.npy",
        "part_prior.npy",
        "part_role.npy",
        "redirects.parquet",
        "rejects.parquet",
        "manifest.json",
        "manifests.jsonl",
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
    table = lookup.read_entities(tmp_path / "kb")
    assert table["qid"].to_pylist() == QIDS
    assert table["hypernyms"].to_pylist()[9] == ["n9"]
    assert table["description"].to_pylist()[2] == "it wakes"


def test_bad_rows_are_counted_with_their_line_and_reason(tmp_path, caplog):
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
    config = inputs.kb_rules(reject_budget=1.0)
    with caplog.at_level("WARNING"):
        manifest = kb_build.build(tmp_path / "rows.jsonl", tmp_path / "kb", config)
    assert "1 broken_json, the first line 2" in caplog.text
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
    with pytest.raises(errors.BadInput, match=r"in 1 \(1 no_label, the first in line 1\): give"):
        kb_build.build(
            write(tmp_path / "none.jsonl", [{"id": "a"}]), tmp_path / "kb", inputs.kb_rules()
        )
    assert not (tmp_path / "kb/manifest.json").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(errors.BadInput, match="has no usable row in 0"):
        kb_build.build(tmp_path / "empty.jsonl", tmp_path / "kb", inputs.kb_rules())
    with pytest.raises(errors.BadInput, match=r"nowhere\.jsonl does not exist: name a"):
        kb_build.build(tmp_path / "nowhere.jsonl", tmp_path / "kb", inputs.kb_rules())
    (tmp_path / "kb.csv").touch()
    with pytest.raises(errors.BadInput, match=r"kb\.csv has an unknown suffix: give a \.jsonl"):
        kb_build.build(tmp_path / "kb.csv", tmp_path / "kb", inputs.kb_rules())
    cut = gzip.compress(json.dumps(ROWS[0]).encode() * 100)[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(errors.BadInput, match=r"cut\.jsonl\.gz is damaged after line \d+"):
        kb_build.build(tmp_path / "cut.jsonl.gz", tmp_path / "kb", inputs.kb_rules())


def test_only_the_most_likely_are_stored(tmp_path):
    rows = [{"id": f"n{i}", "label": "thing", "sitelinks": i} for i in range(50)]
    kb_build.build(write(tmp_path / "rows.jsonl", rows), tmp_path / "kb", inputs.kb_rules())
    candidates = lookup.KnowledgeBase(tmp_path / "kb").candidates("thing", 100)
    assert [entity for entity, _ in candidates] == list(range(49, 19, -1))
    assert sum(prior for _, prior in candidates) == pytest.approx(1)


def test_built_twice_it_is_the_same_bytes(tmp_path):
    first = kb_build.build(SAMPLE, tmp_path / "one", inputs.kb_rules())
    second = kb_build.build(SAMPLE, tmp_path / "two", inputs.kb_rules())
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
    kb_build.build(source, tmp_path / "elsewhere", inputs.kb_rules())

    def prepare(workdir, given):
        config = ml_collections.ConfigDict(
            {"knowledge_base": str(given), "kb": inputs.kb_rules(alpha=0.5)}
        )
        kb_build.prepare(config, engine.Engine(tmp_path / workdir))
        kb = lookup.KnowledgeBase(tmp_path / workdir / "kb")
        assert kb.candidates("rosebush", 1) == [(0, 1.0)]

    prepare("linked", tmp_path / "elsewhere")
    assert (tmp_path / "linked/kb").is_symlink()
    assert not engine.stage_seconds(tmp_path / "linked")  # it was made elsewhere
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
    manifest = tmp_path / "elsewhere/manifest.json"
    text = manifest.read_text()
    for damage in (re.sub(r'"version": \d+', '"version": 4', text), text[:-9], "[]"):
        manifest.write_text(damage)
        with pytest.raises(errors.BadInput, match="elsewhere was built by another version of"):
            prepare("other", tmp_path / "elsewhere")


# ------------------------------------------------------------------------- names, cases and links


def build(folder, rows, **changes):
    config = inputs.kb_rules(**changes)
    kb_build.build(write(folder / "rows.jsonl", rows), folder / "kb", config)
    return lookup.KnowledgeBase(folder / "kb")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("red panda", 0),
        ("Lord of the Rings", 0),
        ("Apple", 1),
        ("Apple Inc.", 1),
        ("iPhone", 1),
        ("McDonald's", 1),
        ("A", 1),
        ("B 52", 1),
        ("IT", 2),
        ("U.S.", 2),
        ("NASA TV", 2),
        ("NASA tv", 0),
        ("Élan", 1),
        ("ÉLAN", 2),
        ("東京", 0),  # no letter that knows case
        ("747", 0),
        ("", 0),
    ],
)
def test_how_names_are_written(name, case):
    assert forms.case_of(name) == case


def test_of_several_spellings_the_smallest_case_counts(tmp_path):
    rows = [
        {"id": "Q1", "label": "IT", "aliases": ["it", "Red Panda"]},
        {"id": "Q2", "label": "It", "sitelinks": 9},
    ]
    base = build(tmp_path, rows)
    cases = np.load(tmp_path / "kb/cand_case.npy")
    assert cases.dtype == np.uint8
    entities = np.load(tmp_path / "kb/cand_entity.npy").tolist()
    assert base.candidates("it", 2)[0][0] == 1
    assert len(cases) == len(entities) == 4  # it (2), red panda, redpanda
    found = sorted(zip(entities, cases.tolist(), strict=True))
    assert found == [(0, 0), (0, 1), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("label", "bare"),
    [
        ("John Smith (actor)", "john smith"),
        ("Mercury (planet) ", "mercury"),
        ("f (x) (album)", "f x"),
        ("(album)", None),
        ("Earth (", None),
        ("Venus (planet) song", None),
    ],
)
def test_a_label_with_a_bracket_is_a_name_without_it(tmp_path, label, bare):
    base = build(
        tmp_path, [{"id": "Q1", "label": label, "sitelinks": 3}, {"id": "Q2", "label": "x"}]
    )
    form = names.normalize(label)
    known = {form, form.replace(" ", "")} | ({bare, bare.replace(" ", "")} if bare else set())
    assert len(np.load(tmp_path / "kb/alias_offsets.npy")) - 1 == len(known | {"x"})
    for name in known:
        assert base.candidates(name, 1)[0][0] == 0
    assert lookup.read_entities(tmp_path / "kb")["aliases"].to_pylist()[0] == []


def test_priors_take_the_exponent_and_the_factor_of_the_configuration(tmp_path):
    rows = [
        {"id": "Q1", "label": "sun", "sitelinks": 3},
        {"id": "Q2", "label": "star", "aliases": ["sun"], "sitelinks": 15},
    ]
    base = build(tmp_path, rows, alpha=0.5, alias_factor=0.25)
    assert dict(base.candidates("sun", 2)) == pytest.approx({0: 2 / 3, 1: 1 / 3})  # 2 : 0.25 * 4


def test_joined_names_give_way_to_what_has_the_very_name(tmp_path):
    rows = [
        {"id": "Q1", "label": "alarm clock", "sitelinks": 99},
        {"id": "Q2", "label": "Alarmclock"},
        {"id": "Q3", "label": "clock radio"},
    ]
    base = build(tmp_path, rows)
    assert base.candidates("alarmclock", 5) == [(1, 1.0)]
    assert base.candidates("clockradio", 5) == [(2, 1.0)]


ANCHORS = [
    ("Paris", "Q1", 6),
    ("paris", "Q2", 3),
    ("PARIS", "Q9", 100),  # not in the knowledge base
    ("Texas", "Q3", 1),
    ("City of Light", "Q1", 5),
    ("city of lights", "Q1", 4),  # too rare
    ("!!!", "Q1", 50),
]
PLACES = [
    {"id": "Q1", "label": "Paris", "sitelinks": 299},
    {"id": "Q2", "label": "Paris Hilton", "aliases": ["Paris"], "sitelinks": 199},
    {"id": "Q3", "label": "Texas", "sitelinks": 9},
    {"id": "Q4", "label": "Texas", "sitelinks": 29},
    {"id": "Q5", "label": "Paris (myth)", "sitelinks": 0},
]


def write_anchors(path):
    if path.suffix == ".parquet":
        columns = zip(*ANCHORS, strict=True)
        table = pa.table(dict(zip(("anchor", "qid", "count"), map(list, columns), strict=True)))
        pq.write_table(table, path)
    else:
        text = "".join("\t".join(map(str, row)) + "\n" for row in ANCHORS).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["anchors.parquet", "anchors.tsv", "anchors.tsv.gz"])
def test_link_counts_decide_where_they_know_the_name(tmp_path, name):
    anchors = write_anchors(tmp_path / name)
    base = build(tmp_path, PLACES, anchors=anchors, anchor_smoothing=2.0)
    weights = {0: 300, 1: 100, 4: 0.5}
    total = sum(weights.values())
    smoothed = {0: 6 + 2 * 300 / total, 1: 3 + 2 * 100 / total, 4: 2 * 0.5 / total}
    expected = {entity: value / 11 for entity, value in smoothed.items()}
    assert dict(base.candidates("paris", 5)) == pytest.approx(expected, abs=1e-6)
    assert dict(base.candidates("texas", 5)) == pytest.approx({2: 1.5 / 3, 3: 1.5 / 3})
    assert base.candidates("city of light", 5) == [(0, 1.0)]
    assert base.candidates("city of lights", 5) == [(0, 1.0)]  # the plural of a name
    assert base.candidates("paris hilton", 5) == [(1, 1.0)]
    manifest = json.loads((tmp_path / "kb/manifest.json").read_text())
    assert manifest["counts"]["linked_names"] == 1
    assert manifest["inputs"][1]["path"].endswith(name)
    before = manifest["outputs"]
    assert build(tmp_path, PLACES, anchors=anchors, anchor_min_links=4).candidates(
        "city of lights", 5
    ) == [(0, 1.0)]
    assert json.loads((tmp_path / "kb/manifest.json").read_text())["outputs"] != before


def test_anchors_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(errors.BadInput, match=r"none\.tsv does not exist: name a table"):
        build(tmp_path, PLACES, anchors=str(tmp_path / "none.tsv"))
    (tmp_path / "a.csv").touch()
    with pytest.raises(errors.BadInput, match=r"a\.csv has an unknown suffix: give a \.parquet"):
        build(tmp_path, PLACES, anchors=str(tmp_path / "a.csv"))
    (tmp_path / "a.tsv").write_text("Paris\tQ1\tmany\n")
    with pytest.raises(errors.BadInput, match=r"a\.tsv cannot be read .*anchor, qid and count"):
        build(tmp_path, PLACES, anchors=str(tmp_path / "a.tsv"))
    pq.write_table(pa.table({"anchor": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(errors.BadInput, match=r"a\.parquet cannot be read"):
        build(tmp_path, PLACES, anchors=str(tmp_path / "a.parquet"))
    with pytest.raises(errors.BadInput, match=r"config\.redirects: .*the columns from and to"):
        build(tmp_path, PLACES, redirects=str(tmp_path / "a.parquet"))
    codes = tuple(f"a{number}" for number in range(17))
    with pytest.raises(errors.BadInput, match=r"config.languages=.* give 16 at most"):
        build(tmp_path, PLACES, languages=codes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", 0),
        ("chunk_lines", 0),
        ("memory_gb", 0.0),
        ("alpha", -1.0),
        ("alpha", 5.0),
        ("reject_budget", 1.5),
        ("alias_factor", 0.0),
        ("anchor_min_links", 0),
        ("anchor_smoothing", 0.0),
    ],
)
def test_values_that_cannot_be_used_are_told(tmp_path, key, value):
    with pytest.raises(errors.BadInput, match=f"config.{key}={value} cannot be used: give"):
        build(tmp_path, PLACES, **{key: value})
    assert not (tmp_path / "kb").exists()


class Recorder(executors.Local):
    """Runs jobs here and remembers of which stages they were."""

    stages = ()

    def run(self, todo, accelerator):
        self.stages = (*self.stages, *(job.stage for job in todo))
        return super().run(todo, accelerator)


def test_a_base_is_built_where_the_other_stages_run(tmp_path):
    recorder, source = Recorder(), write(tmp_path / "rows.jsonl", ROWS)
    with engine.Engine(tmp_path, executor=recorder) as work:
        kb_build.build(source, tmp_path / "kb", inputs.kb_rules(), work)
    assert recorder.stages == ("kb",)


def test_neither_workers_nor_chunks_nor_memory_nor_batches_change_the_bytes(tmp_path, monkeypatch):
    digests = []
    monkeypatch.setattr(kb_merge, "_ROW_GROUP", 250)  # people are taken apart by groups
    for name, changes in (
        ("one", {"workers": 1}),
        ("two", {"workers": 2, "chunk_lines": 100, "memory_gb": 0.25}),
    ):
        config = kb.get_config()
        config.update(changes)
        manifest = kb_build.build(SAMPLE, tmp_path / name / "kb", config)
        digests.append([(output["path"], output["sha256"]) for output in manifest["outputs"]])
        monkeypatch.setattr(ranking, "BATCH", 37)
        monkeypatch.setattr(closure, "_PARTS", 2)
    assert digests[0] == digests[1]


def run_main(*args, **kwargs):
    command = [sys.executable, "-m", "data_prep.build_kb", *args]
    folder = pathlib.Path(__file__).parents[1]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **kwargs
    )


def test_the_command_needs_no_config_and_takes_single_keys(tmp_path):
    entity = {"type": "item", "id": "Q1", "labels": {"en": {"language": "en", "value": "tea"}}}
    dump = f"[\n{json.dumps(entity)}\n]\n"
    flags = ("--dump=-", f"--out={tmp_path / 'kb'}", "--config.workers=1")
    done = run_main(*flags, "--config.need_link_or_image=False", input=dump)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kb/result.json").read_text())
    assert result["counts"]["entities"] == 1
    failed = run_main("--dump=/nowhere.json", f"--out={tmp_path / 'other'}")
    assert failed.returncode == 2
    assert "/nowhere.json does not exist: name a .jsonl" in failed.stderr
    assert not (tmp_path / "other").exists()
