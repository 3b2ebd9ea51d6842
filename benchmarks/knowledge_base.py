"""Size and speed of knowledge bases, for `benchmarks.data_prep`."""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import figures, synthetic
from configs import kb as kb_config
from data_prep.kb import build as kb_build
from data_prep.kb.sources import dump as kb_dump

_OPEN = """
import sys, psutil
from data_prep.kb import lookup
import marisa_trie, numpy
private = psutil.Process().memory_full_info
before = private()
kb = lookup.KnowledgeBase(sys.argv[1])
opened = private()
for name in open(sys.argv[2]):
    kb.candidates(name.strip(), 10)
used = private()
mib = 2**20
print((opened.rss - before.rss) / mib, (used.rss - before.rss) / mib, (used.uss - before.uss) / mib)
sys.stdin.read()
"""


def size(report: figures.Report, quick: bool) -> None:
    """The trie on disk, and what a second process that opens the base adds."""
    entities = 50_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = synthetic.write_rows(folder / "rows.jsonl", entities, 2)
        start = time.perf_counter()
        manifest = kb_build.build(rows, folder / "kb", kb_config.get_config())
        seconds = time.perf_counter() - start
        aliases = manifest["counts"]["aliases"]
        each = (folder / "kb/aliases.marisa").stat().st_size / aliases
        sample = folder / "names.txt"
        sample.write_text("".join(f"{n.lower()}\n" for n in synthetic.names(min(entities, 40_000))))
        line = [sys.executable, "-c", _OPEN, folder / "kb", sample]
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            told = process.stdout.readline()
            processes.append(process)
        for process in processes:
            process.communicate("")
    opened, used, private = map(float, told.split())
    scale = f"knowledge base of {aliases:,} aliases"
    report.add(f"{scale}: trie on disk", each, "B/alias", figures.CPU, "<= 15")
    report.add(f"{scale}: built", aliases / seconds, "aliases/s", figures.CPU)
    report.add(
        f"{scale}: opening it in a second process adds", opened, "MiB", figures.CPU, "<= 100"
    )
    report.add(f"{scale}: after 40,000 lookups, shared pages included", used, "MiB", figures.CPU)
    report.add(f"{scale}: after 40,000 lookups, of its own", private, "MiB", figures.CPU, "<= 100")


def parse_speed(report: figures.Report, quick: bool) -> None:
    """Items of Wikidata's dump per second of one core: parsed, judged, names made, part written."""
    settings = kb_build.settings_of(kb_config.get_config(), "wikidata")
    for length in (2_500, 10_000):
        lines = list(synthetic.dump_lines(500 if quick else 5_000, length))
        data = b"[\n" + b",\n".join(lines) + b"\n]\n"
        with tempfile.TemporaryDirectory() as folder:
            parse = kb_build.Parser(folder, settings)
            parse(kb_dump.Chunk(0, 1, data))  # imports
            rates = []
            for number in range(1, 4 if quick else 8):
                start = time.process_time()
                parse(kb_dump.Chunk(number, 1, data))
                rates.append(len(lines) / (time.process_time() - start))
        bar = f"Wikidata dump: items of {length / 1000:g} kB"
        report.add(bar, statistics.median(rates), "items/s", figures.CPU, ">= 15000")
