"""The stages of data preparation that need no picture, over a million pairs, for `data_prep`."""

import os
import pathlib
import random
import tempfile
import threading
import time

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import figures, synthetic
from configs import i2e
from data_prep import engine
from data_prep.dataset import order as record_order
from data_prep.dataset import shards, vocabulary
from data_prep.filters import stage as filters_stage
from data_prep.kb import build as kb_build
from data_prep.linking import stage as linking_stage
from data_prep.selection import choose

_WORKERS = 2
_CORES = 512  # of the cost model
_BILLION = 10**9

# The stages that move rows, by the rate that is asked of them, in rows a second of one worker.
_ASKED = {
    300_000: ("entity_counts_parts", "frequent_parts", "label_count_parts"),
    100_000: ("caption_rows", "link_rows", "gathered", "ordered-i2e", "planned-i2e"),
}


class Memory:
    """Resident memory of this process and its workers, sampled ten times a second."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for each in (process, *process.children(recursive=True)):
                try:
                    total += each.memory_info().rss
                except psutil.NoSuchProcess:  # has just ended
                    continue
            self.samples.append((time.monotonic(), total / 2**20))

    def growth(self) -> float:
        """The peak of the second half of the time over the peak of the first, minus 1."""
        middle = (self.samples[0][0] + self.samples[-1][0]) / 2
        halves = [
            max((rss for at, rss in self.samples if (at >= middle) == late), default=0.0)
            for late in (False, True)
        ]
        return halves[1] / halves[0] - 1

    def peak(self) -> float:
        return max(rss for _, rss in self.samples)


def measure(report: figures.Report, quick: bool) -> None:
    """The stages without pictures over synthetic pairs, and what a billion would take."""
    pairs, unique = (50_000, 2_000) if quick else (1_000_000, 60_000)
    draw = random.Random(5)
    captions = synthetic.captions(unique, list(synthetic.names(60_000)))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        work_folder = folder / "W"
        synthetic.write_pairs(work_folder, draw.choices(captions, k=pairs), shard_rows=100_000)
        config = i2e.get_config("sample,labels=text")
        rows = synthetic.write_rows(folder / "rows.jsonl", 20_000, 2)
        kb_build.build(rows, work_folder / "kb", config.kb)
        config.update(min_images=5, max_images=5_000)
        given = sum(len(names) for _, _, names in os.walk(work_folder))
        before, started = psutil.Process().cpu_times(), time.monotonic()
        with engine.Engine(work_folder, _WORKERS) as work:
            with Memory() as linked:
                linking_stage.run(config, work)
            with Memory() as rest:
                choose.run(config, work)
                filters_stage.run(config, work)
                vocabulary.run(config, work)
                record_order.run(work, "i2e", seed=0, shard_examples=10_000)
        elapsed = time.monotonic() - started
        after = psutil.Process().cpu_times()
        files = sum(len(names) for _, _, names in os.walk(work_folder)) - given
        seconds = engine.stage_seconds(work_folder)
    scale = f"{pairs:,} pairs"
    cpu = figures.CPU
    asked = None if quick else "<= 1500"
    report.add(f"{scale}, {_WORKERS} workers: all stages", elapsed, "s", cpu, asked)
    own = after.user + after.system - before.user - before.system
    workers = after.children_user + after.children_system
    workers -= before.children_user + before.children_system
    asked = None if quick else "<= 0.1"
    share = own / (own + workers)
    report.add(f"{scale}: the driver's share of the CPU time", share, "of all", cpu, asked)
    report.add(f"{scale}: files written", files, "files", cpu, "<= 200")
    for name, memory, bound in (("linking", linked, asked), ("the other stages", rest, None)):
        bar = f"{scale}: memory in the second half of {name} over the first"
        report.add(bar, memory.growth(), "growth", cpu, bound)
    report.add(f"{scale}: peak memory", max(linked.peak(), rest.peak()), "MiB", cpu)
    seconds.pop("kb", None)
    for stage, found in seconds.items():
        rate = pairs / max(found["seconds"], 1e-3)
        bounds = [f">= {least}" for least, stages in _ASKED.items() if stage in stages]
        asked = None if quick else next(iter(bounds), None)
        report.add(f"{scale}: stage {stage}", rate, "rows/s", cpu, asked)
    _show_costs({stage: found["seconds"] / pairs * 1e6 for stage, found in seconds.items()})
    _measure_entity_ids(report)


def _show_costs(costs: dict[str, float]) -> None:
    """Prints worker-seconds per million pairs, and hours and share of a billion."""
    total = sum(costs.values())
    print(f"\n{'stage':<24}{'s / 10^6':>10}{f'h / 10^9 on {_CORES} cores':>26}{'share':>8}")
    for stage, cost in [*costs.items(), ("all", total)]:
        hours = cost * _BILLION / 1e6 / 3600 / _CORES
        print(f"{stage:<24}{cost:>10.2f}{hours:>26.3f}{cost / total:>8.1%}")
    print(flush=True)


def _measure_entity_ids(report: figures.Report) -> None:
    entities, records = 2_000_000, 10_000
    draw = np.random.default_rng(0)
    rows = draw.permutation(4 * entities)[:entities].astype(np.int32)
    labels = pa.chunked_array([pa.array(list(draw.choice(rows, (records, 2))))])
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ids.npy"
        np.save(path, vocabulary.invert(rows))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            shards._entity_ids(labels, path)
            times.append(time.perf_counter() - started)
    bar = f"entity ids of a record, of {entities:,}"
    report.add(bar, min(times) / records * 1e6, "us", figures.CPU, "<= 5")
