"""The vocabulary: which entities are classes, and their dense ids. labels_final/ -> vocabulary/.

vocabulary/entities.parquet   id, qid, name, description, image_count; row = entity id, by
                              descending count, then qid (`mofi_jax.data.records.Entities`)
vocabulary/kb_rows.npy        int32 [e]: the knowledge base's row of each entity id
vocabulary/ids.npy            int32 [2, e]: the way back: these rows, ascending, and their ids
"""

import ml_collections
import numpy as np

from data_prep import engine
from data_prep.filters import stage as filters_stage
from mofi_jax.common import errors
from mofi_jax.data import records


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Counts the pictures of every label and writes vocabulary/.

    Args:
      config: nothing is read from it, but every stage takes one.
      work: the engine; its work directory holds labels_final/ and kb/.

    Returns:
      The one manifest; counts `entities`, `labels`.
    """
    labels = engine.listed(work.workdir / "labels_final")
    parts = work.partial("label_count_parts", _COUNTS, {"labels": labels})
    tables = {"kb": [work.workdir / "kb/entities.parquet"], "parts": parts}
    work.aggregate("label_counts", {"label_counts/entities.parquet": _TOTALS}, tables)
    task = engine.Task("entities", (work.workdir / "label_counts/entities.parquet",))
    return work.map_shards("vocabulary", _write, [task], {"version": 2}, keys=None)


_COUNTS = """
    SELECT entity, count(*) AS image_count
    FROM (SELECT unnest(entities) AS entity FROM read_parquet($labels)) GROUP BY entity
"""
# file_row_number is the row of the knowledge base, which is what labels hold.
_TOTALS = """
    SELECT kb.file_row_number AS kb_row, kb.qid, kb.label, coalesce(kb.description, '') AS text,
           counts.image_count
    FROM read_parquet($kb, file_row_number = true) AS kb
    JOIN (
        SELECT entity, sum(image_count)::BIGINT AS image_count
        FROM read_parquet($parts) GROUP BY entity
    ) AS counts ON counts.entity = kb.file_row_number
    ORDER BY counts.image_count DESC, kb.qid
"""


def invert(kb_rows: np.ndarray) -> np.ndarray:
    """int32 [2, e] of `kb_rows` [e]: ascending, and the entity id of each."""
    ids = np.argsort(kb_rows, kind="stable")
    return np.stack([kb_rows[ids], ids]).astype(np.int32)


def entity_ids(inverse: np.ndarray, entities: np.ndarray) -> np.ndarray:
    """Entity ids int32 [n] of the knowledge base's rows `entities`; `inverse` is of `invert`.

    Raises:
      ValueError: one of them is not in the vocabulary.
    """
    rows, ids = inverse
    positions = np.minimum(np.searchsorted(rows, entities), len(rows) - 1)
    if not np.array_equal(rows[positions], entities):
        raise ValueError("a label is not in the vocabulary")
    return ids[positions]


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    rows = engine.read_table(task.inputs[0])
    if not len(rows):
        raise errors.BadInput(filters_stage.why_empty(outputs.workdir, "i2e"))
    qids, labels, texts = (rows[name].to_pylist() for name in ("qid", "label", "text"))
    entities = records.Entities(qids, labels, texts, rows["image_count"].to_numpy())
    records.write_entities(outputs.path("vocabulary/entities.parquet"), entities)
    kb_rows = rows["kb_row"].to_numpy().astype(np.int32)
    np.save(outputs.path("vocabulary/kb_rows.npy"), kb_rows)
    np.save(outputs.path("vocabulary/ids.npy"), invert(kb_rows))
    return {"entities": len(entities), "labels": int(entities.counts.sum())}
