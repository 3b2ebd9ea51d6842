"""What one GPU has to show: attention, the step beside PyTorch, the entity softmax.

    python -m benchmarks.one_gpu [--quick] [--minutes 14]

Runs, on the device at hand, `benchmarks.train_step --only attention` for the variants whose class
token can be apart, then `--only torch` with the faster attention for each variant, and
`benchmarks.entity_softmax --only speed`.  Their tables come as they are measured and their JSON
objects last; exits 1 when a figure that was asked for does not hold, or a part has not ended in
time.  --quick, for machines without a GPU: the smallest tower in place of all.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from typing import Any

Figures = list[dict[str, Any]]
VARIANTS = ("L/14", "H/14", "B/16")  # the last one's patches fill no tiles


def run(end: float, *command: str) -> tuple[Figures, bool]:
    """The figures of a benchmark, and whether it ended well."""
    print("\n$ python -m", *command, flush=True)
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", *command], stdout=subprocess.PIPE, text=True
    ) as child:
        timer = threading.Timer(max(end - time.monotonic(), 0), child.kill)
        timer.start()
        for line in child.stdout:
            if line.startswith("{"):
                lines.append(line)
            else:
                print(line, end="", flush=True)
        timer.cancel()
    return [json.loads(line) for line in lines], child.returncode == 0


def faster(figures: Figures, variant: str) -> str:
    """`auto`, or `split` where attention in the image tower of the variant was faster by it."""
    by_name = {
        figure["bar"].rpartition(", ")[2]: figure["value"]
        for figure in figures
        if figure["bar"].startswith(f"attention {variant}, ") and figure["unit"] == "ms"
        if ", 77 tokens" not in figure["bar"]
    }
    return "split" if by_name and min(by_name, key=by_name.get) == "split" else "auto"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="Ti/16 at 32 pixels in float32")
    parser.add_argument("--minutes", type=float, default=14, help="all ends by then")
    flags = parser.parse_args()
    quick = ("--quick",) if flags.quick else ()
    end = time.monotonic() + 60 * flags.minutes
    step = ("benchmarks.train_step", *quick, "--remat", "none")

    def minutes() -> tuple[str, str]:
        return "--minutes", f"{max((end - time.monotonic()) / 60, 0):.1f}"

    some = ("--variants", ",".join(VARIANTS[:2]))
    found, well = run(end, *step, "--only", "attention", *some, *minutes())
    results = [(found, well)]
    chosen = {variant: faster(found, variant) for variant in VARIANTS}
    for attention in dict.fromkeys(chosen.values()):
        variants = ",".join(v for v in VARIANTS if chosen[v] == attention)
        options = ("--attention", attention, "--variants", variants, *minutes())
        results.append(run(end, *step, "--only", "torch", *options))
    results.append(run(end, "benchmarks.entity_softmax", *quick, "--only", "speed"))
    print()
    for figures, _ in results:
        for figure in figures:
            print(json.dumps(figure))
    return int(not all(well for _, well in results))


if __name__ == "__main__":
    sys.exit(main())
