"""Names and the lookup half of the knowledge base: normal forms, candidates, scanning."""

import json
import pathlib
import re
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_prep.kb import build as kb_build
from data_prep.kb import lookup, names
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


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb")
    kb_build.build(write(folder / "rows.jsonl", ROWS), folder / "kb", inputs.kb_rules())
    return lookup.KnowledgeBase(folder / "kb")


def found(kb, text):
    return [text[match.start : match.end] for match in kb.scan(text)]


def meanings(kb, name, top=10):
    return [(QIDS[entity], round(prior, 4)) for entity, prior in kb.candidates(name, top)]


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Alarm-Clock!! ", "alarm clock"),
        ("rose_123.SVG", "rose 123 svg"),
        ("Anna's", "anna s"),
        ("Straße ＡＢＣ", "strasse abc"),
        ("ﬁre", "fire"),
        ("cafe\u0301", "café"),
        ("İstanbul", "i\u0307stanbul"),
        ("½ pint™", "1 2 pint"),
        ("❤️ 1️⃣", "1"),
        ("東京タワー", "東京タワー"),
        ("हिन्दी", "हिन्दी"),
        ("...", ""),
    ],
)
def test_normal_forms(text, form):
    assert names.normalize(text) == form


@hypothesis.given(st.text())
def test_normal_forms_are_stable(text):
    form = names.normalize(text)
    assert names.normalize(form) == form
    assert form == " ".join(form.split())
    assert names.normalize(f" ({text})! ") == form
    for token in names.tokenize(text):
        assert names.normalize(text[token.start : token.end]) == token.form
        assert not any(unicodedata.category(c)[0] in "PZC" for c in token.form.replace(" ", ""))


PLURALS = re.findall(
    r"\S+",
    """
    icons:icon roses:rose horses:horse cookies:cookie waves:wave chefs:chef keys:key glasses:glass
    chains:chain photos:photo taxis:taxi menus:menu kiwis:kiwi bikinis:bikini
    buses:bus viruses:virus lenses:lens octopuses:octopus geniuses:genius campuses:campus
    irises:iris atlases:atlas gases:gas canvases:canvas
    foxes:fox boxes:box sandwiches:sandwich dishes:dish dresses:dress quizzes:quiz prizes:prize
    headaches:headache tomatoes:tomato mangoes:mango shoes:shoe
    berries:berry ponies:pony movies:movie ties:tie trousers:trouser jeans:jean
    leaves:leaf knives:knife wolves:wolf shelves:shelf roofs:roof gloves:glove
    women:woman firemen:fireman children:child feet:foot mice:mouse teeth:tooth oxen:ox
    people:person dice:die passersby:passerby
    cacti:cactus fungi:fungus alumni:alumnus criteria:criterion bacteria:bacterium
    larvae:larva vertebrae:vertebra algae:alga matrices:matrix vertices:vertex
    analyses:analysis oases:oasis crises:crisis axes:axis axes:axe plateaus:plateau
    hoverboards:hoverboard smartwatches:smartwatch selfies:selfie
""",
)


def test_singulars():
    pairs = [pair.split(":") for pair in PLURALS]
    assert [p for p, single in pairs if single not in names.singulars(p)] == []
    assert names.singulars("red boxes") == ["red box"]


NO_PLURALS = re.findall(
    r"\S+",
    """
    james paris texas mars hermes wales kansas laos dallas brussels athens naples versailles
    philippines netherlands honduras maldives vegas mercedes adidas lexus nicolas thomas jones
    williams dickens socrates hercules christmas andes thames ganges
    glass bus lens virus octopus iris gas atlas canvas tennis analysis chassis grass
    species series scissors shorts news mathematics physics diabetes corps
    sheep deer this his was us across s
""",
)


def test_what_is_no_plural():
    words = ["", "los angeles", "las vegas", "rolling stones album", *NO_PLURALS]
    assert [word for word in words if names.singulars(word)] == []


def test_words_are_split_at_case_and_digits():
    forms = [token.form for token in names.split_word("HTMLAlarmClock2go")]
    assert forms == ["html", "alarm", "clock", "2", "go"]
    assert [(t.start, t.end) for t in names.split_word("rose12", 5)] == [(5, 9), (9, 11)]


# ------------------------------------------------------------------------------------------ lookup


def test_priors_follow_ranks_sitelinks_and_the_alias_factor(kb):
    assert meanings(kb, "rose") == [("n1", 0.75), ("n2", 0.25)]  # 1/1 : 1/3
    assert meanings(kb, "rosebush") == [("n1", 1.0)]
    assert meanings(kb, "clock radio") == [("Q5", 0.6667), ("Q4", 0.3333)]  # 40 * 0.5 : 10
    assert meanings(kb, "clock radio", top=1) == [("Q5", 0.6667)]
    assert meanings(kb, "nothing") == []


def test_a_plural_may_mean_the_singular_too(kb):
    assert meanings(kb, "roses") == meanings(kb, "rose")
    assert meanings(kb, "chains") == [("n6", 0.8), ("n7", 0.2)]
    assert meanings(kb, "tomatoes") == [("n11", 1.0)]


def test_scan_finds_the_longest_names(kb):
    assert found(kb, "cute rose clip art") == ["rose"]
    assert found(kb, "ALARM  CLOCK icon") == ["ALARM  CLOCK"]
    assert found(kb, "an alarm clock radio") == ["alarm clock", "clock radio"]
    assert found(kb, "roses, tomatoes") == ["roses", "tomatoes"]
    assert found(kb, "prose") == []
    assert found(kb, "in Paris, Texas") == ["Paris", "Paris, Texas", "Texas"]
    assert found(kb, "in Paris Texas") == ["Paris Texas"]
    assert found(kb, "东京 rosé") == ["东京", "rosé"]
    assert found(kb, "") == []


def test_scan_reads_hashtags_and_file_names(kb):
    assert found(kb, "#alarmclock #rose") == ["alarmclock", "rose"]
    assert meanings(kb, "alarmclock") == [("n3", 1.0)]
    assert found(kb, "#AlarmClock2") == ["AlarmClock"]
    assert found(kb, "rose_123.svg rose12") == ["rose", "rose"]
    assert found(kb, "/img/alarm-clock.png") == ["alarm-clock"]


@hypothesis.given(st.text(alphabet="roseclkam RS,_#1\u00e9\u0301½", max_size=30))
def test_every_match_is_a_known_name_at_the_edge_of_words(kb, text):
    for match in kb.scan(text):
        assert kb.candidates(match.form, 1)
        assert names.normalize(text[match.start : match.end]) in (
            match.form,
            match.form.replace(" ", ""),
        )


def test_every_name_of_the_sample_is_found_again(tmp_path):
    kb_build.build(SAMPLE, tmp_path / "kb", inputs.kb_rules())
    kb = lookup.KnowledgeBase(tmp_path / "kb")
    table = lookup.read_entities(tmp_path / "kb")
    assert table.num_rows == 2443
    ambiguous = 0
    for entity, row in enumerate(table.to_pylist()):
        for name in (row["label"], *row["aliases"]):
            form = names.normalize(name)
            candidates = dict(kb.candidates(form, lookup.MAX_STORED))
            assert entity in candidates, name
            assert sum(candidates.values()) == pytest.approx(1, abs=1e-5)
            ambiguous += len(candidates) > 1
            spans = [match.form for match in kb.scan(f"a {name} drawing")]
            assert any(form in span for span in spans), (name, spans)
    assert ambiguous > 1000


def scan_word_by_word(kb, text):
    """`KnowledgeBase.scan` in the plainest way: every run of words is looked up."""

    def maximal(tokens):
        matches, reached = [], 0
        for i in range(len(tokens)):
            for j in range(min(len(tokens), i + lookup.MAX_TOKENS), i, -1):
                form = " ".join(token.form for token in tokens[i:j])
                if form in kb:
                    if j > reached:
                        matches.append((tokens[i].start, tokens[j - 1].end, form))
                        reached = j
                    break
        return matches

    tokens = names.tokenize(text)
    matches = set(maximal(tokens))
    for run in names.split_at_punctuation(text, tokens):
        matches.update(maximal(run))
    for token in tokens:
        if not any(start <= token.start < end for start, end, _ in matches):
            parts = names.split_word(text[token.start : token.end], token.start)
            if len(parts) > 1:
                matches.update(maximal(parts))
    return sorted(matches)


WORDS = (
    "rose",
    "Roses",
    "alarm",
    "clock",
    "clocks",
    "radio",
    "irons",
    "tomatoes",
    "Paris",
    "Texas",
)
BETWEEN = (" ", ", ", "-", "_", "", " | ", ". ")


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BETWEEN)), max_size=12)
)
def test_scan_finds_what_looking_up_every_run_of_words_finds(kb, parts):
    text = "".join(word + between for word, between in parts)
    assert [tuple(match) for match in kb.scan(text)] == scan_word_by_word(kb, text)


@hypothesis.given(st.text(max_size=40))
def test_scan_of_any_text_finds_what_looking_up_every_run_of_words_finds(kb, text):
    assert [tuple(match) for match in kb.scan(text)] == scan_word_by_word(kb, text)


@pytest.mark.parametrize(
    "plural", ["ponies", "leaves", "mice", "boxes", "glasses", "lenses", "children", "quizzes"]
)
def test_scan_finds_plurals_of_every_kind(tmp_path, plural):
    labels = ["pony", "leaf", "mouse", "box", "glass", "lens", "child", "quiz", "wild pony"]
    rows = [{"id": f"n{i}", "label": label} for i, label in enumerate(labels)]
    kb_build.build(write(tmp_path / "rows.jsonl", rows), tmp_path / "kb", inputs.kb_rules())
    kb = lookup.KnowledgeBase(tmp_path / "kb")
    assert found(kb, f"two wild {plural} here") in ([plural], ["wild ponies"])
    assert [tuple(m) for m in kb.scan(f"two wild {plural} here")] == scan_word_by_word(
        kb, f"two wild {plural} here"
    )


def test_look_up_of_many_is_the_look_up_of_each(kb):
    forms = ["rose", "nothing", "irons", "clock radio", "", "chains", "tomatoes"]
    together = kb.look_up(forms)
    for number, form in enumerate(forms):
        own = together.take(np.flatnonzero(together.surface == number))
        alone = kb.look_up([form])
        assert own.entity.tolist() == alone.entity.tolist()
        assert own.prior.tolist() == pytest.approx(alone.prior.tolist())
        assert own.prior.tolist() == sorted(own.prior.tolist(), reverse=True)
