"""The data card's numbers of pairs on small tables with known answers."""

import collections

import numpy as np
import pyarrow as pa
import pytest

from data_prep.card import numbers as card_numbers
from data_prep.card import pictures as card_pictures
from mofi_jax.data import records
from tests import card_tables


@pytest.fixture
def tables(tmp_path):
    return card_tables.Tables(tmp_path)


# ----------------------------------------------------------------------------------------- funnel


@pytest.fixture
def lossy(tables):
    """Ten pairs of two sources in two shards, of which most get lost, each otherwise."""
    keys = "abcdefghij"
    for name, own in (("00000", keys[:5]), ("00001", keys[5:])):
        sources = ["one" if key in "abcdefg" else "two" for key in own]
        tables.write("pairs", {"key": list(own), "source": sources}, name=name)
        candidate = {"i": [(0, 1, 1.0)], "j": []}
        tables.links([(key, candidate.get(key, [(0, 0, 1.0)])) for key in own], name)
        reasons = {"i": "below_min_probability", "j": "no_mention"}
        rows = [(key, [] if key in reasons else [0], reasons.get(key)) for key in own]
        tables.labels("labels", rows, name)
        tables.labels("labels_final", [(key, [0], None) for key in own if key in "ab"], name)
    tables.rejects(
        [
            ("y", "pairs", "truncated"),
            ("z", "pairs", "truncated"),
            ("x", "pairs", "no_text"),
            ("i", "labels", "below_min_probability"),
            ("j", "labels", "no_mention"),
            ("c", "dropped-i2e", "eval_duplicate:pets"),
            ("d", "dropped-i2e", "eval_duplicate:birds"),
            ("e", "dropped-i2e", "unsafe_column:NSFW"),
            ("f", "labels_final", "rare_entity"),
            ("g", "some_new_filter", "too_dull"),
        ]
    )
    return tables


def test_funnel_counts_each_kind_of_loss(lossy):
    sources = card_numbers.by_source(lossy.connection, lossy.files)
    funnel = card_numbers.funnel(lossy.connection, lossy.files, sources, 2)
    removed = funnel.pop("removed")
    assert funnel == {
        "read": 13,
        "valid": 10,
        "with_mention": 9,
        "with_candidate": 9,
        "labelled": 8,
        "final": 2,
    }
    # "h" was labelled, is not among the final ones and has no reject: said, not hidden.
    assert [(row["reason"], row["count"], row["left"]) for row in removed] == [
        ("eval_duplicate", 2, 6),
        ("unsafe_column", 1, 5),
        ("too_dull", 1, 4),
        ("rare_entity", 1, 3),
        (None, 1, 2),
    ]


def test_rejects_stand_in_the_order_of_the_stages(lossy):
    rows = card_numbers.rejects(lossy.connection, lossy.files)
    assert [(row["stage"], row["reason"], row["count"]) for row in rows] == [
        ("pairs", "truncated", 2),
        ("pairs", "no_text", 1),
        ("labels", "below_min_probability", 1),
        ("labels", "no_mention", 1),
        ("dropped-i2e", "eval_duplicate:birds", 1),
        ("dropped-i2e", "eval_duplicate:pets", 1),
        ("dropped-i2e", "unsafe_column:NSFW", 1),
        ("some_new_filter", "too_dull", 1),
        ("labels_final", "rare_entity", 1),
    ]


@pytest.mark.parametrize("at_once", [1, 32])
def test_funnel_by_source(lossy, monkeypatch, at_once):
    monkeypatch.setattr(card_numbers, "_SHARDS_AT_ONCE", at_once)
    names = ("source", "valid", "with_mention", "with_candidate", "labelled", "final")
    rows = card_numbers.by_source(lossy.connection, lossy.files)
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("one", 7, 7, 7, 7, 2),
        ("two", 3, 2, 2, 1, 0),
    ]


def test_a_pair_whose_shard_is_missing_later_counts_as_far_as_it_came(lossy):
    lossy.files["labels"].pop()
    lossy.files["unwritten"] += ["b", "c"]
    rows = card_numbers.by_source(lossy.connection, lossy.files)
    assert [(row["valid"], row["with_mention"], row["labelled"], row["final"]) for row in rows] == [
        (7, 7, 5, 1),
        (3, 2, 0, 0),
    ]


@pytest.mark.parametrize("places", [("00001",), ()])
def test_a_shard_in_quarantine_is_passed_over(tables, places):
    for name in ("00000", "00001"):
        tables.labels("labels", [(name, [3], None)], name)
    for name in places:
        tables.labels("labels_final", [(name, [3], None)], name)
    sql = "SELECT key FROM read_parquet($labels) JOIN read_parquet($labels_final) AS f USING (key)"
    stages = ("labels", "labels_final")
    found = card_numbers.collect(tables.connection, sql, tables.files, stages)
    assert [key for [key] in found] == [*places]


# ---------------------------------------------------------------------- pictures and their captions


def test_picture_sizes_are_of_the_shorter_side(tables):
    tables.write("pairs", {"width": [64, 200, 500, 40, 70], "height": [80, 127, 300, 900, 70]})
    assert card_numbers.picture_sizes(tables.connection, tables.files) == {
        "median": 70,
        "bins": [
            {"from": 32, "to": 63, "pictures": 1},
            {"from": 64, "to": 127, "pictures": 3},
            {"from": 128, "to": 255, "pictures": 0},
            {"from": 256, "to": 511, "pictures": 1},
        ],
    }


def test_duplicates(tables):
    tables.write("pairs", {"sha256": [f"{n:064x}"[::-1] for n in (1, 2, 1, 3, 1, 2)]})
    tables.rejects([(k, "d", f"eval_duplicate:{s}") for k, s in ("ax", "bx", "cy")])
    tables.write("eval_limits", {"set": ["x", "w"], "limit": [0.0015, None]})
    matches = {"eval_duplicate:x:phash": 2, "eval_duplicate:z:sha256": 1, "eval_duplicate:x": 2}
    assert card_numbers.duplicates(tables.connection, tables.files, matches) == {
        "repeated": 3,
        "evaluation": [
            {"set": "w", "removed": 0, "by_layer": {}, "cosine": None},
            {"set": "x", "removed": 2, "by_layer": {"phash": 2}, "cosine": 0.9985},
            {"set": "y", "removed": 1, "by_layer": {}, "cosine": None},
            {"set": "z", "removed": 0, "by_layer": {"sha256": 1}, "cosine": None},
        ],
    }


def test_scripts(tables):
    captions = {
        "Latin": ["Ein Bild", "la photo de 写", "l'été"],
        "Cyrillic": ["фото кота jpg"],
        "Arabic": ["صورة قطة"],
        "Han": ["猫的照片"],
        "Japanese": ["猫の写真集の"],
        "Devanagari": ["बिल्ली"],
        "other": ["ᏣᎳᎩ"],
        "no letters": ["2026 -- 17", ""],
    }
    texts = [text for found in captions.values() for text in found]
    tables.write("pairs", {"key": [str(i) for i in range(len(texts))], "text": texts})
    found = card_numbers.scripts(tables.connection, tables.files)
    assert found["sampled"] == len(texts)
    assert {row["script"]: row["captions"] for row in found["scripts"]} == {
        script: len(texts) for script, texts in captions.items()
    }
    assert found["scripts"][0] == {"script": "Latin", "captions": 3}


def test_captions_are_sampled_by_key_whatever_their_shard(tables):
    keys = [f"k{i}" for i in range(2000)]
    for name, own in (("00000", keys[:700]), ("00001", keys[700:])):
        tables.write("pairs", {"key": own, "text": ["a"] * len(own)}, name=name)
    found = card_numbers.scripts(tables.connection, tables.files, most=200)
    assert 120 < found["sampled"] < 300
    tables.files["pairs"].reverse()
    assert card_numbers.scripts(tables.connection, tables.files, most=200) == found


# ---------------------------------------------------------------------------------------- pictures


def test_rare_entities_are_those_with_fewest_pictures_and_none_of_the_largest(tables, monkeypatch):
    np.save(tables.folder / "kb_rows.npy", np.arange(9))
    tables.files["vocabulary"] = ["", str(tables.folder / "kb_rows.npy")]
    tables.labels("labels_final", [("a", [1], None), ("b", [1, 4], None), ("c", [8], None)])
    counts = np.array([9, 8, 0, 5, 3, 2, 2, 2, 2], np.int64)
    qids = [f"Q{i}" for i in range(9)]
    entities = records.Entities(qids, qids, [""] * 9, counts)

    def strips(top, rare):
        monkeypatch.setattr(card_pictures, "TOP_ENTITIES", top)
        monkeypatch.setattr(card_pictures, "RARE_ENTITIES", rare)
        found = card_pictures.entity_strips(tables.connection, tables.files, entities)
        return [
            [strip["images"] for strip in found[f"{name}_entities"]] for name in ("top", "rare")
        ]

    assert strips(2, 3) == [[9, 8], [2, 2, 2]]
    assert strips(2, 5) == [[9, 8], [2, 2, 2, 2, 3]]
    assert strips(6, 3) == [[9, 8, 5, 3, 2, 2], [2, 2]]
    assert strips(8, 3) == [[9, 8, 5, 3, 2, 2, 2, 2], []]
    found = card_pictures.entity_strips(tables.connection, tables.files, entities)
    assert [strip["keys"] for strip in found["top_entities"]][1:4] == [["a", "b"], [], ["b"]]


def test_the_gallery_prefers_pictures_that_chose_something_else(tables, monkeypatch):
    keys = [f"{i:02d}" for i in range(30)]
    tables.write("pairs", {"key": keys, "text": ["x"] * 30})
    tables.links([(key, [(0, 0, 0.9), (0, 2, 0.1), (1, 1, 1.0)]) for key in keys])
    # By text 0 and 1: of five pictures one chooses another, three drop one, one agrees.
    chosen = [[2, 1] if i % 5 == 0 else [0] if i % 5 < 4 else [0, 1] for i in range(30)]
    for stage in ("labels", "labels_final"):
        tables.labels(stage, [(*row, None) for row in zip(keys, chosen, strict=True)])
    tables.write("barred", {"entity": np.array([], np.int32)})
    columns = {"label": ["x", "y", "z"], "description": [None] * 3}
    tables.write("kb", columns, {"description": pa.string()})
    monkeypatch.setattr(card_pictures, "GALLERY", {"changed": 8, "agreed": 3, "rejected": 1})
    found = card_pictures.gallery(tables.connection, tables.files, {"labels": "text"})
    shown = [p["key"] for p in found if p["group"] == "changed"]
    assert len(shown) == 8
    assert {*shown[:6]} == {*keys[::5]}
    assert sum(p["group"] == "agreed" for p in found) == 3


def test_the_gallery_shows_nothing_that_a_filter_removed(tables):
    keys = [f"{i:02d}" for i in range(40)]
    tables.write("pairs", {"key": keys, "text": ["x"] * 40})
    tables.links([(key, [(0, 0, 1.0), (1, 1, 1.0)]) for key in keys])
    reasons = dict.fromkeys(keys[20:], "below_min_probability")
    rows = [(key, [] if key in reasons else [0], reasons.get(key)) for key in keys]
    tables.labels("labels", rows)
    tables.labels("labels_final", [(key, [0], None) for key in keys[:10]])
    # No picture decided that entity 1 is no label.
    tables.write("barred", {"entity": np.array([1], np.int32)})
    columns = {"label": ["x", "y"], "description": [None] * 2}
    tables.write("kb", columns, {"description": pa.string()})
    found = card_pictures.gallery(tables.connection, tables.files, {"labels": "text"})
    by_group = collections.defaultdict(set)
    for picture in found:
        by_group[picture["group"]].add(picture["key"])
    assert by_group["agreed"] == set(keys[:10])
    assert len(by_group["rejected"]) == card_pictures.GALLERY["rejected"]
    assert by_group["rejected"] <= set(keys[20:])
