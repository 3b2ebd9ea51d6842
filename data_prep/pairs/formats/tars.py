"""Tars in img2dataset's layout, and folders: members, sidecars, unpacking.

A sample is what shares a name up to the last dot: a picture (.jpg .jpeg .png .webp .gif), a caption
(`.txt`, or else "caption" in `.json`; or what `config.caption_column` names there) and what else
`.json` says. Where a kind occurs twice under one name, the second is a sample of its own, with the
reason `duplicate_key`; but a tiny picture of another format only keeps its place: in Commons-VEL
all rows have a .jpg and a .png, one of them of a single pixel. Beside `00000.tar` may lie
`00000.parquet`, which then says more than the `.json` members, also of what could not be
downloaded, and `00000_stats.json`, which says how many pairs the tar should hold. Names are keys:
nothing is ever written under them. What macOS puts beside files (`._NAME`, `__MACOSX/`) is ignored.

Of a large tar `scan` lists the samples once, so that each piece of it is a shard of its own. A
folder of such files is read as the tar that would hold them (`formats.folders`).

Damage costs what it covers: a tar that was cut short gives what lies before the cut, one damaged in
the middle also what lies behind, and a file that is no tar is one reject.
"""

import collections
import contextlib
import json
import os
import typing
import zlib
from collections.abc import Iterable, Iterator, Sequence

from absl import logging

from data_prep import engine
from data_prep.pairs import pictures, samples
from data_prep.pairs.formats import folders, parquets
from data_prep.pairs.samples import Sample
from mofi_jax.common import errors
from mofi_jax.data.pictures.tar_headers import Listing, Member, list_members

_TINY = 1_000  # bytes; one pixel takes 70 as PNG, 630 as JPEG
# Pictures can hardly be packed any further. What grows more than this was made to fill the disk.
_MAX_RATIO, _ALWAYS_FINE = 100, 64 << 20
# Fewer than pairs have on average: a tar of fewer bytes is one shard, and nobody lists it before.
_BYTES_OF_PAIR = 8_000


def stem(path: str) -> str:
    """ "00000" from "folder/00000.tar.gz"."""
    return os.path.basename(path).removesuffix(".gz").rpartition(".")[0]


def is_large(path: str, rows: int) -> bool:
    """Whether a tar may hold many more than so many pairs; only its size is looked at."""
    return path.endswith(".tar") and os.path.getsize(path) > rows * _BYTES_OF_PAIR


def sidecars(path: str) -> tuple[str, ...]:
    """The parquet and the statistics that lie beside a tar or folder."""
    base = path if os.path.isdir(path) else os.path.join(os.path.dirname(path), stem(path))
    return tuple(name for name in (f"{base}.parquet", f"{base}_stats.json") if os.path.exists(name))


def unpack(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A stage: `unpacked/NAME` from one .gz; of a damaged tar all that can be had.

    Raises:
      BadInput: a table that is damaged or too large.
    """
    path, why, cut = task.inputs[0], "", False
    most = _MAX_RATIO * os.path.getsize(path) + _ALWAYS_FINE
    with open(path, "rb") as source, open(outputs.path(f"unpacked/{task.name}"), "wb") as target:
        try:
            for data in _inflate(source):
                target.write(data)
                if target.tell() > most:
                    why = f"it holds more than {_MAX_RATIO} times its size"
                    break
        except EOFError:
            cut = True
        except zlib.error as error:
            why = str(error)
    if why and not task.name.endswith(".tar"):
        raise errors.BadInput(f"sources: {path} is damaged ({why}): fetch it again or remove it.")
    if why:
        logging.warning("%s is damaged (%s): used up to there", path, why)
    return {"files": 1, "cut_short": int(cut or bool(why))}


def _inflate(source: typing.BinaryIO) -> Iterator[bytes]:
    """What gzip streams in a row hold, up to the last byte before a damage or cut.

    Raises:
      EOFError: the last stream is cut short.
      zlib.error: there is something else at this place.
    """
    # Not gzip.open: at a cut it loses what it has read since its last answer.
    unpacker = zlib.decompressobj(wbits=31)
    while chunk := source.read(1 << 14):  # little, as zeros grow a thousandfold
        while chunk:
            if unpacker.eof:
                unpacker = zlib.decompressobj(wbits=31)
            before = unpacker.copy()
            try:
                yield unpacker.decompress(chunk)
            except zlib.error:  # it has thrown away what came before: once more, in single bytes
                for byte in chunk:
                    yield before.decompress(bytes([byte]))
            chunk = unpacker.unused_data.lstrip(b"\0")
    if not unpacker.eof:
        raise EOFError


def scan(path: str, rows: int, target: os.PathLike[str]) -> dict:
    """Looks through the headers of a tar once; its samples are the lines of the file `target`.

    Returns:
      `head`, what is known of the tar as a whole, and `ranges`: of each piece of `rows` samples
      its first byte in `target` and the byte after its last.
    """
    head, groups = _look(path)
    ranges = []
    with open(target, "w", encoding="ascii") as file:
        for at in range(0, len(groups), rows) or (0,):
            start = file.tell()
            file.writelines(json.dumps(group) + "\n" for group in groups[at : at + rows])
            ranges.append([start, file.tell()])
    return {"head": head, "ranges": ranges}


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of a tar or folder in the order of their names' first appearance.

    Args:
      inputs: the tar, then what `scan` wrote if anything, then the sidecars; of a folder the
        sidecars alone.
      part: `name`, what to call it, of a folder its path; `cut_short`, whether it was unpacked only
        in part; `text`, where captions are in `.json`, if it is named; of a piece what `scan`
        returned, with `range` instead of `ranges`.
      keep: the columns that sidecars are asked for.
      counts: gets `members`, `tars_cut_short`, `tars_damaged`, `tars_unreadable`, `pairs_missing`
        (promised by the statistics) and `not_downloaded`, also by status; of a tar in pieces all of
        them with the first.

    Raises:
      BadInput: an unreadable table beside the tar.
    """
    path = part["name"] if os.path.isdir(part["name"]) else inputs[0]
    start, stop = part.get("range", (0, None))
    head, groups = (
        _look(path) if stop is None else (part.get("head"), _lines(inputs[1], start, stop))
    )
    parquet = next((path for path in inputs if path.endswith(".parquet")), None)
    stats = next((path for path in inputs if path.endswith("_stats.json")), None)
    keys = {key for key, _ in groups}
    describe, failures = _read_parquet(parquet, keep, keys) if parquet else (None, {})
    if start == 0:
        promised, failed = _read_stats(stats) if stats else (0, {})
        failures = failures if parquet else failed
        counts |= {
            "members": head["members"],
            "tars_cut_short": int(head["is_tar"] and (head["cut"] or part.get("cut_short", False))),
            "tars_damaged": int(bool(head["damaged"])),
            "tars_unreadable": int(not head["is_tar"]),
            "pairs_missing": max(0, promised - head["whole"]),
            "not_downloaded": sum(failures.values()),
        }
        counts |= {f"not_downloaded_{status}": n for status, n in sorted(failures.items())}
        name = os.path.basename(part["name"])
        if not head["is_tar"]:
            yield Sample(name, reason="not_a_tar")
        for offset in head["damaged"]:
            yield Sample(f"{name}@{offset}", reason="tar_damaged")
    with contextlib.ExitStack() as stack:
        tar = None if os.path.isdir(path) else stack.enter_context(open(path, "rb"))

        def place(member: Member) -> str:
            return path if tar else os.path.join(path, member.name)

        def content(member: Member) -> bytes:
            with contextlib.nullcontext(tar) if tar else open(place(member), "rb") as file:
                file.seek(member.offset)
                return file.read(member.length)

        for key, parts in groups:
            if parts is None:
                yield Sample(key, reason="duplicate_key")
            else:
                row = describe(key) if describe else None
                yield _sample(key, parts, content, place, row, part.get("text"))


def _look(path: str) -> tuple[dict, list[tuple[str, dict[str, Member] | None]]]:
    """What is known of a tar or folder as a whole; its samples, None for one of a key once more."""
    listing = folders.list_files(path) if os.path.isdir(path) else list_members(path)
    members, damaged, complete = listing or Listing([], [], True)
    groups = _group(members)
    head = {
        "members": len(members),
        "whole": sum("picture" in parts and len(parts) > 1 for _, parts in groups),
        "damaged": damaged,
        "cut": not complete,
        "is_tar": listing is not None,
    }
    seen: set[str] = set()
    # A set's `add` returns None, which is false.
    return head, [(key, None if key in seen or seen.add(key) else parts) for key, parts in groups]


def _lines(path: str, start: int, stop: int) -> list[tuple[str, dict[str, Member] | None]]:
    """Samples as `scan` wrote them down."""
    with open(path, "rb") as file:
        file.seek(start)
        lines = map(json.loads, file.read(stop - start).splitlines())
        return [
            (key, parts and {kind: Member(*member) for kind, member in parts.items()})
            for key, parts in lines
        ]


def _sample(
    key: str,
    parts: dict[str, Member],
    content: typing.Callable[[Member], bytes],
    place: typing.Callable[[Member], str],
    row: dict | None,
    text_at: str | None,
) -> Sample:
    """`row` is what the sidecar says; without sidecar (None) the .json member is read for it."""
    for kind, member in parts.items():
        reason = member.reason
        if member.length > (pictures.MAX_BYTES if kind == "picture" else samples.MAX_TEXT):
            reason = reason or "too_many_bytes"
        if reason:
            return Sample(key, reason=reason)
    fields, broken = {}, None
    if "json" in parts and (row is None or text_at or "txt" not in parts):
        fields, broken = _fields(content(parts["json"]))
    row = fields if row is None else row
    _, url = samples.key_and_url(row, key)
    if "txt" in parts and not text_at:
        text = content(parts["txt"])
    elif broken:
        return Sample(key, reason=broken)
    else:
        text = samples.first_text(samples.at(fields, text_at or "caption"))
        if text is not None and not isinstance(text, str):
            return Sample(key, reason="broken_json")
    if "picture" not in parts:
        return Sample(key, reason="no_text" if text is None else "no_picture")
    picture = parts["picture"]
    return Sample(
        key,
        text,
        content(picture),
        place(picture),
        picture.offset,
        picture.length,
        url,
        row,
    )


def _fields(data: bytes) -> tuple[dict, str | None]:
    """What a .json member says, and the reason why it cannot be read or None."""
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return {}, "caption_not_utf8"
    except (ValueError, RecursionError):
        return {}, "broken_json"
    return (fields if isinstance(fields, dict) else {}), None


def _group(members: Sequence[Member]) -> list[tuple[str, dict[str, Member]]]:
    """Members by key and kind ("picture", "txt", "json"), keys in order of first appearance."""
    groups: list[tuple[str, dict[str, Member]]] = []
    by_key: dict[str, list[dict[str, Member]]] = {}
    for member in members:
        key, suffix = folders.split(member.name)
        kind = "picture" if suffix in folders.PICTURE_SUFFIXES else suffix
        if suffix == "" or "__MACOSX" in key.split("/") or os.path.basename(key).startswith("._"):
            continue
        of_key = by_key.setdefault(key, [])
        if kind == "picture":
            parts = next((p for p in of_key if _keeps_place(p.get(kind), member)), None)
            if parts is not None:
                parts[kind] = max(parts[kind], member, key=lambda picture: picture.length)
                continue
        if kind not in ("picture", "txt", "json"):
            kind = None  # a mask, a class number: no part of a pair, but it has a name
        parts = next((parts for parts in of_key if kind not in parts), None)
        if parts is None:
            parts = {}
            of_key.append(parts)
            groups.append((key, parts))
        if kind is not None:
            parts[kind] = member
    return groups


def _keeps_place(one: Member | None, other: Member) -> bool:
    """Whether these are pictures of two formats, one of which is too small to be meant."""
    if not one or folders.split(one.name)[1] == folders.split(other.name)[1]:
        return False
    return min(one.length, other.length) < _TINY


# ----------------------------------------------------------------------------------------- sidecars


def _read_parquet(
    path: str, keep: Sequence[str], keys: Iterable[str]
) -> tuple[typing.Callable[[str], dict], dict[str, int]]:
    """What img2dataset's table says of one of the keys; how many downloads failed, by status."""
    import pyarrow as pa

    known, failures = {}, collections.Counter()
    with parquets.open_file(path) as file, parquets.told(path):
        schema = parquets.narrow_columns(file)
        columns = schema.names
        kind = schema.field("key").type if "key" in columns else pa.null()
        # Where pandas has read keys as numbers, their zeros are gone.
        numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        strings = ("string", "large_string", "dictionary<values=string")
        if not numbers and not str(kind).startswith(strings):
            raise errors.BadInput(
                f"sources: {path} has no column `key` of strings or whole numbers, which joins"
                " it to the tar beside it: move it away if it does not belong to the tar."
            )

        def spelt(key: str) -> str:
            return (key.lstrip("0") or "0") if numbers else key

        asked = set(map(spelt, keys))
        url = samples.pick(columns, samples.URL_COLUMNS)
        wanted = samples.columns_of(("key", "status", *filter(None, [url]), *keep), columns)
        for batch in file.iter_batches(columns=sorted(wanted)):
            names = batch.schema.names
            for i in range(len(batch)):
                row = {name: samples.cell(batch.column(name), i) for name in names}
                key, status = row.pop("key"), row.pop("status", "success")
                if status != "success":
                    failures[status if status in samples.FAILED else "other"] += 1
                elif key is not None and not (numbers and key % 1):
                    key = str(int(key)) if numbers else key
                    if key in asked:
                        known[key] = row

    return lambda key: known.get(spelt(key), {}), dict(failures)


def _read_stats(path: str) -> tuple[int, dict[str, int]]:
    """How many pairs img2dataset says it wrote; how many downloads failed, by status.

    0 and nothing, with a warning, where it says nothing that makes sense.
    """
    try:
        with open(path, encoding="utf-8") as file:
            stats = json.loads(file.read(samples.MAX_TEXT))
        counts = {name: int(stats.get(name) or 0) for name in ("successes", *samples.FAILED)}
        if not all(0 <= count < 1 << 40 for count in counts.values()):
            raise ValueError(counts)
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError):
        logging.warning("%s is not img2dataset's statistics: ignored", path)
        return 0, {}
    return counts.pop("successes"), {name: count for name, count in counts.items() if count}
