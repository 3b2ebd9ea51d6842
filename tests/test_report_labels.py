"""The data card's numbers of labels on small tables with known answers."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from data_prep.card import labels as card_labels
from data_prep.selection import visibility
from tests import card_tables, decision


@pytest.fixture
def tables(tmp_path):
    return card_tables.Tables(tmp_path)


def test_images_per_entity():
    counts = np.array([20, 8, 7, 4, 3, 2, 1, 1])
    found = card_labels.images_per_entity(counts)
    names = ("from", "to", "entities", "labels", "share")
    assert [tuple(b[name] for name in names) for b in found["bins"]] == [
        (1, 1, 2, 2, 1.0),
        (2, 3, 2, 5, round(44 / 46, 4)),
        (4, 7, 2, 11, round(39 / 46, 4)),
        (8, 15, 1, 8, round(28 / 46, 4)),
        (16, 31, 1, 20, round(20 / 46, 4)),
    ]
    assert found["head"] == [
        {"part": 0.01, "entities": 1, "share": round(20 / 46, 4)},
        {"part": 0.1, "entities": 1, "share": round(20 / 46, 4)},
    ]


CONFIG = {
    "prior_weight": 0.5,
    "kin_weight": 2.0,
    "min_probability": 0.2,
    "max_labels": 2,
    "min_images": 3,
}


@pytest.fixture
def evident(tables, rng=7):
    """Two hundred pictures with random evidence, and what the rule decides about them."""
    rng = np.random.default_rng(rng)
    entities, cells = 12, len(visibility._VISIBLE) * len(visibility._DISTANCES)
    kin = rng.uniform(0, 0.3, entities).astype(np.float32)
    mixture = rng.dirichlet(np.full(cells, 0.1), entities).astype(np.float32)
    mixture[1] = np.eye(cells)[-1]  # shown beyond doubt
    columns = {"entity": np.arange(entities), "kin": kin, "mixture": mixture.tolist()}
    tables.write("visibility", columns, {"mixture": card_tables.FLOATS})
    tables.write("barred", {"entity": np.array([3])})
    pictures, repeated = [], set()
    for name in ("00000", "00001", "00002"):
        rows = []
        for i in range(70):
            candidates = [
                (mention, int(entity), float(np.float32(rng.uniform(0.05, 1))))
                for mention in range(rng.integers(0, 4))
                for entity in rng.choice(entities, rng.integers(1, 4), replace=False)
            ]
            known = sorted({entity for _, entity, _ in candidates})
            values = np.round(rng.normal(1, 1.5, (len(known), 2)), 4).astype(np.float32)
            rows.append((f"{name}-{i}", candidates, known, values))
        rows.append((f"{name}-70", [(0, 1, 1.0)], [1], np.array([[1, 9]], np.float32)))
        tables.links([(key, candidates) for key, candidates, _, _ in rows], name)
        rows = [row for row in rows if row[1]]
        lists = [[values[:, i].tolist() for _, _, _, values in rows] for i in range(2)]
        keys, known = [row[0] for row in rows], [row[2] for row in rows]
        # Of every other picture an earlier one is the same, where that mentions its entities.
        twins = [(key, e) for key, of in zip(keys[::2], known[::2], strict=True) for e in of]
        columns = dict(zip(("key", "entity"), zip(*twins, strict=True), strict=True))
        tables.write("twins", columns, {"entity": pa.int32()}, name)
        repeated.update(keys[::2])
        names = ("scores", "z_scores")
        columns = {"key": keys, "entities": known, **dict(zip(names, lists, strict=True))}
        types = {"entities": card_tables.INTS, **dict.fromkeys(names, card_tables.FLOATS)}
        tables.write("z_scores", columns, types, name)
        pictures += rows

    def choose(**changes):
        found = {}
        for key, candidates, known, values in pictures:
            entity = np.array(known, np.int32)
            z_score = values[:, 1].astype(np.float64)
            shown, fit = visibility.shown(entity, z_score, np.arange(entities), mixture)
            evidence = {
                e: (float(kin[e]), 0 if e == 3 else s, f)
                for e, s, f in zip(known, shown, fit, strict=True)
            }
            found[key] = dict(decision.choose(candidates, evidence, CONFIG | changes)[0])
        return found

    for name in ("00000", "00001", "00002"):
        rows = [(key, [*chosen], None) for key, chosen in choose().items() if key.startswith(name)]
        tables.labels("labels", rows, name)
    return tables, choose, repeated


def test_other_thresholds_label_what_the_selection_would(evident):
    tables, choose, repeated = evident
    found = card_labels.thresholds(tables.connection, tables.files, CONFIG)
    [points] = found["sensitivity"].values()
    assert [p["value"] for p in points if p["configured"]] == [0.2]
    assert len(points) > 15
    assert [p["value"] for p in points] == sorted(p["value"] for p in points)
    for point in points:
        labels = choose(min_probability=point["value"])
        new = (chosen for key, chosen in labels.items() if key not in repeated)
        counts = collections.Counter(e for chosen in new for e in chosen)
        assert point["pictures"] == sum(map(bool, labels.values())), point
        assert point["entities"] == sum(n >= 3 for n in counts.values()), point
    assert len({p["pictures"] for p in points}) > 10
    assert len({p["entities"] for p in points}) > 3


def test_the_histogram_counts_every_likeliest_candidate_once(evident):
    tables, choose, _ = evident
    found = card_labels.thresholds(tables.connection, tables.files, CONFIG)["probabilities"]
    assert found["threshold"] == 0.2
    expected = collections.Counter(
        min(19, int(np.floor(round(p / 0.05, 6))))
        for chosen in choose(min_probability=0.0).values()
        for p in chosen.values()
    )
    bins = {round(b["from"] / 0.05): b["chosen"] + b["others"] for b in found["bins"]}
    assert bins == expected
    assert any(p == 1 for chosen in choose(min_probability=0.0).values() for p in chosen.values())
    assert sum(b["chosen"] for b in found["bins"]) == sum(map(len, choose().values()))
    # No chosen candidate lies below the threshold's bin.
    assert all(b["chosen"] == 0 for b in found["bins"] if b["from"] < 0.2)


# ------------------------------------------------------------------------------------------- types


@pytest.fixture
def zoo(tables):
    """Two cats, a dog and a stone; text alone names the stone oftener than pictures show it."""
    tables.links(
        [
            ("a", [(0, 0, 0.9), (0, 3, 0.1)]),
            ("b", [(0, 1, 0.6), (0, 0, 0.4), (1, 1, 1.0)]),
            ("c", [(0, 2, 1.0), (1, 3, 1.0)]),
            ("d", [(0, 3, 0.5), (0, 2, 0.5)]),
            ("e", []),
        ]
    )
    rows = [("a", [0], None), ("b", [1, 0], None), ("c", [2], None), ("d", [2], None)]
    tables.labels("labels_final", rows)
    return tables


KB = {"qid": ["Q1", "Q2", "Q3", "Q4"], "label": ["tabby", "cat", "dog", "stone"]}


def _types(tables):
    found = card_labels.entity_types(tables.connection, tables.files)
    names = ("type", "name", "text_labels", "labels", "entities")
    return found, [tuple(row[name] for name in names) for row in found["types"]]


def test_types_are_named_and_counted_before_and_after(zoo):
    types = [["Q2", "Q9", "Q2"], ["Q9"], ["Q9"], []]
    zoo.write("kb", {**KB, "types": types}, {"types": pa.list_(pa.string())})
    found, rows = _types(zoo)
    # By text: a tabby, b cat, c dog and stone, d dog (of equally likely ones the smaller row).
    assert (found["text_labels"], found["labels"], found["others"]) == (5, 5, 0)
    assert rows == [("Q9", None, 4, 5, 3), ("Q2", "cat", 1, 2, 1)]
    assert found["untyped"] == {"text_labels": 1, "labels": 0, "entities": 0}


def test_kinds_are_counted_before_and_after_and_guessed_ones_are_told(zoo):
    kinds = {
        "kind": ["animal", "animal", None, "nature"],
        "kind_from": ["given", "guessed", None, "guessed"],
    }
    zoo.write("kb", KB | kinds)
    rows = [tuple(row.values()) for row in _types(zoo)[0]["kinds"]]
    assert rows == [("animal", 2, 3, 2, 1), (None, 2, 2, 1, 0), ("nature", 1, 0, 0, 1)]


def test_what_has_no_type_goes_by_its_hypernyms(zoo):
    columns = {"types": [["Q2"], [], None, None], "hypernyms": [["Q7"], ["Q4"], ["Q4"], None]}
    zoo.write("kb", KB | columns, dict.fromkeys(columns, pa.list_(pa.string())))
    found, rows = _types(zoo)
    assert rows == [("Q4", "stone", 3, 3, 2), ("Q2", "cat", 1, 2, 1)]
    assert found["untyped"]["text_labels"] == 1


def test_a_knowledge_base_without_types(zoo):
    zoo.write("kb", KB)
    found, rows = _types(zoo)
    assert rows == []
    assert found["untyped"] == {"text_labels": 5, "labels": 5, "entities": 3}


def test_types_beyond_the_most_frequent_are_counted(zoo, monkeypatch):
    monkeypatch.setattr(card_labels, "_SHOWN_TYPES", 1)
    zoo.write("kb", {**KB, "hypernyms": [["A"], ["B"], ["C"], ["D"]]})
    found, rows = _types(zoo)
    assert rows == [("C", None, 2, 2, 1)]
    assert found["others"] == 3
