"""What shuffling blocks of records does to a model: unseen mAP on the bundled sample.

    python -m benchmarks.block_order [--seeds 0 1 2 3 4] [--block 32] [--steps 400] [--out W]

Trains the quick start's multi-task recipe with a smaller model on the quick start's data (`make
quickstart` has made them), with ``config.data.block`` 1 and ``--block`` for each seed, and prints
the mean difference of unseen mAP with its 95 % interval over the seeds (paired, Student's t).  Runs
that are finished in W are not made again.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import figures
from configs import quickstart
from mofi_jax import train

SIZE = 24  # pixels


def config(seed: int, block: int, steps: int, data: pathlib.Path, programs: pathlib.Path) -> Any:
    made = quickstart.get_config("task=multitask")
    made.seed, made.total, made.compile_cache = seed, f"{steps} steps", str(programs)
    made.model.update(image_size=SIZE, embed_dim=64)
    made.model.image.update(width=64, layers=2, heads=2)
    made.model.text.layers = 1
    made.data.update(
        dir=str(data),
        block=block,
        eval_ops=f"decode|resize_short({SIZE})|center_crop({SIZE})",
    )
    made.evaluators = {"unseen": made.evaluators.retrieval_unseen.to_dict()}
    made.evaluators.unseen.every = made.checkpoint.every = "100 percent"
    made.log_every = "100 steps"
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--data", type=pathlib.Path, default="runs/quickstart/data")
    parser.add_argument("--out", type=pathlib.Path, default="runs/block_order")
    args = parser.parse_args()
    scores = []
    for seed in args.seeds:
        for block in (1, args.block):
            workdir = args.out / f"seed_{seed}_block_{block}_steps_{args.steps}"
            if not (workdir / "result.json").exists():
                programs = (args.out / "programs").absolute()
                train.main(config(seed, block, args.steps, args.data, programs), str(workdir))
            result = json.loads((workdir / "result.json").read_text())
            scores.append(result["scores"]["unseen/map"])
    single, blocks = np.reshape(scores, (-1, 2)).T
    interval = stats.ttest_rel(blocks, single).confidence_interval(0.95)
    report = figures.Report()
    name = f"unseen mAP, {args.steps} steps, {len(single)} seeds"
    report.add(f"{name}: single records", single.mean(), "", figures.CPU)
    report.add(f"{name}: blocks of {args.block}", blocks.mean(), "", figures.CPU)
    report.add(f"{name}: difference", (blocks - single).mean(), "", figures.CPU)
    report.add(f"{name}: difference, 95 % interval from", interval.low, "", figures.CPU)
    report.add(f"{name}: difference, 95 % interval to", interval.high, "", figures.CPU)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
