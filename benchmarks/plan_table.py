"""Training steps planned for TPU slices: do they fit, how long does a plan take, what do they cost.

    python -m benchmarks.plan_table --out PLANS

Each row is `mofi_jax.plan` in a process of its own.  A row whose plan is in PLANS is not made
again, so that the command can be interrupted and repeated.  Ends with the table in Markdown.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks import figures

REPOSITORY = pathlib.Path(__file__).parent.parent
COMPILER_DEVICE = "TPU compiler on CPU"


@dataclasses.dataclass(frozen=True)
class Row:
    variant: str
    topology: str
    batch: int = 32_768
    millions: float = 2
    task: str = "multitask"
    options: tuple[str, ...] = ()  # of the config, KEY=VALUE instead of its own

    @property
    def name(self) -> str:
        return ", ".join(
            (
                f"{self.variant} {self.task}",
                f"batch {self.batch:,}",
                f"{self.millions:g} M entities",
                self.topology,
                *self.options,
            )
        )


# What the project promises to fit.
BARS = (
    Row("B/16", "v5e:16x16", 16_384),
    Row("B/16", "v5e:16x16"),
    Row("L/14", "v5p:8x8x4"),
    Row("H/14", "v6e:16x16", millions=10),
    Row("H/14", "v5p:8x8x8", millions=10),
    Row("H/14", "tpu7x:4x4x8", millions=10),
)
# What a reader may want to rent.
TABLE = (
    Row("B/16", "v5e:16x16"),
    Row("B/16", "v5p:4x4x4"),
    Row("B/16", "v6e:8x8", 16_384),
    Row("B/16", "tpu7x:2x4x4"),
    Row("L/14", "v5e:16x16", options=("model.remat=full",)),
    Row("L/14", "v5p:8x8x4"),
    Row("L/14", "v6e:16x16"),
    Row("L/14", "tpu7x:4x4x8"),
    Row("H/14", "v5e:16x16"),
    Row("H/14", "v5p:8x8x8"),
    Row("H/14", "v6e:16x16"),
    Row("H/14", "tpu7x:4x4x8"),
)
QUICK = (Row("Ti/16", "v5e:2x2", 1024, 0.02, task="supervised"),)


def make(row: Row, folder: pathlib.Path) -> dict:
    """The row's result.json, from its part of `folder`, with the seconds of the whole command."""
    folder /= re.sub(r"[^\w.=-]+", "-", row.name)
    done, whole = folder / "result.json", folder / "seconds.json"
    if not whole.exists():
        start = time.monotonic()
        subprocess.run(
            [
                *(sys.executable, "-m", "mofi_jax.plan"),
                *("--config", f"configs/mofi.py:task={row.task},variant={row.variant}"),
                f"--config.batch_size={row.batch}",
                *(f"--config.{option}" for option in row.options),
                *("--topology", row.topology),
                f"--entities={round(row.millions * 1e6)}",
                *("--out", str(folder)),
            ],
            cwd=REPOSITORY,
            check=False,
        )
        if not done.exists():
            sys.exit(f"error: no plan of {row.name}: see above.")
        whole.write_text(json.dumps(time.monotonic() - start))
    return json.loads(done.read_text()) | {"command_seconds": json.loads(whole.read_text())}


def markdown(rows: list[tuple[Row, dict]]) -> str:
    lines = [
        "| model | slice | chips | batch | entities | GiB a chip | of | TFLOP a step | "
        "sent MiB a device | estimated MFU | img/s a chip |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, result in rows:
        used, there = result["needed"] or 0, result["available"]
        cells = [
            *(row.variant, row.topology, result["chips"], f"{row.batch:,}"),
            f"{row.millions:g} M",
            *(f"{used / 2**30:.1f}", f"{there / 2**30:.0f}"),
            f"{sum(result['model'].values()) / 1e12:,.0f}",
        ]
        if result["fits"]:
            sent = sum(c["sent_bytes"] for c in result["collectives"])
            rate = result["batch_size"] / result["chips"] / result["step_seconds"]
            cells += [
                f"{sent / 2**20:,.0f}",
                f"{100 * result['mfu_estimate']:.0f} %",
                f"{rate:,.0f}",
            ]
        else:
            cells += ["", "does not fit", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small row, about a minute")
    parser.add_argument("--only", choices=("bars", "table"), help="one list of rows alone")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the plans, to go on later")
    flags = parser.parse_args()
    chosen = {"bars": BARS, "table": TABLE}.get(flags.only, (*BARS, *TABLE))
    rows = QUICK if flags.quick else tuple(dict.fromkeys(chosen))
    report = figures.Report()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows:
            result = make(row, flags.out or pathlib.Path(scratch))
            results.append((row, result))
            asked = row in BARS
            report.add(
                f"plan fits: {row.name}",
                *(float(result["fits"]), "1 = yes", COMPILER_DEVICE),
                ">= 1" if asked else None,
            )
            report.add(
                "  seconds of the whole command",
                *(result["command_seconds"], "s", COMPILER_DEVICE),
                "<= 300" if asked else None,
            )
    code = report.finish()
    print("\n" + markdown(results))
    return code


if __name__ == "__main__":
    sys.exit(main())
