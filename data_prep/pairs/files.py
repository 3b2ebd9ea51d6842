"""Which files `config.sources` means: names, patterns, formats. Opens no file but TFDS metadata."""

import collections
import glob
import hashlib
import os
import re
import typing
from collections.abc import Sequence

from data_prep.pairs import samples
from data_prep.pairs.formats import tables, tars, tfds_sets
from mofi_jax.common import errors

# Formats by the end of the name. Where a pattern finds several kinds, the first of them is read:
# beside tars and folders lie their own tables, beside parquet may lie the list it was made from.
_KINDS = {"tar": (".tar",), "folder": (), "parquet": (".parquet",), "table": tables.SUFFIXES}
_LONGEST = 100  # characters of a shard's name
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_WANTED = (
    "what img2dataset writes (.tar, .tar.gz, .tgz, folders with their _stats.json beside them),"
    " .parquet, .csv, .tsv, .jsonl (.gz)"
)


class Found(typing.NamedTuple):
    """A file to read.

    Attributes:
      source: the name of its source.
      prefix: what its keys begin with: "" for the only source, else "NAME/", so that two sets that
        number their pairs alike do not clash.
      kind: "tar", "folder" (of img2dataset's format `files`), "parquet", "table" or "tfds".
      path: absolute.
      stem: what the keys of a table without keys begin with, after the prefix.
      unpacked: the name under which it is to be unpacked; None where it is not packed.
      shard: what its shards are called: by where it lies in its source, not by its number, so that
        one more file changes no other's.
      span: of an ArrayRecord shard the first record and the one after the last.
    """

    source: str
    prefix: str
    kind: str
    path: str
    stem: str = ""
    unpacked: str | None = None
    shard: str = ""
    span: tuple[int, int] = (0, 0)


def find(sources: Sequence[str]) -> list[Found]:
    """The files of all sources, source by source, sorted by path.

    Args:
      sources: "NAME=PATTERN" each; a pattern is a folder, a glob pattern (`**` for any depth), a
        file, or `tfds:NAME[:SPLIT][@DATA_DIR]`.

    Raises:
      BadInput: a source that is not written so, twice one name, or nothing that could be read.
    """
    if isinstance(sources, str) or not sources:
        raise errors.BadInput(
            f"config.sources={sources!r} cannot be used: give a tuple of NAME=PATTERN, for example"
            " ('cc3m=cc3m/*.tar',)."
        )
    patterns: dict[str, str] = {}
    for entry in sources:
        name, _, pattern = entry.partition("=")
        if not _NAME.fullmatch(name) or not pattern:
            raise errors.BadInput(
                f"config.sources: {entry!r} is not NAME=PATTERN with a name of letters, digits and"
                " ._-: write for example cc3m=cc3m/*.tar."
            )
        if name in patterns:
            raise errors.BadInput(
                f"config.sources: two sources are called {name}: give each a name of its own."
            )
        patterns[name] = pattern
    found = []
    for name, pattern in patterns.items():
        prefix = f"{name}/" if len(patterns) > 1 else ""
        if pattern.startswith(tfds_sets.PREFIX):
            for shard in tfds_sets.find(pattern):
                span = (shard.start, shard.stop)
                at = os.path.basename(shard.path)
                found.append(Found(name, prefix, "tfds", shard.path, shard=at, span=span))
        else:
            found += _find_files(name, prefix, pattern)
    found = _named(found)
    packed = collections.Counter(file.unpacked for file in found if file.unpacked)
    for name, count in packed.items():
        if count > 1:
            raise errors.BadInput(
                f"config.sources: two files would be unpacked to {name}: rename one of them."
            )
    return found


def _named(found: list[Found]) -> list[Found]:
    """Makes distinct names of shards, which are names of files, from sources and places in them."""
    named = []
    for file in found:
        whole = f"{file.source}-{file.shard}"
        name = re.sub("[^A-Za-z0-9_-]", "-", whole)
        if name != whole or len(name) > _LONGEST:  # no longer told from every other
            name = f"{name[:_LONGEST]}-{hashlib.md5(os.fsencode(whole)).hexdigest()[:8]}"
        named.append(file._replace(shard=name))
    return named


def shorthand(folder: str) -> tuple[str, ...]:
    """`config.sources` from `PATH`, `PATH+PATH` or `NAME@PATH+NAME@PATH`.

    A source without a name is called by the last part of its path that is no pattern.
    """
    found, words = [], folder.split("+")
    while words:
        # Names of files may hold these marks too: the longest that is there is one source.
        ends = range(len(words), 0, -1)
        sources = [_source("+".join(words[:end])) for end in ends]
        there = (i for i, (_, pattern) in enumerate(sources) if _matches(pattern))
        at = next(there, len(words) - 1)
        found.append("=".join(sources[at]))
        words = words[ends[at] :]
    return tuple(found)


def _source(entry: str) -> tuple[str, str]:
    name, at, pattern = entry.partition("@")
    if at and _NAME.fullmatch(name) and not _matches(entry):
        return name, pattern
    return _call(entry), entry


def _matches(pattern: str) -> bool:
    if pattern.startswith(tfds_sets.PREFIX):
        name, _, pattern = pattern.partition("@")
        if "+" in name:  # a set in TFDS's own folder, and another source
            return False
    return os.path.exists(pattern) or next(glob.iglob(pattern), None) is not None


def _call(pattern: str) -> str:
    if pattern.startswith(tfds_sets.PREFIX):
        words = [re.split("[:@]", pattern.removeprefix(tfds_sets.PREFIX))[0]]
    else:
        words = [word for word in os.path.normpath(pattern).split("/") if not glob.has_magic(word)]
    name = re.sub("[^A-Za-z0-9_.-]", "_", words[-1] if words else "").lstrip(".-")
    return name or "pairs"


def _kind(path: str) -> str | None:
    if path.endswith(".parquet.gz") or os.path.basename(path).startswith("._"):
        return None  # parquet is packed inside; what macOS says of the file NAME is in ._NAME
    if not os.path.isfile(path):
        return "folder" if tars.is_folder(path) else None
    plain = _plain(path)
    return next((kind for kind, ends in _KINDS.items() if plain.endswith(ends)), None)


def _plain(path: str) -> str:
    """The name that a packed file has when it is unpacked; of any other its own."""
    return re.sub(r"\.tgz$", ".tar", path).removesuffix(".gz")


def _find_files(name: str, prefix: str, pattern: str) -> list[Found]:
    if os.path.isdir(pattern) and not tars.is_folder(pattern):
        listed = [os.path.join(pattern, entry) for entry in os.listdir(pattern)]
    elif os.path.exists(pattern):
        listed = [pattern]
    else:
        folder, rest = pattern, ""
        while folder and not os.path.isdir(folder):
            folder, last = os.path.split(folder)
            rest = os.path.join(last, rest) if rest else last
        # What exists is a name, whatever characters are in it; only the rest is a pattern.
        listed = glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)
    by_kind: dict[str, set[str]] = {kind: set() for kind in _KINDS}
    for path in listed:
        kind = _kind(path)
        if kind:
            by_kind[kind].add(os.path.abspath(path))
    kind = next((kind for kind, paths in by_kind.items() if paths), None)
    if kind is None:
        here = os.path.isdir(pattern) or bool(listed)
        what = "holds nothing that is known" if here else "does not exist"
        raise errors.BadInput(
            f"config.sources: {pattern} {what}: name a folder, a glob pattern or a file of"
            f" {_WANTED}, or tfds:NAME."
        )
    # Where both `a.tar` and `a.tar.gz` are there, the former is the latter unpacked.
    chosen = by_kind[kind]
    if kind == "folder":  # what a download that was killed has not described yet is one as well
        numbered = (path for path in listed if os.path.basename(path).isdigit())
        chosen |= {os.path.abspath(path) for path in numbered if os.path.isdir(path)}
    paths = sorted(path for path in chosen if _plain(path) not in chosen - {path})
    base = os.path.abspath(pattern)
    while not os.path.isdir(base) or base in chosen:  # the last folder that is no pattern
        base = os.path.dirname(base)
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    found = []
    for path in paths:
        if samples.encodable(path) != path:
            raise errors.BadInput(
                f"config.sources: the name of {samples.encodable(path)} is not UTF-8: rename it."
            )
        inside = os.path.relpath(_plain(path), root)
        shard = os.path.relpath(_plain(path), base)
        shard = shard if kind == "folder" else shard.rpartition(".")[0]
        unpacked = None
        if path != _plain(path):
            unpacked = (prefix + os.path.basename(inside)).replace("/", "-")
        stem = inside.rpartition(".")[0]
        found.append(Found(name, prefix, kind, path, stem, unpacked, shard))
    return found
