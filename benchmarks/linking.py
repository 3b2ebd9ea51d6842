"""Linking measured on texts with gold mentions: what each part of it does, and how fast it is.

    python -m benchmarks.linking --entities wikidata.jsonl.gz --texts mel.jsonl.gz news.jsonl.gz

The texts are JSON lines {"text", "mentions": [{"start", "end", "qid"}]}, the entities a source of
`data_prep.kb.build` or a finished folder. With --sentences each sentence is a caption, and the rest
of its text the page on which it stands. One row for each set of texts and way of linking:

    gold, all      of all gold mentions, those with their entity among the candidates
    gold, known    the same of those whose entity is in the base
    cands          candidates of a mention that has any
    top-1          of the known, those whose likeliest candidate is their entity
    with cands     mentions that have one; linked: those that mean it more likely than nothing
    precision      of the links on gold mentions, those that are right
    outside        of all links, those on no gold mention
    texts/s        CPU time
"""

import argparse
import gc
import gzip
import itertools
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import figures
from configs import i2e
from data_prep.kb import build as kb_build
from data_prep.kb import lookup
from data_prep.kb.sources import dump as kb_dump
from data_prep.linking import boilerplate, disambiguate, ner
from data_prep.linking import mentions as mentions_of
from data_prep.linking import rows as link_rows
from data_prep.linking import stage as linking_stage

# Ways of linking: the keys that differ from the configuration's defaults.
WAYS = {
    "all parts": {},
    "no NER": {"spacy_model": None},
    "NER not weighed": {"ner_weight": 1.0},
    "case not weighed": {"case_weight": 1.0},
    "nothing not weighed": {"nil_weight": 0.0},
    "page read": {"context_columns": ("page",)},
}
_BLOCK = 4096  # texts, as in the stage
_COLUMNS = ("gold, all", "gold, known", "cands", "top-1", "with cands", "linked")
_COLUMNS += ("precision", "outside", "texts/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entities", required=True, help="a knowledge base or what makes one")
    parser.add_argument("--texts", required=True, nargs="+", help="texts with gold mentions")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="500 texts of each")
    parser.add_argument("--sentences", action="store_true", help="of texts as captions")
    parser.add_argument("--speed", action="store_true", help="against bare nlp.pipe, three rounds")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kb = _open(flags.entities, folder)
        ids = {qid: row for row, qid in enumerate(lookup.read_entities(kb.path)["qid"].to_pylist())}
        print(f"{'texts':<18} {'way':<18}" + "".join(f"{name:>12}" for name in _COLUMNS))
        found = []
        for path in flags.texts:
            texts = _read(path)[: 500 if flags.quick else None]
            texts = [*itertools.chain(*map(_sentences, texts))] if flags.sentences else texts
            for way in flags.ways:
                values = quality(kb, ids, texts, way)
                stem = pathlib.Path(path).name.split(".")[0]
                shown = "".join(f"{value:>12.4g}" for value in values.values())
                print(f"{stem:<18} {way:<18}{shown}", flush=True)
                found.append({"texts": stem, "way": way} | values)
        for row in found:
            print(json.dumps(row))
        if not flags.speed:
            return 0
        report = figures.Report()
        speed(report, kb, [row["text"] for row in _read(flags.texts[0])][:2048])
        return report.finish()


def _open(entities: str, folder: str) -> lookup.KnowledgeBase:
    if kb_dump.is_finished(entities):
        return lookup.KnowledgeBase(entities)
    kb_build.build(entities, f"{folder}/kb", i2e.get_config("sample").kb)
    return lookup.KnowledgeBase(f"{folder}/kb")


def _read(path: str) -> list[dict]:
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        return [json.loads(line) for line in file]


def _sentences(row: dict) -> Iterator[dict]:
    """The sentences of a text that have a gold mention, each with the rest as its `page`."""
    text = row["text"]
    ends = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", text)]
    for start, end in itertools.pairwise([0, *ends, len(text)]):
        own = [m for m in row["mentions"] if start <= m["start"] and m["end"] <= end]
        own = [m | {"start": m["start"] - start, "end": m["end"] - start} for m in own]
        if own:
            page = f"{text[:start]} | {text[end:]}"
            yield {"text": text[start:end], "mentions": own, "page": page}


def _config(way: str):
    config = i2e.get_config("sample")
    config.update(WAYS[way])
    return config


def quality(kb, ids: dict[str, int], rows: list[dict], way: str) -> dict[str, float]:
    """The figures of a set of texts, in the order of the columns."""
    import pyarrow as pa

    config = _config(way)
    texts = [row["text"] for row in rows]
    blank = boilerplate.Blanker(config.boilerplate)
    start = time.process_time()
    how = (blank, kb, disambiguate.Rule.of(config), config.spacy_model)
    pages = [" | ".join(row.get(name, "") for name in config.context_columns) for row in rows]
    people = mentions_of.people_named([page[: linking_stage.MAX_CONTEXT] for page in pages], kb)
    parts = [
        linking_stage.link(texts[i : i + _BLOCK], *how, people[i : i + _BLOCK])
        for i in range(0, len(texts), _BLOCK)
    ]
    mentions, candidates = (pa.concat_arrays(column) for column in zip(*parts, strict=True))
    seconds = time.process_time() - start
    columns = {"key": pa.array(map(str, range(len(texts)))), "mentions": mentions}
    links = link_rows.flatten(pa.table(columns | {"candidates": candidates}))

    # Mentions numbered over all texts.
    first = np.concatenate([[0], np.cumsum(links.mentions)])
    number = first[links.row] + links.mention
    total = np.bincount(number, links.prior, minlength=first[-1])
    best = np.flatnonzero(link_rows.starts_run(number)) if len(number) else np.zeros(0, int)
    top = np.full(first[-1], -1)
    top[number[best]] = links.entity[best]
    linked = np.zeros(first[-1], bool)
    linked[number[best]] = links.prior[best] > 1 - total[number[best]]
    entities_of: dict[int, set[int]] = {}
    for mention, entity in zip(number.tolist(), links.entity.tolist(), strict=True):
        entities_of.setdefault(mention, set()).add(entity)

    golds = known = hit = right = on_gold = right_links = 0
    inside = np.zeros(first[-1], bool)
    for text, (row, own) in enumerate(zip(rows, mentions.to_pylist(), strict=True)):
        for gold in row["mentions"]:
            overlaps = {}
            for i, span in enumerate(own):
                common = min(span["end"], gold["end"]) - max(span["start"], gold["start"])
                if common > 0:
                    union = max(span["end"], gold["end"]) - min(span["start"], gold["start"])
                    overlaps[first[text] + i] = common / union
            inside[list(overlaps)] = True
            entity = ids.get(gold["qid"], -1)
            golds += 1
            known += entity >= 0
            hit += any(entity in entities_of.get(i, ()) for i in overlaps)
            # Of several mentions on it that which covers it best and has candidates.
            with_any = [i for i in overlaps if i in entities_of]
            if with_any:
                closest = max(with_any, key=overlaps.get)
                right += entity >= 0 and top[closest] == entity
                on_gold += linked[closest]
                right_links += linked[closest] and top[closest] == entity
    values = (
        *(hit / golds, hit / known, len(number) / max(len(best), 1), right / known, len(best)),
        *(int(linked.sum()), right_links / max(on_gold, 1)),
        *((linked & ~inside).sum() / max(linked.sum(), 1), len(texts) / seconds),
    )
    return dict(zip(_COLUMNS, map(float, values), strict=True))


def speed(report: figures.Report, kb, texts: list[str]) -> None:
    """The stage's work on captions against bare nlp.pipe of the same pipeline; medians of three."""
    config = _config("all parts")
    rule = disambiguate.Rule.of(config)
    blank = boilerplate.Blanker(config.boilerplate)
    nlp = ner.load_spacy(config.spacy_model)

    def bare() -> None:
        with nlp.memory_zone():
            for _ in nlp.pipe(texts, batch_size=ner.BATCH):
                pass

    def whole(config) -> None:
        linking_stage.link(texts, blank, kb, rule, config.spacy_model)

    whole(config)
    gc.freeze()  # as the stage does

    def seconds(function, *args) -> float:
        start = time.process_time()  # other work on the machine does not count
        function(*args)
        return time.process_time() - start

    rounds = [
        (seconds(bare), seconds(whole, config), seconds(whole, _config("no NER"))) for _ in range(3)
    ]
    ratio = statistics.median(a / b for a, b, _ in rounds)
    report.add("linking: speed over bare nlp.pipe", ratio, "x", figures.CPU, ">= 0.95")
    rate = len(texts) / statistics.median(c for _, _, c in rounds)
    report.add("linking: without NER, one core", rate, "captions/s", figures.CPU, ">= 8000")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
