"""Tars in img2dataset's layout: members, sidecars, unpacking. One tar is one shard.

A sample is what shares a name up to the last dot: a picture (.jpg .jpeg .png .webp .gif), a caption
(`.txt`, or else "caption" in `.json`) and what else `.json` says. Where a kind occurs twice under
one name, the second is a sample of its own, with the reason `duplicate_key`. Beside `00000.tar` may
lie `00000.parquet`, which then says more than the `.json` members, also of what could not be
downloaded, and `00000_stats.json`, which says how many pairs the tar should hold. Names are keys:
nothing is ever written under them. What macOS puts beside files (`._NAME`, `__MACOSX/`) is ignored.

Damage costs what it covers: a tar that was cut short gives what lies before the cut, one damaged in
the middle also what lies behind, and a file that is no tar is one reject.
"""

import collections
import json
import os
import typing
import zlib
from collections.abc import Iterator, Sequence

from absl import logging

from data_prep import engine
from data_prep.pairs import pictures, samples
from data_prep.pairs.formats.tar_headers import Listing, Member, list_members
from data_prep.pairs.samples import Sample
from mofi_jax.common import errors

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
# Pictures can hardly be packed any further. What grows more than this was made to fill the disk.
_MAX_RATIO, _ALWAYS_FINE = 100, 64 << 20
_STATUSES = ("failed_to_download", "failed_to_resize")


def stem(path: str) -> str:
    """ "00000" from "folder/00000.tar.gz"."""
    return os.path.basename(path).removesuffix(".gz").rpartition(".")[0]


def sidecars(path: str) -> tuple[str, ...]:
    """The parquet and the statistics that lie beside a tar."""
    base = os.path.join(os.path.dirname(path), stem(path))
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


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of a tar in the order of their names' first appearance.

    Args:
      inputs: the tar, then its sidecars.
      part: `name`, what to call the tar; `cut_short`, whether it was unpacked only in part.
      keep: the columns that sidecars are asked for.
      counts: gets `members`, `tars_cut_short`, `tars_damaged`, `tars_unreadable`, `pairs_missing`
        (promised by the statistics) and `not_downloaded`, also by status.

    Raises:
      BadInput: an unreadable table beside the tar.
    """
    path, name = inputs[0], os.path.basename(part["name"])
    listing = list_members(path)
    parquet = next((path for path in inputs[1:] if path.endswith(".parquet")), None)
    stats = next((path for path in inputs[1:] if path.endswith("_stats.json")), None)
    describe, failures = _read_parquet(parquet, keep) if parquet else (None, {})
    promised = 0
    if stats:
        promised, failed = _read_stats(stats)
        failures = failures if parquet else failed
    members, damaged, complete = listing or Listing([], [], True)
    groups = _group(members)
    whole = sum("picture" in parts and len(parts) > 1 for _, parts in groups)
    counts |= {
        "members": len(members),
        "tars_cut_short": int(
            listing is not None and (not complete or part.get("cut_short", False))
        ),
        "tars_damaged": int(bool(damaged)),
        "tars_unreadable": int(listing is None),
        "pairs_missing": max(0, promised - whole),
        "not_downloaded": sum(failures.values()),
    }
    counts |= {f"not_downloaded_{status}": n for status, n in sorted(failures.items())}
    if listing is None:
        yield Sample(name, reason="not_a_tar")
    for offset in damaged:
        yield Sample(f"{name}@{offset}", reason="tar_damaged")
    with open(path, "rb") as file:

        def content(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(member.length)

        seen = set()
        for key, parts in groups:
            if key in seen:
                yield Sample(key, reason="duplicate_key")
                continue
            seen.add(key)
            yield _sample(key, parts, content, path, describe(key) if describe else None)


def _sample(
    key: str,
    parts: dict[str, Member],
    content: typing.Callable[[Member], bytes],
    path: str,
    row: dict | None,
) -> Sample:
    """`row` is what the sidecar says; without sidecar (None) the .json member is read for it."""
    for kind, member in parts.items():
        reason = member.reason
        if member.length > (pictures.MAX_BYTES if kind == "picture" else samples.MAX_TEXT):
            reason = reason or "too_many_bytes"
        if reason:
            return Sample(key, reason=reason)
    fields, broken = {}, None
    if "json" in parts and (row is None or "txt" not in parts):
        fields, broken = _fields(content(parts["json"]))
    row = fields if row is None else row
    url = row.get(samples.pick(row, samples.URL_COLUMNS))
    if "txt" in parts:
        text = content(parts["txt"])
    elif broken:
        return Sample(key, reason=broken)
    else:
        text = samples.first_text(fields.get("caption"))
        if text is not None and not isinstance(text, str):
            return Sample(key, reason="broken_json")
    if text is None or "picture" not in parts:
        return Sample(key, reason="no_text" if text is None else "no_picture")
    picture = parts["picture"]
    return Sample(
        key,
        text,
        content(picture),
        path,
        picture.offset,
        picture.length,
        url if isinstance(url, str) else None,
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


def _split(name: str) -> tuple[str, str]:
    """("folder/000001", "jpg") from "folder/000001.JPG"."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.rpartition(".")
    return os.path.join(folder, stem or base), suffix.lower() if stem else ""


def _group(members: Sequence[Member]) -> list[tuple[str, dict[str, Member]]]:
    """Members by key and kind ("picture", "txt", "json"), keys in order of first appearance."""
    groups: list[tuple[str, dict[str, Member]]] = []
    by_key: dict[str, list[dict[str, Member]]] = {}
    for member in members:
        key, suffix = _split(member.name)
        kind = "picture" if suffix in PICTURE_SUFFIXES else suffix
        if suffix == "" or "__MACOSX" in key.split("/") or os.path.basename(key).startswith("._"):
            continue
        of_key = by_key.setdefault(key, [])
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


# ----------------------------------------------------------------------------------------- sidecars


def _read_parquet(
    path: str, keep: Sequence[str]
) -> tuple[typing.Callable[[str], dict], dict[str, int]]:
    """What img2dataset's table says of a key; how many downloads failed, by status."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known, failures = {}, collections.Counter()
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            kind = file.schema_arrow.types[columns.index("key")] if "key" in columns else pa.null()
            # Where pandas has read keys as numbers, their zeros are gone.
            numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            strings = ("string", "large_string", "dictionary<values=string")
            if not numbers and not str(kind).startswith(strings):
                raise errors.BadInput(
                    f"sources: {path} has no column `key` of strings or whole numbers, which joins"
                    " it to the tar beside it: move it away if it does not belong to the tar."
                )
            url = samples.pick(columns, samples.URL_COLUMNS)
            wanted = {"key", "status", url, *keep} & set(columns)
            for batch in file.iter_batches(columns=sorted(wanted)):
                names = batch.schema.names
                for i in range(len(batch)):
                    row = {name: samples.cell(batch.column(name), i) for name in names}
                    key, status = row.pop("key"), row.pop("status", "success")
                    if status != "success":
                        failures[status if status in _STATUSES else "other"] += 1
                    elif key is not None and not (numbers and key % 1):
                        known[str(int(key)) if numbers else key] = row
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the disk or the network: the file may be sound
        reason = str(error).partition("\n")[0].rstrip(".")
        raise errors.BadInput(
            f"sources: {path} cannot be read ({reason}): fetch it again, or remove it to read the"
            " tar beside it without."
        ) from error

    def describe(key: str) -> dict:
        return known.get((key.lstrip("0") or "0") if numbers else key, {})

    return describe, dict(failures)


def _read_stats(path: str) -> tuple[int, dict[str, int]]:
    """How many pairs img2dataset says it wrote; how many downloads failed, by status.

    0 and nothing, with a warning, where it says nothing that makes sense.
    """
    try:
        with open(path, encoding="utf-8") as file:
            stats = json.loads(file.read(samples.MAX_TEXT))
        counts = {name: int(stats.get(name) or 0) for name in ("successes", *_STATUSES)}
        if not all(0 <= count < 1 << 40 for count in counts.values()):
            raise ValueError(counts)
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError):
        logging.warning("%s is not img2dataset's statistics: ignored", path)
        return 0, {}
    return counts.pop("successes"), {name: count for name, count in counts.items() if count}
