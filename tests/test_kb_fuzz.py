"""Lines of a dump and rows of strangers: each is an entity or one reject, whatever it holds."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_prep.kb import build as kb_build
from data_prep.kb import forms, lookup, parts
from data_prep.kb.sources import rows as kb_rows
from data_prep.kb.sources import wikidata
from tests import inputs
from tests.fuzzing import altered, fuzz
from tests.test_wikidata import EN, dump, item, line, statement

RULES = kb_rows.Rules.from_settings(inputs.kb_rules(need_link_or_image=False))


def built(folder, name, data):
    """Ids and rejects of a file with these bytes."""
    (folder / name).write_bytes(data)
    kb_build.build(folder / name, folder / "kb", inputs.kb_rules())
    rejects = pq.read_table(folder / "kb/rejects.parquet").to_pylist()
    ids = lookup.read_entities(folder / "kb")["qid"].to_pylist()
    return ids, [(row["key"], row["reason"]) for row in rejects]


def claims(prop, value):
    return {prop: [{"rank": "normal", "mainsnak": statement(prop, "x")["mainsnak"] | value}]}


def value(of):
    return {"datavalue": {"value": of}}


HOSTILE = {
    **{f"P31 {of}": ({"claims": claims("P31", value(of))}, "wrong_type") for of in (
        {"id": 5}, {"id": [1]}, {"id": {"a": 1}}, {"id": "../../x"}, "x", {"numeric-id": "../x"},
        {"id": 1.5}, {"id": None}, {"id": True},
    )},
    "P18 5": ({"claims": claims("P18", value(5))}, "wrong_type"),
    "P18 {}": ({"claims": claims("P18", value({"a": 1}))}, "wrong_type"),
    "a title that is a number": ({"sitelinks": {"enwiki": {"title": 5}}}, "wrong_type"),
    "no title": ({"sitelinks": {"enwiki": {"title": None}}}, "wrong_type"),
    "a description that is a number": ({"descriptions": {"en": {"value": 5}}}, "wrong_type"),
    "an alias that is a number": ({"aliases": {"en": [{"value": 5}]}}, "wrong_type"),
    "aliases that are a text": ({"aliases": "xx"}, "wrong_type"),
    "labels that are a list": ({"labels": [1]}, "wrong_type"),
    "a type that is a number": ({"type": 5}, "wrong_type"),
    "an id that is a path": ({"id": "Q1/../../x"}, "no_id"),
    "an id in SQL": ({"id": "Q1'; DROP"}, "no_id"),
    "an id in Arabic digits": ({"id": "Q\u0661\u0662"}, "no_id"),
    "an id of 30 digits": ({"id": "Q" + "1" * 30}, "no_id"),
    "an id that is a number": ({"id": 5}, "wrong_type"),
    "a number of 30 digits": ({"pageid": 10**30}, "broken_json"),
    "not a number": ({"pageid": float("nan")}, "broken_json"),
    "half a surrogate pair": ({"labels": {"en": {"value": "\ud800"}}}, "broken_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_that_is_not_what_it_should_be_costs_itself(tmp_path, name):
    changes, reason = HOSTILE[name]
    good = line(item("Q1", {"en": "tea"}, links=EN))
    bad = line(item("Q2", {"en": "bad"}, links=EN) | changes)
    assert built(tmp_path, "dump.json", dump([good, bad])) == (["Q1"], [("line 3", reason)])


@pytest.mark.parametrize(
    "bad",
    [b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}", b'{"a":1e400}', b"\xff", b"[1]", b"5", b'"x"'],
)
def test_lines_that_no_parser_takes_cost_themselves(tmp_path, bad):
    good = line(item("Q1", {"en": "tea"}, links=EN))
    ids, [(key, _)] = built(tmp_path, "dump.json", dump([good, bad]))
    assert (ids, key) == (["Q1"], "line 3")


ROW = {"qid": "Q1", "label": "cat"}
ROWS = {
    "sitelinks beyond any": (b'{"qid":"Q1","label":"cat","sitelinks":1e400}', "broken_json"),
    "NaN": (b'{"qid":"Q1","label":"cat","sitelinks":NaN}', "broken_json"),
    "many sitelinks": (line(ROW | {"sitelinks": 1e300}), "wrong_sitelinks"),
    "a rank beyond any": (line(ROW | {"sense_rank": [10**18]}), "wrong_sense_rank"),
    "SQL": (line(ROW | {"qid": "Q1'); DROP TABLE x; --"}), "no_id"),
    "NUL": (line(ROW | {"qid": "Q\0"}), "no_id"),
    "a blank id": (line(ROW | {"qid": " "}), "no_id"),
    "a long id": (line(ROW | {"qid": "Q" * 1_000_000}), "no_id"),
    "half a surrogate pair": (b'{"qid":"Q1","label":"\\ud800"}', "broken_json"),
    "a label of controls": (line(ROW | {"label": "\0\u202e"}), "no_label"),
    "an unknown kind": (line(ROW | {"kind": "cat"}), "wrong_kind"),
    "depth": (b"[" * 100_000, "broken_json"),
    "Latin-1": (b'{"qid":"Q1","label":"\xff"}', "not_utf8"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_not_what_it_should_be_costs_itself(tmp_path, name):
    bad, reason = ROWS[name]
    data = line({"qid": "Q9", "label": "dog"}) + b"\r\n" + bad + b"\r\n"
    assert built(tmp_path, "rows.jsonl", data) == (["Q9"], [("line 2", reason)])


# ------------------------------------------------------------------------------------------- fuzz

WHOLE = item(
    "Q1",
    {"en": "Tea"},
    aliases={"en": ["tea"]},
    descriptions={"en": "hot drink"},
    claims=[
        statement("P31", "Q5"),
        statement("P279", "Q7"),
        statement("P171", "Q8"),
        statement("P18", "Tea.jpg"),
    ],
    links=EN,
)
FULL_ROW = ROW | {
    "aliases": ["puss"],
    "description": "d",
    "hypernyms": ["Q2"],
    "types": ["Q3"],
    "sitelinks": 3,
    "sense_rank": [1, 2],
    "image": "a.jpg",
    "title": "Cat",
    "kind": "animal",
    "lexname": "noun.animal",
}

REASONS = {
    *("broken_json", "wrong_type", "no_id", "no_label", "no_item", "property"),
    *("no_object", "wrong_sense_rank", "wrong_sitelinks", "wrong_kind", "not_utf8"),
}


def check(parse, text):
    """Parses a line as a worker does: an entity that can be written, or a known reason."""
    try:
        row = parse(text, RULES)
    except (ValueError, kb_rows.Dropped) as error:
        assert str(error) in REASONS  # noqa: PT017  both are an answer
        return
    names, _ = forms.names_of(row.label, row.names, RULES.alias_factor)
    schema = parts.part_schema()
    pa.table([[value] for value in (1, *row[:-2])], schema=schema).validate(full=True)
    assert all(0 < weight < float("inf") for _, weight, *_ in names)
    assert all(form and " " * 2 not in form for form, *_ in names)


@pytest.mark.parametrize(
    ("parse", "whole"), [(wikidata.parse, WHOLE), (kb_rows.parse, FULL_ROW)], ids=["dump", "rows"]
)
@fuzz(400, data=st.data())
def test_any_value_at_any_place_is_an_entity_or_a_reject(parse, whole, data):
    check(parse, json.dumps(data.draw(altered(whole))).encode())


@pytest.mark.parametrize(
    ("parse", "whole"), [(wikidata.parse, WHOLE), (kb_rows.parse, FULL_ROW)], ids=["dump", "rows"]
)
@fuzz(400, noise=st.binary(max_size=60), place=st.integers(0, 1500))
def test_a_damaged_line_is_an_entity_or_a_reject(parse, whole, noise, place):
    text = line(whole)
    for damaged in (noise, text[:place] + noise + text[place:], text[:place]):
        check(parse, damaged)
    assert parse(text, RULES).label in ("Tea", "cat")
