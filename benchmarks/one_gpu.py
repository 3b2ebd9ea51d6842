"""What one GPU has to show: attention, the step beside PyTorch, the entity softmax.

    python -m benchmarks.one_gpu [--quick] [--minutes 14]

Runs, on the device at hand, `benchmarks.entity_softmax --only speed`, then `benchmarks.train_step
--only attention` for the variants whose class token can be apart, and `--only torch` with the
faster attention for each variant.  Their tables come as they are measured and their JSON objects
last; exits 1 when a figure that was asked for does not hold, or one is missing.  --quick, for
machines without a GPU: the smallest tower in place of all.
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
GRACE = 20  # seconds for a benchmark that keeps to the minutes itself, and ends what it has started


def run(end: float, wanted: dict[str, int], *command: str) -> tuple[Figures, bool]:
    """The figures of a benchmark, and whether it ended well with all that are wanted of it.

    wanted: beginnings of names, and how many figures have to have them.
    """
    print("\n$ python -m", *command, flush=True)
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", *command], stdout=subprocess.PIPE, text=True
    ) as child:
        timer = threading.Timer(max(end + GRACE - time.monotonic(), 0), child.kill)
        timer.start()
        for line in child.stdout:
            if line.startswith("{"):
                lines.append(line)
            else:
                print(line, end="", flush=True)
        timer.cancel()
    figures = [json.loads(line) for line in lines]
    complete = True
    for name, number in wanted.items():
        found = sum(figure["bar"].startswith(name) for figure in figures)
        if found < number:
            print(f"missing: {number - found} of {number} figures {name!r}")
            complete = False
    return figures, complete and child.returncode == 0


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

    softmax = ("benchmarks.entity_softmax", *quick, "--only", "speed")
    results = [run(end, {"rate of 8BCD": 1}, *softmax)]
    some = VARIANTS[:2]
    # The image and the text tower, by one attention at least.
    wanted = {"attention Ti/16": 2} if quick else {f"attention {name}": 2 for name in some}
    options = ("--only", "attention", "--variants", ",".join(some), *minutes())
    found, well = run(end, wanted, *step, *options)
    results.append((found, well))
    chosen = {variant: faster(found, variant) for variant in VARIANTS}
    for attention in dict.fromkeys(chosen.values()):
        variants = [v for v in VARIANTS if chosen[v] == attention]
        wanted = {"fastest of this batch / PyTorch": 1 if quick else len(variants)}
        options = ("--attention", attention, "--variants", ",".join(variants), *minutes())
        results.append(run(end, wanted, *step, "--only", "torch", *options))
    print()
    for figures, _ in results:
        for figure in figures:
            print(json.dumps(figure))
    return int(not all(well for _, well in results))


if __name__ == "__main__":
    sys.exit(main())
