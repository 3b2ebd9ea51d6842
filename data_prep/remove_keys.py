"""Removes records from a published data set: the next patch version, without them.

    python -m data_prep.remove_keys --dataset W/i2e/1.0.0 --keys KEYS.txt [--out W/i2e/1.0.1]

KEYS.txt has one key in each line. Nothing but the published folder is needed. Shards that hold none
of the keys are linked, or copied where the file system cannot; of the others all records that stay
keep their bytes and their order. Entity ids stay what they were, because trained models know them:
an entity may be left without pictures. The new version lies in a hidden folder beside its final
name until it is complete, so that a kill leaves no half version; the same command run again does
what is missing, or nothing.

    NAME-SPLIT.array_record-*, features.json, dataset_info.json, entities.parquet, tokenizer.json
    keys.parquet       key, shard int32, index int32 (in the shard): where each record is
    removed_keys.txt   all keys removed so far, sorted
    result.json        what this run did, also keys that the data set does not hold

The old version is not touched: delete it once nobody reads it any more. Until then, linked shards
take no room.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from data_prep.dataset import files as dataset_files
from data_prep.dataset import versions
from data_prep.engine import manifests
from mofi_jax.common import cli, errors, files
from mofi_jax.data import records

REMOVED_FILE = "removed_keys.txt"
RESULT_FILE = "result.json"

_ROWS = 1 << 16  # of keys.parquet at a time
# Links that a file system cannot make: across disks, none at all, too many.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES)


def main(dataset: str, keys: str, out: str | None = None) -> None:
    """The command: `remove`, and what it did for people to read."""
    result = remove(dataset, keys, out)
    unknown, version = result["unknown"], result["version"]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        logging.warning("%d keys are not in the data set: %s", len(unknown), shown)
    if not result["removed"]:
        logging.info("%s holds none of the keys: no new version is needed", dataset)
        return
    logging.info(
        "version %s: %d records removed, %d shards written again, %d records left; delete %s to"
        " remove the pictures from this disk",
        *(version, result["removed"], result["shards_rewritten"], result["records"], dataset),
    )


def remove(
    dataset: epath.PathLike, keys: epath.PathLike, out: epath.PathLike | None = None
) -> dict:
    """Writes the version of `dataset` without `keys`.

    Args:
      dataset: the folder of a version, such as W/i2e/1.0.0.
      keys: a file with a key in each line.
      out: the folder of the new version, whose name is its number; by default beside `dataset`,
        with the last number one higher.

    Returns:
      What result.json holds: `name`, `version`, `made_from`, `request` (sha256 of the keys asked
      for), `removed`, `already_removed`, `unknown` (list of keys), `shards_rewritten`, `records`,
      `entities_without_images`. Without a key to remove nothing is written, and `version` is that
      of `dataset`.

    Raises:
      BadInput: no finished version, no keys, a folder in the way, or nothing would be left.
    """
    source = epath.Path(os.path.abspath(dataset))
    info = versions.read_info(source)
    wanted = read_keys(keys)
    target = epath.Path(os.path.abspath(out)) if out else source.parent / next_version(info.version)
    files.output_folder(target, "--out")
    if not re.fullmatch(r"\d+\.\d+\.\d+", target.name) or target == source:
        raise errors.BadInput(
            f"--out={out} is no folder of a new version: name it by three numbers, such as"
            f" {source.parent / next_version(info.version)}."
        )
    done = _read_finished(target, info, wanted)
    if done is not None:
        return done
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.tmp"
    temporary.mkdir(exist_ok=True)
    with manifests.locked(temporary):
        for path in temporary.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        try:
            result = _write(source, info, temporary, target.name, wanted)
            if result["removed"]:
                _publish(temporary, target)
                return result
        except errors.BadInput:
            shutil.rmtree(temporary)
            raise
    shutil.rmtree(temporary)
    return result


# ------------------------------------------------------------------------------------------- input


def read_keys(path: epath.PathLike) -> list[str]:
    """The distinct keys of a file, sorted.

    Raises:
      BadInput: no such file, not UTF-8, or no key in it.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            keys = {line.rstrip("\n") for line in file} - {""}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise errors.BadInput(
            f"--keys={path} cannot be read ({reason}): name a text file with one key in each line."
        ) from error
    if not keys:
        raise errors.BadInput(f"--keys={path} holds no key: write one in each line.")
    return sorted(keys)


def next_version(version: str) -> str:
    """ "1.0.1" from "1.0.0"."""
    major, minor, patch = version.split(".")
    return f"{major}.{minor}.{int(patch) + 1}"


def _fingerprint(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _read_finished(target: epath.Path, info: versions.Info, wanted: Sequence[str]) -> dict | None:
    """What an earlier run of the same command did; None where the target is free.

    Raises:
      BadInput: something else is in the way.
    """
    if not target.exists():
        return None
    result = manifests.read_json(target / RESULT_FILE) or {}
    same = (result.get("request"), result.get("made_from")) == (_fingerprint(wanted), info.version)
    if same and (target / "dataset_info.json").exists():
        return result
    raise errors.BadInput(
        f"{target} exists already and was not made by removing these keys from {info.version}: to"
        " remove more, name the newest version with --dataset, so that what it lacks stays removed."
    )


# ------------------------------------------------------------------------------------- the records


def _write(
    source: epath.Path,
    info: versions.Info,
    folder: epath.Path,
    version: str,
    wanted: Sequence[str],
) -> dict:
    """Writes shards, vocabulary, keys.parquet and the list of what was removed into `folder`."""
    index = versions.index_keys(source, info, folder)
    found = versions.find_keys(index, wanted)
    before = set((_read_text(source / REMOVED_FILE) or "").splitlines())
    known = {key for keys in found.values() for key in keys.values()}
    result = {
        "name": info.name,
        "version": version if found else info.version,
        "made_from": info.version,
        "request": _fingerprint(wanted),
        "removed": len(known),
        "already_removed": len(before & set(wanted) - known),
        "unknown": [key for key in wanted if key not in known and key not in before],
    }
    if not found:
        return result
    left = sum(info.shard_lengths) - len(known)
    if not left:
        raise errors.BadInput(
            f"--keys names all {len(known)} records of {source}: delete the folder instead."
        )
    labels: dict[int, int] = {}
    num_bytes = info.num_bytes
    for number in range(len(info.shard_lengths)):
        shard = info.shard(source, number)
        if number in found:
            length = info.shard_lengths[number]
            for record in _rewrite(shard, folder / shard.name, length, found[number]):
                num_bytes -= len(record)
                for entity in records.parse(record)["entity_ids"].tolist():
                    labels[entity] = labels.get(entity, 0) + 1
        else:
            _link(shard, folder / shard.name)
    _write_index(index, folder / records.KEYS_FILE, found)
    if index.parent == folder:
        index.unlink()
    result |= {"shards_rewritten": len(found), "records": left}
    result["entities_without_images"] = _write_vocabulary(source, folder, labels)
    removed = "".join(f"{key}\n" for key in sorted(before | known))
    (folder / REMOVED_FILE).write_text(removed)
    lengths = [
        length - len(found.get(number, ())) for number, length in enumerate(info.shard_lengths)
    ]
    _carry_over(source, folder)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (folder / RESULT_FILE).write_text(text)
    dataset_files.write_metadata(
        folder,
        name=info.name,
        version=version,
        split=info.split,
        shard_lengths=lengths,
        num_bytes=num_bytes,
        description=info.description,
    )
    return result


def _rewrite(
    source: epath.Path, target: epath.Path, length: int, removed: Mapping[int, str]
) -> list[bytes]:
    """Copies a shard of `length` records without those at `removed`, which it returns."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(os.fspath(target), records.WRITER_OPTIONS)
    gone = []
    for position, record in enumerate(versions.read_shard(source, length)):
        if position not in removed:
            writer.write(record)
        elif records.parse(record)["key"] == removed[position]:
            gone.append(record)
    writer.close()
    if len(gone) != len(removed):
        raise errors.BadInput(
            f"{source.parent / records.KEYS_FILE} does not belong to {source}: remove it, and the"
            " shards are searched instead."
        )
    return gone


# --------------------------------------------------------------------------------- all but records


def _write_index(
    source: epath.Path, target: epath.Path, removed: Mapping[int, Mapping[int, str]]
) -> None:
    """Copies keys.parquet without removed records; those behind them in a shard move up."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    codes = [shard << 32 | position for shard, own in removed.items() for position in own]
    gone = np.sort(np.array(codes, np.int64))
    with pq.ParquetFile(os.fspath(source)) as file:
        schema = file.schema_arrow
        with pq.ParquetWriter(os.fspath(target), schema, compression="zstd") as writer:
            for batch in file.iter_batches(_ROWS):
                shard, position = (batch[n].to_numpy().astype(np.int64) for n in ("shard", "index"))
                code = shard << 32 | position
                before = np.searchsorted(gone, code) - np.searchsorted(gone, shard << 32)
                stays = gone[np.minimum(np.searchsorted(gone, code), len(gone) - 1)] != code
                moved = pa.array((position - before).astype(np.int32))
                batch = batch.set_column(schema.get_field_index("index"), "index", moved)
                writer.write_batch(batch.filter(pa.array(stays)))


def _write_vocabulary(source: epath.Path, folder: epath.Path, labels: Mapping[int, int]) -> int:
    """Writes the vocabulary, if there is one; returns how many entities have no images left."""
    if not (source / records.ENTITIES_FILE).exists():
        return 0
    entities = records.read_entities(source / records.ENTITIES_FILE)
    counts = entities.counts.copy()
    for entity, images in labels.items():
        counts[entity] -= images
    left = records.Entities(entities.qids, entities.names, entities.descriptions, counts)
    records.write_entities(folder / records.ENTITIES_FILE, left, old=entities)
    return int((counts == 0).sum())


def _carry_over(source: epath.Path, folder: epath.Path) -> None:
    """Copies what else lies in the data set: the tokenizer, licences, notes of people."""
    for path in sorted(source.iterdir()):
        made_anew = path.name in ("dataset_info.json", "features.json", RESULT_FILE)
        if path.is_dir() or made_anew or (folder / path.name).exists() or path.name[0] == ".":
            continue
        shutil.copyfile(path, folder / path.name)


def _link(source: epath.Path, target: epath.Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _publish(temporary: epath.Path, target: epath.Path) -> None:
    """Gives the complete folder its name, durably."""
    (temporary / ".lock").unlink()
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    os.rename(temporary, target)
    _sync(target.parent)


def _sync(path: epath.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_text(path: epath.Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    cli.run(main)
