"""labels/ written by hand, and what stages made of it."""

import zlib

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("entities", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("z_scores", pa.list_(pa.float32())),
        ("probabilities", pa.list_(pa.float32())),
        ("reason", pa.string()),
    ]
)


def write(workdir, shards):
    """Writes labels/ of shards of (key, entities); a pair without entities has no label.

    And pairs/ where there is none, each with a perceptual hash of its own.
    """
    (workdir / "labels").mkdir(parents=True)
    if not (workdir / "pairs").exists():
        (workdir / "pairs").mkdir()
        for number, rows in enumerate(shards):
            keys = [key for key, _ in rows]
            hashes = [zlib.crc32(key.encode()) for key in keys]
            table = {"key": pa.array(keys, pa.string()), "phash": pa.array(hashes, pa.int64())}
            pq.write_table(pa.table(table), workdir / f"pairs/{number:05d}.parquet")
    for number, rows in enumerate(shards):
        columns = [
            {
                "key": key,
                "entities": entities,
                "scores": [0.1 * entity for entity in entities],
                "z_scores": [float(entity) for entity in entities],
                "probabilities": [0.5 for _ in entities],
                "reason": None if entities else "below_min_probability",
            }
            for key, entities in rows
        ]
        table = pa.Table.from_pylist(columns, schema=_SCHEMA)
        pq.write_table(table, workdir / f"labels/{number:05d}.parquet")


def read(workdir, pattern):
    """The rows of all matching files, in the order of their names."""
    return [
        row for path in sorted(workdir.glob(pattern)) for row in pq.read_table(path).to_pylist()
    ]
