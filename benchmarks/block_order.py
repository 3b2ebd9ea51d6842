"""What shuffling blocks of records does to a model: unseen mAP on the bundled sample.

    python -m benchmarks.block_order [--block 32] [--seeds 5] [--steps 850] [--jobs 1] [--out W]

Trains the quick start's multi-task model on its data (`make quickstart` has made them) with
``config.data.block`` 1 and ``--block``, once for each seed, and prints the mean difference of
unseen mAP with its 95 % interval over the seeds (paired, Student's t).  Run again, it resumes.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from concurrent import futures

import numpy as np
from scipy import stats

from benchmarks import figures


def train(out: pathlib.Path, seed: int, block: int, steps: int, data: pathlib.Path) -> float:
    """Unseen mAP after a run in ``out``."""
    workdir = out / f"seed_{seed}_block_{block}"
    command = [sys.executable, "-m", "mofi_jax.train", "--config", "configs/quickstart.py"]
    values = {"seed": seed, "data.block": block, "data.dir": data, "total": f"{steps} steps"}
    for name in ("retrieval_seen", "retrieval_unseen", "entity_seen", "zeroshot_unseen"):
        values[f"evaluators.{name}.every"] = "100 percent"
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log:
        subprocess.run([*command, *flags, f"--workdir={workdir}"], check=True, stderr=log)
    return json.loads((workdir / "result.json").read_text())["scores"]["retrieval_unseen/map"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--data", type=pathlib.Path, default="runs/quickstart/data")
    parser.add_argument("--out", type=pathlib.Path, default="runs/block_order")
    args = parser.parse_args()
    runs = [(seed, block) for seed in range(args.seeds) for block in (1, args.block)]
    with futures.ThreadPoolExecutor(args.jobs) as pool:
        maps = list(pool.map(lambda run: train(args.out, *run, args.steps, args.data), runs))
    single, blocks = np.reshape(maps, (args.seeds, 2)).T
    found = stats.ttest_rel(blocks, single).confidence_interval(0.95)
    report = figures.Report()
    name = f"unseen mAP, {args.steps} steps, {args.seeds} seeds"
    report.add(f"{name}: single records", single.mean(), "", figures.CPU)
    report.add(f"{name}: blocks of {args.block}", blocks.mean(), "", figures.CPU)
    report.add(f"{name}: difference", (blocks - single).mean(), "", figures.CPU)
    report.add(f"{name}: difference, 95 % interval from", found.low, "", figures.CPU)
    report.add(f"{name}: difference, 95 % interval to", found.high, "", figures.CPU)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
