"""The stages of data preparation that need no picture, over a million pairs, for `data_prep`."""

import os
import pathlib
import random
import tempfile
import threading
import time

import ml_collections
import numpy as np
import psutil
import pyarrow as pa

from benchmarks import costs, figures, synthetic
from configs import i2e
from data_prep import engine
from data_prep.dataset import order as record_order
from data_prep.dataset import shards, vocabulary
from data_prep.engine import executors
from data_prep.filters import stage as filters_stage
from data_prep.kb import build as kb_build
from data_prep.linking import stage as linking_stage
from data_prep.selection import choose

_WORKERS = 2

# The stages that move rows, by the rate that is asked of them, in rows a second of one worker.
_ASKED = {
    300_000: ("entity_counts_parts", "frequent_parts", "label_count_parts"),
    100_000: ("caption_rows", "link_rows", "gathered", "ordered-i2e", "planned-i2e"),
}


class Watch:
    """Memory and CPU time of this process and its workers, sampled ten times a second.

    Attributes:
      samples: time and MiB of all together.
      own: CPU seconds of this process; `cpu` those of each worker.
    """

    def __init__(self, workers: str) -> None:
        """Names of processes that work for this one begin with `workers`."""
        self.samples: list[tuple[float, float]] = []
        self.cpu: dict[int, float] = {}
        self._workers = workers
        self._before: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._before = self._sample()[1]
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        self.own = self.cpu.pop(os.getpid())

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            rss, cpu = self._sample()
            self.samples.append((time.monotonic(), rss))
            self.cpu |= {pid: spent - self._before.get(pid, 0.0) for pid, spent in cpu.items()}

    def _sample(self) -> tuple[float, dict[int, float]]:
        process, total, cpu = psutil.Process(), 0, {}
        for each in (process, *process.children(recursive=True)):
            try:
                if each == process or each.name().startswith(self._workers):
                    total += each.memory_info().rss
                    times = each.cpu_times()
                    cpu[each.pid] = times.user + times.system
            except psutil.NoSuchProcess:  # has just ended
                continue
        return total / 2**20, cpu

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


def measure(report: figures.Report, quick: bool, given: costs.Given) -> None:
    """The stages without pictures over synthetic pairs, and what a billion would take."""
    pairs, unique = (50_000, 2_000) if quick else (1_000_000, 60_000)
    scale, cpu = f"{pairs:,} pairs", figures.CPU
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        work_folder, config = _prepare(folder, pairs, unique)
        given_files = _count_files(work_folder)
        started = time.monotonic()
        with engine.Engine(work_folder, _WORKERS) as work:
            with Watch("python") as linked:
                linking_stage.run(config, work)
            with Watch("python") as rest:
                _after_linking(config, work)
        elapsed = time.monotonic() - started
        files = _count_files(work_folder) - given_files
        seconds = engine.stage_seconds(work_folder)
        seconds.pop("kb", None)  # is of no number of pairs
    asked = None if quick else "<= 1500"
    report.add(f"{scale}, {_WORKERS} workers: all stages", elapsed, "s", cpu, asked)
    _add_share(report, f"{scale}, {_WORKERS} workers", quick, linked, rest)
    report.add(f"{scale}: files written", files, "files", cpu, "<= 200")
    for name, memory, bound in (("linking", linked, "<= 0.1"), ("the other stages", rest, None)):
        bar = f"{scale}: memory in the second half of {name} over the first"
        report.add(bar, memory.growth(), "growth", cpu, None if quick else bound)
    report.add(f"{scale}: peak memory", max(linked.peak(), rest.peak()), "MiB", cpu)
    for stage, found in seconds.items():
        rate = pairs / max(found["seconds"], 1e-3)
        bounds = [f">= {least}" for least, stages in _ASKED.items() if stage in stages]
        asked = None if quick else next(iter(bounds), None)
        report.add(f"{scale}: stage {stage}", rate, "rows/s", cpu, asked)
    _measure_entity_ids(report)
    rows = {stage: found["seconds"] / pairs * 1e6 for stage, found in seconds.items()}
    # On the web nearly every caption is another one.
    rows["captions"] *= pairs / unique
    costs.show(report, quick, rows, given)


def measure_on_ray(report: figures.Report, quick: bool) -> None:
    """The driver's share where a Ray cluster does the work."""
    pairs, unique = (50_000, 2_000) if quick else (1_000_000, 60_000)
    with tempfile.TemporaryDirectory() as folder:
        work_folder, config = _prepare(pathlib.Path(folder), pairs, unique)
        work = engine.Engine(work_folder, executor=executors.Ray())
        with work, Watch("ray::") as watch:
            linking_stage.run(config, work)
            _after_linking(config, work)
    _add_share(report, f"{pairs:,} pairs, Ray", quick, watch)


def _prepare(
    folder: pathlib.Path, pairs: int, unique: int
) -> tuple[pathlib.Path, ml_collections.ConfigDict]:
    draw, work_folder = random.Random(5), folder / "W"
    captions = synthetic.captions(unique, list(synthetic.names(60_000)))
    synthetic.write_pairs(work_folder, draw.choices(captions, k=pairs), shard_rows=100_000)
    config = i2e.get_config("sample,labels=text")
    rows = synthetic.write_rows(folder / "rows.jsonl", 20_000, 2)
    kb_build.build(rows, work_folder / "kb", config.kb)
    config.update(min_images=5, max_images=5_000)
    return work_folder, config


def _after_linking(config: ml_collections.ConfigDict, work: engine.Engine) -> None:
    choose.run(config, work)
    filters_stage.run(config, work)
    vocabulary.run(config, work)
    record_order.run(work, "i2e", seed=0, shard_examples=10_000)


def _count_files(folder: pathlib.Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def _add_share(report: figures.Report, scale: str, quick: bool, *watches: Watch) -> None:
    own = sum(watch.own for watch in watches)
    share = own / (own + sum(sum(watch.cpu.values()) for watch in watches))
    asked = None if quick else "<= 0.1"
    report.add(f"{scale}: the driver's share of the CPU time", share, "of all", figures.CPU, asked)


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
