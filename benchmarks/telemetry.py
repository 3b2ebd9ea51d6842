"""What telemetry and asynchronous checkpoints cost, as a share of the step.

    python -m benchmarks.telemetry [--quick]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold.  One compiled update on one batch runs in this one process.  The calls that the
training loop makes to report a step are timed one by one: that is what a step would lose if no
update were in flight to hide them.  Stretches of steps with and without them, and with and without
a save, take turns, so that a busy machine slows both; the price of a save, until it is on disk, is
the median over pairs of neighbouring stretches, and a run that saves each 100 steps pays a
hundredth of it a step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks import figures
from configs import quickstart
from mofi_jax import telemetry
from mofi_jax.distributed import global_batch, meshes
from mofi_jax.training import checkpoint, setup, state, step

SAVE_EVERY = 100
LOG_EVERY = 10  # the loop of configs/mofi.py logs each 50 steps
ENTITIES = 5_000
VOCABULARY = 1_000


class Loop:
    """The training loop on one batch, with a switch for what it says."""

    def __init__(self, workdir: epath.PathLike, *, width: int, batch_size: int):
        config = quickstart.get_config("task=multitask")
        config.batch_size = batch_size
        config.model.image.update(width=width, layers=4)
        mesh = meshes.make_mesh(**config.mesh)
        train_setup = setup.make(
            config,
            mesh,
            vocab_size=VOCABULARY,
            eos_id=VOCABULARY - 1,
            num_entities=ENTITIES,
            examples_per_epoch=10_000,
        )
        self.state, shardings = state.create(train_setup.init, config.seed, mesh)
        self.update = step.make_train_step(train_setup.context, train_setup.tx, shardings)
        self.batch = global_batch.to_global(mesh, random_batch(config, batch_size))
        self.learning_rates = train_setup.learning_rates
        self.values: Any = None
        self.step = 0
        self.report_seconds: list[float] = []

        self.goodput = telemetry.Goodput()
        self.goodput.resume(workdir, {})
        self.goodput.enter("step")
        self.watchdog = telemetry.Watchdog(minutes=20.0)
        self.metrics = telemetry.Metrics(workdir, resume_step=-1)
        self.meter = telemetry.Meter(
            self.goodput,
            images_per_step=batch_size,
            tokens_per_step=batch_size * config.model.context_length,
            peak_flops=1e12,
        )
        self.progress = telemetry.Progress(
            self.goodput,
            first=0,
            total=10_000,
            batch_size=batch_size,
            work=lambda start, end: 1e12 * (end - start),
            pauses={"checkpoint": [1000]},
        )
        self.checkpointer = checkpoint.Checkpointer(workdir, keep=2)

    def run(self, steps: int, *, reporting: bool, saving: bool = False) -> float:
        """Seconds a step, until all of it is computed and, with a save, on disk."""
        start = time.perf_counter()
        if saving:
            with self.goodput.phase("checkpoint"):
                position = checkpoint.Position(self.step, {}, self.goodput.save(), {})
                self.checkpointer.save(self.step, self.state, position)
        for _ in range(steps):
            before = self.values
            if reporting:
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                    with self.goodput.phase("input"):
                        pass
                    self.state, self.values = self.update(self.state, self.batch)
            else:
                self.state, self.values = self.update(self.state, self.batch)
            jax.block_until_ready(before)
            self.step += 1
            if reporting:
                called = time.perf_counter()
                self.report()
                self.report_seconds.append(time.perf_counter() - called)
        jax.block_until_ready(self.values)
        if saving:
            self.checkpointer.wait()
        return (time.perf_counter() - start) / steps

    def report(self) -> None:
        """What the training loop does after each step."""
        self.progress.at(self.step - 1)
        self.watchdog.progress()
        self.metrics.watch(self.step, self.values)
        self.progress.show(self.step - 1, self.metrics.flush())
        if self.step % LOG_EVERY == 0:
            measured = {
                **self.learning_rates(self.step),
                **self.meter.read(self.step, 1e12 * self.step),
            }
            self.metrics.push(self.step, {**self.values, **measured})
            self.goodput.heartbeat()

    def close(self) -> None:
        self.checkpointer.close()
        self.metrics.abandon()
        self.watchdog.close()
        self.goodput.close()


def random_batch(config: Any, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size, length = config.model.image_size, config.model.context_length
    ids = rng.integers(0, ENTITIES, (rows, config.data.max_labels)).astype(np.int32)
    tokens = rng.integers(0, VOCABULARY - 1, (rows, length)).astype(np.int32)
    tokens[:, -1] = VOCABULARY - 1
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "tokens": tokens,
        "text_group": ids[:, 0],
        "text_valid": np.ones(rows, bool),
        "entity_ids": ids,
        "entity_weights": np.full(ids.shape, 1 / ids.shape[1], np.float32),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    flags = parser.parse_args()
    report = figures.Report()
    pairs, save_pairs, steps = (4, 4, 3) if flags.quick else (12, 16, 4)
    device = jax.devices()[0].device_kind.lower()
    with tempfile.TemporaryDirectory() as folder:
        width, batch_size = (64, 32) if flags.quick else (256, 120)
        loop = Loop(folder, width=width, batch_size=batch_size)
        # Compiles, and opens what is opened once.
        loop.run(LOG_EVERY + 2, reporting=True, saving=True)
        loop.report_seconds.clear()
        bare, reported = [], []
        for turn in range(pairs):
            order = (bare, reported) if turn % 2 else (reported, bare)
            for seconds in order:
                seconds.append(loop.run(steps, reporting=seconds is reported))
        unsaved, saved = [], []
        for turn in range(save_pairs):
            order = (unsaved, saved) if turn % 2 else (saved, unsaved)
            for seconds in order:
                seconds.append(loop.run(steps, reporting=True, saving=seconds is saved))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state))
        calls = statistics.fmean(loop.report_seconds)
        loop.close()

    each = statistics.median(bare)
    reporting = statistics.median(t - b for t, b in zip(reported, bare, strict=True))
    save = statistics.median(steps * (s - u) for s, u in zip(saved, unsaved, strict=True))
    asked = None if flags.quick else "<= 1"
    report.add("step", 1e3 * each, "ms", device, None if flags.quick else ">= 500")
    report.add("state that is saved", size / 2**20, "MiB", device)
    report.add("telemetry, calls of a step on the host", 1e3 * calls, "ms", device)
    report.add("telemetry, step with less step without", 1e3 * reporting, "ms", device)
    report.add("a save, until it is on disk", 1e3 * save, "ms", device)
    report.add(
        f"telemetry and a save each {SAVE_EVERY} steps, share of the step",
        100 * (calls + save / SAVE_EVERY) / each,
        "%",
        device,
        asked,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
