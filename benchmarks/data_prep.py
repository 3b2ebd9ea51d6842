"""Speed, memory and quality of data preparation.

    python -m benchmarks.data_prep [--quick] [--only NAME ...]
                                   [--entity_linking TEXTS --entities KB]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold. Rates are of one core unless said otherwise; what is compared runs in this one
process, turn by turn.

Linking is measured on texts with gold mentions, {"text", "mentions": [{"start", "end", "surface",
"qid"}]} a line, and a knowledge base of JSON lines; without the two flags that part is left out.
How good the labels are, `python -m data_prep.label_quality` measures on any work directory.
"""

import argparse
import gzip
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import costs, figures, million_pairs, synthetic
from benchmarks import knowledge_base as kb_figures
from configs import i2e
from data_prep import engine
from data_prep.kb import build as kb_build
from data_prep.kb import lookup, names
from data_prep.linking import boilerplate, disambiguate, ner
from data_prep.linking import stage as linking_stage


def make_config(**changes):
    config = i2e.get_config("sample,labels=text")
    config.update(changes)
    return config


def median_ratio(pairs: int, first: Callable, second: Callable) -> tuple[float, float, float]:
    """Median seconds of both, and the median of first over second, run in turn."""
    seconds = []
    for turn in range(pairs + 1):
        times = []
        for function in (first, second):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        if turn:
            seconds.append(times)
    one, two = (statistics.median(times) for times in zip(*seconds, strict=True))
    return one, two, statistics.median(a / b for a, b in seconds)


# ------------------------------------------------------------------------------------------ linking


def read_gold(path: str) -> list[dict]:
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        return [json.loads(line) for line in file]


def linking_quality(report: figures.Report, texts_path: str, rows_path: str, quick: bool) -> None:
    """Gold entities among the candidates; mentions found."""
    gold = read_gold(texts_path)[: 500 if quick else None]
    with tempfile.TemporaryDirectory() as folder:
        kb_build.build(rows_path, f"{folder}/kb", make_config().kb)
        kb = lookup.KnowledgeBase(f"{folder}/kb")
        entities = lookup.read_entities(f"{folder}/kb").to_pylist()
        row_of = {row["qid"]: number for number, row in enumerate(entities)}
        names_of = [
            {names.normalize(name) for name in (row["label"], *(row["aliases"] or ()))}
            for row in entities
        ]
        config = make_config()
        texts = [row["text"] for row in gold]
        blank = boilerplate.Blanker(config.boilerplate)
        blanked = [blank(text) for text in texts]
        spans = ner.spacy_spans(blanked, config.spacy_model, config.noun_chunks)
        rule = disambiguate.Rule.of(config)
        mentions, candidates = linking_stage.link(texts, blanked, spans, kb, rule)
        mentions, candidates = mentions.to_pylist(), candidates.to_pylist()

        total = known = named = 0  # of the mentions: all, entity in the base, and by a name of it
        found = looked_up = looked_up_named = linked = linked_named = 0
        for row, spans_of, candidates_of in zip(gold, mentions, candidates, strict=True):
            for mention in row["mentions"]:
                total += 1
                overlapping = {
                    i
                    for i, span in enumerate(spans_of)
                    if span["start"] < mention["end"] and mention["start"] < span["end"]
                }
                found += bool(overlapping)
                entity = row_of.get(mention["qid"])
                if entity is None:
                    continue
                known += 1
                form = names.normalize(mention["surface"])
                by_name = form in names_of[entity]
                named += by_name
                hit = entity in [e for e, _ in kb.candidates(form, config.max_candidates)]
                looked_up += hit
                looked_up_named += hit and by_name
                hit = any(
                    c["entity"] == entity and c["mention"] in overlapping for c in candidates_of
                )
                linked += hit
                linked_named += hit and by_name
    add = report.add
    add(
        "linking: gold entity among the 10 candidates of its name",
        looked_up_named / named,
        "share",
        figures.CPU,
        ">= 0.9",
    )
    add(
        "linking: the same through the whole stage (the mention has to be found)",
        linked_named / named,
        "share",
        figures.CPU,
        ">= 0.9",
    )
    add(
        "linking: gold entity among the candidates, over all mentions",
        linked / total,
        "share",
        figures.CPU,
    )
    add("linking: the same by looking up the surface", looked_up / total, "share", figures.CPU)
    add("linking: mentions whose entity is in the base", known / total, "share", figures.CPU)
    add(
        "linking: of these, with a name of the entity as surface",
        named / max(known, 1),
        "share",
        figures.CPU,
    )
    add("linking: mention found (overlap)", found / total, "share", figures.CPU, ">= 0.9")


def linking_speed(report: figures.Report, quick: bool) -> None:
    """spaCy's share, and what linking adds to it."""
    config = make_config()
    entities = 20_000
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = synthetic.write_rows(folder / "rows.jsonl", entities, 2)
        kb_build.build(rows, folder / "kb", config.kb)
        kb = lookup.KnowledgeBase(folder / "kb")
        known = list(synthetic.names(entities * 3))
        captions = synthetic.captions(256 if quick else 2_048, known)
        nlp = ner.load_spacy(config.spacy_model, config.noun_chunks)

        def bare() -> None:
            with nlp.memory_zone():
                for _ in nlp.pipe(captions, batch_size=ner.BATCH):
                    pass

        def ours() -> None:
            for _ in ner.spacy_spans(captions, config.spacy_model, config.noun_chunks):
                pass

        pairs = 2 if quick else 5
        seconds, _, ratio = median_ratio(pairs, bare, ours)
        report.add("NER stage: speed over bare nlp.pipe", ratio, "x", figures.CPU, ">= 0.95")
        report.add("NER stage: bare nlp.pipe", len(captions) / seconds, "texts/s", figures.CPU)

        many = synthetic.captions(4_096 if quick else 40_000, known)
        spans = [[]] * len(many)
        rule = disambiguate.Rule.of(config)
        found = [match for text in many for match in kb.scan(text)]
        forms = [match.form for match in found]
        surfaces = [match.form.title() for match in found]
        text_of = np.repeat(np.arange(len(many)), [len(kb.scan(text)) for text in many])

        def candidates_alone() -> None:
            disambiguate.weigh(kb, rule, many, text_of, surfaces, forms)

        def with_gazetteer() -> None:
            for start in range(0, len(many), 4096):
                part = many[start : start + 4096]
                linking_stage.link(part, part, spans[start : start + 4096], kb, rule)

        seconds, whole, _ = median_ratio(pairs, candidates_alone, with_gazetteer)
        rate = len(forms) / seconds
        report.add(
            "linking after NER: candidates of mentions", rate, "mentions/s", figures.CPU, ">= 80000"
        )
        report.add(
            "linking after NER: with the gazetteer's scan and the columns",
            len(forms) / whole,
            "mentions/s",
            figures.CPU,
        )


# ------------------------------------------------------------------------------------------- engine


def read_numbers(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """A stage that does next to nothing: its time is the engine's."""
    outputs.write_table(f"numbers/{task.name}.parquet", pq.read_table(task.inputs[0]))
    return {"rows": settings["rows"]}


def engine_overhead(report: figures.Report, quick: bool) -> None:
    """Wall-clock seconds of a stage without work, over its records."""
    shards, rows = (10 if quick else 50), 1_000
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tasks = []
        for number in range(shards):
            path = folder / f"{number:05d}.parquet"
            pq.write_table(pa.table({"key": [f"{number}-{row}" for row in range(rows)]}), path)
            tasks.append(engine.Task(path.stem, (path,)))
        for workers in (1, 2):
            with engine.Engine(folder / f"w{workers}", workers) as work:
                work.map_shards("warm", read_numbers, tasks[:workers], {"rows": rows})
                start = time.perf_counter()
                work.map_shards("numbers", read_numbers, tasks, {"rows": rows})
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                work.map_shards("numbers", read_numbers, tasks, {"rows": rows})
                again = time.perf_counter() - start
            microseconds = 1e6 * seconds / (shards * rows)
            bar = (
                f"engine: overhead, {workers} worker{'s'[: workers - 1]}, {rows:,} records a shard"
            )
            report.add(bar, microseconds, "us/record", figures.CPU, "<= 50")
        report.add(
            "engine: a finished stage again, per shard", 1e3 * again / shards, "ms", figures.CPU
        )


def two_workers(report: figures.Report, quick: bool) -> None:
    """The linking stage with two processes against one, workers started beforehand."""
    captions = synthetic.captions(2_000 if quick else 12_000, list(synthetic.names(60_000)))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = synthetic.write_rows(folder / "rows.jsonl", 20_000, 2)
        engines = {}
        for workers in (1, 2):
            workdir = folder / f"w{workers}"
            synthetic.write_pairs(workdir, captions, shard_rows=1_000)
            kb_build.build(rows, workdir / "kb", make_config().kb)
            engines[workers] = engine.Engine(workdir, workers)
        turn = [0]

        def run(workers: int) -> None:
            # A setting that changes nothing else makes every turn do the work again.
            turn[0] += 1
            config = make_config(company_weight=0.0, case_penalty=1 - turn[0] / 1000)
            linking_stage.run(config, engines[workers])

        _, _, ratio = median_ratio(1 if quick else 3, lambda: run(1), lambda: run(2))
        for work in engines.values():
            work.close()
    report.add("engine: two workers against one, linking stage", ratio, "x", figures.CPU, ">= 1.6")


PARTS = {
    "kb": kb_figures.size,
    "parse": kb_figures.parse_speed,
    "kinds": kb_figures.kinds,
    "linking": linking_speed,
    "overhead": engine_overhead,
    "workers": two_workers,
    "ray": million_pairs.measure_on_ray,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    choices = ["quality", *PARTS, "million"]
    parser.add_argument("--only", nargs="+", choices=choices, help="parts to run")
    parser.add_argument("--cores", type=int, default=512, help="of the cost model")
    parser.add_argument("--accelerators", type=int, default=64, help="of the cost model")
    parser.add_argument(
        "--pictures_per_second", type=float, default=1000, help="that one of them embeds"
    )
    parser.add_argument("--entity_linking", help="texts with gold mentions, .jsonl or .jsonl.gz")
    parser.add_argument("--entities", help="their knowledge base, .jsonl or .jsonl.gz")
    flags = parser.parse_args()
    if bool(flags.entity_linking) != bool(flags.entities):
        parser.error("--entity_linking and --entities go together")
    report = figures.Report()
    chosen = flags.only or choices
    if flags.entity_linking and "quality" in chosen:
        linking_quality(report, flags.entity_linking, flags.entities, flags.quick)
    for name, part in PARTS.items():
        if name in chosen:
            part(report, flags.quick)
    if "million" in chosen:
        given = costs.Given(flags.cores, flags.accelerators, flags.pictures_per_second)
        million_pairs.measure(report, flags.quick, given)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
