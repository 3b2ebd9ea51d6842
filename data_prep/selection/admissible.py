"""Which entities are no labels, whatever a picture shows: by kind, or named. kb/ -> barred/

entities.parquet  entity (row of the knowledge base), ascending
unknown.txt       ids of `never_labels` that the base has not, a line each
"""

import os
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.kb import lookup

_BARRED = """
    SELECT file_row_number::INT AS entity FROM read_parquet($kb, file_row_number = true)
    WHERE (NOT coalesce(list_contains($kinds, kind), true) AND image IS NULL)
       OR file_row_number IN (SELECT unnest($never::BIGINT[]))
    ORDER BY entity
"""


def run(kinds: Sequence[str], never: Sequence[str], work: engine.Engine) -> epath.Path:
    """Writes and returns barred/entities.parquet.

    Args:
      kinds: `config.label_kinds`.
      never: `config.never_labels`, redirects and spellings as of `lookup.rows_of`.
      work: the engine; its work directory holds kb/.
    """
    kb = work.workdir / "kb"
    task = engine.Task("all", (kb / "entities.parquet", kb / "redirects.parquet"))
    settings = {"version": 2, "kinds": list(kinds), "never": [*map(str, never)]}
    [made] = work.map_shards("barred", _bar, [task], settings, keys=None)
    if unknown := made["counts"]["unknown"]:
        path = work.workdir / "barred/unknown.txt"
        with open(path, encoding="utf-8") as file:
            example = file.readline().strip()
        logging.warning(
            "config.never_labels: %d of %d ids, such as %r, are not in the knowledge base: see %s",
            *(unknown, len(never), example, path),
        )
    return work.workdir / "barred/entities.parquet"


def _bar(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    kb = task.inputs[0]
    rows = lookup.rows_of(os.path.dirname(kb), settings["never"])
    parameters = {"kb": kb, "kinds": settings["kinds"], "never": rows.tolist()}
    with engine.connect(outputs) as connection:
        table = engine.ask(connection, _BARRED, parameters).to_arrow_table()
    outputs.write_table("barred/entities.parquet", table)
    unknown = [settings["never"][i] for i in np.flatnonzero(rows < 0)]
    text = "".join(f"{name}\n" for name in unknown)
    outputs.path("barred/unknown.txt").write_text(text, encoding="utf-8")
    return {"entities": len(table), "unknown": len(unknown)}
