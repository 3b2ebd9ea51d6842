"""Minimum images per entity, on labels written by hand."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine, filters
from tests import workdirs

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("entities", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("fits", pa.list_(pa.float32())),
        ("reason", pa.string()),
    ]
)


def _write_labels(workdir, shards):
    (workdir / "labels").mkdir(parents=True)
    for number, rows in enumerate(shards):
        columns = [
            {
                "key": key,
                "entities": entities,
                "scores": [0.1 * entity for entity in entities],
                "fits": [float(entity) for entity in entities],
                "reason": None if entities else "below_min_fit",
            }
            for key, entities in rows
        ]
        table = pa.Table.from_pylist(columns, schema=_SCHEMA)
        pq.write_table(table, workdir / f"labels/{number:05d}.parquet")


def _read(workdir, pattern):
    return [
        row for path in sorted(workdir.glob(pattern)) for row in pq.read_table(path).to_pylist()
    ]


_SHARDS = [
    [("a", [1, 2]), ("b", [2]), ("c", [3]), ("d", [])],
    [("e", [2, 4]), ("f", [4, 1]), ("g", [5, 3])],
]


@pytest.mark.parametrize("workers", [1, 2])
def test_rare_entities_go_and_so_do_pictures_left_without_label(tmp_path, workers):
    _write_labels(tmp_path, _SHARDS)
    manifests = filters.run(workdirs.config(min_images=2), engine.Engine(tmp_path, workers))
    kept = {row["key"]: row for row in _read(tmp_path, "labels_final/*.parquet")}
    assert {key: row["entities"] for key, row in kept.items()} == {
        "a": [1, 2],
        "b": [2],
        "c": [3],
        "e": [2, 4],
        "f": [4, 1],
        "g": [3],
    }
    assert kept["g"]["fits"] == [3.0]
    assert kept["g"]["scores"] == pytest.approx([0.3])
    assert [m["counts"]["labelled"] for m in manifests] == [3, 3]

    filters.run(workdirs.config(min_images=3), engine.Engine(tmp_path, workers))
    kept = {row["key"]: row["entities"] for row in _read(tmp_path, "labels_final/*.parquet")}
    assert kept == {"a": [2], "b": [2], "e": [2]}
    rejects = {row["key"]: row["reason"] for row in _read(tmp_path, "rejects/labels_final-*")}
    assert rejects == dict.fromkeys("cfg", "rare_entity")


def test_one_pass_is_the_fix_point(tmp_path):
    _write_labels(tmp_path, _SHARDS)
    filters.run(workdirs.config(min_images=3), engine.Engine(tmp_path))
    first = _read(tmp_path, "labels_final/*.parquet")
    again = tmp_path / "again"
    (tmp_path / "labels_final").rename(tmp_path / "moved")
    (again / "labels").mkdir(parents=True)
    for path in (tmp_path / "moved").glob("*.parquet"):
        path.rename(again / "labels" / path.name)
    filters.run(workdirs.config(min_images=3), engine.Engine(again))
    assert _read(again, "labels_final/*.parquet") == first
    assert _read(again, "rejects/*.parquet") == []


def test_nothing_left_is_an_empty_shard_and_not_an_error(tmp_path):
    _write_labels(tmp_path, [[("a", [1])], []])
    filters.run(workdirs.config(min_images=9), engine.Engine(tmp_path))
    assert _read(tmp_path, "labels_final/*.parquet") == []
    assert len(_read(tmp_path, "rejects/*.parquet")) == 1
