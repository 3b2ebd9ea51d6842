"""The vocabulary: which entities are classes, and their dense ids. labels_final/ -> vocabulary/.

vocabulary/entities.parquet   id, qid, name, description, image_count; row = entity id, by
                              descending count, then qid (`mofi_jax.data.records.Entities`)
vocabulary/kb_rows.npy        int32 [e]: the knowledge base's row of each entity id
"""

import os

import ml_collections
import numpy as np

from data_prep import engine
from mofi_jax import errors
from mofi_jax.data import records


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Counts the pictures of every label and writes vocabulary/.

    Args:
      config: nothing is read from it, but every stage takes one.
      work: the engine; its work directory holds labels_final/ and kb/.

    Returns:
      The one manifest; counts `entities`, `labels`.
    """
    workdir = work.workdir
    kb = workdir / "kb/entities.parquet"
    inputs = (kb, *sorted(workdir.glob("labels_final/*.parquet")))
    return work.map_shards("vocabulary", _write, [engine.Task("entities", inputs)], {}, here=True)


def entity_ids(kb_rows: np.ndarray, entities: np.ndarray) -> np.ndarray:
    """Entity ids int32 [n] of the knowledge base's rows `entities`; all must be in `kb_rows`."""
    order = np.argsort(kb_rows, kind="stable")
    positions = np.searchsorted(kb_rows, entities, sorter=order)
    ids = order[np.minimum(positions, len(order) - 1)]
    if not np.array_equal(kb_rows[ids], entities):
        raise ValueError("a label is not in the vocabulary")
    return ids.astype(np.int32)


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import duckdb

    kb_path, *label_paths = task.inputs
    # file_row_number is the row of the knowledge base, which is what labels hold.
    rows = duckdb.execute(
        """
        SELECT kb.file_row_number AS kb_row, kb.qid, kb.label, coalesce(kb.description, ''),
               counts.image_count
        FROM read_parquet($kb, file_row_number = true) AS kb
        JOIN (
            SELECT entity, count(*) AS image_count
            FROM (SELECT unnest(entities) AS entity FROM read_parquet($labels))
            GROUP BY entity
        ) AS counts ON counts.entity = kb.file_row_number
        ORDER BY counts.image_count DESC, kb.qid
        """,
        {"kb": kb_path, "labels": label_paths},
    ).fetchall()
    if not rows:
        raise errors.BadInput(
            f"No entity is left in {os.path.dirname(label_paths[0])}: lower config.min_images or "
            "config.min_fit, or check that the knowledge base fits the captions."
        )
    kb_rows, qids, names, descriptions, counts = zip(*rows, strict=True)
    entities = records.Entities(
        list(qids), list(names), list(descriptions), np.array(counts, np.int64)
    )
    records.write_entities(outputs.path("vocabulary/entities.parquet"), entities)
    np.save(os.fspath(outputs.path("vocabulary/kb_rows.npy")), np.array(kb_rows, np.int32))
    return {"entities": len(entities), "labels": int(entities.counts.sum())}
