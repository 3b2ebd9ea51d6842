"""Dense entity ids: order, names, and the way back to the knowledge base."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import engine
from data_prep.dataset import vocabulary
from mofi_jax.common import errors
from mofi_jax.data import records
from tests import workdirs


def _write(workdir, labels):
    (workdir / "kb").mkdir()
    kb = {
        "qid": ["Q5", "Q4", "Q30", "Q2", "Q1"],
        "label": ["five", "four", "thirty", "two", "one"],
        "description": ["5", None, "30", "2", "1"],
    }
    pq.write_table(pa.table(kb), workdir / "kb/entities.parquet")
    (workdir / "labels_final").mkdir()
    _write_labels(workdir, labels)


def _write_labels(workdir, labels):
    for number, shard in enumerate(labels):
        table = {
            "key": [str(i) for i in range(len(shard))],
            "entities": pa.array(shard, pa.list_(pa.int32())),
        }
        pq.write_table(pa.table(table), workdir / f"labels_final/{number:05d}.parquet")


def test_ids_come_by_descending_count_then_qid(tmp_path):
    _write(tmp_path, [[[1], [1, 3], [0]], [[1, 2], [3], [2]]])
    [manifest] = vocabulary.run(workdirs.config(), engine.Engine(tmp_path))
    entities = records.read_entities(tmp_path / "vocabulary/entities.parquet")
    # Counts 3, 2, 2, 1; among equals "Q2" sorts before "Q30".
    assert entities.qids == ["Q4", "Q2", "Q30", "Q5"]
    assert entities.names == ["four", "two", "thirty", "five"]
    assert entities.descriptions == ["", "2", "30", "5"]
    assert entities.counts.tolist() == [3, 2, 2, 1]
    kb_rows = np.load(tmp_path / "vocabulary/kb_rows.npy")
    assert kb_rows.dtype == np.int32
    assert kb_rows.tolist() == [1, 3, 2, 0]
    inverse = np.load(tmp_path / "vocabulary/ids.npy")
    assert inverse.tolist() == [[0, 1, 2, 3], [3, 0, 2, 1]]
    assert vocabulary.entity_ids(inverse, np.array([0, 1, 1])).tolist() == [3, 0, 0]
    assert manifest["counts"] == {"entities": 4, "labels": 8}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            {"labels": {"pairs": 5, "labelled": 0, "no_candidate": 1, "barred": 4}},
            "of 5 pairs (1 are no_candidate, 4 are barred): check config.label_kinds and",
        ),
        (
            {
                "labels": {"pairs": 9, "labelled": 7},
                "dropped-i2e": {"dropped": 6, "eval_duplicate:a": 6, "eval_duplicate:a:cosine": 6},
                "labels_final": {"labelled": 0, "rare_entity": 1},
            },
            "of 7 labelled pairs (6 are eval_duplicate:a, 1 are rare_entity): check config.filters",
        ),
        (
            {"labels_final": {"labelled": 0, "rare_entity": 2}},
            "of 2 labelled pairs (2 are rare_entity): check config.min_images.",
        ),
    ],
)
def test_where_nothing_is_left_the_step_that_took_it_is_named(tmp_path, stages, words):
    _write(tmp_path, [[], []])
    work = engine.Engine(tmp_path)
    for stage, counts in stages.items():
        work.map_shards(stage, lambda *_, counts=counts: counts, [engine.Task("0", ())], {})
        _write_labels(tmp_path, [[], []])
    with pytest.raises(errors.BadInput, match=re.escape(f"No pair is left {words}")):
        vocabulary.run(workdirs.config(), engine.Engine(tmp_path))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True), st.data())
def test_entity_ids_invert_the_vocabulary(rows, data):
    kb_rows = np.array(rows, np.int32)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    inverse = vocabulary.invert(kb_rows)
    back = vocabulary.entity_ids(inverse, kb_rows[np.array(ids, int)])
    assert back.tolist() == ids
    assert back.dtype == np.int32
    unknown = data.draw(st.integers(0, 10**6 + 1).filter(lambda row: row not in rows))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        vocabulary.entity_ids(inverse, np.array([unknown]))
