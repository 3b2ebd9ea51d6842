"""Pictures in Hugging Face's parquet: a column of ``struct<bytes, path>``, one of class labels.

Rows stay in the order of the files.
"""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures.parquets import Rows, pick
from mofi_jax.evaluators.sets import listing

SUFFIX = ".parquet"
LABELS = ("label", "labels", "fine_label", "class", "category")
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
    rows = Rows(files)
    classes, labels = _classes(rows)
    paths = rows.column(f"{rows.picture}.path") if rows.has_paths else [None] * len(classes)
    names = [f"{i:08d}_{name}" if name else f"{i:08d}" for i, name in enumerate(paths)]
    return listing.Listing(names, classes, labels, rows.picture_bytes)


def _classes(rows: Rows) -> tuple[np.ndarray, dict[int, str]]:
    import pyarrow as pa

    types = pa.types
    fields = _class_labels(rows.schema.metadata)
    fitting = [name for name in rows.schema.names if name in fields] or [
        field.name
        for field in rows.schema
        if types.is_integer(field.type) or types.is_string(field.type)
    ]
    path = rows.paths[0]
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
    classes, names = np.array(values, np.int64), fields.get(name, [])
    if names and not 0 <= classes.min() <= classes.max() < len(names):
        raise BadInput(
            f"{path} has rows of the classes {classes.min()} to {classes.max()} and names for "
            f"{len(names)}: fetch it again."
        )
    return classes, dict(enumerate(names))


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
