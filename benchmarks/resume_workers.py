"""What data workers and another number of hosts change in a run that goes on: nothing.

    python -m benchmarks.resume_workers [--quick]

A run of 2 processes x 1 device, with 0 to 3 data workers each, kills itself and goes on from step 5
in 1 process x 2 devices.  Its final state has to be that of a run without workers that stayed in
one process, bit for bit, and every example has to be used once in each epoch, in the same row; the
order is one of blocks.
"""

import argparse
import pathlib
import signal
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from benchmarks import figures
from benchmarks import kill_and_resume as runs

STEPS = 11
RESUMED = runs.PERIODS["checkpoint"]  # a multiple of neither 2 nor 3
DIES = RESUMED + 4  # the save is long finished


def resumed(folder: pathlib.Path, numbers: Iterable[int]) -> dict[str, Any]:
    """Runs all; `runs.prepare` has made the folder.

    Args:
      numbers: of data workers.
    """
    assert runs.wait(runs.Cluster(1, 2).start(folder, "stayed", steps=STEPS, pause=0.0)) == [0]
    stayed, differing, same_rows = runs.parameters(folder, "stayed"), 0, True
    for number in numbers:
        name = f"workers_{number}"
        options = {"steps": STEPS, "workers": number}
        killed = runs.Cluster(2, 1).start(folder, name, pause=0.3, die_at=DIES, **options)
        assert runs.wait(killed) == [-signal.SIGKILL] * 2
        assert runs.saved(folder, name) == [RESUMED]
        assert runs.wait(runs.Cluster(1, 2).start(folder, name, pause=0.0, **options)) == [0]
        differing += runs.bits_differ(stayed, runs.parameters(folder, name))
        used = runs.used(folder, name)
        same_rows &= used == runs.used(folder, "stayed") and runs.each_once(used, STEPS, 48)
    return {"differing": differing, "same_rows": same_rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two data workers alone")
    args = parser.parse_args(arguments)
    report = figures.Report()
    with tempfile.TemporaryDirectory(prefix="mofi_jax_workers_") as temporary:
        folder = pathlib.Path(temporary)
        runs.prepare(folder)
        found = resumed(folder, (2,) if args.quick else range(4))
    device = "cpu, 2 x 1 -> 1 x 2 simulated devices"
    report.add(
        "data workers, fewer hosts: arrays of the final state that differ in a bit",
        *(found["differing"], "arrays", device, "<= 0"),
    )
    report.add(
        "data workers, fewer hosts: each example of an epoch used once, in the same row",
        *(float(found["same_rows"]), "yes", device, ">= 1"),
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
