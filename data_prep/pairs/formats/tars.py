"""Tars in img2dataset's layout: members, sidecars, unpacking. One tar is one shard.

A sample is what shares a name up to the last dot: a picture (.jpg .jpeg .png .webp .gif), a caption
(`.txt`, or else "caption" in `.json`) and what else `.json` says. Where a kind occurs twice under
one name, the second is a sample of its own, with the reason `duplicate_key`. Beside `00000.tar` may
lie `00000.parquet`, which then says more than the `.json` members, also of what could not be
downloaded, and `00000_stats.json`, which says how many pairs the tar should hold.
"""

import collections
import json
import os
import tarfile
import typing
import zlib
from collections.abc import Iterator, Sequence

from data_prep import engine
from data_prep.pairs import pictures, samples
from data_prep.pairs.samples import Sample
from mofi_jax.common import errors

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_BLOCK = tarfile.BLOCKSIZE


class Member(typing.NamedTuple):
    """A file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


def stem(path: str) -> str:
    """ "00000" from "folder/00000.tar.gz"."""
    return os.path.basename(path).removesuffix(".gz").rpartition(".")[0]


def sidecars(path: str) -> tuple[str, ...]:
    """The parquet and the statistics that lie beside a tar."""
    base = os.path.join(os.path.dirname(path), stem(path))
    return tuple(name for name in (f"{base}.parquet", f"{base}_stats.json") if os.path.exists(name))


def unpack(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A stage: `unpacked/NAME` from one .gz; one that is cut short gives all that can be had."""
    # Not gzip.open: at a cut it loses what it has read since its last answer.
    unpacker = zlib.decompressobj(wbits=31)
    target_path = outputs.path(f"unpacked/{task.name}")
    with open(task.inputs[0], "rb") as source, open(target_path, "wb") as target:
        try:
            while chunk := source.read(1 << 20):
                while chunk:
                    if unpacker.eof:  # several gzip streams in a row are one file
                        unpacker = zlib.decompressobj(wbits=31)
                    target.write(unpacker.decompress(chunk))
                    chunk = unpacker.unused_data.lstrip(b"\0")
        except zlib.error as error:
            raise errors.BadInput(
                f"sources: {task.inputs[0]} is damaged ({error}): fetch it again or remove it."
            ) from error
    return {"files": 1, "cut_short": int(not unpacker.eof)}


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of a tar in the order of their names' first appearance.

    Args:
      inputs: the tar, then its sidecars.
      part: `name`, what to call the tar in complaints.
      keep: the columns that sidecars are asked for.
      counts: gets `members`, `tars_cut_short`, `pairs_missing` (promised by the statistics) and
        `not_downloaded`, also by status.

    Raises:
      BadInput: no tar, a tar damaged in the middle, or an unreadable sidecar.
    """
    path = inputs[0]
    members, cut, complete = list_members(path, part["name"])
    parquet = next((name for name in inputs[1:] if name.endswith(".parquet")), None)
    stats = next((name for name in inputs[1:] if name.endswith("_stats.json")), None)
    known, failures = _read_parquet(parquet, keep) if parquet else (None, {})
    promised = None
    if stats:
        promised, failed = _read_stats(stats)
        failures = failures if parquet else failed
    groups = _group(members)
    whole = sum("picture" in parts and len(parts) > 1 for _, parts in groups)
    counts |= {
        "members": len(members),
        "tars_cut_short": int(not complete),
        "pairs_missing": max(0, (promised or 0) - whole),
        "not_downloaded": sum(failures.values()),
    }
    counts |= {f"not_downloaded_{status}": n for status, n in sorted(failures.items())}
    with open(path, "rb") as file:

        def content(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(member.length)

        seen = set()
        for key, parts in groups:
            if cut is not None and key == _split(cut.name)[0]:
                continue  # told below
            if key in seen:
                yield Sample(key, reason="duplicate_key")
                continue
            seen.add(key)
            row = known.get(key, {}) if known is not None else None
            yield _sample(key, parts, content, path, row)
    if cut is not None:
        yield Sample(_split(cut.name)[0], reason="tar_cut_short")


def _sample(
    key: str,
    parts: dict[str, Member],
    content: typing.Callable[[Member], bytes],
    path: str,
    row: dict | None,
) -> Sample:
    """`row` is what the sidecar says; without sidecar (None) the .json member is read for it."""
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
        text = fields.get("caption")
        if text is not None and not isinstance(text, str):
            return Sample(key, reason="broken_json")
    if text is None or "picture" not in parts:
        return Sample(key, reason="no_text" if text is None else "no_picture")
    picture = parts["picture"]
    if picture.length > pictures.MAX_BYTES:
        return Sample(key, reason="too_many_bytes")
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
        if suffix == "":
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


def _read_parquet(path: str, keep: Sequence[str]) -> tuple[dict[str, dict], dict[str, int]]:
    """What img2dataset's table says of each key; how many downloads failed, by status."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known, failures = {}, collections.Counter()
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "key" not in columns:
                raise errors.BadInput(
                    f"sources: {path} has no column `key`, which joins it to the tar beside it:"
                    " move it away if it does not belong to the tar."
                )
            url = samples.pick(columns, samples.URL_COLUMNS)
            wanted = {"key", "status", url, *keep} & set(columns)
            for batch in file.iter_batches(columns=sorted(wanted)):
                for row in batch.to_pylist():
                    status = row.pop("status", "success")
                    if status == "success":
                        known[str(row.pop("key"))] = row
                    else:
                        failures[str(status)] += 1
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the disk or the network: the file may be sound
        reason = str(error).partition("\n")[0].rstrip(".")
        raise errors.BadInput(
            f"sources: {path} cannot be read ({reason}): fetch it again, or remove it to read the"
            " tar beside it without."
        ) from error
    return known, dict(failures)


def _read_stats(path: str) -> tuple[int | None, dict[str, int]]:
    """How many pairs img2dataset says it wrote; how many downloads failed, by status."""
    try:
        with open(path, encoding="utf-8") as file:
            stats = json.load(file)
        failures = {
            name: int(stats[name])
            for name in ("failed_to_download", "failed_to_resize")
            if stats.get(name)
        }
        return int(stats["successes"]), failures
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.BadInput(
            f"sources: {path} is not img2dataset's statistics: remove it or fetch it again."
        ) from error


# --------------------------------------------------------------------------------------- the format


def list_members(
    path: str | os.PathLike[str], name: str | None = None
) -> tuple[list[Member], Member | None, bool]:
    """Lists the files of an uncompressed tar, called `name` in complaints.

    Returns:
      The whole files, the file that is cut off at the end or None, and whether the tar is complete
      (ends in the zero block that tar writes last).

    Raises:
      BadInput: the file is no tar, or damaged in the middle.
    """
    name = name or os.fspath(path)
    size = os.path.getsize(path)
    members = []
    complete = False
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closing would close `file`
            for info in tar:
                if info.isreg():
                    members.append(Member(info.name, info.offset_data, info.size))
            end = tar.offset
        except (tarfile.ReadError, EOFError) as error:
            if not members:
                raise errors.BadInput(
                    f"sources: {name} is no tar ({error}): remove it or fetch it again."
                ) from error
            # Past the end: the bytes of the last member are missing. Before it: damaged.
            end = size if file.tell() >= size else file.tell()
        file.seek(end)
        rest = file.read(_BLOCK)
    if rest and not rest.strip(b"\0"):
        complete = True
    elif len(rest) == _BLOCK:
        # tarfile stops without a word at a header it cannot read.
        raise errors.BadInput(
            f"sources: {name} is damaged at byte {end}: fetch it again or remove it."
        )
    whole = [member for member in members if member.offset + member.length <= size]
    cut = next((member for member in members if member.offset + member.length > size), None)
    return whole, cut, complete and cut is None
