"""Meanings: what the case of a caption and its other mentions say about a name."""

import json

import numpy as np
import pytest

from data_prep.kb import build as kb_build
from data_prep.kb import kinds, lookup, names
from data_prep.linking import boilerplate, disambiguate
from tests import inputs

ROWS = [
    {"qid": "Q89", "label": "apple", "sitelinks": 9, "hypernyms": ["fruit"]},
    {"qid": "Q312", "label": "Apple", "sitelinks": 29, "types": ["company"]},
    {"qid": "Q1", "label": "IT", "aliases": ["information technology"]},
    {"qid": "Q2", "label": "IKEA", "types": ["company"]},
    {"qid": "Q3", "label": "pear", "hypernyms": ["fruit"]},
    {"qid": "Q4", "label": "cup"},
    {"qid": "Q5", "label": "US"},
    {"qid": "Q6", "label": "BMW"},
    {"qid": "Q7", "label": "fig", "hypernyms": ["fruit"]},
]


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    kb_build.build(folder / "rows.jsonl", folder / "kb", inputs.kb_rules())
    return lookup.KnowledgeBase(folder / "kb")


def weigh(kb, text, surfaces, linked=None, **changes):
    """{surface: {qid: prior}} of mentions in one caption."""
    rule = {"max_candidates": 10, "case_penalty": 0.25, "company_weight": 0.0} | changes
    rule = {"linker_weight": 4.0} | rule
    forms = [names.normalize(surface) for surface in surfaces]
    text_of = np.zeros(len(surfaces), np.int64)
    found = disambiguate.weigh(
        kb, disambiguate.Rule(**rule), [text], text_of, surfaces, forms, linked
    )
    result = {surface: {} for surface in surfaces}
    for number, entity, prior in zip(found.surface, found.entity, found.prior, strict=True):
        result[surfaces[number]][ROWS[entity]["qid"]] = round(float(prior), 3)
    return result


def test_a_word_in_lower_case_is_hardly_a_name_where_the_caption_uses_capitals(kb):
    # Apple has three times the sitelinks: 30/40 against 10/40.
    assert weigh(kb, "An apple a day", ["apple"])["apple"] == {"Q312": 0.429, "Q89": 0.571}
    assert weigh(kb, "Apple opens a shop", ["Apple"])["Apple"] == {"Q312": 0.75, "Q89": 0.25}


@pytest.mark.parametrize("text", ["buy an apple now", "BUY AN APPLE NOW"])
def test_a_caption_of_one_case_says_nothing(kb, text):
    surface = "apple" if text.islower() else "APPLE"
    assert weigh(kb, text, [surface])[surface] == {"Q312": 0.75, "Q89": 0.25}


def test_the_penalty_can_be_turned_off(kb):
    found = weigh(kb, "An apple a day", ["apple"], case_penalty=1.0)
    assert found["apple"] == {"Q312": 0.75, "Q89": 0.25}


def test_function_words_are_no_acronyms(kb):
    assert weigh(kb, "Look at it, join us", ["it", "us"]) == {"it": {}, "us": {}}
    assert weigh(kb, "Jobs in IT in the US", ["IT", "US"]) == {"IT": {"Q1": 1.0}, "US": {"Q5": 1.0}}
    assert weigh(kb, "JOIN US NOW", ["US"]) == {"US": {}}  # capitals say nothing here


def test_short_names_that_are_no_function_words_stay(kb):
    assert weigh(kb, "a cup", ["cup"]) == {"cup": {"Q4": 1.0}}
    assert weigh(kb, "my new bmw", ["bmw"]) == {"bmw": {"Q6": 1.0}}  # the only meaning


def test_company_makes_related_meanings_likelier(kb):
    surfaces = ["apple", "pear", "fig"]
    alone = weigh(kb, "apple, pear and fig", surfaces)["apple"]
    together = weigh(kb, "apple, pear and fig", surfaces, company_weight=9.0)["apple"]
    assert alone == {"Q312": 0.75, "Q89": 0.25}
    # Both others are fruit for certain: the fruit's weight is 0.25 * (1 + 9).
    assert together == {"Q89": round(2.5 / 3.25, 3), "Q312": round(0.75 / 3.25, 3)}
    found = weigh(kb, "Apple and IKEA", ["Apple", "IKEA"], company_weight=9.0)["Apple"]
    assert found["Q312"] > 0.95


def test_what_a_trained_linker_chose_is_likelier(kb):
    found = weigh(kb, "apple pie", ["apple"], linked={0: "Q89"}, linker_weight=5.0)["apple"]
    assert found == {"Q89": round(1.5 / 2.25, 3), "Q312": round(0.75 / 2.25, 3)}
    assert weigh(kb, "apple pie", ["apple"], linked={0: "Q99999"})["apple"]["Q312"] == 0.75


def test_most_likely_first_and_no_more_than_asked(kb):
    assert list(weigh(kb, "apple", ["apple"])["apple"]) == ["Q312", "Q89"]
    assert list(weigh(kb, "apple", ["apple"], max_candidates=1)["apple"]) == ["Q312"]


def test_entities_are_found_by_id_title_and_kind(tmp_path):
    rows = [
        {"qid": "Q89", "label": "apple", "title": "Apple", "kind": "food"},
        {"qid": "Q2", "label": "IKEA", "title": "IKEA Group", "kind": "group"},
        {"qid": "Q3", "label": "pear"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kb_build.build(tmp_path / "rows.jsonl", tmp_path / "kb", inputs.kb_rules())
    base = lookup.KnowledgeBase(tmp_path / "kb")
    assert base.rows_of(["Q3", "Q8", "Q89"]).tolist() == [2, -1, 0]
    assert base.rows_of_titles(["IKEA_Group", "Pear"]).tolist() == [1, -1]
    assert [kinds.KINDS[code] for code in base.kind[:2]] == ["food", "group"]
    assert base.kind.dtype == np.uint8


def test_no_mentions(kb):
    assert weigh(kb, "", []) == {}


# ------------------------------------------------------------------------------------ boilerplate


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Red panda stock photo", "Red panda"),
        ("IMG_20231.jpg", ""),
        ("DSC 0042 lighthouse", "lighthouse"),
        ("Photo 3 of 12: a harp", ": a harp"),
        ("click here to enlarge", "to enlarge"),
        ("harp, royalty-free vector", "harp,  vector"),
        ("see https://example.com/a.jpg?x=1 harp", "see  harp"),
        ("Desk lamp 1920x1080 px", "Desk lamp"),
        ("alarm_clock.svg", "alarm_clock"),
        ("a photograph of stocks", "a photograph of stocks"),
    ],
)
def test_boilerplate_is_blanked_and_places_stay(text, left):
    blanked = boilerplate.Blanker(boilerplate.PATTERNS)(text)
    assert len(blanked) == len(text)
    assert " ".join(blanked.split()) == " ".join(left.split())
    assert all(b in (" ", a) for a, b in zip(text, blanked, strict=True))


def test_no_patterns_blank_nothing():
    assert boilerplate.Blanker(())("stock photo.jpg") == "stock photo.jpg"
