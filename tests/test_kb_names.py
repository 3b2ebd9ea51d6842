"""Names as people write them: parts of people's names, shortened and folded ones, languages."""

import json

import marisa_trie
import numpy as np
import pytest
from hypothesis import strategies as st

from data_prep import engine
from data_prep.kb import build as kb_build
from data_prep.kb import forms, names, people
from tests import inputs
from tests.fuzzing import fuzz
from tests.test_wikidata import dump, item, line


def parts(label, *aliases, description="", role=None):
    found = people.take_apart(label, list(aliases), description, 0.5).parts
    return {form for form, of in found if role in (None, of)}


@pytest.mark.parametrize(
    ("label", "family", "given"),
    [
        ("John Smith", {"smith"}, {"john"}),
        ("Ludwig van Beethoven", {"van beethoven", "beethoven"}, {"ludwig"}),
        ("Oscar de la Hoya", {"de la hoya", "hoya"}, {"oscar"}),
        ("Harry Connick Jr.", {"connick"}, {"harry"}),
        ("Robert Downey III", {"downey"}, {"robert"}),
        ("Farid al-Atrash", {"al atrash", "atrash"}, {"farid"}),
        ("Dr. José Núñez (writer)", {"núñez", "nunez"}, {"josé", "jose"}),
        ("Queen Elizabeth II", set(), {"elizabeth"}),
        ("Anne of Austria", set(), {"anne"}),
        ("Edward Grey, 1st Viscount Grey", {"grey"}, {"edward"}),
        ("Björk", set(), set()),
        ("film maker", set(), set()),  # a noun
    ],
)
def test_family_and_given_names(label, family, given):
    assert parts(label, role=people.FAMILY) == family
    assert parts(label, role=people.GIVEN) == given


def test_the_family_name_may_come_first_where_the_description_says_the_country():
    assert parts("Mao Zedong", role=people.FAMILY) == {"zedong"}
    assert parts("Mao Zedong", description="Chinese leader", role=people.FAMILY) == {
        "mao",
        "zedong",
    }


@pytest.mark.parametrize(
    ("label", "shortened", "others"),
    [
        ("John Fitzgerald Smith", {"john smith", "john f smith"}, {"j smith", "j f smith"}),
        ("Sir John Smith", {"john smith"}, {"j smith"}),
        ("Elizabeth II of the United Kingdom", {"elizabeth ii"}, set()),
        (
            "William Morrison, 1st Viscount Dunrossil",
            {"william morrison", "viscount dunrossil"},
            {"dunrossil"},
        ),
        ("John Smith", set(), {"j smith"}),
    ],
)
def test_what_is_left_of_full_names(label, shortened, others):
    assert set(people.take_apart(label, [], "", 0.5).shortened) == shortened
    assert others <= parts(label, role=people.OTHER)


@fuzz(150, words=st.lists(st.text(max_size=8), max_size=6), aliases=st.lists(st.text(max_size=12)))
def test_any_name_can_be_taken_apart(words, aliases):
    found = people.take_apart(" ".join(words), aliases, "", 0.5)
    for form in [*found.shortened, *(form for form, _ in found.parts)]:
        assert form
        assert names.normalize(form) == form


def build(folder, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, kb_build.build(path, folder / "kb", inputs.kb_rules(**changes))


def entries(folder, trie, stem, *columns):
    """Name -> its candidates' columns."""
    names = marisa_trie.Trie()
    names.load(str(folder / f"{trie}.marisa"))
    offsets = np.load(folder / f"{stem}_offsets.npy")
    prefix = {"alias": "cand", "part": "part"}[stem]
    values = [np.load(folder / f"{prefix}_{column}.npy").tolist() for column in columns]
    rows = list(zip(*values, strict=True))
    return {n: rows[offsets[i] : offsets[i + 1]] for n, i in names.items()}


def test_parts_lie_apart_and_for_people_alone(tmp_path):
    rows = [
        {"id": "a", "label": "John Adam Smith", "kind": "person", "sitelinks": 9},
        {"id": "b", "label": "Jane Smith", "kind": "character", "sitelinks": 29},
        {"id": "c", "label": "Great Smith", "kind": "group", "sitelinks": 99},
    ]
    _, manifest = build(tmp_path, rows)
    found = entries(tmp_path / "kb", "parts", "part", "entity", "role", "prior")
    assert [(entity, role) for entity, role, _ in found["smith"]] == [(1, 0), (0, 0)]
    np.testing.assert_allclose([prior for *_, prior in found["smith"]], [0.75, 0.25])
    assert found["john"] == [(0, people.GIVEN, 1.0)]
    assert "great" not in found
    assert manifest["counts"]["parts"] == len(found)
    whole = entries(tmp_path / "kb", "aliases", "alias", "entity", "form")
    assert "smith" not in whole
    assert whole["john smith"] == [(0, forms.SHORTENED)]


def test_names_tell_how_they_came(tmp_path):
    rows = [
        {"id": "a", "label": "São Paulo", "sitelinks": 9},
        {"id": "b", "label": "Sao Paulo", "sitelinks": 1},
        {"id": "c", "label": "Tom &amp; Jerry", "title": "Tom and Jerry (series)"},
        {"id": "d", "label": "नमस्ते"},
    ]
    build(tmp_path, rows)
    found = entries(tmp_path / "kb", "aliases", "alias", "entity", "form")
    assert found["são paulo"] == [(0, forms.EXACT)]
    assert found["sao paulo"] == [(0, forms.FOLDED), (1, forms.EXACT)]  # 10 / 2 against 2
    assert sorted(found["saopaulo"]) == [(0, forms.JOINED), (1, forms.JOINED)]
    assert found["tom jerry"] == found["tom and jerry"] == [(2, forms.EXACT)]
    assert [name for name, rows in found.items() if rows[0][0] == 3] == ["नमस्ते"]


@pytest.mark.parametrize(
    ("form", "bare"),
    [("grützmacher", "grutzmacher"), ("łódź", "lodz"), ("ёлка", "елка"), ("йод", "йод")],
)
def test_diacritics_are_folded(form, bare):
    assert names.fold_diacritics(form) == bare


def test_languages_of_names_are_bits_and_mul_is_any(tmp_path):
    entity = item(
        "Q1",
        {"en": "Munich", "de": "München", "fr": "Munich"},
        aliases={"de": ["Minga"], "mul": ["MUC"]},
        links={"dewiki": "München (Stadt)", "enwiki": "City of Munich"},
    )
    (tmp_path / "dump.json").write_bytes(dump([line(entity)]))
    config = inputs.kb_rules(languages=("en", "de", "fr", "mul"))
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config)
    found = entries(tmp_path / "kb", "aliases", "alias", "languages", "form")
    assert found["munich"] == [(0b101, forms.EXACT)]
    assert found["münchen"] == [(0b010, forms.EXACT)]
    assert found["munchen"] == [(0b010, forms.FOLDED)]
    assert found["minga"] == [(0b010, forms.EXACT)]
    assert found["muc"] == [(forms.ANY, forms.EXACT)]
    assert found["city of munich"] == [(0b001, forms.EXACT)]


def test_redirected_ids_lead_to_entities_however_many_steps_away(tmp_path, caplog):
    rows = [{"id": "Q1", "label": "tea"}, {"id": "Q2", "label": "coffee"}]
    table = tmp_path / "redirects.tsv"
    steps = ["Q9 Q8", "Q8 Q1", "Q7 Q6", "Q6 Q7", "Q5 Q5", "Q2 Q1"]  # circles, too
    wikidata = "http://www.wikidata.org/entity/"  # as the query service writes ids
    steps.append(f"<{wikidata}Q4> <{wikidata}Q2>")
    table.write_text("".join(step.replace(" ", "\t") + "\n" for step in steps))
    anchors = tmp_path / "anchors.tsv"
    anchors.write_text("cuppa\tQ9\t6\t24\ncuppa\tQ77\t6\t24\nTea\tQ1\t10\t10\n")
    build(tmp_path, rows, redirects=str(table), anchors=str(anchors))
    found = engine.read_table(tmp_path / "kb/redirects.parquet").to_pylist()
    assert [(row["qid"], row["entity"]) for row in found] == [("Q4", 1), ("Q8", 0), ("Q9", 0)]
    whole = entries(tmp_path / "kb", "aliases", "alias", "entity")
    assert whole["cuppa"] == [(0,)]
    names = marisa_trie.Trie()
    names.load(str(tmp_path / "kb/aliases.marisa"))
    linked = np.load(tmp_path / "kb/alias_linked.npy")
    assert linked[names["cuppa"]] == 0.5  # twelve links, six of them to what the base lacks
    assert linked[names["tea"]] == 1
    table.write_text("Q1\tQ2\nx\ty\n")
    build(tmp_path, rows, redirects=str(table))
    assert f"no row of {table} leads to an entity" in caplog.text
    assert np.isnan(linked[names["coffee"]])
