"""Which files `config.sources` means: names, patterns, formats. Opens no file but TFDS metadata.

A folder means all that is below it, at any depth. In each folder one kind is read: tars, or what
img2dataset wrote as `files`, or parquet and Arrow, or tables, which speak for the folders below
them too, or else the pictures themselves with their captions beside them. What names of files and
folders say is for validation or test is left out where there is something else to train on.
"""

import collections
import glob
import hashlib
import os
import re
import typing
from collections.abc import Callable, Sequence

from absl import logging

from data_prep.pairs import samples
from data_prep.pairs.formats import folders as folder_files
from data_prep.pairs.formats import tables, tars, tfds_sets
from mofi_jax.common import errors
from mofi_jax.data.pictures import arrow_files, containers, tree
from mofi_jax.interop import from_hub

# Formats by the end of the name.
_KINDS = {"tar": (".tar",), "parquet": (".parquet", ".arrow"), "table": tables.SUFFIXES}
_LONGEST = 100  # characters of a shard's name
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_WANTED = (
    "what img2dataset writes (.tar, .tar.gz, .tgz, folders of pictures with .txt or .json beside"
    " them), .parquet, .arrow, .csv, .tsv, .jsonl (.gz)"
)
# What is told where it is found, with what to do about it.
_NOT_READ = {
    ".tfrecord": "is TFRecord, which is not read: run img2dataset with --output_format webdataset",
    **dict.fromkeys(containers.ARCHIVES, "is packed as a whole: unpack it"),
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".incomplete", ".aria2", ".download"),
        "is a download that is not complete: fetch it again",
    ),
    **dict.fromkeys(
        tree.PICTURES,
        "is a picture without a caption: put one beside it as .txt, write a metadata.csv with"
        " the columns file_name and text, or, where folders are classes, pack them with"
        " `mofi class-folders`",
    ),
}


class Found(typing.NamedTuple):
    """A file to read.

    Attributes:
      source: the name of its source.
      prefix: what its keys begin with: "NAME/" where there are several sources, and then the folder
        it lies in below that of its source, as in "cc3m/part1/", so that two sets that number their
        pairs alike do not clash.
      kind: "tar", "folder" (pictures and captions in files of their own), "parquet" (Arrow as
        well), "table" or "tfds".
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


def find(sources: Sequence[str], warn: Callable[..., None] = logging.warning) -> list[Found]:
    """The files of all sources, source by source, sorted by path.

    Args:
      sources: "NAME=PATTERN" each; a pattern is a folder, a glob pattern (`**` for any depth), a
        file, `tfds:NAME[:SPLIT][@DATA_DIR]`, or of the hub (`mofi_jax.interop.from_hub`).
      warn: is told what is left out, as `logging.warning` is.

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
            found += _find_files(name, prefix, from_hub.data(pattern), warn)
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
    if from_hub.is_address(pattern):
        return "+" not in pattern
    if pattern.startswith(tfds_sets.PREFIX):
        name, _, pattern = pattern.partition("@")
        if "+" in name:  # a set in TFDS's own folder, and another source
            return False
    return os.path.exists(pattern) or next(glob.iglob(pattern), None) is not None


def _call(pattern: str) -> str:
    if pattern.startswith(tfds_sets.PREFIX):
        words = [re.split("[:@]", pattern.removeprefix(tfds_sets.PREFIX))[0]]
    elif from_hub.is_address(pattern):
        words = [re.sub("@[^/]*", "", pattern).rpartition("/")[2]]
    else:
        words = [word for word in os.path.normpath(pattern).split("/") if not glob.has_magic(word)]
    name = re.sub("[^A-Za-z0-9_.-]", "_", words[-1] if words else "").lstrip(".-")
    return name or "pairs"


def _kind(path: str) -> str | None:
    if path.endswith(".parquet.gz") or tree.is_hidden(os.path.basename(path)):
        return None  # parquet is packed inside; what macOS says of the file NAME is in ._NAME
    plain = _plain(path)
    if plain.endswith(arrow_files.SUFFIX) and not arrow_files.is_data(os.path.basename(path)):
        return None
    return next((kind for kind, ends in _KINDS.items() if plain.endswith(ends)), None)


def _plain(path: str) -> str:
    """The name that a packed file has when it is unpacked; of any other its own."""
    return re.sub(r"\.tgz$", ".tar", path).removesuffix(".gz")


class _Kept(typing.NamedTuple):
    """What is to be read: a file, or a folder for the files in it."""

    kind: str
    path: str
    inside: str  # the folder by which its keys are told from those of others


def _find_files(name: str, prefix: str, pattern: str, warn: Callable[..., None]) -> list[Found]:
    passed_over: dict[str, str] = {}
    kept = _kept(pattern, passed_over)
    told = {suffix: f"{path} {_NOT_READ[suffix]}" for suffix, path in passed_over.items()}
    if not kept and told:
        raise errors.BadInput(
            f"config.sources: {pattern} holds nothing that can be read: {next(iter(told.values()))}"
            "."
        )
    if not kept:
        what = "holds nothing that is known" if os.path.exists(pattern) else "does not exist"
        raise errors.BadInput(
            f"config.sources: {pattern} {what}: name a folder, a glob pattern or a file of"
            f" {_WANTED}, or tfds:NAME."
        )
    for end in told.keys() - {*tree.PICTURES}:  # those may be of a README
        warn("config.sources: left out: %s", told[end])
    base = os.path.abspath(pattern)
    # The last folder that is no pattern.
    while not os.path.isdir(base) or folder_files.is_shard(base):
        base = os.path.dirname(base)
    found = []
    for one in _to_train_on(kept, base, warn):
        if samples.encodable(one.path) != one.path:
            raise errors.BadInput(
                f"config.sources: the name of {samples.encodable(one.path)} is not UTF-8: rename"
                " it."
            )
        plain, within = _plain(one.path), os.path.relpath(one.inside, base)
        before = prefix if within == "." else f"{prefix}{within}/"
        shard = os.path.basename(plain) if plain == base else os.path.relpath(plain, base)
        shard = shard if one.kind == "folder" else shard.rpartition(".")[0]
        unpacked = None
        if one.path != plain:
            unpacked = (before + os.path.basename(plain)).replace("/", "-")
        stem = os.path.basename(plain).rpartition(".")[0]
        found.append(Found(name, before, one.kind, one.path, stem, unpacked, shard))
    return found


def _kept(pattern: str, passed_over: dict[str, str]) -> list[_Kept]:
    """What a pattern means, by path; `passed_over` gets a file for each end in `_NOT_READ`."""
    if os.path.exists(pattern):
        listed = [pattern]
    else:
        folder, rest = pattern, ""
        while folder and not os.path.isdir(folder):
            folder, last = os.path.split(folder)
            rest = os.path.join(last, rest) if rest else last
        # What exists is a name, whatever characters are in it; only the rest is a pattern.
        listed = glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)
    found: dict[str, _Kept] = {}

    def visit(folder: str, folders: set[str], names: set[str], above: frozenset[str]) -> None:
        kept, further = _choose(folder, folders, names)
        for one in kept:  # a shard is told from its parent, which comes first
            found.setdefault(one.path, one)
        read = {os.path.basename(one.path) for one in kept}
        for name in sorted(names - read if kept[:1] != [_Kept("folder", folder, folder)] else ()):
            if end := next((end for end in _NOT_READ if name.lower().endswith(end)), None):
                passed_over.setdefault(end, os.path.join(folder, name))
        for name in sorted(further):
            path = os.path.join(folder, name)
            if (beyond := tree.within(path, above)) is not None:
                entries = [e for e in tree.entries(path) if not tree.is_hidden(e.name)]
                inner = {entry.name for entry in entries if tree.is_folder(entry)}
                visit(path, inner, {entry.name for entry in entries} - inner, beyond)

    groups: dict[str, tuple[set[str], set[str]]] = {}
    for path in map(os.path.abspath, listed):
        folder, name = os.path.split(path)
        groups.setdefault(folder, (set(), set()))[not os.path.isdir(path)].add(name)
    for folder, (folders, names) in sorted(groups.items()):
        visit(folder, folders, names, frozenset())
    return sorted(found.values(), key=lambda one: one.path)


def _choose(folder: str, folders: set[str], names: set[str]) -> tuple[list[_Kept], set[str]]:
    """What is read in a folder, by the names in it, and the folders to look into."""
    by_kind = {kind: {name for name in names if _kind(name) == kind} for kind in _KINDS}
    shards = {name for name in folders if folder_files.is_shard(os.path.join(folder, name))}
    if shards:  # what a download that was killed has not described yet is one as well
        shards |= {name for name in folders if name.isdigit()}
    # What lies beside describes it.
    described = {tars.stem(name) for name in by_kind["tar"]}
    if any(name.endswith(".tfrecord") for name in names):
        by_kind["parquet"] = set()
    by_kind["parquet"] = {n for n in by_kind["parquet"] if tars.stem(n) not in described | folders}
    kind = next((kind for kind, chosen in by_kind.items() if chosen), "")
    further = set() if kind == "table" and not shards else folders - shards - described
    if shards and kind != "tar":
        return [_Kept("folder", os.path.join(folder, name), folder) for name in shards], further
    if not kind and folder_files.has_pairs(names):
        return [_Kept("folder", folder, folder)], further
    # Where both `a.tar` and `a.tar.gz` are there, the former is the latter unpacked.
    chosen = by_kind.get(kind, set())
    paths = [os.path.join(folder, name) for name in chosen if _plain(name) not in chosen - {name}]
    return [_Kept(kind, path, folder) for path in paths], further


def _to_train_on(kept: list[_Kept], base: str, warn: Callable[..., None]) -> list[_Kept]:
    """Without what is for validation or test by its name, if anything is left then."""
    held: dict[str, list[_Kept]] = {}
    for one in kept:
        held.setdefault(tree.split_of(os.path.relpath(one.path, base)) or "train", []).append(one)
    if "train" not in held:
        return kept
    for split in sorted(held.keys() - {"train"}):
        warn(
            "config.sources: %d of %d files are left out as the split %s, %s the first of them:"
            " name them alone to train on them",
            *(len(held[split]), len(kept), split, held[split][0].path),
        )
    return held["train"]
