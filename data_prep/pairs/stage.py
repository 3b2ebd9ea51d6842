"""Sources: image-text pairs in whatever form -> pairs/ (key, text, pointer to the picture's bytes).

`config.sources` names them, "NAME=PATTERN" each: a folder, a glob pattern or a file of what
img2dataset wrote, of parquet or Arrow with pictures in it, of tables beside pictures, or of
pictures with captions beside them; or a data set of TFDS (see `data_prep.pairs.files` and
`formats`). Everything is read once: each sample's place is noted, each picture is decoded in full
and dropped again. Later stages fetch bytes by pointer (path, offset, length; see `read_pictures`).

    unpacked/  what was packed (.gz, and the pictures in parquet), in which nothing can be found by
               its place
    scanned/   of each table its columns, of each large tar its samples, and where each piece of
               `rows_per_shard` of them begins
    parts/     of each shard what is to be read, from a file or a piece of one
    indexed/   NAME.parquet, the usable samples of each part; the others, with their reasons
    pairs/     NAME.parquet, without repeated keys (`pairs.unique`): key, text, source, path,
               offset, length, width, height, sha256, phash, url, extras

Every sample ends either in pairs/ or in rejects/ with a reason:

    no_picture no_text broken_json broken_row broken_record     the sample is not whole
    duplicate_key                               another of that key came before it
    empty_caption caption_not_utf8              the caption cannot be read (needless where entities
                                                are given)
    picture_missing picture_outside picture_is_a_url    a table names no file in its folder
    empty_picture not_a_picture truncated corrupt too_small too_wide too_many_pixels too_many_bytes
    tar_cut_short                               the member at which a tar that was cut short ends
    tar_damaged                                 what cannot be read in a tar, by FILE@BYTE
    not_a_tar                                   a file that only bears the name
    not_a_file                                  links, devices and sparse files in a tar or folder

A tar that was cut short, as an interrupted download is, gives all pairs before the cut, one damaged
in the middle those around it, with a warning and the counts `tars_cut_short` and `tars_damaged`
(`tars_unreadable` where no part is a tar): thousands of good shards should not wait for one.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.pairs import ahead, pictures, samples, unique
from data_prep.pairs.files import Found, find
from data_prep.pairs.formats import folders, parquets, tables, tars, tfds_sets
from data_prep.pairs.samples import Rejected
from mofi_jax.common import errors

__all__ = ["find", "read_pictures", "run"]

# What these leave out are samples that are no pairs yet.
STAGES = ("unpacked", "scanned", "indexed", "pairs")

_READERS = {"tar": tars, "folder": tars, "parquet": parquets, "table": tables, "tfds": tfds_sets}
_BATCH = 10_000  # rows that are held as Python objects
_PIECE_BYTES, _THREADS = 8 << 20, 8  # of pictures that are read at a time, and by how many threads
_FEW_REPEATED = 0.01  # a larger share of repeated keys has another cause than chance


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes pairs/NAME.parquet, shards of about `rows_per_shard` rows (see `pairs.unique`).

    Columns: key, text, source, path (relative ones lie in the work directory), offset, length
    (bytes), width, height (pixels), sha256 (of the picture's bytes), phash (bits of the perceptual
    hash), url, extras (JSON of the columns to keep; both may be null).

    Args:
      config: `dataset`, `labels` (where entities are given, a caption may be missing: it is empty),
        `sources`, `caption_column` (None: known by its name; of TFDS always),
        `keep_columns`, `context_columns` and what `given` names, `rows_per_shard`, `min_side`,
        `max_aspect`, `max_pixels`, `max_caption_chars`.
      work: the engine.

    Returns:
      The manifests; counts `pairs` and `rejected` (every sample is one or the other; of the latter
      `duplicate_keys`), `members` (files of a tar, rows of a table), `captions_cut`,
      `without_caption` and, of tars,
      `tars_cut_short`, `tars_damaged`, `tars_unreadable`, `pairs_missing` and `not_downloaded` (see
      `data_prep.pairs.formats.tars`).

    Raises:
      BadInput: nothing to read, or files that cannot be read and no failure budget for them.
    """
    captionless = config.dataset == "i2e" and config.labels == "given"
    optional = {"optional_captions": True} if captionless else {}
    tasks = _plan(
        *(find(config.sources), config.rows_per_shard, config.caption_column, optional, work)
    )
    names = ("min_side", "max_aspect", "max_pixels", "max_caption_chars")
    settings = {"version": 10, "decoders": pictures.DECODERS, **optional}
    settings |= {name: config[name] for name in names}
    columns = (*config.keep_columns, *given_columns(config.given), *config.context_columns)
    settings["keep_columns"] = list(columns)
    indexed = work.map_shards("indexed", _index, tasks, settings, keys=_keys_of_part)
    _warn(indexed)
    kept = unique.run(indexed, work, config.rows_per_shard)
    work.forget_rejects()
    total = engine.total_counts(kept)
    if total.get("without_caption"):
        logging.warning(
            "%d of the pairs have no caption to train with: where the input has captions, name"
            " their column in config.caption_column",
            total["without_caption"],
        )
    if total.get("duplicate_keys", 0) > _FEW_REPEATED * total.get("pairs", 0):
        logging.warning(
            "%d of the samples bear the key of another and were left out: where sets number their"
            " pairs alike, name each in config.sources",
            total["duplicate_keys"],
        )
    return kept


def given_columns(given: Mapping) -> list[str]:
    """The columns, or places in them, that `config.given` names (see `linking.given`)."""
    named = [given[name] for name in ("ids", "titles", "weights") if given[name]]
    return [*named, *(condition.partition("=")[0] for condition in given["where"])]


def read_pictures(
    workdir: epath.PathLike, paths: Sequence[str], offsets: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Reads pictures by pointer, in the order in which they lie on disk.

    A pointer is, by the name of the file: a record of an ArrayRecord shard (`offset` is its
    number), or bytes anywhere (`offset` is the first). Threads read ahead, some megabytes at a
    time: what opening a file and finding a place in it take, the reader does not wait for.

    Args:
      workdir: where relative paths start.
      paths, offsets, lengths: columns of pairs/.

    Yields:
      (row, the picture's bytes).

    Raises:
      BadInput: a file is gone or not what it was.
    """
    pieces: list[list[int]] = []
    size = 0
    for row in sorted(range(len(paths)), key=lambda row: (paths[row], offsets[row])):
        size += lengths[row]
        if not pieces or paths[pieces[-1][-1]] != paths[row] or size > _PIECE_BYTES:
            pieces.append([])
            size = lengths[row]
        pieces[-1].append(row)

    def read(rows: list[int]) -> list[tuple[int, bytes]]:
        path = os.path.join(os.fspath(workdir), paths[rows[0]])
        if not os.path.exists(path):
            raise errors.BadInput(
                f"The file {path} is gone since its pictures were listed: restore it, or run again"
                " without it."
            )
        places = [offsets[row] for row in rows]
        if tfds_sets.is_shard(path):
            found = tfds_sets.read_rows(path, places)
        else:
            found = _read_bytes(path, places, [lengths[row] for row in rows])
        # Not strict: a file that has become shorter ends early.
        whole = [(r, data) for r, data in zip(rows, found, strict=False) if len(data) == lengths[r]]
        if len(whole) < len(rows):
            raise errors.BadInput(
                f"The file {path} is not as long as when its pictures were listed: restore it, or"
                " run again in another --workdir."
            )
        return whole

    yield from itertools.chain.from_iterable(ahead.results(read, pieces, _THREADS, _THREADS))


def _read_bytes(path: str, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for offset, length in zip(offsets, lengths, strict=True):
            file.seek(offset)
            yield file.read(length)


# --------------------------------------------------------------------------------------- the shards


def _plan(
    found: Sequence[Found], rows: int, text: str | None, optional: dict, work: engine.Engine
) -> list[engine.Task]:
    """Unpacks and scans what has to be; writes parts/ and returns one task for each part."""
    unpack = [engine.Task(file.unpacked, (file.path,)) for file in found if file.unpacked]
    unpacked = work.map_shards("unpacked", tars.unpack, unpack, {"version": 3}, keys=_unknown)
    cut_short = {m["shard"] for m in unpacked if m["counts"]["cut_short"]}
    at = {m["shard"]: os.fspath(work.workdir / m["outputs"][0]["path"]) for m in unpacked}
    paths = [at.get(file.unpacked) if file.unpacked else file.path for file in found]
    scan = [
        engine.Task(file.shard, (path,))
        for file, path in zip(found, paths, strict=True)
        if path and (file.kind in ("parquet", "table") or tars.is_large(path, rows))
    ]
    named = {"text": text} if text else {}
    settings = {"version": 6, "rows": rows, **named, **optional}
    keys = functools.partial(_keys_of_tar, {file.shard: file for file in found})
    scanned = work.map_shards("scanned", _scan, scan, settings, keys=keys)
    plans = {m["shard"]: [work.workdir / o["path"] for o in m["outputs"]] for m in scanned}

    parts: dict[str, tuple[tuple[str, ...], dict]] = {}
    for file, path in zip(found, paths, strict=True):
        if path is None:
            continue  # in quarantine
        part = {"kind": file.kind, "source": file.source, "prefix": file.prefix}
        inputs = (path,)
        if file.kind in ("tar", "folder"):
            part |= {"name": file.path, "cut_short": file.unpacked in cut_short, **named}
            inputs = (*inputs, *tars.sidecars(file.path))
        else:
            part |= {"stem": file.stem, "table": file.path}
        if file.kind == "folder":
            parts[file.shard] = (inputs[1:], part | {"listed": folders.fingerprint(path)})
        elif file.kind == "tfds":
            inputs = (path, *tfds_sets.described_in(path))
            for number, start in enumerate(range(*file.span, rows)):
                piece = [start, min(start + rows, file.span[1])]
                parts[f"{file.shard}-{number:05d}"] = (inputs, {**part, "range": piece})
        elif file.shard in plans:
            *members, plan_path = sorted(plans[file.shard])
            plan = json.loads(plan_path.read_text())
            inputs = (path, *map(os.fspath, members), *inputs[1:])
            for number, piece in enumerate(plan.pop("ranges")):
                parts[f"{file.shard}-{number:05d}"] = (inputs, {**part, **plan, "range": piece})
                plan.pop("head", None)  # told once, with the first piece
        elif file.kind == "tar" and not tars.is_large(path, rows):
            parts[file.shard] = (inputs, part)
    return _write_parts(parts, work.workdir / "parts")


def _write_parts(
    parts: Mapping[str, tuple[tuple[str, ...], dict]], folder: epath.Path
) -> list[engine.Task]:
    """A part is an input of its shard: what changes for one leaves the others finished."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for name, (inputs, part) in sorted(parts.items()):
        path = folder / f"{name}.part"
        text = json.dumps(part, sort_keys=True, ensure_ascii=False) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        tasks.append(engine.Task(name, (*inputs, os.fspath(path))))
    for path in {*engine.listed(folder, ".part")} - {epath.Path(task.inputs[-1]) for task in tasks}:
        path.unlink()
    return tasks


def _scan(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    path = task.inputs[0]
    if path.endswith(".tar"):
        plan = tars.scan(path, settings["rows"], outputs.path(f"scanned/{task.name}.members"))
    else:
        reader = parquets if path.endswith((".parquet", ".arrow")) else tables
        texts = samples.TEXT_COLUMNS + (None,) * ("optional_captions" in settings)
        texts = [settings["text"].lower()] if "text" in settings else texts
        plan = reader.scan(path, settings["rows"], texts)
    text = json.dumps(plan, ensure_ascii=False) + "\n"
    outputs.path(f"scanned/{task.name}.plan").write_text(text)
    if not plan["ranges"]:
        logging.warning("sources: %s holds no row", path)
    return {"pieces": len(plan["ranges"])}


# -------------------------------------------------------------------------------------------- pairs


def _schema():
    import pyarrow as pa

    words = ("key", "text", "source", "path")
    numbers = {"offset": pa.int64(), "length": pa.int64(), "width": pa.int32()}
    return pa.schema(
        [(name, pa.string()) for name in words]
        + list(numbers.items())
        + [("height", pa.int32()), ("sha256", pa.string()), ("phash", pa.int64())]
        + [("url", pa.string()), ("extras", pa.string())]
    )


def _index(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Looks at every sample of a part."""
    import pyarrow as pa

    *inputs, part_path = task.inputs
    part = json.loads(epath.Path(part_path).read_text())
    keep = settings["keep_columns"]
    workdir = os.path.join(os.path.abspath(outputs.workdir), "")
    counts: dict[str, int] = {"usable": 0, "members": 0, "captions_cut": 0, "without_caption": 0}
    schema = _schema()
    unpacked = samples.Unpacked(outputs, f"unpacked/{task.name}.pictures")
    batches, rows, rejects = [], [], []

    def flush() -> None:
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
        batches.append(pa.record_batch(arrays, schema=schema))
        rows.clear()

    for sample in _READERS[part["kind"]].read(inputs, part, keep, counts):
        key = samples.spell_key(part["prefix"] + sample.key)
        try:
            if sample.reason:
                raise Rejected(sample.reason)
            text, was_cut = _caption(sample.text, settings)
            seen = pictures.check_picture(sample.picture, settings)
        except Rejected as rejected:
            rejects.append((key, str(rejected)))
            continue
        counts["usable"] += 1
        counts["captions_cut"] += was_cut
        counts["without_caption"] += not text
        if sample.path is None:
            pointer = unpacked.add(sample.picture)
        else:
            pointer = (sample.path.removeprefix(workdir), sample.offset, sample.length)
        digest = hashlib.sha256(sample.picture).hexdigest()
        more = (
            sample.url and samples.encodable(sample.url),
            samples.extras_json(sample.extras, keep),
        )
        size = (seen.width, seen.height, digest, seen.phash)
        rows.append((key, text, part["source"], *pointer, *size, *more))
        if len(rows) == _BATCH:
            flush()
    flush()
    unpacked.close()
    outputs.write_table(f"indexed/{task.name}.parquet", pa.Table.from_batches(batches, schema))
    columns = {
        "key": pa.array([key for key, _ in rejects], pa.string()),
        "reason": pa.array([reason for _, reason in rejects], pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({unique.COUNTS: json.dumps(counts)})
    outputs.write_table(f"indexed/{task.name}-rejects.parquet", table)
    return counts


def _caption(text: str | bytes | None, settings: Mapping) -> tuple[str, bool]:
    """`samples.caption`; "" for one that cannot be used where none is needed."""
    try:
        return samples.caption(text, settings["max_caption_chars"])
    except Rejected:
        if "optional_captions" in settings:
            return "", False
        raise


def _unknown(task: engine.Task) -> Iterator:
    """Nobody has read the keys yet; see `engine.Engine.map_shards`."""
    return iter(())


def _keys_of_tar(found: Mapping[str, Found], task: engine.Task) -> Iterator:
    """The keys of a tar that is not in pieces yet; of other files nobody knows them."""
    file = found[task.name]
    if file.kind == "tar":
        yield from _read_keys(task.inputs, {**file._asdict(), "name": file.path})


def _keys_of_part(task: engine.Task) -> Iterator:
    *inputs, part_path = task.inputs
    yield from _read_keys(inputs, json.loads(epath.Path(part_path).read_text()))


def _read_keys(inputs: Sequence[str], part: dict) -> Iterator:
    """The keys of a part as far as it can be read; no picture is decoded."""
    import pyarrow as pa

    keys = []
    try:
        for sample in _READERS[part["kind"]].read(inputs, part, (), {}):
            keys.append(samples.spell_key(part["prefix"] + sample.key))
    finally:
        yield pa.chunked_array([keys], pa.string())


def _warn(indexed: Sequence[dict]) -> None:
    damage = {
        "tars_cut_short": "is cut short: used up to the cut",
        "tars_damaged": "is damaged: used but for what is damaged (rejected as tar_damaged)",
        "tars_unreadable": "is no tar (rejected as not_a_tar): remove it or fetch it again",
    }
    for manifest in indexed:
        path, counts = manifest["inputs"][0]["path"], manifest["counts"]
        for name, words in damage.items():
            if counts.get(name):
                logging.warning("%s %s", path, words)
        if counts.get("pairs_missing"):
            missing = counts["pairs_missing"]
            logging.warning("%s holds %d pairs fewer than its _stats.json says", path, missing)
