"""Pictures that occur more than once among the candidates, byte for byte. pairs/ -> copies/.

copies/   NNNNN.parquet  key, first: the smallest key of those with this picture, which stays
"""

from collections.abc import Sequence

from data_prep import engine

_SQL = """
    SELECT sha256 AS value, key, parse_filename(filename, true) AS shard, file_row_number AS "row"
    FROM read_parquet($pairs, filename = true, file_row_number = true)
"""
_LABELLED = " SEMI JOIN (SELECT key FROM read_parquet($labels) WHERE reason IS NULL) USING (key)"
_NOT_GONE = " ANTI JOIN (SELECT key FROM read_parquet(${stage})) USING (key)"


def run(work: engine.Engine, shards: Sequence[str], labelled: bool, gone: Sequence[str]) -> None:
    """Writes copies/: every candidate but the one with the smallest key, for each sha256.

    Args:
      work: the engine; its work directory holds pairs/.
      shards: names of the shards.
      labelled: only pairs with a label in labels/ are candidates.
      gone: stages with a column `key` of pairs that are no candidates any more, so that no picture
        is lost by being a copy of one that goes for another reason.
    """
    sql = _SQL + (_LABELLED if labelled else "")
    sql += "".join(_NOT_GONE.format(stage=stage) for stage in gone)
    tables = {
        stage: [work.workdir / f"{stage}/{shard}.parquet" for shard in shards]
        for stage in ("pairs", *(["labels"] if labelled else []), *gone)
    }
    tasks, settings = work.repeated("copy", sql, tables, ["key"])
    work.map_shards("copies", _write, tasks, {"version": 2, **settings}, keys=None)


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    copies = 0
    for shard, table in engine.gather_shards(task, settings):
        outputs.write_table(f"copies/{shard}.parquet", table.drop_columns(["row"]))
        copies += len(table)
    return {"copies": copies}
