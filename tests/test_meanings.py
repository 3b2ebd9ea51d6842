"""Meanings: what a caption says about a name: case, types, other mentions, or nothing at all."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_prep.kb import build as kb_build
from data_prep.kb import kinds, lookup
from data_prep.linking import boilerplate, disambiguate, languages, mentions, ner
from data_prep.linking import stage as linking_stage
from tests import inputs

ROWS = [
    {"qid": "Q89", "label": "apple", "sitelinks": 9, "kind": "food"},
    {"qid": "Q312", "label": "Apple", "sitelinks": 29, "kind": "group"},
    {"qid": "Q1", "label": "IT", "aliases": ["information technology"]},
    {"qid": "Q2", "label": "IKEA", "kind": "group"},
    {"qid": "Q4", "label": "cup"},
    {"qid": "Q5", "label": "US", "kind": "place"},
    {"qid": "Q6", "label": "BMW"},
    {"qid": "Q8", "label": "Your", "kind": "work"},
    {"qid": "Q9", "label": "So On", "kind": "work"},
    {"qid": "Q10", "label": "2019", "kind": "work"},
    {"qid": "Q11", "label": "photograph", "kind": "artifact"},
    {"qid": "Q12", "label": "second", "aliases": ["s"], "kind": "time"},
    {"qid": "Q13", "label": "Hill", "kind": "group"},
    {"qid": "Q14", "label": "Paris", "kind": "place"},
    {"qid": "Q15", "label": "Paris", "kind": "work", "sitelinks": 1},
    {"qid": "Q20", "label": "Angela Merkel", "kind": "person", "sitelinks": 9},
    {"qid": "Q21", "label": "Una Merkel", "kind": "person"},
    {"qid": "Q22", "label": "Howard Smith", "kind": "person"},
    {"qid": "Q23", "label": "Manmohan Singh", "kind": "person"},
    {"qid": "Q24", "label": "Singh", "kind": "product"},
    {"qid": "Q25", "label": "Robert Nardelli", "kind": "person"},
    {"qid": "Q26", "label": "Beyoncé", "kind": "person"},
    {"qid": "Q27", "label": "東京タワー", "kind": "building"},
    {"qid": "Q28", "label": "แมว", "kind": "animal"},
    {"qid": "Q29", "label": "glasses"},
    {"qid": "Q30", "label": "glass"},
    {"qid": "Q31", "label": "McDonald's", "kind": "group"},
    {"qid": "Q32", "label": "Zelda Paris", "kind": "person"},
    {"qid": "Q33", "label": "Eiffel Tower", "kind": "building"},
    {"qid": "Q34", "label": "Coca-Cola", "kind": "food"},
    {"qid": "Q35", "label": "Tesla Model S", "kind": "product"},
    {"qid": "Q36", "label": "Nikola Tesla", "kind": "person"},
    {"qid": "Q37", "label": "Jordan River", "kind": "nature"},
    {"qid": "Q38", "label": "English", "aliases": ["en"], "kind": "communication"},
    {"qid": "Q39", "label": "Bolivia", "aliases": ["bo"], "kind": "place"},
    {"qid": "Q40", "label": "Flying Tiger Copenhagen", "aliases": ["tiger"], "kind": "group"},
    {"qid": "Q41", "label": "Kim", "kind": "group"},
    {"qid": "Q42", "label": "Josephine Baker", "kind": "person"},
    {"qid": "Q43", "label": "baker"},
]
ROW_OF = {row["qid"]: number for number, row in enumerate(ROWS)}


def build(folder, rows, **changes):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rules = inputs.kb_rules()
    rules.update(changes)
    kb_build.build(folder / "rows.jsonl", folder / "kb", rules)
    return lookup.KnowledgeBase(folder / "kb")


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    return build(tmp_path_factory.mktemp("kb"), ROWS)


@pytest.fixture
def meanings(kb, monkeypatch):
    """A function from a text to {surface: {qid: prior}}.

    `spans` are what spaCy is to find, `context` is what stands on the text's page.
    """

    def link(text, spans=None, context="", **changes):
        rule = disambiguate.Rule(10, 10.0, 4.0, 5.0, 1.0)._replace(**changes)
        found = [
            ner.Span(text.index(surface), text.index(surface) + len(surface), *rest)
            for surface, *rest in spans or ()
        ]
        monkeypatch.setattr(ner, "spacy_spans", lambda texts, model: [found for _ in texts])
        monkeypatch.setattr(ner, "links_itself", lambda model: False)
        blank = boilerplate.Blanker(boilerplate.PATTERNS)
        model = None if spans is None else "a model"
        people = mentions.people_named([context], kb)
        found, candidates = linking_stage.link([text], blank, kb, rule, model, people)
        [found], [candidates] = found.to_pylist(), candidates.to_pylist()
        result = {mention["surface"]: {} for mention in found}
        for mention in found:
            assert text[mention["start"] : mention["end"]] == mention["surface"]
        for row in candidates:
            surface = found[row["mention"]]["surface"]
            result[surface][ROWS[row["entity"]]["qid"]] = row["prior"]
        for own in result.values():
            assert sum(own.values()) <= 1 + 1e-6
            assert list(own.values()) == sorted(own.values(), reverse=True)
        return result

    return link


def by_text(found):
    """The entities that mentions mean more likely than nothing."""
    best = {
        max(own, key=own.get): 1 - sum(own.values()) < max(own.values())
        for own in found.values()
        if own
    }
    return {qid for qid, likely in best.items() if likely}


@pytest.mark.parametrize(
    ("text", "spans", "likely"),
    [
        # A whole name of several words says more than spaCy's type.
        ("Eiffel Tower at night", [("Eiffel Tower", "PERSON")], {"Q33"}),
        ("Tesla Model S", [("Tesla Model S", "PERSON")], {"Q35"}),
        ("Jordan River valley", [("Jordan River", "GPE")], {"Q37"}),
        ("Coca-Cola bottle", [("Coca-Cola", "ORG")], {"Q34"}),
        ("Eiffel Tower", None, {"Q33"}),
        # In capitals all over spaCy sees one name in many.
        ("MERKEL MEETS BMW", [("MERKEL MEETS BMW", "PERSON")], {"Q6"}),
        # A person's name that is another's is the other's, unless spaCy says it is a person's.
        (
            "Zelda Paris stays in Paris",
            [("Zelda Paris", "PERSON"), ("in Paris", "GPE")],
            {"Q14", "Q32"},
        ),
        ("zelda paris in paris", None, {"Q32"}),
        # What is written with a capital is no everyday word without it.
        ("Foto de un perro en la casa", None, set()),
        ("FOTO DE UN PERRO EN LA CASA", None, set()),
        ("The dog called Bo sits", None, set()),
        ("tiger in the zoo", None, set()),
        ("The tiger in the zoo", None, set()),
        ("a photo of kim on the beach", None, set()),
        ("Kim", None, {"Q41"}),
    ],
)
def test_what_captions_mean_by_text_alone(meanings, text, spans, likely):
    assert by_text(meanings(text, spans)) == likely


def test_of_a_text_in_capitals_spacy_reads_titles(kb, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ner, "spacy_spans", lambda texts, model: (asked.extend(texts), [[] for _ in texts])[1]
    )
    monkeypatch.setattr(ner, "links_itself", lambda model: False)
    rule, blank = disambiguate.Rule(10, 10.0, 4.0, 5.0, 1.0), boilerplate.Blanker(())
    linking_stage.link(["MCDONALD'S IN PARIS", "GROSS IN PARIS \ufb01"], blank, kb, rule, "a model")
    assert asked == ["Mcdonald's In Paris", "GROSS IN PARIS \ufb01"]


# ------------------------------------------------------------------------------------------- case


def test_a_word_in_lower_case_is_hardly_a_name_where_the_caption_minds_case(meanings):
    # Apple has three times the sitelinks: 30/40 against 10/40; the odds of both are 9.
    assert meanings("An apple a day")["apple"] == pytest.approx(
        {"Q89": 2.25 / 3.925, "Q312": 0.675 / 3.925}
    )
    found = meanings("the big shop of Apple opens")["Apple"]
    assert found == pytest.approx({"Q312": 67.5 / 70.75, "Q89": 2.25 / 70.75})
    found = meanings("An apple a day", case_weight=1.0)["apple"]
    assert found == pytest.approx({"Q312": 0.675, "Q89": 0.225})

    # In lower case all over that is half as much.
    found = meanings("buy an apple now")["apple"]
    assert found["Q312"] / found["Q89"] == pytest.approx(3 / 10**0.5)


@pytest.mark.parametrize("text", ["BUY AN APPLE NOW", "Apple at the Market"])
def test_a_caption_of_one_case_says_nothing(meanings, text):
    [found] = [own for surface, own in meanings(text).items() if surface.lower() == "apple"]
    assert found == pytest.approx({"Q312": 0.675, "Q89": 0.225})


def test_function_words_are_no_acronyms(meanings):
    assert meanings("look at it, join us") == {"it": {}, "us": {}}
    assert by_text(meanings("new jobs in IT in the US")) == {"Q1", "Q5"}
    assert meanings("JOIN US NOW") == {"US": {}}  # capitals say nothing here
    assert by_text(meanings("a cup for my new bmw")) == {"Q4", "Q6"}


# ---------------------------------------------------------------------------------------- nothing


def test_what_hardly_ever_means_anything_is_no_label_by_text(meanings):
    text = "a photograph from the hill with your dog's cup in 2019, and so on"
    found = meanings(text)
    assert by_text(found) == {"Q4"}
    assert "s" not in found, "a possessive begins no name"
    assert not any(found.get(surface) for surface in ("photograph", "your", "2019"))
    assert 0 < sum(found["hill"].values()) < 0.2


def test_names_always_mean_something_where_nothing_has_no_weight(meanings):
    text = "a photograph from the hill with your dog's cup in 2019"
    weighed, found = meanings(text), meanings(text, nil_weight=0.0)
    assert by_text(found) == {"Q4", "Q8", "Q10", "Q11", "Q13"}
    assert all(sum(own.values()) == pytest.approx(1) for own in found.values() if own)
    half = meanings(text, nil_weight=0.5)["hill"]["Q13"]
    assert found["hill"]["Q13"] > half > weighed["hill"]["Q13"]


def test_joined_and_short_names_need_evidence(meanings):
    assert not by_text(meanings("coming soon"))
    assert sum(meanings("listen to #soon")["soon"].values()) >= 0.5
    assert sum(meanings("SoOn_01.jpg")["SoOn"].values()) >= 0.5
    assert not by_text(meanings("model s"))


def test_a_link_probability_counts_where_there_is_one(tmp_path):
    rows = [{"qid": "Q1", "label": "Hill", "kind": "place"}, {"qid": "Q2", "label": "Obama"}]
    (tmp_path / "anchors.tsv").write_text("Hill\tQ1\t65\t1000\nObama\tQ2\t5\t5000\n")
    kb = build(tmp_path, rows, anchors=str(tmp_path / "anchors.tsv"))
    rule = disambiguate.Rule(10, 1.0, 1.0, 1.0, 1.0)
    for text, prior in (("hill", 0.5), ("obama", 0.001 / 0.066)):
        _, [found] = linking_stage.link([text], boilerplate.Blanker(()), kb, rule, None)
        assert found[0]["prior"].as_py() == pytest.approx(prior)


# -------------------------------------------------------------------------------------------- NER


def test_types_of_spans_agree_with_kinds_or_contradict_them(meanings):
    text = "the story of Paris"
    place, work = (meanings(text, [("Paris", label)])["Paris"] for label in ("GPE", "WORK_OF_ART"))
    ratio = (place["Q14"] / place["Q15"]) / (work["Q14"] / work["Q15"])
    assert ratio == pytest.approx((4 * 4) ** 2, rel=1e-4)
    assert meanings(text, [("Paris", "GPE")], ner_weight=1.0) == meanings(text)


def test_a_piece_of_another_name_and_what_spacy_passes_over_are_less_likely(meanings):
    whole = meanings("shops of Paris today", [("Paris", "GPE")])["Paris"]
    nothing = meanings("shops of Paris today", [])["Paris"]
    piece = meanings("shops of Paris Street Shoes today", [("Paris Street Shoes", "ORG")])["Paris"]
    assert sum(whole.values()) > sum(nothing.values()) > sum(piece.values())


def test_common_nouns_are_not_for_spacy_to_judge(meanings):
    found = meanings("a red cup here", [("cup", "PERSON")])["cup"]
    assert found == meanings("a red cup here")["cup"]


# ----------------------------------------------------------------------------------------- people


def test_parts_of_names_are_candidates_where_a_person_is_meant(meanings):
    found = meanings("talks with Merkel in the garden", [("Merkel", "PERSON")])["Merkel"]
    assert found["Q20"] > found["Q21"] > 0
    assert "merkel" not in meanings("talks with merkel in the garden")
    person = meanings("lunch with Singh today", [("Singh", "PERSON")])["Singh"]
    thing = meanings("lunch with Singh today", [("Singh", "PRODUCT")])["Singh"]
    assert [max(own, key=own.get) for own in (person, thing)] == ["Q23", "Q24"]


def test_a_whole_name_elsewhere_says_who_is_meant(meanings):
    text = "Una Merkel on the stage, Merkel at home"
    assert max(meanings(text)["Merkel"].items(), key=lambda item: item[1])[0] == "Q21"
    assert by_text(meanings("una merkel on the stage, merkel at home")) == {"Q21"}


@pytest.mark.parametrize(
    "context",
    [
        "Who is Una Merkel?",
        "https://a.org/angela/una-merkel_at%20home.jpg",
        "Una%20Merkel",
        "x &amp; Una&nbsp;Merkel",
    ],
)
def test_a_whole_name_on_the_page_says_who_is_meant(meanings, context):
    for text in ("Merkel on the stage", "merkel on the stage"):
        assert by_text(meanings(text, context=context)) == {"Q21"}
        assert "Q21" not in by_text(meanings(text))
        assert meanings("on the stage", context=context) == meanings("on the stage")
    both = meanings("Merkel on the stage", context=f"{context}, Angela Merkel")["Merkel"]
    assert min(both["Q20"], both["Q21"]) > 0.4
    whole = "Angela Merkel on the stage, Merkel at home"
    assert by_text(meanings(whole, context=context)) == {"Q20"}, "the caption's own come first"


def test_a_page_says_of_people_alone_what_is_meant(meanings):
    text = "a view of Paris and its Eiffel Tower"
    assert meanings(text, context="zelda-paris") == meanings(text), "another's whole name"
    assert meanings(text, context="Merkel, Paris, IKEA") == meanings(text), "no whole names"
    page = "https://a.org/josephine-baker"
    assert meanings("bread of the baker", context=page) == meanings("bread of the baker")
    [own] = meanings("Baker on the stage", context=page).values()
    [before] = meanings("Baker on the stage").values()
    assert own["Q42"] > 0.4
    assert "Q42" not in before
    odds = [found["Q43"] / (1 - sum(found.values())) for found in (own, before)]
    assert odds[0] == pytest.approx(odds[1], rel=1e-3), "it may still mean what it says"


@pytest.mark.parametrize(
    ("name", "qid"),
    [
        ("Howard K. Smith", "Q22"),
        ("Howard Kingsbury Smith", "Q22"),
        ("President Manmohan Singh", "Q23"),
        ("Singh Manmohan", "Q23"),
        ("Bob Nardelli", "Q25"),
        ("Merkel's", "Q20"),
        ("Merkel´s", "Q20"),
    ],
)
def test_people_are_found_as_they_are_called(meanings, name, qid):
    found = meanings(f"a speech by {name} on the stage", [(name, "PERSON")])
    assert by_text(found) == {qid}


# ---------------------------------------------------------------------------------------- writing


def test_names_as_people_write_them(meanings):
    assert by_text(meanings("a song by beyonce")) == {"Q26"}
    assert by_text(meanings("a song by Beyonc&eacute; &amp; friends")) == {"Q26"}
    assert by_text(meanings("\u590f\u306e\u6771\u4eac\u30bf\u30ef\u30fc\u306e\u5199\u771f")) == {
        "Q27"
    }
    assert by_text(
        meanings("\u0e23\u0e39\u0e1b\u0e41\u0e21\u0e27\u0e19\u0e48\u0e32\u0e23\u0e31\u0e01")
    ) == {"Q28"}
    found = meanings("a pair of glasses")["glasses"]
    assert found["Q29"] == pytest.approx(4 * found["Q30"])
    assert by_text(meanings("lunch at McDonald’s")) == {"Q31"}


_PIECES = (
    *("Apple", "APPLE", "apple's", "Mr. Singh", "Singh Manmohan", "Angela Merkel", "Merkel"),
    *(
        "beyonce",
        "Beyonc&eacute;",
        "\u6771\u4eac\u30bf\u30ef\u30fc",
        "\u0e41\u0e21\u0e27",
        "IT",
        "So On",
        "soon",
    ),
    *("&amp;", "&#39", "&nbsp;", "&ampCup;", "&fjlig;", "&#0;", "&#1;", "&#xD800;", "&;", "&lt"),
    *(
        "2019",
        "#ikeaParis_2",
        "\u200b",
        "\u0301",
        "\u202e",
        "\ufdfa",
        "\u00bd",
        "\u01c6",
        "\u0130",
        "\U0001f34e",
        ",",
        "",
    ),
)


@hypothesis.given(st.lists(st.sampled_from(_PIECES), max_size=12), st.sampled_from(["", " "]))
def test_mentions_stand_in_the_text_in_order_and_priors_add_up(kb, pieces, between):
    texts = [between.join(pieces), "Angela Merkel"]
    rule = disambiguate.Rule(10, 10.0, 4.0, 5.0, 1.0)
    blank = boilerplate.Blanker(boilerplate.PATTERNS)
    mentions, candidates = linking_stage.link(texts, blank, kb, rule, None)
    alone = linking_stage.link(texts[:1], blank, kb, rule, None)
    assert [alone[0][0], alone[1][0]] == [mentions[0], candidates[0]]
    mentions, candidates = mentions[0].as_py(), candidates[0].as_py()
    places = [(mention["start"], mention["end"]) for mention in mentions]
    assert places == sorted(places)
    for mention in mentions:
        assert mention["surface"] == texts[0][mention["start"] : mention["end"]] != ""
    priors = np.zeros(len(mentions))
    for row in candidates:
        assert row["prior"] > 0
        priors[row["mention"]] += row["prior"]
    assert (priors <= 1 + 1e-5).all()


def test_names_of_another_language_count_less(tmp_path):
    texts = [
        "Das ist ein sehr schönes Bild von einem Gift",
        "This is a very nice gift for you",
    ]
    assert languages.of([*texts, "Gift"], ["en", "de", "mul"]).tolist() == [2, 1, languages.ANY]
    assert languages.of(texts, ["en", "mul"]).tolist() == [languages.ANY] * 2
    assert languages.of(texts, ["en", "tlh"]).tolist() == [languages.ANY] * 2
    text = ["Uma casa muito bonita na beira do rio em Lisboa"]
    assert languages.of(text, ["pt", "en", "pt-br"]).tolist() == [0b101]
    entity = {"type": "item", "sitelinks": {"enwiki": {"title": "x"}}}
    rows = [
        entity | {"id": "Q1", "labels": {"en": {"language": "en", "value": "gift"}}},
        entity
        | {
            "id": "Q2",
            "labels": {
                "en": {"language": "en", "value": "poison"},
                "de": {"language": "de", "value": "gift"},
            },
        },
    ]
    (tmp_path / "dump.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    kb_build.build(
        tmp_path / "dump.json", tmp_path / "kb", inputs.kb_rules(languages=("en", "de", "mul"))
    )
    kb, rule = lookup.KnowledgeBase(tmp_path / "kb"), disambiguate.Rule(10, 1.0, 1.0, 1.0, 1.0)
    _, found = linking_stage.link(texts, boilerplate.Blanker(()), kb, rule, None)
    best = [own[0]["entity"] for own in found.to_pylist()]
    assert [kb.qid(entity) for entity in best] == ["Q2", "Q1"]


def test_a_span_may_have_more_words_than_a_byte_counts(meanings):
    text = "Paris " + "1 " * 400
    found = meanings(text, [(text.strip(), "CARDINAL")])
    assert set(found) == {"Paris", text.strip()}


def test_what_a_trained_linker_chose_is_likelier(meanings):
    text = "the big shop of Apple opens"
    found = meanings(text, [("Apple", "ORG", "Q89")])["Apple"]
    without = meanings(text, [("Apple", "ORG")])["Apple"]
    odds = [own["Q89"] / own["Q312"] for own in (found, without)]
    assert odds[0] == pytest.approx(5 * odds[1])


def test_most_likely_first_and_no_more_than_asked(meanings):
    assert list(meanings("APPLE")["APPLE"]) == ["Q312", "Q89"]
    found = meanings("APPLE", max_candidates=1)["APPLE"]
    assert found == pytest.approx({"Q312": 0.9}), "what is cut off is still no nothing"


def test_entities_are_found_by_id_title_and_kind(tmp_path):
    rows = [
        {"qid": "Q89", "label": "apple", "title": "Apple", "kind": "food"},
        {"qid": "Q2", "label": "IKEA", "title": "IKEA Group", "kind": "group"},
        {"qid": "Q3", "label": "pear"},
        {"id": "fruit/q3", "label": "plum"},
    ]
    base = build(tmp_path, rows)
    assert lookup.rows_of(base.path, ["Q3", "Q8", "Q89"]).tolist() == [2, -1, 0]
    others = ["q2", " <https://www.wikidata.org/wiki/Q2/>", "wd:Q89", "fruit/q3", "q003", "Q2x", ""]
    assert lookup.rows_of(base.path, others).tolist() == [1, 1, 0, 3, -1, -1, -1]
    assert lookup.rows_of_titles(base.path, ["IKEA_Group", "Pear"]).tolist() == [1, -1]
    assert [kinds.KINDS[code] for code in base.kind[:2]] == ["food", "group"]
    assert base.kind.dtype == np.uint8


def test_no_mentions(meanings):
    assert meanings("") == {}


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


def test_a_pattern_may_have_alternatives_that_begin_within_words():
    blank = boilerplate.Blanker((r"\bhd (?:a|b)\b", r"\bfoo|bar", r"\b[|(]?x\b"))
    assert blank("hd b food rebar x") == " " * 8 + "d re" + " " * 5


def test_no_patterns_blank_nothing():
    assert boilerplate.Blanker(())("stock photo.jpg") == "stock photo.jpg"
