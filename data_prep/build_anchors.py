"""Counts the links of the English Wikipedia, which tell what names mean.

    mofi anchors --dump enwiki-latest-pages-articles.xml.bz2 \\
        --kb kb/ --out anchors.parquet --workers 16
    mofi kb --dump latest-all.json.bz2 --out kb2/ --config.anchors=anchors.parquet

`kb` is a knowledge base built from Wikidata, whose entities have titles; the table says how often
each text links to each entity (anchor, qid, count), titles that redirect to it among them, and how
often the text stands in articles, linked or not (seen). The same command after a kill goes on.
"""

import os

from absl import logging

from data_prep.kb import lookup
from data_prep.kb.sources import dump as kb_dump
from data_prep.kb.sources import wikipedia
from mofi_jax.common import cli, errors


def main(dump: str, kb: str, out: str, workers: str = "2", memory_gb: str = "4") -> None:
    """Writes `out` from `dump`.

    Args:
      dump: pages-articles, .xml, .xml.gz or .xml.bz2.
      kb: a folder made by data_prep.build_kb.
      out: the table, .parquet.
      workers: processes that read pages; another one decompresses.
      memory_gb: for sums; what needs more spills to disk beside `out`.

    Raises:
      BadInput: an argument that cannot be used; `dump` is damaged or leads to no entity of `kb`.
    """
    wikipedia.check(dump)
    if not kb_dump.is_finished(kb):
        raise errors.BadInput(f"--kb={kb} is no knowledge base: make it with `mofi kb`.")
    lookup.check(kb)
    if not out.endswith(".parquet"):
        raise errors.BadInput(f"--out={out} cannot be used: name a .parquet file.")
    if not workers.isdecimal() or int(workers) < 1:
        raise errors.BadInput(f"--workers={workers} cannot be used: give a whole number from 1 on.")
    try:
        memory = float(memory_gb)
    except ValueError:
        memory = 0.0
    if not 0.1 <= memory < float("inf"):
        raise errors.BadInput(f"--memory_gb={memory_gb} cannot be used: give at least 0.1.")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    counts = wikipedia.count(dump, kb, out, int(workers), memory)
    logging.info("%s: %s", out, ", ".join(f"{value} {key}" for key, value in counts.items()))


if __name__ == "__main__":
    cli.run(main)
