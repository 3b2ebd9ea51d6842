"""The data card shows nothing of a pair that a filter or the removal list blocks."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.card import pictures as card_pictures
from data_prep.card import stage as card_stage
from data_prep.dataset import shards, vocabulary
from data_prep.filters import stage as filters_stage
from data_prep.selection import choose, embed
from tests import card_tables, label_tables, workdirs

# By the rule that blocks them: a labelled pair and one that the selection rejects.
BLOCKED = {
    "removed": ("0000", "0004"),
    "hash": ("0001", "0009"),
    "domain": ("0002", "0014"),
    "column": ("0003", "0019"),
    "evaluation": ("0005", "0024"),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The work directory up to links/, with words of its own in every caption."""
    workdir, pairs = workdirs.write(tmp_path)
    monkeypatch.setattr(embed, "load_model", lambda folder, batch_size: workdirs.Model())
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/model.json").write_text("{}")
    (tmp_path / "eval").mkdir()
    digests = []
    for path in sorted((workdir / "pairs").glob("*.parquet")):
        rows = pq.read_table(path)
        schema, rows = rows.schema, rows.to_pylist()
        for row in rows:
            row["text"] += f" word{row['key']}"
            if row["key"] in BLOCKED["domain"]:
                row["url"] = "https://bad.example/x.jpg"
            if row["key"] in BLOCKED["column"]:
                row["extras"] = json.dumps({"punsafe": 0.9})
            if row["key"] in BLOCKED["hash"]:
                digests.append(row["sha256"])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    for key in BLOCKED["evaluation"]:
        [pair] = [pair for pair in pairs if pair.key == key]
        suffix = "jpg" if int(key) % 2 else "png"
        (tmp_path / f"eval/{key}.{suffix}").write_bytes(workdirs.picture(pair, suffix))
    for name, lines in (
        *(("hashes", digests), ("domains", ["bad.example"]), ("list", BLOCKED["removed"])),
    ):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    config = workdirs.config(
        sources=(f"colours={tmp_path / 'tars'}",),
        clip=str(tmp_path / "clip"),
        removed=(str(tmp_path / "list"),),
    )
    with config.unlocked():
        config.filters.eval_sets = {"birds": str(tmp_path / "eval")}
        config.filters.eval_false_positives = 0.0
        config.filters.safety.update(
            blocked_hashes=str(tmp_path / "hashes"),
            blocked_domains=str(tmp_path / "domains"),
            columns={"punsafe": 0.5},
        )
    return workdir, config


def test_no_picture_and_no_word_of_what_is_blocked(world):
    workdir, config = world
    work = engine.Engine(workdir)
    for stage in (choose, filters_stage, vocabulary):
        stage.run(config, work)
    shards.run(config, work, "i2e")
    card_stage.run(config, work)
    blocked = {key for keys in BLOCKED.values() for key in keys}
    labels = {row["key"]: row["reason"] for row in label_tables.read(workdir, "labels/*.parquet")}
    for labelled, rejected in BLOCKED.values():
        assert labels[labelled] is None
        assert labels[rejected] == "below_min_probability"
    numbers = json.loads((workdir / "report/report.json").read_text())
    shown = [picture["key"] for picture in numbers["gallery"] if picture["group"] == "rejected"]
    assert {*shown} == {k for k, reason in labels.items() if reason and k not in blocked} - {
        key for key, reason in labels.items() if reason in ("no_mention", "no_candidate")
    }
    files = {"pairs": sorted((workdir / "pairs").glob("*.parquet"))}
    connection = card_tables.Tables(workdir).connection
    thumbnails = card_pictures.thumbnails(connection, files, workdir, sorted({*blocked, *shown}))
    page = (workdir / "report/index.html").read_text()
    told = page + (workdir / "report/report.json").read_text()
    for key in blocked:
        assert thumbnails[key] not in page
        assert f'"{key}"' not in told
        assert f"word{key}" not in told
    assert shown
    assert all(thumbnails[key] in page for key in shown)
    # A filter that has judged nothing, as all its shards are in quarantine, is not off.
    for path in engine.listed(workdir / "unsafe"):
        path.unlink()
    card_stage.run(config, work)
    numbers = json.loads((workdir / "report/report.json").read_text())
    assert numbers["gallery"]
    assert "rejected" not in [picture["group"] for picture in numbers["gallery"]]


def test_what_a_filter_could_not_judge_is_not_shown(tmp_path):
    tables = card_tables.Tables(tmp_path)
    for name in ("00000", "00001"):
        keys = [f"{name}-{i}" for i in range(3)]
        tables.write("pairs", {"key": keys, "text": ["x"] * 3}, name=name)
        tables.links([(key, [(0, 0, 1.0)]) for key in keys], name)
        tables.labels("labels", [(key, [], "below_min_probability") for key in keys], name)
    tables.labels("labels_final", [])
    tables.write("barred", {"entity": np.zeros(0, np.int32)})
    tables.write("kb", {"label": ["x"], "description": [""]})
    # The other shard's is in quarantine.
    tables.write("unsafe", {"key": ["00000-1"], "reason": ["blocked_hash"]})
    found = card_pictures.gallery(tables.connection, tables.files, {"labels": "text"})
    assert {picture["key"] for picture in found} == {"00000-0", "00000-2"}
