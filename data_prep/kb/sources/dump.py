"""What a knowledge base can be built from: finds the format, reads it in chunks of whole lines.

.json .json.gz .json.bz2   a dump of Wikidata, decompressed by several threads
-                          the same on standard input, decompressed
.jsonl .jsonl.gz           the generic rows (`data_prep.kb.sources.rows.parse`)
a folder                   WordNet's dict with data.noun and index.noun
"""

from __future__ import annotations

import codecs
import concurrent.futures
import contextlib
import gzip
import itertools
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import tqdm

from data_prep.engine import executors
from data_prep.kb import parts
from data_prep.kb.sources import wordnet
from mofi_jax.common import errors

STDIN = "-"
WIKIDATA, ROWS, WORDNET = "wikidata", "rows", "wordnet"
_SUFFIXES = {
    ".json": WIKIDATA,
    ".json.gz": WIKIDATA,
    ".json.bz2": WIKIDATA,
    ".jsonl": ROWS,
    ".jsonl.gz": ROWS,
}
DAMAGE = (EOFError, RuntimeError, ValueError, gzip.BadGzipFile, zlib.error)
_BLOCK = 4 << 20  # bytes
MAX_LINE = 8 << 20  # bytes; Wikidata itself takes entities of 3 MB
_MAX_CHUNK = 64 << 20  # bytes, or one line more
_REMEDY = (
    "name a .jsonl or .jsonl.gz file, a Wikidata dump (.json, .json.gz, .json.bz2), WordNet's dict"
    " folder, or a folder made by `mofi kb`"
)


class Chunk(NamedTuple):
    """Consecutive lines of the source: `data` begins with line `first_line`, counted from 1."""

    number: int
    first_line: int
    data: bytes


class Parser:
    """Turns chunks into parts: files in a folder, not made again where they are whole.

    Attributes:
      last: how the name of the file ends that makes a part whole; its note says what it is made of.
    """

    last: str

    def __init__(self, folder: str, settings: Mapping):
        self.folder, self.settings = folder, dict(settings)

    def __call__(self, chunk: Chunk) -> str:
        """Parses the chunk unless its part is there; returns the path of the part."""
        if not self.is_done(chunk):
            self.parse(chunk)
        return self.path(chunk)

    def path(self, chunk: Chunk) -> str:
        return os.path.join(self.folder, f"{chunk.number:07d}")

    def is_done(self, chunk: Chunk) -> bool:
        found = parts.read(self.path(chunk) + self.last)
        return found is not None and found["made_of"] == self.made_of(chunk)

    def made_of(self, chunk: Chunk) -> dict:
        return {
            "first_line": chunk.first_line,
            "bytes": len(chunk.data),
            "crc32": zlib.crc32(chunk.data),
            "settings": self.settings,
        }

    def parse(self, chunk: Chunk) -> None:
        """Writes the part."""
        raise NotImplementedError


def parse_all(chunks: Iterator[Chunk], parser: Parser, workers: int) -> list[str]:
    """The paths of the parts of all chunks, parsed where they are not there yet."""
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    if workers == 1 or len(first) < 2:
        return [parser(chunk) for chunk in chunks]
    paths = []
    pool = executors.spawned(workers)
    try:
        running: set[concurrent.futures.Future] = set()
        for chunk in chunks:
            paths.append(parser.path(chunk))
            if parser.is_done(chunk):
                continue
            running.add(pool.submit(parser, chunk))
            if len(running) > workers + 1:  # a chunk waits for each worker, no more in memory
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
        for future in running:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return paths


def is_finished(source: str) -> bool:
    """Whether `source` is a folder that data_prep.build_kb made."""
    return os.path.isfile(os.path.join(source, "manifest.json"))


def check(source: str) -> None:
    """Raises BadInput unless `source` is something that can be built from, or a finished folder."""
    if not source:
        raise errors.BadInput(
            f"knowledge_base is not set: write kb=PATH in --config, and {_REMEDY}."
        )
    if os.path.isdir(source):
        if not is_finished(source) and not wordnet.is_folder(source):
            raise errors.BadInput(
                f"knowledge_base: {source} is no finished knowledge base: make it with `mofi kb`."
            )
    elif not os.path.isfile(source):
        raise errors.BadInput(f"knowledge_base: {source} does not exist: {_REMEDY}.")
    elif not source.endswith(tuple(_SUFFIXES)):
        raise errors.BadInput(
            f"knowledge_base: {source} has an unknown suffix: give a .jsonl or .jsonl.gz file, or"
            " .json, .json.gz or .json.bz2 of Wikidata."
        )


def format_of(source: str) -> str:
    """WIKIDATA, ROWS or WORDNET, of a source that `check` lets pass or of standard input."""
    if source == STDIN:
        return WIKIDATA
    if os.path.isdir(source):
        return WORDNET
    return next(kind for suffix, kind in _SUFFIXES.items() if source.endswith(suffix))


def files(source: str) -> tuple[str, ...]:
    """The files that the result depends on."""
    if source == STDIN:
        return ()
    if os.path.isdir(source):
        return tuple(os.path.join(source, name) for name in wordnet.FILES)
    return (source,)


def chunks(source: str, chunk_lines: int, threads: int) -> Iterator[Chunk]:
    """The lines of the source, `chunk_lines` at a time, with a progress bar in bytes.

    Args:
      source: see the docstring of this file.
      chunk_lines: lines of a chunk; of the last one and of long lines there are fewer.
      threads: of the decompression.

    Raises:
      BadInput: the source is damaged or, for a dump, ends before its closing bracket; one without
        an opening bracket needs none.
    """
    if format_of(source) == WORDNET:
        import orjson

        rows = (orjson.dumps(row) + b"\n" for row in wordnet.rows(source))
        yield from _cut(rows, chunk_lines)
        return
    yield from _cut(_checked(blocks(source, threads), source), chunk_lines)


def _checked(blocks: Iterator[bytes], source: str) -> Iterator[bytes]:
    """The blocks, each line cut behind MAX_LINE bytes, which shows that it was too long."""
    lines = length = 0  # whole lines, and bytes of the one that is not
    first = last = b""
    try:
        for block in blocks:
            first = first or block[:64].removeprefix(codecs.BOM_UTF8).strip()[:1]
            last = block[-64:].strip()[-1:] or last
            count, end = block.count(b"\n"), block.find(b"\n")
            end = len(block) if end < 0 else end
            room = max(MAX_LINE + 1 - length, 0)
            if end > room:
                yield block[:room]
                block = block[end:]
            yield block
            lines += count
            length = len(block) - block.rfind(b"\n") - 1 if count else length + end
    except DAMAGE as error:
        raise errors.BadInput(
            f"knowledge_base: {source} is damaged after line {lines}"
            f" ({' '.join(str(error).split())}): fetch it again."
        ) from error
    # One entity a line, as grep or jq pass them on, has no brackets.
    whole = (b"}", b",") if first == b"{" else (b"]",)
    if format_of(source) == WIKIDATA and last not in whole:
        raise errors.BadInput(
            f"knowledge_base: {source} ends after line {lines} without the closing bracket of a"
            " dump, so that some of it is missing: fetch it again."
        )


def _cut(blocks: Iterator[bytes], chunk_lines: int) -> Iterator[Chunk]:
    number, first_line = 0, 1
    held: list[bytes] = []
    lines = size = 0
    for block in blocks:
        start, count = 0, block.count(b"\n")
        while lines + count >= chunk_lines or (count and size + len(block) >= _MAX_CHUNK):
            taken = min(count, chunk_lines - lines)
            end = _after_line(block, start, taken)
            yield Chunk(number, first_line, b"".join([*held, block[start:end]]))
            number, first_line = number + 1, first_line + lines + taken
            count -= taken
            held, lines, size, start = [], 0, 0, end
        held.append(block[start:])
        lines += count
        size += len(held[-1])
    rest = b"".join(held)
    if rest:
        yield Chunk(number, first_line, rest)


def _after_line(block: bytes, start: int, count: int) -> int:
    """The position behind the `count`-th line end from `start` on."""
    for _ in range(count):
        start = block.index(b"\n", start) + 1
    return start


def blocks(source: str, threads: int) -> Iterator[bytes]:
    """The decompressed bytes of a file or of standard input, with a progress bar.

    Raises:
      DAMAGE: those of its errors that say that the file is not what its suffix says.
    """
    size = None if source == STDIN else os.path.getsize(source)
    with (
        _open(source, threads) as (read, position),
        # Below the bar of the stage, which another process may show.
        tqdm.tqdm(
            total=size, unit="B", unit_scale=True, desc="kb: read", position=1, disable=None
        ) as bar,
    ):
        while block := read(_BLOCK):
            bar.update(position() - bar.n)
            yield block


@contextlib.contextmanager
def _open(source: str, threads: int) -> Iterator[tuple[Callable[[int], bytes], Callable[[], int]]]:
    """A function that reads, and one that tells how many bytes of the file have been read."""
    if source == STDIN:
        consumed = 0

        def read(size: int) -> bytes:
            nonlocal consumed
            block = sys.stdin.buffer.read(size)
            consumed += len(block)
            return block

        yield read, lambda: consumed
    elif source.endswith(".bz2") or (source.endswith(".gz") and not source.endswith(".jsonl.gz")):
        import rapidgzip

        # It takes a gzip file cut in the middle for a whole one: the closing bracket or tag tells.
        # Rows have none, so that they are left to the gzip module.
        opener = rapidgzip.IndexedBzip2File if source.endswith(".bz2") else rapidgzip.RapidgzipFile
        with opener(source, parallelization=threads) as file:
            yield file.read, lambda: file.tell_compressed() // 8
    else:
        with open(source, "rb") as raw:
            read = gzip.GzipFile(fileobj=raw).read if source.endswith(".gz") else raw.read
            yield read, raw.tell
