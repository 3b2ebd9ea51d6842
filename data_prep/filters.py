"""Filters over labels: entities with too few pictures are no classes. labels/ -> labels_final/.

One pass, as MOFI: count the pictures of each entity, drop the labels of rare entities, drop the
pictures left without a label. That is its own fix-point: a picture goes only when all its labels
went, so that no count of a kept entity falls.
"""

import os

import ml_collections
import numpy as np

from data_prep import engine


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes labels_final/NNNNN.parquet (columns of labels/, labelled rows only) and rejects.

    Args:
      config: `min_images`, pictures an entity needs.
      work: the engine; its work directory holds labels/.

    Returns:
      The manifests of the shards; counts `labelled`, `rare_entity`.
    """
    workdir = work.workdir
    shards = sorted(workdir.glob("labels/*.parquet"))
    settings = {"min_images": config.min_images}
    task = engine.Task("entities", tuple(shards))
    work.map_shards("frequent", _frequent, [task], settings, here=True)
    frequent = workdir / "frequent/entities.parquet"
    tasks = [engine.Task(path.stem, (path, frequent)) for path in shards]
    return work.map_shards("labels_final", _drop_rare, tasks, {})


def _frequent(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Counts the pictures of every entity; writes those with enough of them."""
    import duckdb

    counts = duckdb.sql(
        """
        SELECT entity, count(*) AS image_count
        FROM (SELECT unnest(entities) AS entity FROM read_parquet($shards))
        GROUP BY entity ORDER BY entity
        """,
        params={"shards": list(task.inputs)},
    ).to_arrow_table()
    counts = counts.cast(_counts_schema())
    frequent = counts.filter(np.asarray(counts["image_count"]) >= settings["min_images"])
    outputs.write_table("frequent/entities.parquet", frequent)
    return {"entities": len(frequent), "rare_entities": len(counts) - len(frequent)}


def _counts_schema():
    import pyarrow as pa

    return pa.schema([("entity", pa.int32()), ("image_count", pa.int64())])


def _drop_rare(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels_path, frequent_path = task.inputs
    labels = pq.read_table(labels_path)
    labels = labels.filter(pa.compute.is_null(labels["reason"]))
    frequent = np.asarray(pq.read_table(frequent_path)["entity"])
    rows, rejects = [], []
    for row in labels.to_pylist():
        kept = np.flatnonzero(np.isin(row["entities"], frequent))
        if len(kept):
            rows.append(
                row
                | {name: [row[name][i] for i in kept] for name in ("entities", "scores", "fits")}
            )
        else:
            rejects.append((row["key"], "rare_entity"))
    outputs.write_table(
        f"labels_final/{os.path.basename(labels_path)}",
        pa.Table.from_pylist(rows, schema=labels.schema),
    )
    outputs.write_rejects(rejects)
    return {"labelled": len(rows), "rare_entity": len(rejects)}
