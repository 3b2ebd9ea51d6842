"""The removal list: pairs and pictures that must stay away. pairs/ -> takedowns/.

A list is a text file (UTF-8) with one of these in each line:

    KEY           the key of a pair; one that a line cannot hold as it is, in JSON's quotes
    sha256:HEX    the file of a picture, under whatever key
    phash:HEX     the perceptual hash of a picture, 16 digits, and all hashes of which no more than
                  `config.filters.max_hamming` bits differ

`config.removed` names lists, and all files `W/removed/*.txt` are lists too: `data_prep.remove_keys`
adds to removed.txt there. Whoever is named goes from the data set, the data card and whatever is
published. Stages before the filters still read the pair: its picture counts among the data set's
background and its entities' prototypes, of which nothing can be read back.

    takedowns/   NNNNN.parquet  key, reason ("removed"), of all pairs, labelled or not
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.engine import manifests
from data_prep.filters import decontaminate
from mofi_jax.common import errors

FOLDER = "removed"  # in the work directory
_BITS = 1 << 64


class Removed(NamedTuple):
    """What must stay away: keys, sha256 in hex, and perceptual hashes (int64 of the same bits)."""

    keys: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    hashes: frozenset[int] = frozenset()

    def __or__(self, other: "Removed") -> "Removed":
        return Removed(*(own | more for own, more in zip(self, other, strict=True)))

    def text(self) -> str:
        """The list, sorted, as `read` reads it."""
        lines = [_written(key) for key in self.keys]
        lines += [f"sha256:{digest}" for digest in self.digests]
        lines += [f"phash:{value % _BITS:016x}" for value in self.hashes]
        return "".join(f"{line}\n" for line in sorted(lines))


def _written(key: str) -> str:
    plain = not re.search(r'[\r\n]|\A["\ufeff]|\A(sha256|phash):|\A\s|\s\Z', key)
    return key if plain else json.dumps(key)


def read(paths: Sequence[epath.PathLike], name: str) -> Removed:
    """The union of lists; `name` is what the user calls them.

    Raises:
      BadInput: a file cannot be read, or a line begins like a hash and is none.
    """
    found = Removed()
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline=None) as file:
                lines = [line.rstrip("\n") for line in file]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise errors.BadInput(
                f"{name}={os.fspath(path)} cannot be read ({reason}): name a text file with one key"
                " in each line."
            ) from error
        keys, digests, hashes = set(), set(), set()
        for number, line in enumerate(lines, 1):
            kind, colon, digits = line.strip().partition(":")
            if kind not in ("sha256", "phash") or not colon:
                keys.add(_key(line))
            elif re.fullmatch("[0-9a-fA-F]{64}", digits) and kind == "sha256":
                digests.add(digits.lower())
            elif re.fullmatch("[0-9a-fA-F]{16}", digits) and kind == "phash":
                value = int(digits, 16)
                hashes.add(value - _BITS if value >= _BITS // 2 else value)
            else:
                raise errors.BadInput(
                    f"{name}={os.fspath(path)}, line {number}: {line.strip()[:80]!r} is no {kind}:"
                    " write 64 hexadecimal digits after sha256: and 16 after phash:, and a key that"
                    " begins like this in double quotes."
                )
        found |= Removed(frozenset(keys - {""}), frozenset(digests), frozenset(hashes))
    return found


def _key(line: str) -> str:
    if line.startswith('"'):
        try:
            key = json.loads(line)
        except ValueError:
            return line
        return key if isinstance(key, str) else line
    return line


def lists(workdir: epath.Path, configured: Sequence[str]) -> list[str]:
    """The files of `config.removed`, then those of the work directory."""
    own = engine.listed(workdir / FOLDER, ".txt")
    return [*map(os.fspath, configured), *map(os.fspath, own)]


def add(workdir: epath.Path, more: Removed) -> None:
    """Adds to the work directory's list, durably."""
    path = workdir / FOLDER / "removed.txt"
    path.parent.mkdir(exist_ok=True)
    with manifests.locked(path.parent):
        before = read([path], "The list") if path.exists() else Removed()
        if before | more != before:
            engine.write_durably(path, (before | more).text().encode())


def of_pictures(pictures: Iterable[tuple[str, str, int | None]]) -> Removed:
    """The list of pairs (key, sha256, perceptual hash or None).

    The hash of a picture of one colour stays out: all of these have it.
    """
    rows = list(pictures)
    hashes = {
        phash for _, _, phash in rows if phash is not None and (phash % _BITS).bit_count() > 1
    }
    keys, digests = (frozenset(row[i] for row in rows) for i in (0, 1))
    return Removed(keys, digests, frozenset(hashes))


class Finder:
    """Finds the pairs that a list names."""

    def __init__(self, removed: Removed, max_hamming: int):
        """
        Args:
          removed: the list.
          max_hamming: how many of the 64 bits of a perceptual hash may differ.
        """
        import pyarrow as pa

        self.keys = pa.array(sorted(removed.keys), pa.string())
        self._digests = pa.array(sorted(removed.digests), pa.string())
        hashes = np.array(sorted(removed.hashes), np.int64)
        self._index = decontaminate.HashIndex(hashes, max_hamming)

    def find(self, pairs) -> np.ndarray:
        """bool [n]: of a table with columns key, sha256 and phash, which rows."""
        import pyarrow.compute as pc

        named = pc.or_(
            pc.is_in(pairs["key"], self.keys), pc.is_in(pairs["sha256"], self._digests)
        ).to_numpy()
        named = named.copy()
        hashed = np.flatnonzero(pairs["phash"].is_valid().to_numpy())
        for row, _, _ in self._index.near(pairs["phash"].drop_null().to_numpy()):
            named[hashed[row]] = True
        return named


def run(work: engine.Engine, files: Sequence[str], max_hamming: int, shards: Sequence[str]) -> None:
    """Writes takedowns/ of `shards` by the lists `files`; tells of keys there that no pair has."""
    tasks = [
        engine.Task(shard, (work.workdir / f"pairs/{shard}.parquet", *files)) for shard in shards
    ]
    settings = {"version": 2, "max_hamming": max_hamming}
    found = engine.total_counts(work.map_shards("takedowns", _find, tasks, settings))
    asked = len(read(files, "config.removed").keys)
    if shards and found.get("named", 0) < asked:
        some = engine.read_table(tasks[0].inputs[0], ["key"])["key"].slice(0, 1).to_pylist()
        logging.warning(
            "%d of %d keys on the removal lists are of no pair here, where a key looks like %s",
            asked - found.get("named", 0),
            asked,
            *map(repr, some or ["..."]),
        )


def _find(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow.compute as pc

    pairs_path, *files = task.inputs
    finder = _finder(files, settings["max_hamming"])
    pairs = decontaminate.read_tables([pairs_path], ["key", "sha256", "phash"])
    keys = pairs["key"].filter(finder.find(pairs)).to_pylist()
    table = engine.rejects_table(outputs.stage, [(key, "removed") for key in keys])
    outputs.write_table(f"{outputs.stage}/{task.name}.parquet", table.drop_columns("stage"))
    named = pc.sum(pc.is_in(pairs["key"], finder.keys)).as_py() or 0
    return {"pairs": len(pairs), "removed": len(keys), "named": named}


@engine.kept
def _finder(files: Sequence[str], max_hamming: int) -> Finder:
    return Finder(read(files, "config.removed"), max_hamming)
