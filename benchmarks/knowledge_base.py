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

_KINDS = """
import resource, sys, time
import duckdb
from data_prep.kb import closure
limits = {"threads": 2, "memory_limit": "1.5 GB", "temp_directory": sys.argv[1]}
with duckdb.connect(config=limits) as connection:
    start = time.perf_counter()
    found = closure.Kinds(connection, sys.argv[2:])
    closed = time.perf_counter() - start
    start = time.perf_counter()
    assert not any(table["kind"].null_count for table in found.tables())
    each = time.perf_counter() - start
print(closed, each, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
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


def kinds(report: figures.Report, quick: bool) -> None:
    """Kinds over a graph of classes as large as Wikidata's: time, and the most memory it takes."""
    classes, items = (40_000, 100_000) if quick else (4_000_000, 2_000_000)
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_classes(pathlib.Path(folder), classes, items)
        line = [sys.executable, "-c", _KINDS, folder, *paths]
        told = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    closed, each, memory = map(float, told.split())
    scale = f"kinds over {classes:,} classes"
    report.add(f"{scale}: closure", closed, "s", figures.CPU)
    report.add(f"{scale}: then 110 million items", 110e6 * each / items, "s", figures.CPU)
    report.add(f"{scale}: memory, whatever the items", memory, "GiB", figures.CPU, "<= 2")


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
