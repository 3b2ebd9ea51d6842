"""The data card: its numbers add up, its page is whole, self-contained and always the same."""

import html.parser
import json
import re

import numpy as np
import pytest

from data_prep import engine, evidence, filters, report, report_page, selection, shards, vocabulary
from tests import workdirs


@pytest.fixture(params=["clip", "text"])
def card(request, tmp_path, monkeypatch):
    workdir, pairs = workdirs.write(tmp_path)
    model = workdirs.Model()
    monkeypatch.setattr(evidence, "load_model", lambda folder, batch_size: model)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/model.json").write_text("{}")
    config = workdirs.config(clip=str(tmp_path / "clip"), labels=request.param)
    for stage in (selection, filters, vocabulary):
        stage.run(config, engine.Engine(workdir))
    shards.run(config, engine.Engine(workdir), "i2e")
    report.run(config, engine.Engine(workdir))
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
    assert sum(b["entities"] for b in numbers["images_per_entity"]) == funnel["entities"]
    assert sum(s["records"] for s in numbers["lineage"]["shards"]) == funnel["final"]
    if config.labels == "clip":
        chosen = sum(b["chosen"] for b in numbers["fits"]["bins"])
        assert chosen == funnel["labelled"] == sum(p.named == p.colour for p in pairs)
    else:
        assert numbers["fits"] is None


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
            assert all({"score", "fit"} <= c.keys() for c in picture["candidates"])
        assert any(c["by_text"] for c in picture["candidates"])


class _Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_and_self_contained(card):
    workdir, _, _, numbers = card
    text = (workdir / "report/index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    keys = [p["key"] for p in numbers["gallery"]]
    keys += [key for entity in numbers["top_entities"] for key in entity["keys"]]
    assert len(page.sources) == len(keys)
    assert not {"None", "nan"} & set(
        re.findall(r"\w+", "".join(page.text).replace("clip None", ""))
    )


def test_page_is_the_same_every_time(card):
    workdir, config, _, _ = card
    files = [workdir / "report/index.html", workdir / "report/report.json"]
    before = [engine.sha256(path) for path in files]
    for path in (workdir / "report").glob("*"):
        if path.is_file():
            path.unlink()
    changed = config.copy_and_resolve_references()
    changed.workers = 2
    report.run(changed, engine.Engine(workdir, workers=2))
    assert [engine.sha256(path) for path in files] == before


def test_captions_and_names_cannot_break_the_page():
    evil = "<script>alert('x')</script>"
    picture = {
        "key": evil,
        "group": "agreed",
        "reason": None,
        "text": f"a {evil} & more",
        "mentions": [[2, 10, "ner"], [4, 8, "gazetteer"]],
        "candidates": [
            {"name": evil, "description": evil, "prior": 1.0, "by_text": True, "chosen": True}
        ],
    }
    entity = {"qid": evil, "name": evil, "description": evil, "images": 1, "keys": [evil]}
    steps = ("read", "valid", "with_mention", "with_candidate", "labelled", "final", "entities")
    page = report_page.render(
        {
            "config": {"sources": [f"{evil}=x"], "labels": "text", "template": evil},
            "funnel": dict.fromkeys(steps, 1),
            "rejects": [],
            "labels_per_picture": {"1": 1},
            "images_per_entity": [{"from": 1, "to": 1, "entities": 1}],
            "fits": None,
            "top_entities": [entity],
            "gallery": [picture],
            "lineage": {"inputs": [], "shards": []},
        },
        {evil: "AAAA"},
    )
    assert "<script" not in page
    assert "<mark>&lt;script&gt;</mark>alert" in page


def test_bins_of_images_per_entity_double():
    counts = np.array([1, 1, 2, 3, 4, 7, 8, 20])
    assert [(b["from"], b["to"], b["entities"]) for b in report._images_per_entity(counts)] == [
        (1, 1, 2),
        (2, 3, 2),
        (4, 7, 2),
        (8, 15, 1),
        (16, 31, 1),
    ]
