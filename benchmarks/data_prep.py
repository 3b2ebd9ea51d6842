"""Speed and memory of data preparation.

    python -m benchmarks.data_prep [--quick] [--only NAME ...]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold. Rates are of one core unless said otherwise; what is compared runs in this one
process, turn by turn.

Linking is measured by `benchmarks.linking`.
How good the labels are, `python -m data_prep.label_quality` measures on any work directory.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import costs, figures, million_pairs, synthetic
from benchmarks import knowledge_base as kb_figures
from configs import i2e
from data_prep import engine
from data_prep.kb import build as kb_build
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
            config = make_config(case_weight=1 + turn[0] / 1000)
            linking_stage.run(config, engines[workers])

        _, _, ratio = median_ratio(1 if quick else 3, lambda: run(1), lambda: run(2))
        for work in engines.values():
            work.close()
    report.add("engine: two workers against one, linking stage", ratio, "x", figures.CPU, ">= 1.6")


PARTS = {
    "kb": kb_figures.size,
    "parse": kb_figures.parse_speed,
    "kinds": kb_figures.kinds,
    "overhead": engine_overhead,
    "workers": two_workers,
    "ray": million_pairs.measure_on_ray,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    choices = [*PARTS, "million"]
    parser.add_argument("--only", nargs="+", choices=choices, help="parts to run")
    parser.add_argument("--cores", type=int, default=512, help="of the cost model")
    parser.add_argument("--accelerators", type=int, default=64, help="of the cost model")
    parser.add_argument(
        "--pictures_per_second", type=float, default=1000, help="that one of them embeds"
    )
    flags = parser.parse_args()
    report = figures.Report()
    chosen = flags.only or choices
    for name, part in PARTS.items():
        if name in chosen:
            part(report, flags.quick)
    if "million" in chosen:
        given = costs.Given(flags.cores, flags.accelerators, flags.pictures_per_second)
        million_pairs.measure(report, flags.quick, given)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
