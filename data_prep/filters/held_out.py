"""Held-out pairs: pictures of one's own to measure on, which no data set gets. pairs/ -> held_out/.

Held out are pictures of which a hash of seed and sha256 falls into the lowest tenth, at most the
first `config.held_out` by this hash: all pairs of a picture or none, the same pairs for i2t and for
i2e, and where pairs are added later none that was trained on.

    held_out_rows/  rows.parquet   key, shard of the pairs held out
    held_out/       NNNNN.parquet  key, reason ("held_out"), of all pairs, labelled or not
"""

from collections.abc import Sequence

from data_prep import engine

REASON = "held_out"
_BELOW = f"{2**32 // 10:08x}"  # of the first digits of the hash

_ROWS = """
    SELECT key, shard FROM (
        SELECT key, parse_filename(filename, true) AS shard,
               dense_rank() OVER (ORDER BY md5(concat($seed, '/', sha256))) AS place
        FROM read_parquet($pairs, filename = true)
        WHERE md5(concat($seed, '/', sha256)) < $below
    )
    WHERE place <= $count
    ORDER BY key
"""


def run(work: engine.Engine, shards: Sequence[str], count: int, seed: int) -> None:
    """Writes held_out/.

    Args:
      work: the engine; its work directory holds pairs/.
      shards: names of the shards.
      count: pictures, at most.
      seed: of the order.
    """
    tables = {"pairs": engine.listed(work.workdir / "pairs")}
    parameters = {"count": count, "seed": seed, "below": _BELOW}
    rows = "held_out_rows/rows.parquet"
    work.aggregate("held_out_rows", {rows: _ROWS}, tables, parameters)
    tasks = [engine.Task(shard, (work.workdir / rows,)) for shard in shards]
    work.map_shards("held_out", _write, tasks, {}, keys=None)


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = engine.read_table(task.inputs[0])
    keys = rows.filter(pc.equal(rows["shard"], task.name))["key"]
    table = pa.table({"key": keys, "reason": pa.array([REASON] * len(keys), pa.string())})
    outputs.write_table(f"held_out/{task.name}.parquet", table)
    return {"held_out": len(keys)}
