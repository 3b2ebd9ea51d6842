"""Kinds of entities: from types over superclasses, from hypernyms, from descriptions and labels."""

import gzip
import json

import duckdb
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from data_prep.kb import build as kb_build
from data_prep.kb import closure, kinds, lookup
from data_prep.kb.sources import guess, nouns
from tests import inputs
from tests.fuzzing import fuzz
from tests.test_wikidata import dump, item, line, statement


def told(folder):
    """Id -> kind and where it is from."""
    columns = ["qid", "kind", "kind_from"]
    rows = lookup.read_entities(folder).select(columns).to_pylist()
    return {row["qid"]: (row["kind"], row["kind_from"]) for row in rows}


def test_the_roots_are_sound():
    assert len(kinds.ROOTS) == len({root for root, _ in kinds.ROOTS})
    said = [kind for _, kind in kinds.ROOTS]
    assert set(said) == {*kinds.KINDS, None}
    assert None not in said[: said.index(None)]
    assert set(said[said.index(None) :]) == {None}  # these come last
    assert {*kinds.LEXNAMES.values()} <= {*kinds.KINDS, None}
    assert all(kinds.LABELS[root] for root, _ in kinds.ROOTS)


@pytest.mark.parametrize("languages", [("en", "mul"), ("de",)])
def test_roots_that_a_base_does_not_have_as_such_are_told(tmp_path, caplog, languages):
    absent, *there = [root for root in kinds.LABELS if root.startswith("Q")]
    rows = [
        {"id": root, "label": kinds.LABELS[root].title(), "hypernyms": ["Q1"]} for root in there
    ]
    rows[0]["label"], rows[1] = "stone", rows[1] | {"label": "x", "aliases": [rows[1]["label"]]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kb_build.build(tmp_path / "rows.jsonl", tmp_path / "kb", inputs.kb_rules(languages=languages))
    other = f"{there[0]} is 'stone', not {kinds.LABELS[there[0]]!r}"
    told = [line for line in caplog.messages if "others here than in data_prep/kb" in line]
    assert [line.endswith(f": {other}") for line in told] == [True] * ("en" in languages)
    assert f"1 of {len(there) + 1} classes by which kinds are told are not here" in caplog.text
    assert f"{absent} {kinds.LABELS[absent]}" in caplog.text


CLASSES = [  # child, what lies above it
    ("Q100", "P279", "Q101"),
    ("Q101", "P279", "Q5"),  # a class of humans
    ("Q102", "P279", "Q103"),
    ("Q103", "P279", "Q102"),  # a circle
    ("Q103", "P279", "Q515"),
    ("Q104", "P279", "Q104"),  # its own superclass
    ("Q105", "P171", "Q106"),
    ("Q106", "P171", "Q729"),  # taxa of animals
]
THINGS = {  # types -> kind
    ("Q5",): "person",
    ("Q100",): "person",
    ("Q102",): "place",
    ("Q104",): None,
    ("Q100", "Q515"): "place",  # nearer
    ("Q101", "Q103"): "person",  # equally near: people come first
    ("Q28640", "Q102"): "place",  # "profession" says nothing
    ("Q999",): None,
    (): None,
}


def test_types_are_closed_over_superclasses_that_are_dropped_themselves(tmp_path):
    items = [item(child, {}, claims=[statement(prop, up)]) for child, prop, up in CLASSES]
    en = {"en": "x"}
    for number, types in enumerate(THINGS):
        claims = [statement("P31", of) for of in types]
        items.append(item(f"Q{number + 1000}", en, claims=claims, links={"enwiki": "x"}))
    above = {"Q2000": ("P171", "Q105", "animal"), "Q2001": ("P279", "Q102", "place")}
    for qid, (prop, up, _) in above.items():  # a taxon and a class
        claims = [statement("P31", "Q16521"), statement(prop, up)]
        items.append(item(qid, en, claims=claims, links={"enwiki": "x"}))
    (tmp_path / "dump.json").write_bytes(dump(map(line, items)))
    digests = []
    for lines in (2, 1000):
        config = inputs.kb_rules(chunk_lines=lines)
        manifest = kb_build.build(tmp_path / "dump.json", tmp_path / f"{lines}/kb", config)
        digests.append([output["sha256"] for output in manifest["outputs"]])
    assert digests[0] == digests[1]
    expected = {f"Q{number + 1000}": kind for number, kind in enumerate(THINGS.values())}
    expected |= {qid: kind for qid, (_, _, kind) in above.items()}
    assert told(tmp_path / "2/kb") == {
        qid: (kind, kinds.GIVEN if kind else None) for qid, kind in expected.items()
    }


@fuzz(
    30,
    edges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25),
    roots=st.dictionaries(st.integers(0, 9), st.integers(0, 3), max_size=4),
)
def test_the_nearest_root_is_that_of_the_fewest_steps(edges, roots):
    with duckdb.connect() as connection:
        for name, columns, rows in (
            ("edges", ("child", "parent"), edges),
            ("roots", ("id", "root"), roots.items()),
        ):
            values = list(zip(*rows, strict=True)) or [(), ()]
            arrays = [pa.array(column, pa.int64()) for column in values]
            connection.register(name, pa.table(arrays, names=columns))
        closure.spread(connection, "edges", "roots", "reached")
        found = connection.execute("SELECT id, root, steps FROM reached").fetchall()
    expected = {node: (root, 0) for node, root in roots.items()}
    for step in range(1, 11):
        for node in {child for child, _ in edges} - expected.keys():
            near = [expected[up] for child, up in edges if child == node and up in expected]
            near = [root for root, steps in near if steps == step - 1]
            if near:
                expected[node] = (min(near), step)
    assert {node: tuple(rest) for node, *rest in found} == expected


def test_rows_say_their_kind_or_it_follows_from_hypernyms(tmp_path):
    rows = [
        {"id": "n00015388", "label": "animal", "lexname": "noun.Tops"},
        {"id": "n1", "label": "dog", "hypernyms": ["n00015388"]},
        {"id": "n2", "label": "cat", "hypernyms": ["n00015388"], "lexname": "noun.person"},
        {"id": "n3", "label": "cow", "kind": "food", "lexname": "noun.animal"},
        {"id": "n4", "label": "List of dogs"},
        {"id": "n5", "label": "stone", "description": "village in Poland"},
        {"id": "n6", "label": "pebble"},
        {"id": "n7", "label": "steak", "hypernyms": ["n3"], "description": "drawing"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kb_build.build(tmp_path / "rows.jsonl", tmp_path / "kb", inputs.kb_rules())
    assert list(told(tmp_path / "kb").values()) == [
        ("animal", "given"),
        ("animal", "given"),
        ("person", "given"),
        ("food", "given"),
        ("wikimedia", "guessed"),
        ("place", "guessed"),
        (None, None),
        ("food", "given"),
    ]


@pytest.mark.parametrize(
    ("description", "kind"),
    [
        ("American actor and film director", "person"),
        ("1944; American screenwriter, director, and producer", "person"),
        ("former U.S. secretary", "person"),
        ("English actress, author and columnist", "person"),
        ("mystery and speculative fiction writer", "person"),
        ("village in Poland", "place"),
        ("1994 film by X", "work"),
        ("British television series", "work"),
        ("species of beetle", "animal"),
        ("breed of dog", "animal"),
        ("fictional detective in novels", "character"),
        ("fictional city in comics", "place"),
        ("pulp and paper manufacturer", "group"),
        ("rock musician, member of The Stones", "person"),
        ("hotel chain run by X", "group"),
        ("car repair chain operating in Denmark", "group"),
        ("chain of restaurants", "group"),
        ("male given name", "name"),
        ("Wikimedia disambiguation page", "wikimedia"),
        ("mountains of Peru", "nature"),
        ("in Poland", None),
        ("", None),
    ],
)
def test_descriptions_tell_kinds(description, kind):
    assert guess.from_row("X", description) == kind


@fuzz(200, label=st.text(max_size=20), description=st.text(max_size=40))
def test_any_text_has_a_kind_or_none(label, description):
    assert guess.from_row(label, description) in {*kinds.KINDS, None}
    assert not guess.Labels().is_person(label)  # of people nothing is known


def test_the_bracket_of_a_label_tells_where_the_description_does_not():
    assert guess.from_row("John Smith (actor)", "") == "person"
    assert guess.from_row("John Smith (actor)", "1912 film") == "work"


def test_labels_look_like_those_of_people(tmp_path, monkeypatch):
    rows = [
        {"id": f"p{i}", "label": f"Anna {s}", "description": "actress"}
        for i, s in enumerate(("Abc", "Bcd", "Cde"))
    ]
    rows += [
        {"id": f"c{i}", "label": f"Acme {s}", "description": "company"}
        for i, s in enumerate(("Abc", "Energi", "Energi", "Energi", "Foo"))
    ]
    labels = {
        "Anna Lund": True,
        "Lars van der Lund": True,
        "Lars Energi": False,
        "Acme Lund": False,
        "Lars Bank": False,
        "Princess Acme": True,
        "Lars 2": False,
        "Lars": False,
        "Lars of the north": False,
    }
    rows += [{"id": f"x{i}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(closure, "_LEARNED", 9)  # whatever is in one part
    for lines in (2, 1000):
        rules = inputs.kb_rules(chunk_lines=lines)
        kb_build.build(tmp_path / "rows.jsonl", tmp_path / f"{lines}/kb", rules)
        found = list(told(tmp_path / f"{lines}/kb").values())[8:]
        person = ("person", "guessed")
        assert found == [person if is_one else (None, None) for is_one in labels.values()]


def test_the_table_of_nouns_is_made_from_wordnet(tmp_path):
    def row(number, label, rank, lexname, hypernyms=(), description="cat bank house cat"):
        return {
            "id": number,
            "label": label,
            "aliases": [],
            "sense_rank": [rank],
            "lexname": lexname,
            "hypernyms": list(hypernyms),
            "description": description,
        }

    rows = [
        row("n1", "cat", 1, "noun.animal"),
        row("n2", "cat", 3, "noun.person"),
        row("n02913152", "house", 1, "noun.artifact"),  # building
        row("n4", "bank", 1, "noun.object"),
        row("n5", "bank", 2, "noun.artifact", ["n02913152"]),
        row("n6", "Bank", 1, "noun.group"),
        row("n7", "rare", 1, "noun.group"),
    ]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    nouns.main(str(tmp_path / "rows.jsonl.gz"), str(tmp_path / "nouns.tsv.gz"))
    text = gzip.decompress((tmp_path / "nouns.tsv.gz").read_bytes()).decode()
    assert "WordNet" in text
    assert text.splitlines()[-3:] == ["animal\tcat", "building\thouse", "nature\tbank"]
