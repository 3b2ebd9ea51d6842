"""Pictures in Hugging Face's parquet: a column of ``struct<bytes, path>``, one of class labels.

Rows stay in the order of the files.  A row group is the smallest piece that parquet reads, so that
reading picture by picture in another order would unpack a hundred pictures for each.
"""

import bisect
import itertools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import listing

SUFFIX = ".parquet"
PICTURES = ("image", "img", "jpg", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "class", "category")
_GROUP_BYTES = 1 << 30  # as they lie unpacked in memory
_KEPT_BYTES = 1 << 30  # of those used last: each device's part of a batch lies in another one
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


def files_of(path: epath.Path) -> list[epath.Path]:
    """The parquet files that a path names, in order; none where it names no parquet.

    A file, the only split in a folder, or one of several: ``FOLDER/test`` for
    ``FOLDER/test-00000-of-00002.parquet`` and the following.

    Raises BadInput: a folder of several splits, or one that lacks a file.
    """
    if path.is_file():
        return [path] if path.suffix == SUFFIX else []
    folder, split = (path, None) if path.is_dir() else (path.parent, path.name)
    found: dict[str, list[epath.Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix == SUFFIX and not file.name.startswith("."):
            shard = _SHARD.fullmatch(file.stem)
            found.setdefault(shard[1] if shard else file.stem, []).append(file)
    if split is not None:
        found = {split: found[split]} if split in found else {}
    if len(found) > 1:
        raise BadInput(
            f"{path} holds the splits {', '.join(found)}: name one, as in "
            f"{path / next(iter(found))}."
        )
    files = next(iter(found.values()), [])
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    if shards and all(shards) and len(files) != int(shards[0][3]):
        raise BadInput(
            f"{files[0]} is one of {int(shards[0][3])} files and {len(files)} of them are there: "
            "fetch the others."
        )
    return files


def read(files: Sequence[epath.Path]) -> listing.Listing:
    """Lists the rows of parquet files, of which the labels are read and no picture.

    Raises:
      BadInput: not parquet, no column of pictures or of labels that is known, a row without one of
        them, row groups too large to read picture by picture.
    """
    rows = _Rows(files)
    classes, labels = _classes(rows)
    paths = rows.column(f"{rows.picture}.path") if rows.has_paths else [None] * len(classes)
    names = [f"{i:08d}_{name}" if name else f"{i:08d}" for i, name in enumerate(paths)]
    return listing.Listing(names, classes, labels, rows.picture_bytes)


class _Rows:
    """Row groups of several files as one table, of which the last few used are kept."""

    def __init__(self, paths: Sequence[epath.Path]):
        import pyarrow as pa

        self._paths = paths
        self._files = [_open(path) for path in paths]
        self.schema = self._files[0].schema_arrow
        self._groups, lengths = [], []
        for file, path in zip(self._files, paths, strict=True):
            if file.schema_arrow != self.schema:
                raise BadInput(f"{path} has other columns than {paths[0]}: fetch both again.")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                if facts.total_byte_size > _GROUP_BYTES:
                    raise BadInput(
                        f"A row group of {path} takes {facts.total_byte_size >> 20} MiB, which is "
                        "too much to read pictures one by one: write it anew with row groups "
                        "of some hundred pictures."
                    )
                self._groups.append((file, group))
                lengths.append(facts.num_rows)
        self._ends = list(itertools.accumulate(lengths))
        self._lock = threading.Lock()
        self._kept: dict[int, Any] = {}  # unpacked groups, that used last at the end
        structs = [f.name for f in self.schema if pa.types.is_struct(f.type)]
        with_bytes = [n for n in structs if self.schema.field(n).type.get_field_index("bytes") >= 0]
        self.picture = pick(paths[0], self.schema.names, with_bytes, PICTURES, "pictures")
        self.has_paths = self.schema.field(self.picture).type.get_field_index("path") >= 0

    def column(self, name: str) -> list[Any]:
        """All values of a column or ``struct.member``; read without the pictures."""
        top, _, member = name.partition(".")
        values = []
        for file in self._files:
            column = file.read(columns=[name]).column(top)
            cells = column.to_pylist()
            values += [cell and cell[member] for cell in cells] if member else cells
        return values

    def picture_bytes(self, i: int) -> bytes:
        number = bisect.bisect_right(self._ends, i)
        with self._lock:  # a group is read once, by the first thread that asks for it
            group = self._kept.pop(number, None)
            group = self._read_group(number) if group is None else group
            self._kept[number] = group
            while len(self._kept) > 1 and sum(g.nbytes for g in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        data = group[i - self._ends[number]].as_py()  # counted from the end of the group
        if data is None:
            raise BadInput(f"Row {i} of {self._paths[0]} has no picture in it: fetch it again.")
        return data

    def _read_group(self, number: int) -> Any:
        from pyarrow import compute

        file, group = self._groups[number]
        table = file.read_row_group(group, columns=[f"{self.picture}.bytes"])
        return compute.struct_field(table.column(self.picture), "bytes").combine_chunks()


def _open(path: epath.Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(str(path))
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read as parquet ({error}): fetch it again.") from error


def pick(
    path: epath.Path, names: Sequence[str], fitting: Sequence[str], known: Sequence[str], what: str
) -> str:
    """The first of the `known` names that fits, or the only one that does; else BadInput."""
    found = [name for name in known if name in fitting] or list(fitting)
    if not found or (len(found) > 1 and found[0] not in known):
        raise BadInput(
            f"{path} has no column of {what} that is known by its name (columns: "
            f"{', '.join(names)}): call it one of {', '.join(known)}."
        )
    return found[0]


def _classes(rows: _Rows) -> tuple[np.ndarray, dict[int, str]]:
    import pyarrow as pa

    types = pa.types
    fields = _class_labels(rows.schema.metadata)
    fitting = [name for name in rows.schema.names if name in fields] or [
        field.name
        for field in rows.schema
        if types.is_integer(field.type) or types.is_string(field.type)
    ]
    path = rows._paths[0]
    # An unnamed integer may be a height: only a column of class labels is taken for its kind.
    known = [name for name in fitting if name in LABELS or name in fields]
    name = pick(path, rows.schema.names, known, LABELS, "labels")
    values = rows.column(name)
    without = next((i for i, value in enumerate(values) if value is None or value == -1), None)
    if without is not None:
        raise BadInput(
            f"Row {without} of {path} has no label (column {name}): use a split that has labels."
        )
    if isinstance(values[0], str):
        texts, classes = np.unique(values, return_inverse=True)
        return classes.astype(np.int64), {i: str(text) for i, text in enumerate(texts)}
    return np.array(values, np.int64), dict(enumerate(fields.get(name, ())))


def _class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of each ClassLabel column, from what the library `datasets` writes into schemas."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
