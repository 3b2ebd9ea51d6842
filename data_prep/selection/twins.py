"""Pictures that look the same count once. links/, pairs/ -> twins/

A placeholder on two hundred pages stands out for its entity as no true picture does, because the
others that mention the entity are itself. So of the pictures of one perceptual hash that mention an
entity only the first is among its pictures; the others are judged beside those that are left. And
what pictures are like at large, only the first of one perceptual hash says.

    twins/  NNNNN.parquet key, entity: candidates of a shard of which an earlier picture is the
            same; entity PICTURE: pictures of which an earlier one, whatever it mentions, is
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.linking import rows as link_rows

if typing.TYPE_CHECKING:
    import pyarrow as pa

# Row of the shard and entity as one number: `Engine.repeated` keeps one for each row.
_ENTITIES = 1 << 32
PICTURE = -1  # stands for an entity that every picture with a candidate mentions
_CANDIDATES = f"""
    SELECT concat(phash, ' ', entity) AS value, key, shard, place * {_ENTITIES} + entity AS "row"
    FROM (
        SELECT DISTINCT key, parse_filename(filename, true) AS shard, file_row_number AS place,
               unnest([{PICTURE}] || [c.entity FOR c IN candidates]) AS entity
        FROM read_parquet($links, filename = true, file_row_number = true)
        WHERE len(candidates) > 0
    ) JOIN (SELECT key, phash FROM read_parquet($pairs)) USING (key)
"""


def run(work: engine.Engine, shards: Sequence[str]) -> list[epath.Path]:
    """Writes twins/; returns its files.

    Args:
      work: the engine; its work directory holds pairs/ and links/.
      shards: names of the shards.
    """
    tables = {
        stage: [work.workdir / f"{stage}/{shard}.parquet" for shard in shards]
        for stage in ("links", "pairs")
    }
    tasks, settings = work.repeated("twin", _CANDIDATES, tables, ["key"])
    work.map_shards("twins", _write, tasks, settings, keys=None)
    return [work.workdir / f"twins/{shard}.parquet" for shard in shards]


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    found = 0
    for shard, table in engine.gather_shards(task, settings):
        entity = (table["row"].to_numpy() % _ENTITIES).astype(np.int32)
        own = pa.table({"key": table["key"], "entity": entity})
        outputs.write_table(f"twins/{shard}.parquet", own)
        found += len(own)
    return {"candidates": found}


def among(keys: pa.Array, row: np.ndarray, entity: np.ndarray | int, path: str) -> np.ndarray:
    """bool [p]: which pairs of a row of `keys` and an entity are in a file of twins/."""
    table = engine.read_table(path)
    place = link_rows.positions(link_rows.whole(table["key"]), keys)
    codes = place * np.int64(_ENTITIES) + table["entity"].to_numpy()
    return np.isin(row * np.int64(_ENTITIES) + entity, codes)
