"""The training step on TPUs by the TPU compiler's own clock, from a machine without one.

    python -m benchmarks.tpu_step [--quick] [--only TEXT] [--out PLANS]

Each step is `mofi_jax.plan` in a process of its own: supervised, 2 million entities, without
rematerialisation where that fits, else the config's.  Beside it stands the block of textbooks
(`benchmarks.textbook_block`) on the same chip.  All times are estimates: the cycles that the
compiler notes, and for kernels the bundles that it schedules; none is a measurement.  --only takes
the figures whose name holds TEXT, as in "L/14", "v5e" or "attention".  What is in PLANS is not made
again, so that the command can be interrupted and repeated.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from benchmarks import figures, plan_table
from mofi_jax.plan import clock, tpu_topology

SLICES = {"v5e": "4x4", "v6e": "4x4", "v5p": "2x2x4", "tpu7x": "2x2x4"}  # of 16 chips


@dataclasses.dataclass(frozen=True)
class Step:
    variant: str
    version: str
    batch: int  # a chip
    asked: str | None = None  # of the MFU

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.version}, {self.batch} a chip"


STEPS = (
    Step("B/16", "v5e", 128, ">= 0.58"),
    Step("B/16", "v6e", 256),
    Step("B/16", "v5p", 256),
    Step("B/16", "tpu7x", 512),
    Step("L/14", "v5e", 64, ">= 0.6"),
    Step("L/14", "v6e", 128, ">= 0.6"),
    Step("L/14", "v5p", 128),
    Step("L/14", "tpu7x", 256),
    Step("H/14", "v5e", 32),
    Step("H/14", "v6e", 64),
    Step("H/14", "v5p", 128, ">= 0.6"),
    Step("H/14", "tpu7x", 256),
)
QUICK = (Step("Ti/16", "v5e", 128),)
# Cycles of attention alone, by plans that differ by one layer; XLA's without the copies that it
# makes beside it.
ATTENTION = (
    ("attention, 197 tokens, 12 heads of 64, 128 pictures, v5e", "image", "<= 1.8"),
    ("attention, 77 causal tokens, 8 heads of 64, 128 texts, v5e", "text", None),
)
DEVICE = plan_table.COMPILER_DEVICE


def plan(step: Step, folder: pathlib.Path) -> dict:
    """The result of the step without rematerialisation, or as the config has it."""
    for options in (("model.remat=none",), ()):
        row = plan_table.Row(
            step.variant,
            f"{step.version}:{SLICES[step.version]}",
            16 * step.batch,
            task="supervised",
            options=options,
        )
        if (result := plan_table.make(row, folder))["fits"]:
            break
    return result


def textbook(step: Step, folder: pathlib.Path) -> dict:
    """What `benchmarks.textbook_block` says of the same shapes on the smallest slice."""
    path = folder / f"textbook {re.sub(r'[^a-zA-Z0-9]+', '-', step.name)}.json"
    if not path.exists():
        arguments = (step.variant, tpu_topology.smallest(step.version), str(step.batch))
        command = [sys.executable, "-m", "benchmarks.textbook_block", *arguments]
        done = subprocess.run(
            command, cwd=plan_table.REPOSITORY, check=True, capture_output=True, text=True
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout)
    return json.loads(path.read_text())


def add_step(report: figures.Report, step: Step, folder: pathlib.Path) -> None:
    def add(what: str, value: float, unit: str, asked: str | None = None) -> None:
        report.add(f"{step.name}: {what}", value, unit, DEVICE, asked if step.asked else None)

    result = plan(step, folder)
    add("fits", float(result["fits"]), "1 = yes", ">= 1")
    if not result["fits"]:
        return
    total, remat = result["step_seconds"], result["config"]["model"]["remat"]
    add(f"MFU, rematerialisation {remat}", result["mfu_estimate"], "", step.asked)
    add("bound of the MFU by the links", result["mfu_bound"], "")
    add("pictures a second", step.batch / total, "img/s")
    for cause, spent in sorted(result["estimate"].items(), key=lambda item: -item[1]):
        add(f"time for {cause}", 1e3 * spent, "ms")
    add("operations without an estimate", float(len(result["not_estimated"])), "", "<= 0")
    add("share of the entity softmax", result["estimate"]["entity softmax"] / total, "", "<= 0.12")
    plain = textbook(step, folder)["mfu"]
    add("MFU of the textbook block", plain, "")
    asked = ">= 1.7" if step.variant == "B/16" else None
    add("step over the textbook block", result["mfu_estimate"] / plain, "times", asked)


def add_attention(report: figures.Report, name: str, tower: str, asked: str | None, folder) -> None:
    for implementation in ("auto", "xla"):
        spent = []
        for layers in (2, 3):
            depth = {"image": 2, "text": 2} | {tower: layers}
            row = plan_table.Row(
                *("B/16", "v5e:2x2", 4 * 128),
                millions=0.001,
                task="supervised" if tower == "image" else "contrastive",
                options=(
                    *(f"model.{name}.layers={count}" for name, count in depth.items()),
                    *("model.remat=none", f"model.attention={implementation}"),
                ),
            )
            result = plan_table.make(row, folder)
            spent.append(result["estimate"][clock.ATTENTION] * result["chip"]["clock"])
        report.add(
            f"{name}: {implementation}",
            *((spent[1] - spent[0]) / 1e6, "M cycles", DEVICE),
            asked if implementation == "auto" else None,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small step")
    parser.add_argument("--only", default="", help="figures whose name holds this")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the plans, to go on later")
    flags = parser.parse_args()
    report = figures.Report()
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.out or pathlib.Path(scratch)
        for name, tower, asked in () if flags.quick else ATTENTION:
            if flags.only in name:
                add_attention(report, name, tower, asked, folder)
        for step in QUICK if flags.quick else STEPS:
            if flags.only in step.name:
                add_step(report, step, folder)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
