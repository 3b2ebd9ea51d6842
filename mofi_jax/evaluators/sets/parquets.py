"""Pictures in Hugging Face's parquet or Arrow files, with a column of class labels.

Rows stay in the order of the files.
"""

import json
import os
import posixpath
import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import arrow_files, tree
from mofi_jax.data.pictures.parquets import Rows, pick
from mofi_jax.evaluators.sets import listing

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


def files_of(
    path: epath.Path, wanted: Sequence[str] = tree.TO_MEASURE
) -> tuple[epath.Path, list[epath.Path]]:
    """The parquet or Arrow files that a path names, in order, and what they are called together.

    A file; a folder, at any depth below which they may lie; or of its splits one by its name:
    ``FOLDER/test`` for ``test-00000-of-00002.parquet`` and the following there or in its data/.  Of
    the splits of a folder the first of the `wanted` is taken.  None where the path names none.

    Raises BadInput: a folder of several sets, or one that lacks a file.
    """
    if path.is_file():
        return path, [path] if _is_data(path.name) else []
    folder, split = (path, None) if path.is_dir() else (path.parent, path.name)
    found: dict[str, list[epath.Path]] = {}
    listed = _names(folder, whole=split is None)
    for inside, names in sorted(listed.items()):
        if inside and any(name.lower().endswith(tree.PICTURES) for name in names):
            continue  # tables beside pictures
        for name in filter(_is_data, sorted(names)):
            stem = posixpath.splitext(name)[0]
            # What img2dataset wrote about a tar or folder has its name, and no pictures.
            if {f"{stem}.tar", f"{stem}.tfrecord"} & {*names} or posixpath.join(
                inside, stem
            ) in listed:
                continue
            of_set = found.setdefault(_set_of(posixpath.join(inside, name)), [])
            of_set.append(folder / inside / name)
    if split is not None:
        found = {name: files for name, files in found.items() if split in name.split("/")}
    chosen = tree.of_split(found, wanted) or list(found)
    if len(chosen) > 1:
        raise BadInput(
            f"{path} holds the splits {', '.join(chosen)}: name one, as in {folder / chosen[0]}."
        )
    if not chosen:
        return path, []
    files = found[chosen[0]]
    if len(found) > 1:
        others = ", ".join(found.keys() - {*chosen})
        path = folder / chosen[0]
        logging.info("of %s this is measured: %s (not %s)", folder, path, others)
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    if shards and all(shards) and len(files) != int(shards[0][3]):
        raise BadInput(
            f"{files[0]} is one of {int(shards[0][3])} files and {len(files)} of them are there: "
            "fetch the others."
        )
    return path, files


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") or arrow_files.is_data(name)


def _set_of(path: str) -> str:
    """What all files of one set and split are called: their folder, and what is before a number."""
    inside, name = posixpath.split(posixpath.splitext(path)[0])
    shard = _SHARD.fullmatch(name)
    return posixpath.join(inside, shard[1] if shard else "" if name.isdigit() else name).rstrip("/")


def _names(folder: epath.Path, *, whole: bool) -> dict[str, list[str]]:
    """Names of files by the paths of their folders from one; if not `whole` no deeper than data/.

    Where a path leads to nothing, all that lies around it need not be looked through.
    """
    names: dict[str, list[str]] = {}
    if whole:
        for path in tree.walk(os.fspath(folder)):
            names.setdefault(posixpath.dirname(path), []).append(posixpath.basename(path))
        return names
    for inside in ("", "data"):
        if (folder / inside).is_dir():
            entries = tree.entries(os.path.join(folder, inside))
            names[inside] = [e.name for e in entries if not tree.is_hidden(e.name)]
    return names


def read(files: Sequence[epath.Path]) -> listing.Listing:
    """Lists the rows of such files, of which the labels are read and no picture.

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
    known = [name for name in fitting if name in listing.LABELS or name in fields]
    name = pick(path, rows.schema.names, known, listing.LABELS, "labels")
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
