"""The dump of the English Wikipedia's articles -> how often each text links to each entity.

`count` reads the dump twice. First links and redirects are taken from its articles; targets are
followed over redirects to the titles of a knowledge base. Then the texts of these links are looked
for in all articles, the longest at each word: how often they are seen, linked or not.

A chunk of pages is read by a worker into a file, its part; DuckDB sums the parts, on disk where
memory is short. After a kill the parts that are whole are not made again.
"""

from __future__ import annotations

import collections
import functools
import os
import re
import shutil
import typing
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator

from data_prep import engine
from data_prep.kb import closure
from data_prep.kb import parts as kb_parts
from data_prep.kb.sources import dump, wikitext
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import marisa_trie

_SUFFIXES = (".xml", ".xml.gz", ".xml.bz2")
_CHUNK = 16 << 20  # bytes
_MAX_CHUNK = 256 << 20  # bytes; a page has 2 MB at most, its wikitext once
_LONGEST = 100  # characters of a text that is looked for
# A redirect is there because people write its title: as many links as make a name.
_REDIRECT_LINKS = 5
_PAGE = re.compile(rb"<page>.*?</page>", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")
_NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^<>]*>([^<>]*)</namespace>')
# Other names of some; the dump has the main ones.
_ALIASES = frozenset(("image", "image talk", "project", "project talk", "wp", "wt"))


def check(path: str) -> None:
    """Raises BadInput unless `path` is a file that can be a dump."""
    if not os.path.isfile(path):
        raise errors.BadInput(f"--dump={path} does not exist: name a dump of Wikipedia.")
    if not path.endswith(_SUFFIXES):
        raise errors.BadInput(
            f"--dump={path} has an unknown suffix: give enwiki-DATE-pages-articles.xml.bz2, or the"
            " same as .xml.gz or .xml."
        )


def count(path: str, kb: str, target: str, workers: int, memory_gb: float) -> dict[str, int]:
    """Writes the table of anchors.

    Args:
      path: the dump.
      kb: a built knowledge base, whose entities have titles.
      target: .parquet with the columns anchor, qid, count, seen; sorted.
      workers: processes that read pages.
      memory_gb: for DuckDB.

    Returns:
      Counts: articles, damaged (pages that are passed over), links, anchors (rows of the table).

    Raises:
      BadInput: the dump is damaged or cut off, or no link leads to an entity.
    """
    import duckdb
    import marisa_trie
    import pyarrow.parquet as pq

    scratch = f"{target}.parts"
    for folder in ("links", "seen"):
        os.makedirs(os.path.join(scratch, folder), exist_ok=True)
    spaces = sorted(_namespaces(path, workers))
    parser = Links(os.path.join(scratch, "links"), {"namespaces": spaces})
    links = dump.parse_all(_chunks(path, workers), parser, workers)
    counts = collections.Counter[str]()
    for part in links:
        counts.update(kb_parts.read(part + Links.last)["counts"])
    limits = {"threads": workers, "memory_limit": f"{memory_gb} GB", "temp_directory": scratch}
    with duckdb.connect(config=limits) as connection:
        _resolve(connection, links, kb)
        [(total,)] = connection.execute("SELECT count(*) FROM anchors").fetchall()
        if not total:
            raise errors.BadInput(
                f"--dump={path}: no link leads to a title of {kb}: give a knowledge base made from"
                " Wikidata, and the dump of the English Wikipedia."
            )
        found = engine.ask(connection, "SELECT DISTINCT anchor FROM anchors ORDER BY anchor")
        texts = (batch["anchor"].to_pylist() for batch in found.to_arrow_reader(100_000))
        trie = marisa_trie.Trie(text for some in texts for text in some if len(text) <= _LONGEST)
        looked_for = os.path.join(scratch, "anchors.marisa")
        trie.save(looked_for)
        with open(looked_for, "rb") as file:
            settings = {"namespaces": spaces, "anchors": zlib.crc32(file.read())}
        parser = Seen(os.path.join(scratch, "seen"), settings)
        seen = dump.parse_all(_chunks(path, workers), parser, workers)
        rows = engine.ask(
            connection,
            "SELECT anchor, qid, links AS count, coalesce(seen, 0)::BIGINT AS seen FROM anchors"
            " LEFT JOIN (SELECT anchor, sum(seen) AS seen FROM read_parquet($seen) GROUP BY anchor)"
            " USING (anchor) ORDER BY anchor, qid",
            {"seen": [part + Seen.last for part in seen]},
        ).to_arrow_reader(100_000)
        with pq.ParquetWriter(f"{target}.tmp", rows.schema, compression="zstd") as writer:
            for batch in rows:
                writer.write_batch(batch)
    os.replace(f"{target}.tmp", target)
    shutil.rmtree(scratch)
    return {**{key: counts[key] for key in ("articles", "damaged", "links")}, "anchors": total}


def _resolve(connection, links: list[str], kb: str) -> None:
    """Makes the table anchors: anchor, qid, links."""
    files = {
        "links": [part + Links.links for part in links],
        "redirects": [part + Links.last for part in links],
        "entities": os.path.join(kb, "entities.parquet"),
    }
    for statement in (
        "CREATE TEMP TABLE redirects AS SELECT DISTINCT child, parent"
        " FROM read_parquet($redirects)",
        "CREATE TEMP TABLE titles AS SELECT title AS id, qid AS root"
        " FROM read_parquet($entities) WHERE title IS NOT NULL",
    ):
        engine.ask(connection, statement, files)
    closure.spread(connection, "redirects", "titles", "pages")
    engine.ask(
        connection,
        "CREATE TEMP TABLE anchors AS"
        " SELECT anchor, root AS qid, sum(links)::BIGINT AS links FROM ("
        "  SELECT anchor, title, links FROM read_parquet($links) UNION ALL"
        r"  SELECT regexp_replace(id, '(.)\s*\([^()]*\)$', '\1'), id,"
        f"  {_REDIRECT_LINKS} FROM pages WHERE steps > 0)"
        " JOIN pages ON title = id GROUP BY anchor, root",
        files,
    )


# ------------------------------------------------------------------------------------------ reading


def _chunks(path: str, threads: int) -> Iterator[dump.Chunk]:
    """Whole pages; the first chunk begins with what stands before them."""
    held, number = b"", 0
    try:
        for block in dump.blocks(path, threads):
            held += block
            end = held.rfind(b"</page>") + len(b"</page>")
            if len(held) >= _CHUNK and end >= len(b"</page>"):
                yield dump.Chunk(number, number, held[:end])
                held, number = held[end:], number + 1
            elif len(held) > _MAX_CHUNK:
                raise ValueError("a page without an end")
    except dump.DAMAGE as error:
        raise errors.BadInput(
            f"--dump={path} is damaged ({' '.join(str(error).split())}): fetch it again."
        ) from error
    if not held.rstrip().endswith(b"</mediawiki>"):
        raise errors.BadInput(
            f"--dump={path} ends without the closing tag of a dump of Wikipedia, so that some of it"
            " is missing: fetch it again."
        )
    yield dump.Chunk(number, number, held)


def _namespaces(path: str, threads: int) -> frozenset[str]:
    """The names of the namespaces that are not the articles', in lower case."""
    head = b""
    try:
        for block in dump.blocks(path, threads):
            head += block
            if b"</siteinfo>" in head or len(head) > _CHUNK:
                break
    except dump.DAMAGE as error:
        raise errors.BadInput(
            f"--dump={path} is damaged ({' '.join(str(error).split())}): fetch it again."
        ) from error
    found = _NAMESPACE.findall(head.partition(b"</siteinfo>")[0].decode("utf-8", "replace"))
    if not found:
        raise errors.BadInput(
            f"--dump={path} does not begin like a dump of Wikipedia, with its namespaces: give"
            " enwiki-DATE-pages-articles.xml.bz2."
        )
    return _ALIASES | {name.lower() for key, name in found if key != "0"}


def _articles(chunk: dump.Chunk) -> Iterator[tuple[str, str, str] | None]:
    """Title, title of the page it redirects to or "", wikitext; None for a page that is damaged."""
    for match in _PAGE.finditer(chunk.data):
        try:
            page = ElementTree.fromstring(match[0])
        except ElementTree.ParseError:
            yield None
            continue
        if page.findtext("ns") == "0":
            redirect = page.find("redirect")
            leads = "" if redirect is None else redirect.get("title", "")
            text = page.findtext("revision/text") or ""
            yield wikitext.title_of(page.findtext("title") or ""), wikitext.title_of(leads), text


class Links(dump.Parser):
    """The links of a chunk, and its redirects."""

    links, last = ".links.parquet", ".redirects.parquet"

    def parse(self, chunk: dump.Chunk) -> None:
        import pyarrow as pa

        spaces = frozenset(self.settings["namespaces"])
        links, redirects = collections.Counter[tuple[str, str]](), set[tuple[str, str]]()
        counts = {"articles": 0, "damaged": 0, "links": 0}
        for article in _articles(chunk):
            if article is None:
                counts["damaged"] += 1
            elif article[1]:
                redirects.add(article[:2])
            else:
                found = wikitext.read(article[2], spaces).links
                links.update(found)
                counts["articles"] += 1
                counts["links"] += len(found)
        schema = {"anchor": pa.string(), "title": pa.string(), "links": pa.int64()}
        rows = [(*pair, number) for pair, number in sorted(links.items())]
        path = self.path(chunk)
        kb_parts.write(path + self.links, kb_parts.table(rows, pa.schema(schema)))
        rows = kb_parts.table(sorted(redirects), kb_parts.classes_schema())
        note = {"made_of": self.made_of(chunk), "counts": counts}
        kb_parts.write(path + self.last, rows, note)


class Seen(dump.Parser):
    """How often each text that links somewhere stands in the articles of a chunk."""

    last = ".seen.parquet"

    def parse(self, chunk: dump.Chunk) -> None:
        import pyarrow as pa

        trie = _trie(os.path.join(self.folder, "../anchors.marisa"), self.settings["anchors"])
        spaces = frozenset(self.settings["namespaces"])
        seen = collections.Counter[str]()
        for article in _articles(chunk):
            if article and not article[1]:
                seen.update(_names_in(wikitext.read(article[2], spaces).text, trie))
        schema = pa.schema({"anchor": pa.string(), "seen": pa.int64()})
        rows = kb_parts.table(sorted(seen.items()), schema)
        kb_parts.write(self.path(chunk) + self.last, rows, {"made_of": self.made_of(chunk)})


@functools.lru_cache(maxsize=1)
def _trie(path: str, checksum: int) -> marisa_trie.Trie:
    """The texts that are looked for; `checksum` tells one from the next."""
    import marisa_trie

    return marisa_trie.Trie().mmap(path)


def _names_in(text: str, trie: marisa_trie.Trie) -> Iterator[str]:
    """The texts of the trie in a text, whole words, the longest at each; none inside another."""
    text = " ".join(text.split())
    reached = 0
    for word in _WORD.finditer(text):
        start = word.start()
        if start < reached:
            continue
        for name in reversed(trie.prefixes(text[start : start + _LONGEST])):  # the longest first
            end = start + len(name)
            if not (text[end - 1].isalnum() and text[end : end + 1].isalnum()):
                reached = end
                yield name
                break
