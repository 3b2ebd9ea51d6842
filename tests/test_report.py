"""The data card: its numbers add up, its page is whole, self-contained and always the same."""

import html.parser
import json
import re

import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.card import page as card_page
from data_prep.card import stage as card_stage
from data_prep.dataset import shards, vocabulary
from data_prep.engine import jobs
from data_prep.filters import stage as filters_stage
from data_prep.selection import choose, embed
from tests import workdirs


@pytest.fixture(params=["clip", "text"])
def card(request, tmp_path, monkeypatch):
    workdir, pairs = workdirs.write(tmp_path)
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda folder, batch_size: model)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/model.json").write_text("{}")
    config = workdirs.config(
        sources=(f"colours={tmp_path / 'tars'}",),
        clip=str(tmp_path / "clip"),
        labels=request.param,
    )
    for stage in (choose, filters_stage, vocabulary):
        stage.run(config, engine.Engine(workdir))
    shards.run(config, engine.Engine(workdir), "i2e")
    card_stage.run(config, engine.Engine(workdir))
    return workdir, config, pairs, json.loads((workdir / "report/report.json").read_text())


def test_numbers_add_up(card):
    _, config, pairs, numbers = card
    funnel = numbers["funnel"]
    named = sum(pair.named is not None for pair in pairs)
    assert [funnel[k] for k in ("read", "valid", "with_mention", "with_candidate")] == [
        len(pairs),
        len(pairs),
        named,
        named,
    ]
    lost = sum(row["count"] for row in numbers["rejects"])
    assert funnel["final"] == funnel["read"] - lost
    assert sum(numbers["labels_per_picture"].values()) == funnel["final"]
    bins = numbers["images_per_entity"]["bins"]
    assert sum(b["entities"] for b in bins) == funnel["entities"]
    assert bins[0]["share"] == 1
    assert [row["source"] for row in numbers["sources"]] == ["colours"]
    assert numbers["sources"][0]["final"] == funnel["final"]
    assert numbers["name"] == "colours"
    assert sum(s["records"] for s in numbers["lineage"]["shards"]) == funnel["final"]
    if config.labels == "clip":
        chosen = sum(b["chosen"] for b in numbers["probabilities"]["bins"])
        assert chosen == funnel["labelled"] == sum(p.named == p.colour for p in pairs)
        for points in numbers["sensitivity"].values():
            [configured] = [point for point in points if point["configured"]]
            assert configured["pictures"] == funnel["labelled"]
            assert configured["entities"] == funnel["entities"]
    else:
        assert numbers["probabilities"] is numbers["sensitivity"] is None


def test_gallery_shows_what_happened(card):
    _workdir, config, pairs, numbers = card
    by_key = {pair.key: pair for pair in pairs}
    groups = {picture["group"] for picture in numbers["gallery"]}
    # By text alone, "background" is chosen for every picture; by the picture it never is.
    assert groups == ({"changed", "rejected"} if config.labels == "clip" else {"agreed"})
    for picture in numbers["gallery"]:
        pair = by_key[picture["key"]]
        assert picture["text"] == workdirs.caption(pair)
        chosen = [c["name"] for c in picture["candidates"] if c["chosen"]]
        if config.labels == "clip":
            assert chosen == ([workdirs.NAMES[pair.colour]] if pair.named == pair.colour else [])
            assert (picture["group"] == "rejected") == (not chosen)
            assert all({"shown", "z_score"} <= c.keys() for c in picture["candidates"])
        assert any(c["by_text"] for c in picture["candidates"])


class _Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text, self.unnamed = [], [], [], []

    def handle_starttag(self, tag, attributes):
        named = {"img": "alt", "svg": "aria-label"}
        if tag in named and not dict(attributes).get(named[tag]):
            self.unnamed.append(attributes)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() else []


def test_page_is_well_formed_and_self_contained(card):
    workdir, _, _, numbers = card
    text = (workdir / "report/index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.unnamed == []
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    keys = [p["key"] for p in numbers["gallery"]]
    for name in ("top_entities", "rare_entities"):
        keys += [key for entity in numbers[name] for key in entity["keys"]]
    assert len(page.sources) == len(keys)
    assert not {"None", "nan"} & set(re.findall(r"\w+", " ".join(page.text)))


def test_page_is_the_same_every_time(card):
    workdir, config, _, _ = card
    files = [workdir / "report/index.html", workdir / "report/report.json"]
    before = [engine.sha256(path) for path in files]
    for path in (workdir / "report").glob("*"):
        if path.is_file():
            path.unlink()
    # What the other data set of the work directory left out is none of this one's.
    rejects = jobs.rejects_table("shards-i2t", [("0000", "picture_unreadable")])
    pq.write_table(rejects, workdir / "rejects/shards-i2t-00000.parquet")
    changed = config.copy_and_resolve_references()
    changed.workers = 2
    card_stage.run(changed, engine.Engine(workdir, workers=2))
    assert [engine.sha256(path) for path in files] == before


def test_the_time_a_stage_took_is_on_the_page_and_in_no_fingerprint(card, monkeypatch):
    workdir, config, pairs, numbers = card
    rates = {row["stage"]: row for row in numbers["rates"]}
    assert "report" not in rates
    assert rates["labels"]["rows"] == len(pairs)
    assert rates["labels"]["unit"] == "pairs"
    assert rates["labels"]["shards"] == len(list((workdir / "labels").glob("*.parquet")))
    before = (workdir / "report/report.json").stat().st_mtime_ns
    monkeypatch.setattr(engine, "stage_seconds", lambda workdir: {})
    card_stage.run(config, engine.Engine(workdir))
    assert (workdir / "report/report.json").stat().st_mtime_ns == before
    (workdir / "report/report.json").unlink()
    card_stage.run(config, engine.Engine(workdir))
    assert json.loads((workdir / "report/report.json").read_text()) == {**numbers, "rates": []}
    assert "rows per second" not in (workdir / "report/index.html").read_text()


def test_no_path_of_the_machine_is_told(card, tmp_path):
    workdir, _, _, numbers = card
    for name in ("index.html", "report.json"):
        assert str(tmp_path) not in (workdir / "report" / name).read_text()
    assert numbers["config"]["sources"] == ["colours=tars"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/home/pairs/", "pairs"),
        ("cc3m=/data/cc3m/*.tar", "cc3m=*.tar"),
        ("gs://bucket/folder/kb.jsonl", "kb.jsonl"),
        ("a=s3://b/one,c=~/two/three", "a=one,c=three"),
        ("../up/pairs", "pairs"),
        ("tfds:set@/data/sets", "tfds:set@sets"),
        ("folder/pairs", "folder/pairs"),
        ("{name}, a photo with/without {description} / more", None),
        ({"filters": {"sets": ["/a/b", 3, None]}}, {"filters": {"sets": ["b", 3, None]}}),
        ({"workers": 1, "kb": {"workers": 2, "alpha": 1}}, {"kb": {"alpha": 1}}),
    ],
)
def test_of_paths_the_last_part_is_shown_and_no_number_of_workers(value, shown):
    assert card_stage.without_folders(value) == (value if shown is None else shown)


def test_failed_downloads_by_status():
    counts = {"pairs": 3, "not_downloaded": 7, "not_downloaded_404": 3, "not_downloaded_dns": 4}
    found = card_stage._failed_downloads(counts)
    assert list(found.items()) == [("dns", 4), ("404", 3)]
    assert card_stage._failed_downloads({"pairs": 3}) == {}


# ------------------------------------------------------------------------------------- the page


def example(text: str = "thing", **changes) -> dict:
    """report.json of one picture, in which everything that a user may write says `text`."""
    picture = {
        "key": text,
        "group": "agreed",
        "reason": None,
        "text": f"a {text} & more",
        "mentions": [[2, 10, "ner"], [4, 8, "gazetteer"]],
        "candidates": [
            {"name": text, "description": text, "prior": 1.0, "by_text": True, "chosen": True}
        ],
    }
    entity = {"qid": text, "name": text, "description": text, "images": 1, "keys": [text]}
    steps = ("read", "valid", "with_mention", "with_candidate", "labelled", "final", "entities")
    types = {
        "type": "t",
        "name": text,
        "text_labels": 2,
        "labels": 1,
        "entities": 1,
        "examples": [text],
    }
    source = {"source": text, **dict.fromkeys(steps[1:-1], 1)}
    return {
        "name": text,
        "config": {"sources": [f"{text}=x"], "labels": "text", "template": text},
        "funnel": {**dict.fromkeys(steps, 1), "not_downloaded": 0, "missing": 0, "removed": []},
        "sources": [source, source],
        "failed_downloads": {text: 1},
        "rejects": [{"stage": text, "reason": text, "count": 1}],
        "labels_per_picture": {"1": 1},
        "images_per_entity": {
            "bins": [{"from": 1, "to": 1, "entities": 1, "labels": 1, "share": 1.0}],
            "head": [{"part": 0.01, "entities": 1, "share": 1.0}],
        },
        "picture_sizes": {"median": 0, "bins": []},
        "probabilities": None,
        "sensitivity": None,
        "entity_types": {
            "text_labels": 2,
            "labels": 1,
            "kinds": [{"kind": text, "guessed": 1, **types}],
            "types": [types],
            "others": 3,
            "untyped": {"text_labels": 0, "labels": 0, "entities": 0},
        },
        "captions": {"sampled": 1, "scripts": [{"script": "Latin", "captions": 1}]},
        "duplicates": {
            "repeated": 1,
            "evaluation": [{"set": text, "removed": 1, "by_layer": {text: 1}, "cosine": 0.99}],
        },
        "top_entities": [entity],
        "rare_entities": [entity],
        "gallery": [picture],
        "rates": [{"stage": text, "seconds": 1.0, "shards": 1, "rows": 1, "unit": text}],
        "lineage": {"inputs": [{"path": text, "bytes": 1, "sha256": "0"}], "shards": []},
        **changes,
    }


def test_captions_and_names_cannot_break_the_page():
    evil = "<script>alert('x')</script>{{ 7 * 7 }}\" onload=\"x"
    text = card_page.render(example(evil), {evil: "AAAA"})
    assert "<script" not in text
    assert 'onload="' not in text
    assert "{{ 7 * 7 }}" in text
    assert "<mark>&lt;script&gt;</mark>alert" in text
    page = _Page()
    page.feed(text)
    assert page.open == []


def test_where_entities_are_given_the_page_does_not_speak_of_captions():
    config = {**example()["config"], "labels": "given", "label_kinds": []}
    rejects = [{"stage": "labels", "reason": "no_mention", "count": 1}]
    text = card_page.render(example(config=config, rejects=rejects), {})
    for words in ("no entity came with it", "which entities came with the picture", "Labelled"):
        assert words in text
    for words in ("caption is text", "Underlined", "Picture and text agree", "captions name"):
        assert words not in text


def _text(**changes):
    page = _Page()
    page.feed(card_page.render(example(**changes), {}))
    return page.text


def test_kinds_that_are_no_labels_are_marked_and_the_mark_is_told():
    text = _text(config={**example()["config"], "label_kinds": []})
    assert "thing\u2009*" in text
    assert any("Kinds with * are labels only where" in words for words in text)
    assert not any("thing\u2009*" in words or "Kinds with *" in words for words in _text())


def test_a_type_without_a_name_is_told_from_names():
    types = example()["entity_types"]
    unnamed = {**types["types"][0], "type": "Q9", "name": None, "examples": ["cat", "dog"]}
    nothing = {**unnamed, "examples": []}
    text = _text(entity_types={**types, "types": [unnamed, nothing]})
    assert "kind of cat, dog" in text
    assert "unnamed" in text
    assert "Q9" not in text
    assert "no type" not in text
    untyped = {**types["untyped"], "text_labels": 1}
    assert "no type" in _text(entity_types={**types, "untyped": untyped})


def test_the_threshold_of_a_target_precision_is_told():
    def note(threshold):
        bins = [{"from": 0.5, "chosen": 3, "others": 1}]
        config = {**example()["config"], "min_probability": 0.25, "target_precision": 0.8}
        found = {"threshold": threshold, "bins": bins}
        [words] = [
            w for w in _text(config=config, probabilities=found, gallery=[]) if "In colour" in w
        ]
        return words

    assert "min_probability = 0.562. It is what target_precision = 0.8 asks for" in note(0.562)
    assert "target_precision" not in note(0.25)


def test_funnel_names_what_was_removed():
    funnel = {
        **example()["funnel"],
        **{"not_downloaded": 49, "missing": 1, "read": 150, "labelled": 100, "final": 60},
        "removed": [
            {"reason": "eval_duplicate", "count": 10, "left": 90},
            {"reason": "of_no_use", "count": 20, "left": 70},
            {"reason": None, "count": 10, "left": 60},
        ],
    }
    page = _Page()
    rejects = [{"stage": "fits", "reason": "quarantined", "count": 1}]
    page.feed(card_page.render(example(funnel=funnel, rejects=rejects), {}))
    start = page.text.index("pairs asked for")
    assert page.text[start - 1].endswith("2 pairs are lost to damaged files and shards.")
    steps = page.text[start : page.text.index("By source")]
    assert steps[:3] == ["pairs asked for", "200", "100.0 %"]
    for words, left, share in (
        ("not in an evaluation set", "90", "45.0 %, −10.0 %"),
        ("without of no use", "70", "35.0 %, −22.2 %"),
        ("(lost without a reject)", "60", "30.0 %, −14.3 %"),
        ("in the data set", "60", "30.0 %"),
    ):
        place = steps.index(words)
        assert steps[place + 1 : place + 3] == [left, share]


def test_thresholds_mark_the_configured_one():
    points = [
        {"value": value, "pictures": 1000 - i, "entities": 7 - i, "configured": i == 0}
        for i, value in enumerate((-1.0, 0.1, 0.2))
    ]
    found = example(sensitivity={"min_probability": points})
    text = card_page.render(found, {})
    assert text.count('class="mark"') == 2
    assert 'class="value"' in text
    assert "1\u2009000<" in text
