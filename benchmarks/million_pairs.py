"""The stages of data preparation that need no picture, over a million pairs, for `data_prep`."""

import pathlib
import random
import tempfile
import threading
import time

import psutil

from benchmarks import figures, synthetic
from configs import i2e
from data_prep import engine
from data_prep.dataset import order as record_order
from data_prep.dataset import vocabulary
from data_prep.filters import stage as filters_stage
from data_prep.kb import build as kb_build
from data_prep.linking import stage as linking_stage
from data_prep.selection import choose


class Memory:
    """Resident memory of this process, sampled ten times a second, by stage."""

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
            self.samples.append((time.monotonic(), process.memory_info().rss / 2**20))

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
    """The stages without pictures over synthetic pairs, in this one process."""
    pairs, unique = (50_000, 2_000) if quick else (1_000_000, 60_000)
    draw = random.Random(5)
    captions = synthetic.captions(unique, list(synthetic.names(60_000)))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        synthetic.write_pairs(folder / "W", draw.choices(captions, k=pairs), shard_rows=10_000)
        kb_build.build(synthetic.write_rows(folder / "rows.jsonl", 20_000, 2), folder / "W/kb")
        config = i2e.get_config("sample,labels=text")
        config.update(min_images=5, max_images=5_000)
        work = engine.Engine(folder / "W")
        with Memory() as linked:
            linking_stage.run(config, work)
        with Memory() as rest:
            choose.run(config, work)
            filters_stage.run(config, work)
            vocabulary.run(config, work)
            record_order.run(work, "i2e", seed=0, shard_examples=10_000)
        seconds = engine.stage_seconds(work.workdir)
    scale = f"{pairs:,} pairs"
    report.add(
        f"{scale}: memory in the second half of linking over the first",
        linked.growth(),
        "growth",
        figures.CPU,
        "<= 0.1",
    )
    report.add(
        f"{scale}: memory in the second half of the other stages over the first",
        rest.growth(),
        "growth",
        figures.CPU,
    )
    report.add(f"{scale}: peak memory", max(linked.peak(), rest.peak()), "MiB", figures.CPU)
    aggregates = (
        "caption_rows",
        "link_rows",
        "entity_counts",
        "frequent",
        "label_counts",
        "ordered-i2e",
        "planned-i2e",
    )
    seconds.pop("kb", None)
    for stage, found in seconds.items():
        rate = pairs / max(found["seconds"], 1e-3)
        asked = ">= 300000" if stage in aggregates and not quick else None
        report.add(f"{scale}: stage {stage}", rate, "rows/s", figures.CPU, asked)
