"""Sources: img2dataset tars -> pairs/ (key, text, pointer to the picture's bytes).

A tar is read once: each member's place is noted, each picture is decoded in full and dropped again.
Later stages fetch bytes by pointer (path, offset, length). A `.tar` stays where it is; a `.tar.gz`,
in which nothing can be found without unpacking, is unpacked once to `W/unpacked/`.

A pair is what shares a name up to the last dot: a picture (.jpg .jpeg .png .webp .gif) and a
caption (`.txt`, or else "caption" in `.json`). Every pair ends either in pairs/ or in rejects/ with
a reason:

    no_picture no_text duplicate_key            the pair is not whole
    empty_caption caption_not_utf8 broken_json  the caption cannot be read
    empty_picture not_a_picture truncated corrupt too_small too_wide too_many_pixels
    tar_cut_short                               the member at which a tar that was cut short ends

A tar that was cut short, as an interrupted download is, gives all pairs before the cut, a warning
and the count `tars_cut_short`: thousands of good shards should not wait for one.
"""

import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import typing
import warnings
import zlib
from collections.abc import Iterator, Sequence

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from mofi_jax import errors

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_BLOCK = tarfile.BLOCKSIZE


class Member(typing.NamedTuple):
    """A file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


class Rejected(Exception):
    """A pair that cannot be used, with the reason in one word."""


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes pairs/NNNNN.parquet, one for each tar of `config.pairs` in the order of their names.

    Columns: key, text, path (relative ones lie in the work directory), offset, length (bytes),
    width, height (pixels), sha256 (of the picture's bytes).

    Args:
      config: `pairs` (folder, glob pattern or tar), `min_side`, `max_aspect`, `max_pixels`,
        `max_caption_chars`.
      work: the engine.

    Returns:
      The manifests; counts `members`, `pairs`, `captions_cut`, `tars_cut_short` and `rejected`.

    Raises:
      BadInput: no tars, a file that is no tar, or one key twice.
    """
    workdir = work.workdir
    tars = find_tars(config.pairs)
    packed = [tar for tar in tars if tar.endswith(".gz")]
    unpack = [engine.Task(_stem(tar), (tar,)) for tar in packed]
    work.map_shards("unpacked", _unpack, unpack, {"version": 1})
    tasks = []
    for number, tar in enumerate(tars):
        at = os.fspath(workdir / f"unpacked/{_stem(tar)}.tar") if tar.endswith(".gz") else tar
        tasks.append(engine.Task(f"{number:05d}", (at,)))
    settings = {
        "version": 1,
        "min_side": config.min_side,
        "max_aspect": config.max_aspect,
        "max_pixels": config.max_pixels,
        "max_caption_chars": config.max_caption_chars,
    }
    manifests = work.map_shards("pairs", _index, tasks, settings)
    for manifest in manifests:
        if manifest["counts"]["tars_cut_short"]:
            logging.warning("%s is cut short: used up to the cut", manifest["inputs"][0]["path"])
    shards = tuple(os.fspath(workdir / f"pairs/{task.name}.parquet") for task in tasks)
    unique = [engine.Task("keys", shards)]
    work.map_shards("unique", _check_keys, unique, {"version": 1}, here=True)
    return manifests


def find_tars(pattern: str) -> list[str]:
    """The tars of a folder, a glob pattern or a single tar, as absolute paths sorted by name.

    Where both `a.tar` and `a.tar.gz` are there, the former is used.
    """
    pattern = os.fspath(pattern)
    if os.path.isdir(pattern):
        found = [os.path.join(pattern, name) for name in os.listdir(pattern)]
    else:
        found = [path for path in glob.glob(pattern) if os.path.isfile(path)]
    tars = {os.path.abspath(path) for path in found if path.endswith((".tar", ".tar.gz"))}
    tars = sorted(path for path in tars if path.removesuffix(".gz") not in tars - {path})
    if not tars:
        what = "holds no .tar or .tar.gz files" if os.path.isdir(pattern) else "does not exist"
        raise errors.BadInput(
            f"pairs: {pattern} {what}: name a folder of img2dataset tars, a glob pattern or one"
            " tar."
        )
    stems = [_stem(tar) for tar in tars if tar.endswith(".gz")]
    for stem in stems:
        if stems.count(stem) > 1:
            raise errors.BadInput(
                f"pairs: two tars are called {stem}.tar.gz in {pattern}: rename one of them."
            )
    return tars


def read_pictures(
    workdir: epath.PathLike, paths: Sequence[str], offsets: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Reads pictures by pointer, in the order in which they lie on disk.

    Args:
      workdir: where relative paths start.
      paths, offsets, lengths: columns of pairs/.

    Yields:
      (row, the picture's bytes).

    Raises:
      BadInput: a tar is gone or shorter than it was.
    """
    order = sorted(range(len(paths)), key=lambda row: (paths[row], offsets[row]))
    for name, rows in itertools.groupby(order, key=lambda row: paths[row]):
        path = os.path.join(os.fspath(workdir), name)
        if not os.path.exists(path):
            raise errors.BadInput(
                f"The tar {path} is gone since its pictures were listed: restore it, or run again"
                " without it."
            )
        with open(path, "rb") as file:
            for row in rows:
                file.seek(offsets[row])
                data = file.read(lengths[row])
                if len(data) < lengths[row]:
                    raise errors.BadInput(
                        f"The tar {path} is shorter than when its pictures were listed: restore"
                        " it, or run again."
                    )
                yield row, data


# --------------------------------------------------------------------------------------------- tars


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
                    f"pairs: {name} is no tar ({error}): remove it or fetch it again."
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
            f"pairs: {name} is damaged at byte {end}: fetch it again or remove it."
        )
    whole = [member for member in members if member.offset + member.length <= size]
    cut = next((member for member in members if member.offset + member.length > size), None)
    return whole, cut, complete and cut is None


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".gz").removesuffix(".tar")


def _unpack(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Unpacks one .tar.gz; one that is cut short gives all that can be had of it."""
    # Not gzip.open: at a cut it loses what it has read since its last answer.
    unpacker = zlib.decompressobj(wbits=31)
    target_path = outputs.path(f"unpacked/{task.name}.tar")
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
                f"pairs: {task.inputs[0]} is damaged ({error}): fetch it again or remove it."
            ) from error
    return {"tars": 1, "tars_cut_short": int(not unpacker.eof)}


# -------------------------------------------------------------------------------------------- pairs


def _index(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    path = task.inputs[0]
    pointer = os.path.abspath(path).removeprefix(os.path.abspath(outputs.workdir) + os.sep)
    unpacked = not os.path.isabs(pointer)
    members, cut, complete = list_members(path, f"{_stem(path)}.tar.gz" if unpacked else None)
    rejects = []
    rows = {name: [] for name in ("key", "text", "offset", "length", "width", "height", "sha256")}
    captions_cut = 0
    with open(path, "rb") as file:

        def read(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(member.length)

        for key, parts in _group(members, rejects).items():
            if cut is not None and key == _split(cut.name)[0]:
                continue  # told below
            try:
                text, was_cut = _caption(parts, read, settings["max_caption_chars"])
                if "picture" not in parts:
                    raise Rejected("no_picture")
                data = read(parts["picture"])
                width, height = check_picture(data, settings)
            except Rejected as rejected:
                rejects.append((key, str(rejected)))
                continue
            captions_cut += was_cut
            rows["key"].append(key)
            rows["text"].append(text)
            rows["offset"].append(parts["picture"].offset)
            rows["length"].append(parts["picture"].length)
            rows["width"].append(width)
            rows["height"].append(height)
            rows["sha256"].append(hashlib.sha256(data).hexdigest())
    if cut is not None:
        rejects.append((_split(cut.name)[0], "tar_cut_short"))
    table = pa.table(
        {
            "key": pa.array(rows["key"], pa.string()),
            "text": pa.array(rows["text"], pa.string()),
            "path": pa.array([pointer] * len(rows["key"]), pa.string()),
            "offset": pa.array(rows["offset"], pa.int64()),
            "length": pa.array(rows["length"], pa.int64()),
            "width": pa.array(rows["width"], pa.int32()),
            "height": pa.array(rows["height"], pa.int32()),
            "sha256": pa.array(rows["sha256"], pa.string()),
        }
    )
    outputs.write_table(f"pairs/{task.name}.parquet", table)
    outputs.write_rejects(rejects)
    return {
        "members": len(members),
        "pairs": len(rows["key"]),
        "rejected": len(rejects),
        "captions_cut": captions_cut,
        "tars_cut_short": int(not complete),
    }


def _split(name: str) -> tuple[str, str]:
    """("folder/000001", "jpg") from "folder/000001.JPG"."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.rpartition(".")
    return os.path.join(folder, stem or base), suffix.lower() if stem else ""


def _group(members: Sequence[Member], rejects: list) -> dict[str, dict[str, Member]]:
    """Members by key, keys in order of first appearance; kinds "picture", "txt", "json"."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        key, suffix = _split(member.name)
        kind = "picture" if suffix in PICTURE_SUFFIXES else suffix
        if kind not in ("picture", "txt", "json"):
            if suffix == "":
                continue
            groups.setdefault(key, {})
        elif kind in groups.setdefault(key, {}):
            rejects.append((key, "duplicate_key"))
        else:
            groups[key][kind] = member
    return groups


def _caption(
    parts: dict[str, Member], read: typing.Callable[[Member], bytes], limit: int
) -> tuple[str, bool]:
    """The caption in one line, and whether it had to be cut to `limit` characters."""
    if "txt" in parts:
        try:
            # A replacement character would be a word that nobody wrote.
            text = read(parts["txt"]).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Rejected("caption_not_utf8") from None
    elif "json" in parts:
        try:
            content = json.loads(read(parts["json"]).decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise Rejected("caption_not_utf8") from None
        except (ValueError, RecursionError):
            raise Rejected("broken_json") from None
        text = content.get("caption") if isinstance(content, dict) else None
        if text is None:
            raise Rejected("no_text")
        # JSON may spell half a surrogate pair, which no UTF-8 file can hold.
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise Rejected("caption_not_utf8" if isinstance(text, str) else "broken_json")
    else:
        raise Rejected("no_text")
    text = clean_caption(text)
    if not text:
        raise Rejected("empty_caption")
    return cut_caption(text, limit), len(text) > limit


def clean_caption(text: str) -> str:
    """One line: white space and control characters squeezed to single spaces."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def cut_caption(text: str, limit: int) -> str:
    """At most `limit` characters, cut at the end of a word where there is one."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1].rpartition(" ")[0]
    return (head or text[:limit]).rstrip()


def check_picture(data: bytes, settings: dict) -> tuple[int, int]:
    """Width and height of a picture that decodes in full and keeps to the limits.

    The size is read from the header first: a picture of a billion pixels is never decoded.

    Raises:
      Rejected: with the reason.
    """
    from PIL import Image

    from mofi_jax.data import ops

    if not data:
        raise Rejected("empty_picture")
    try:
        with warnings.catch_warnings():
            # Pillow warns of many pixels; the limit here is the config's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise Rejected("too_many_pixels") from None
    except Exception:  # noqa: BLE001  Pillow's parsers raise whatever the bytes lead them to
        raise Rejected("not_a_picture") from None
    if min(width, height) < settings["min_side"]:
        raise Rejected("too_small")
    if max(width, height) > settings["max_aspect"] * min(width, height):
        raise Rejected("too_wide")
    if width * height > settings["max_pixels"]:
        raise Rejected("too_many_pixels")
    try:
        decoded = ops.decode_rgb(data)
    except ops.UndecodableImage as error:
        raise Rejected(error.reason) from None
    height, width = decoded.shape[:2]
    return width, height


def _check_keys(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Raises BadInput where two pairs share a key: later stages join on it."""
    import duckdb

    connection = duckdb.connect()
    source = "read_parquet($shards, filename=true)"
    twice = connection.execute(
        f"SELECT key, min(path), max(path) FROM {source} GROUP BY key HAVING count(*) > 1"
        " ORDER BY key LIMIT 1",
        {"shards": list(task.inputs)},
    ).fetchall()
    if twice:
        key, first, second = twice[0]
        raise errors.BadInput(
            f"pairs: the key {key} is in {first} and in {second}: give every pair a name of its"
            " own, as img2dataset does by numbering across shards."
        )
    return {}
