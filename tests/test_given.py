"""labels=given: entities that come with the data, in the layouts in which it is published."""

import contextlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import synthetic
from configs import i2e as i2e_config
from data_prep import build_i2e, engine, label_quality
from data_prep.dataset import shards
from data_prep.kb import build as kb_build
from data_prep.linking import given
from data_prep.pairs import stage as pairs_stage
from data_prep.selection import choose
from mofi_jax.common import errors
from mofi_jax.data import records
from tests import inputs

_CAPTIONS = ["a tram in the rain", "what we saw", "Tower, at dusk", "the tram again", "of 2019"]


def write_kb(folder):
    """Q1 to Q3: of Q1 and Q3 Wikipedia has an article."""
    rows = [
        {"qid": "Q1", "label": "tram", "description": "a vehicle", "title": "Tram car"},
        {"qid": "Q2", "label": "rain", "description": "weather"},
        {"qid": "Q3", "label": "tower", "description": "a building", "title": "Tower (building)"},
    ]
    path = folder / "kb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def photo(number):
    return inputs.picture(40 + number, 40, "jpeg")


def make_config(folder, **changes):
    config = i2e_config.get_config(f"folder={folder / 'pairs'},kb={write_kb(folder)},labels=given")
    for part in ("given", "kb"):
        config[part].update(changes.get(part, {}))
    changes = {name: value for name, value in changes.items() if name not in ("given", "kb")}
    config.update({"min_images": 1, "vocab_size": 300, "workers": 1, "min_side": 16, **changes})
    return config


def build(folder, **changes):
    """Labels by key and counts of the stages of a build; two workers link the same bytes."""
    workdir = folder / "W1"
    result = build_i2e.build(make_config(folder, **changes), str(workdir))
    config = make_config(folder, **changes)
    with engine.Engine(folder / "W2", 2) as work:
        pairs_stage.run(config, work)
        kb_build.prepare(config, work)
        given.run(config, work)
    links = [[path.read_bytes() for path in engine.listed(folder / f"W{n}/links")] for n in (1, 2)]
    assert links[0] == links[1]
    source = records.open_source(workdir, "i2e")
    qids = records.read_entities(workdir / "i2e/1.0.0" / records.ENTITIES_FILE).qids
    labels = {
        source[i]["key"]: {qids[entity] for entity in source[i]["entity_ids"]}
        for i in range(len(source))
    }
    return labels, result["stages"]


def reasons(workdir):
    rows = [row for table in inputs.tables_of(workdir, "rejects/labels-*") for row in table]
    return {row["key"]: row["reason"] for row in rows}


def test_commons_vel_a_webdataset_with_ids_in_its_json(tmp_path):
    (tmp_path / "pairs").mkdir()
    found = [["Q1", "Q2"], ["Q3"], ["Q404", "Q3"], ["Q405"], []]
    for shard, rows in enumerate((range(3), range(3, 5))):
        members = []
        for i in rows:
            about = {"img_id": i, "description": _CAPTIONS[i], "gt_1": found[i], "gt_10": []}
            # Of the two pictures that every row has, one is of a single pixel.
            pixel = inputs.picture(1, 1, "png" if i % 2 else "jpeg")
            jpg, png = (photo(i), pixel) if i % 2 else (pixel, inputs.picture(40 + i, 40))
            members += [
                (f"{100 + i}.jpg", jpg),
                (f"{100 + i}.json", json.dumps(about).encode()),
                (f"{100 + i}.png", png),
            ]
        (tmp_path / f"pairs/{shard:02d}.tar").write_bytes(inputs.tar_bytes(members))
    labels, stages = build(tmp_path, caption_column="description", given={"ids": "gt_1"})
    assert labels == {"100": {"Q1", "Q2"}, "101": {"Q3"}, "102": {"Q3"}}
    assert reasons(tmp_path / "W1") == {"103": "no_candidate", "104": "no_mention"}
    assert stages["links"] == {
        "texts": 5,
        "linked": 3,
        "mentions": 6,
        "candidates": 4,
        "unknown_ids": 2,
        "bad_weights": 0,
    }
    # Neither spaCy nor names: "tram" in a caption is no label.
    assert not (tmp_path / "W1/captions").exists()


def test_wit_base_parquet_of_which_the_articles_titles_are_sitelinks(tmp_path):
    (tmp_path / "pairs").mkdir()
    features = [
        {"language": ["de", "en"], "page_title": ["Bahn", "Tram_car"], "is_main_image": [True] * 2},
        {"language": ["en"], "page_title": ["Tower (building)"], "is_main_image": [False]},
        {"language": ["fr"], "page_title": ["Tower (building)"], "is_main_image": [True]},
        {"language": ["en"], "page_title": ["Tower (building)"], "is_main_image": [True]},
    ]
    long = {"context_page_description": ["long"]}  # what is not named is not kept
    table = pa.table(
        {
            "image": [{"bytes": photo(i), "path": f"{i}.jpg"} for i in range(4)],
            "image_url": [f"https://upload.example.org/{i}.jpg" for i in range(4)],
            "embedding": [[0.5, 0.25]] * 4,
            "caption_attribution_description": _CAPTIONS[:4],
            "wit_features": [long | row for row in features],
        }
    )
    pq.write_table(table, tmp_path / "pairs/train-00000-of-00001.parquet")
    where = ("wit_features.language=en", "wit_features.is_main_image=true")
    labels, _ = build(
        tmp_path,
        caption_column="caption_attribution_description",
        given={"titles": "wit_features.page_title", "where": where},
    )
    assert [sorted(qids) for _, qids in sorted(labels.items())] == [["Q1"], ["Q3"]]
    assert sorted(reasons(tmp_path / "W1").values()) == ["no_mention"] * 2
    [pairs] = inputs.tables_of(tmp_path / "W1", "pairs/*")
    assert "long" not in pairs[0]["extras"]
    assert pairs[0]["url"] == "https://upload.example.org/0.jpg"


def test_pictures_without_captions_in_tars_and_tables(tmp_path, caplog):
    for name in ("pairs", "p", "u"):
        (tmp_path / name).mkdir()
    found = ["http://www.wikidata.org/entity/Q1", ["q3", None, "<wd:Q3>"], 3, None]
    members = []
    for i, ids in enumerate(found):
        members += [(f"{i}.jpg", photo(i)), (f"{i}.json", json.dumps({"qid": ids}).encode())]
    members += [("5.jpg", photo(5)), ("5.json", b'{"qid": "Q1"}'), ("5.txt", b"\xff")]
    (tmp_path / "pairs/0.tar").write_bytes(inputs.tar_bytes(members))
    table = pa.table({"jpg": [photo(6), photo(7)], "qid": ["Q2", "Q2 Q404"]})
    pq.write_table(table, tmp_path / "p/0.parquet")
    (tmp_path / "u/8.jpg").write_bytes(photo(8))
    (tmp_path / "u/u.csv").write_text("file_name,qid\n8.jpg,Q1\n")
    sources = tuple(f"{name}={tmp_path / name}" for name in ("pairs", "p", "u"))
    about = {"given": {"ids": "qid"}, "sources": sources}
    labels, stages = build(tmp_path, **about)
    found = sorted((key.rpartition("/")[2], *sorted(ids)) for key, ids in labels.items())
    assert found[:4] == [("0", "Q1"), ("00000000", "Q1"), ("00000000", "Q2"), ("00000001", "Q2")]
    assert found[4:] == [("1", "Q3"), ("5", "Q1")]
    assert stages["links"]["unknown_ids"] == 2
    assert stages["pairs"]["without_caption"] == 8
    assert "8 of the pairs have no caption to train with" in caplog.text
    source = records.open_source(tmp_path / "W1", "i2e")
    assert {source[i]["text"] for i in range(len(source))} == {""}
    for dataset, labels, column in (("i2e", "given", "words"), ("i2t", "given", None)):
        config = make_config(tmp_path, caption_column=column, **about)
        config.update({"dataset": dataset, "labels": labels})
        with pytest.raises(errors.BadInput, match=r"or name it in config.caption_column"):
            build_i2e.build(config, str(tmp_path / "W3"))


@pytest.mark.parametrize("join", ["url", "key"])
def test_entitynet_tables_joined_with_what_img2dataset_has_fetched(tmp_path, join):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "entitynet/images_metadata").mkdir(parents=True)
    queries = {
        "query_hash": ["h1", "h2", "h3", "h4", "h5"],
        "query": ["yellow tram", "tram", "rain", "dog", "tower"],
        "query_type": ["wd-attrnoun-world", *["wd-noun-world"] * 2, *["wordnet-noun-living"] * 2],
        "entity": ["Q1", "Q1", "Q2", "wordnet:dog.n.01", "wordnet:tower.n.01"],
        "attribute": ["yellow", None, None, None, None],
    }
    pq.write_table(pa.table(queries), tmp_path / "entitynet/entitynet-queries.parquet")
    for part, rows in enumerate(([0, 1, 4], [2, 3])):
        hashes = [["h1", "h2", "h5"], ["h3", "h1"], ["h4"], ["h9"], ["h3"]]
        metadata = {
            "key": [f"k{i}" for i in rows],
            "qh": [hashes[i] for i in rows],
            "texts": [[_CAPTIONS[i]] for i in rows],
            "images_link": [[f"http://a.org/{i}.jpg", f"http://b.org/{i}.jpg"] for i in rows],
            "images_contextlink": [["http://a.org/"] * 2 for _ in rows],
            "images_width": [[40, 40] for _ in rows],
            "images_height": [[40, 40] for _ in rows],
        }
        name = f"train-{part:05d}-of-00002.parquet"
        pq.write_table(pa.table(metadata), tmp_path / "entitynet/images_metadata" / name)
    name = {"url": "{:09d}", "key": "k{}"}[join]
    members = []
    for i in range(4):
        about = {"url": f"http://b.org/{i}.jpg" if join == "url" else None, "caption": _CAPTIONS[i]}
        members += [
            (f"{name.format(i)}.jpg", photo(i)),
            (f"{name.format(i)}.txt", _CAPTIONS[i].encode()),
            (f"{name.format(i)}.json", json.dumps(about).encode()),
        ]
    (tmp_path / "pairs/00000.tar").write_bytes(inputs.tar_bytes(members))
    about = {"entitynet": str(tmp_path / "entitynet"), "join": join}
    # WordNet's names are none of this base's ids, but a table of redirects may know them.
    (tmp_path / "names.tsv").write_text("from\tto\nwordnet:tower.n.01\tQ3\n")
    moved = {"redirects": str(tmp_path / "names.tsv")}
    labels, _ = build(tmp_path, given=about, kb=moved)
    assert labels == {name.format(0): {"Q1", "Q3"}, name.format(1): {"Q1", "Q2"}}
    # A hash that no query has says nothing.
    assert reasons(tmp_path / "W1") == {
        name.format(2): "no_candidate",
        name.format(3): "no_mention",
    }


# ------------------------------------------------------------------------------------ ids, weights


def _rows(extras, **settings):
    settings = {"ids": "ids", "titles": None, "weights": None, "where": [], **settings}
    return list(given._given(extras, settings))


def test_ids_are_one_or_many_with_weights_beside_them():
    assert _rows({"ids": "Q1"}) == [("Q1", 1.0)]
    assert _rows({"ids": "Q1 Q2"}) == [("Q1", 1.0), ("Q2", 1.0)]
    assert _rows({"ids": "Q1, Q2;Q3"}) == [("Q1", 1.0), ("Q2", 1.0), ("Q3", 1.0)]
    assert _rows({"a": "Tram car"}, ids=None, titles="a") == [("Tram car", 1.0)]
    assert _rows({"ids": [" Q2 ", None, 7, ""]}) == [("Q2", 1.0), ("7", 1.0)]
    assert _rows({}) == []
    weighted = {"ids": ["Q1", "Q2"], "w": [0.25, 1]}
    assert _rows(weighted, weights="w") == [("Q1", 0.25), ("Q2", 1.0)]
    assert str(_rows({"ids": ["Q1", "Q2"], "w": ["much"]}, weights="w")) == str(
        [("Q1", float("nan")), ("Q2", float("nan"))]
    )
    texts = {"ids": "Q1|Q2", "w": "0.9|1e-1", "one": "0.5", "bad": [10**400, "a lot"]}
    assert _rows(texts, weights="w") == [("Q1", 0.9), ("Q2", 0.1)]
    assert _rows(texts, weights="one") == [("Q1", 0.5), ("Q2", 0.5)]
    assert not any(weight >= 0 for _, weight in _rows(texts, weights="bad"))
    assert _rows({"ids": ["Q1", "Q2"], "n": [1, 2]}, where=[("n", "2")]) == [("Q2", 1.0)]


def test_weights_are_priors_and_what_is_doubtful_is_left_to_the_picture(tmp_path):
    """As objects in a table, more likely wrong than right, or with a weight that is none."""
    (tmp_path / "pairs").mkdir()
    found = [
        [{"id": "Q1", "p": 0.9}, {"id": "Q2", "p": 0.3}],
        [{"id": "Q2", "p": 3.0}],
        [{"id": "Q3", "p": 0.4}],
        [{"id": "Q1", "p": 0.8}],
    ]
    lines = []
    for i, entities in enumerate(found):
        (tmp_path / f"pairs/{i}.jpg").write_bytes(photo(i))
        lines.append({"file": f"{i}.jpg", "words": _CAPTIONS[i], "key": f"{i}", "about": entities})
    table = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "pairs/table.jsonl").write_text(table)
    about = {"ids": "about.id", "weights": "about.p"}
    config = make_config(tmp_path, given=about, caption_column="words")
    stages = build_i2e.build(config, str(tmp_path / "W1"))["stages"]
    [links] = inputs.tables_of(tmp_path / "W1", "links/*")
    priors = [[round(c["prior"], 3) for c in row["candidates"]] for row in links]
    assert priors == [[0.9, 0.3], [], [0.4], [0.8]]
    assert stages["links"]["bad_weights"] == 1
    assert stages["labels"]["labelled"] == 2
    # With a model to see them, all of them are candidates, in the same work directory.
    synthetic.write_clip(tmp_path / "clip", _CAPTIONS)
    loose = {"min_probability": 0.0, "caption_column": "words"}
    config = make_config(tmp_path, given=about, clip=str(tmp_path / "clip"), **loose)
    stages = build_i2e.build(config, str(tmp_path / "W1"))["stages"]
    assert stages["labels"]["labelled"] == 3
    page = (tmp_path / "W1/report/index.html").read_text()
    assert "entities are given" in page
    assert "<mark></mark>" not in page


def test_a_build_that_stops_halfway_leaves_nothing_that_reads_as_whole(tmp_path, monkeypatch):
    (tmp_path / "pairs").mkdir()
    members, truth = [], ""
    for i, (first, second) in enumerate([("Q1", "Q3"), ("Q2", "Q3"), ("Q1", "Q2")]):
        about = json.dumps({"first": first, "second": second})
        members += [(f"{i}.jpg", photo(i)), (f"{i}.json", about.encode())]
        truth += json.dumps({"key": f"{i}", "qid": first, "says": [first]}) + "\n"
    (tmp_path / "pairs/0.tar").write_bytes(inputs.tar_bytes(members))
    (tmp_path / "truth.jsonl").write_text(truth)

    def run(column, stops_at=None):
        config = make_config(tmp_path, given={"ids": column}, shard_examples=1)
        with monkeypatch.context() as patch:
            if stops_at:
                patch.setattr(*stops_at, lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError) if stops_at else contextlib.nullcontext():
                build_i2e.build(config, str(tmp_path / "W"))

    def precision():
        quality = label_quality.measure_workdir(tmp_path / "W", tmp_path / "truth.jsonl")
        return quality["selected"]["precision"]

    run("first")
    assert precision() == 1
    run("second", stops_at=(choose, "run"))
    with pytest.raises(errors.BadInput, match="labels/ that were not made from its links/pairs-0"):
        precision()
    assert len(records.open_source(tmp_path / "W", "i2e")) == 3  # the set of before, whole
    run("second", stops_at=(shards, "_describe"))
    assert precision() == 0
    with pytest.raises(errors.BadInput, match="holds no finished version"):
        records.open_source(tmp_path / "W", "i2e")
    run("second")
    assert len(records.open_source(tmp_path / "W", "i2e")) == 3


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({}, "needs one of ids, titles, entitynet"),
        ({"ids": "a", "titles": "b"}, "set are: ids, titles"),
        ({"ids": "a", "where": ("language",)}, "'language' is not PLACE=VALUE"),
        ({"entitynet": "nowhere"}, "holds entitynet-queries.parquet"),
        ({"ids": "qid"}, "none of 1 pairs has an entity there"),
        ({"ids": "caption"}, "none of 2 ids there is in the knowledge base"),
        ({"ids": "caption", "weights": "p"}, "given.weights='p': 2 of 2 ids have no number from 0"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_sentence(tmp_path, about, words):
    (tmp_path / "pairs").mkdir()
    members = [("0.jpg", photo(0)), ("0.json", b'{"caption": "a tram"}')]
    (tmp_path / "pairs/0.tar").write_bytes(inputs.tar_bytes(members))
    with pytest.raises(errors.BadInput, match=words):
        build_i2e.build(make_config(tmp_path, given=about), str(tmp_path / "W"))
    assert (tmp_path / "W").exists() == ("none of" in words or "2 of 2" in words)


def test_ids_are_not_passed_over_where_captions_are_read(tmp_path):
    config = make_config(tmp_path, given={"ids": "qid"}, labels="text")
    with pytest.raises(errors.BadInput, match="ids='qid' is for labels=given, and this is labels="):
        given.check(config)
    config = make_config(tmp_path, given={"ids": "qid"}, context_columns=("title",))
    with pytest.raises(errors.BadInput, match="is for captions, which labels=given does not read"):
        given.check(config)


def test_entitynets_tables_are_looked_at_before_anything_is_written(tmp_path):
    (tmp_path / "images_metadata").mkdir()
    pq.write_table(pa.table({"query_hash": ["h"]}), tmp_path / "entitynet-queries.parquet")
    (tmp_path / "images_metadata/train-0.parquet").write_text("version https://git-lfs")
    config = make_config(tmp_path, given={"entitynet": str(tmp_path), "join": "name"})
    with pytest.raises(errors.BadInput, match="choose url or key"):
        given.check(config)
    config.given.join = "url"
    with pytest.raises(errors.BadInput, match="columns query_hash, entity"):
        given.check(config)
    pq.write_table(
        pa.table({"query_hash": ["h"], "entity": ["Q1"]}), tmp_path / "entitynet-queries.parquet"
    )
    with pytest.raises(errors.BadInput, match="git lfs pull"):
        given.check(config)
    good = {"key": pa.array([1]), "qh": pa.array([["h"]]), "images_link": pa.array([["a"]])}
    for texts in (pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        good |= {"key": pa.array(["1"]).cast(texts), "qh": pa.array([["h"]], pa.list_(texts))}
        pq.write_table(pa.table(good), tmp_path / "images_metadata/train-0.parquet")
        given.check(config)
    for wrong in ({"qh": ["h"]}, {"images_link": [[{"a": 1}]]}, {"key": [["k"]]}):
        table = pa.table(good | {name: pa.array(values) for name, values in wrong.items()})
        pq.write_table(table, tmp_path / "images_metadata/train-0.parquet")
        with pytest.raises(errors.BadInput, match=r"key, qh \(lists\), images_link"):
            given.check(config)


def test_tables_of_other_pictures_are_told():
    about = {"ids": None, "titles": None, "entitynet": "EN", "join": "key"}
    with pytest.raises(errors.BadInput, match=r"none of 3 pairs .* that the key of pairs is"):
        given._check_found(about, {"texts": 3, "mentions": 0})


def test_only_named_members_of_a_struct_are_read(tmp_path):
    struct = [{"qid": "Q1", "big": "x" * 50}]
    table = pa.table({"jpg": [photo(0)], "caption": ["a"], "about": struct, "many": [struct]})
    pq.write_table(table, tmp_path / "t.parquet")
    config = inputs.make_config(
        tmp_path, keep_columns=("about.qid", "many.qid", "many", "none.qid")
    )
    pairs_stage.run(config, engine.Engine(tmp_path / "W"))
    [[pair]] = inputs.tables_of(tmp_path / "W", "pairs/*")
    assert json.loads(pair["extras"]) == {
        "about.qid": "Q1",
        "many": struct,
        "many.qid": ["Q1"],
    }
