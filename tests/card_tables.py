"""Small tables as the stages of data preparation leave them, for the tests of the data card."""

import collections

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.linking import stage as linking_stage

INTS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())


class Tables:
    """Writes tables by stage; `files` names them, `connection` reads them."""

    def __init__(self, folder):
        self.folder, self.connection = folder, duckdb.connect()
        self.files = collections.defaultdict(list, unwritten=[])

    def write(self, stage, columns, types=(), name="00000"):
        (self.folder / stage).mkdir(exist_ok=True)
        path = self.folder / stage / f"{name}.parquet"
        types = dict(types)
        arrays = {key: pa.array(values, types.get(key)) for key, values in columns.items()}
        pq.write_table(pa.table(arrays), path)
        self.files[stage].append(str(path))

    def labels(self, stage, rows, name="00000"):
        """Rows (key, entities, reason)."""
        keys, entities, reasons = zip(*rows, strict=True) if rows else ((), (), ())
        columns = {"key": keys, "entities": entities, "reason": reasons}
        types = {"key": pa.string(), "entities": INTS, "reason": pa.string()}
        self.write(stage, columns, types, name)

    def links(self, rows, name="00000"):
        """Rows (key, candidates of [(mention, entity, prior)])."""
        columns = {
            "key": [key for key, _ in rows],
            "mentions": [
                [{"start": 0, "end": 1, "surface": "x", "kind": "ner"} for _ in found]
                for _, found in rows
            ],
            "candidates": [
                [dict(zip(("mention", "entity", "prior"), c, strict=True)) for c in found]
                for _, found in rows
            ],
        }
        types = {
            "mentions": linking_stage.mentions_type(),
            "candidates": linking_stage.candidates_type(),
        }
        self.write("links", columns, types, name)

    def rejects(self, rows, name="00000"):
        keys, stages, reasons = zip(*rows, strict=True) if rows else ((), (), ())
        types = dict.fromkeys(("key", "stage", "reason"), pa.string())
        self.write("rejects", {"key": keys, "stage": stages, "reason": reasons}, types, name)
