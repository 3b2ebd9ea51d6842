"""Speed, memory and exactness of what is done with a trained model.

    python -m benchmarks.interop [--quick] [--only SECTION ...]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold.  What is compared in speed runs in turns in this one process, so that a busy
machine slows both: ratios are medians over these turns.  --quick takes smaller sets.
"""

import argparse
import sys

from benchmarks import collection, figures, python_api

# A section is a function of the report and whether it is to be quick.
SECTIONS = {
    "import": python_api.imports,
    "naming": python_api.naming,
    "embed": collection.embed,
    "search": collection.search,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    report = figures.Report()
    for name in options.only:
        SECTIONS[name](report, options.quick)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
