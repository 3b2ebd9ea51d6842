"""Removes records from a version of a data set: the next version, without them.

Shards that hold none of the records are linked, or copied where the file system cannot; of the
others all records that stay keep their bytes and their order. Entity ids stay what they were,
because trained models know them: an entity may be left without pictures. The new version lies in a
hidden folder beside its final name until it is complete, so that a kill leaves no half version.

    NAME-SPLIT.array_record-*, features.json, dataset_info.json, entities.parquet, tokenizer.json
    keys.parquet       key, shard int32, index int32 (in the shard): where each record is
    removed_keys.txt   the removal list (`data_prep.filters.removed`) of all that was removed so far
    result.json        what this run did, also keys that the data set does not hold

In the work directory that made the version (W/i2e/1.0.0) the same pictures under other keys go too,
and W/removed/ notes all of it, so that the next build leaves it out. Data card and held-out set are
taken away until then: they may show what was removed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.dataset import evaluation, versions
from data_prep.dataset import files as dataset_files
from data_prep.engine import manifests
from data_prep.filters import removed
from data_prep.pairs import pictures
from mofi_jax.common import errors, files
from mofi_jax.data import ops, records

REMOVED_FILE = "removed_keys.txt"
RESULT_FILE = "result.json"

_ROWS = 1 << 16  # of keys.parquet at a time
# Links that a file system cannot make: across disks, none at all, too many.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES)


def remove(
    dataset: epath.PathLike,
    keys: epath.PathLike,
    out: epath.PathLike | None = None,
    max_hamming: int = 4,
) -> dict:
    """Writes the version of `dataset` without what `keys` names.

    Args:
      dataset: the folder of a version, such as W/i2e/1.0.0.
      keys: a removal list, which in a work directory may name pictures by their hashes too.
      out: the folder of the new version, whose name is its number; by default beside `dataset`,
        with the last number one higher.
      max_hamming: how many of the 64 bits of the perceptual hash of a removed picture's copy may
        differ; looked for in the work directory that made the data set.

    Returns:
      What result.json holds: `name`, `version`, `made_from`, `request` (sha256 of the list asked
      for), `removed`, of these `copies` under other keys, `already_removed`, `unknown` (list of
      keys), `shards_rewritten`, `records`, `entities_without_images`. Without a record to remove no
      version is written, and `version` is that of `dataset`.

    Raises:
      BadInput: no finished version, no keys, a folder in the way, or nothing would be left.
    """
    source = epath.Path(os.path.abspath(dataset))
    info = versions.read_info(source)
    request = removed.read([keys], "--keys")
    if not any(request):
        raise errors.BadInput(f"--keys={keys} holds no key: write one in each line.")
    target = epath.Path(os.path.abspath(out)) if out else source.parent / next_version(info.version)
    files.output_folder(target, "--out")
    if not re.fullmatch(r"\d+\.\d+\.\d+", target.name) or target == source:
        raise errors.BadInput(
            f"--out={out} is no folder of a new version: name it by three numbers, such as"
            f" {source.parent / next_version(info.version)}."
        )
    wanted = _resolve(source, info, request, max_hamming)
    done = _read_finished(target, info, request)
    if done is not None:
        wanted.note()
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
        except errors.BadInput:
            shutil.rmtree(temporary)
            raise
        # First: a kill after it leaves what the same command mends, or the next build.
        wanted.note()
        if result["removed"]:
            _publish(temporary, target)
            return result
    shutil.rmtree(temporary)
    return result


# ------------------------------------------------------------------------------------------- input


class _Wanted(NamedTuple):
    """What is to go.

    Attributes:
      request: as asked for.
      keys: all keys that it means.
      known: `request`, and the hashes of the pictures of its keys, as far as they are known.
      workdir: the work directory that made the data set; None: it lies elsewhere.
    """

    request: removed.Removed
    keys: frozenset[str]
    known: removed.Removed
    workdir: epath.Path | None

    def note(self) -> None:
        """Writes W/removed/; takes away data card and held-out set, until the next build."""
        if self.workdir:
            # The keys too: copies that were farther away than the next build looks.
            removed.add(self.workdir, self.known | removed.Removed(self.keys))
            manifests.Ledger(self.workdir, "report").remove("card")
            manifests.Ledger(self.workdir, evaluation.FOLDER).remove(evaluation.TASK)


def _resolve(
    source: epath.Path, info: versions.Info, request: removed.Removed, max_hamming: int
) -> _Wanted:
    """Finds the pictures of the keys, and their copies, where the work directory is at hand."""
    workdir = source.parent.parent
    if not (workdir / f"shards-{info.name}").is_dir() or not engine.listed(workdir / "pairs"):
        if request.digests or request.hashes:
            raise errors.BadInput(
                "--keys names pictures by sha256: or phash:, which are found only in the work"
                f" directory that made the data set, and {source} lies in none: name their keys."
            )
        return _Wanted(request, request.keys, request, None)
    known, keys, columns = request, request.keys, ("key", "sha256", "phash")
    named = removed.Finder(removed.Removed(request.keys), 0)
    for path in engine.listed(workdir / "pairs"):
        table = engine.read_table(path, columns)
        rows = table.filter(named.find(table)).to_pydict()
        known |= removed.of_pictures(zip(*(rows[name] for name in columns), strict=True))
    finder = removed.Finder(known, max_hamming)
    for path in engine.listed(workdir / "pairs"):
        table = engine.read_table(path, columns)
        keys |= frozenset(table["key"].filter(finder.find(table)).to_pylist())
    return _Wanted(request, keys, known, workdir)


def next_version(version: str) -> str:
    """ "1.0.1" from "1.0.0"."""
    major, minor, patch = version.split(".")
    return f"{major}.{minor}.{int(patch) + 1}"


def _fingerprint(request: removed.Removed) -> str:
    return hashlib.sha256(request.text().encode()).hexdigest()


def _read_finished(
    target: epath.Path, info: versions.Info, request: removed.Removed
) -> dict | None:
    """What an earlier run of the same command did; None where the target is free.

    Raises:
      BadInput: something else is in the way.
    """
    if not target.exists():
        return None
    result = manifests.read_json(target / RESULT_FILE) or {}
    same = (result.get("request"), result.get("made_from")) == (_fingerprint(request), info.version)
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
    wanted: _Wanted,
) -> dict:
    """Writes shards, vocabulary, keys.parquet and the list of what was removed into `folder`."""
    index = versions.index_keys(source, info, folder)
    found = versions.find_keys(index, sorted(wanted.keys))
    own = [source / REMOVED_FILE] if (source / REMOVED_FILE).exists() else []
    before = removed.read(own, "The list")
    asked, gone = wanted.request.keys, frozenset(k for own in found.values() for k in own.values())
    lists = removed.lists(wanted.workdir, ()) if wanted.workdir else []
    noted = before.keys | removed.read(lists, "The list").keys
    result = {
        "name": info.name,
        "version": version if found else info.version,
        "made_from": info.version,
        "request": _fingerprint(wanted.request),
        "removed": len(gone),
        "copies": len(gone - asked),
        "already_removed": len((noted & asked) - gone),
        "unknown": sorted(asked - gone - noted),
    }
    if not found:
        return result
    left = sum(info.shard_lengths) - len(gone)
    if not left:
        raise errors.BadInput(
            f"--keys names all {len(gone)} records of {source}: delete the folder instead."
        )
    labels: dict[int, int] = {}
    num_bytes, seen = info.num_bytes, []
    for number in range(len(info.shard_lengths)):
        shard = info.shard(source, number)
        if number in found:
            length = info.shard_lengths[number]
            for record in _rewrite(shard, folder / shard.name, length, found[number]):
                num_bytes -= len(record)
                example = records.parse(record)
                for entity in example["entity_ids"].tolist():
                    labels[entity] = labels.get(entity, 0) + 1
                seen.append((example["key"], *_hashes(example["image"])))
        else:
            _link(shard, folder / shard.name)
    _write_index(index, folder / records.KEYS_FILE, found)
    if index.parent == folder:
        index.unlink()
    result |= {"shards_rewritten": len(found), "records": left}
    result["entities_without_images"] = _write_vocabulary(source, folder, labels)
    # The input's pictures are found by their own hashes, not by those of what was made of them.
    pictures_ = wanted.known if wanted.workdir else removed.of_pictures(seen)
    text = (before | pictures_ | removed.Removed(gone)).text()
    (folder / REMOVED_FILE).write_text(text, encoding="utf-8")
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


def _hashes(image: bytes) -> tuple[str, int | None]:
    try:
        phash = pictures.perceptual_hash(ops.decode_rgb(image))
    except ops.UndecodableImage:
        phash = None
    return hashlib.sha256(image).hexdigest(), phash


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
        manifests.sync(path)
    os.rename(temporary, target)
    manifests.sync(target.parent)
