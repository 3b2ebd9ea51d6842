"""The figures of README.md and docs/ beside what their commands say now.

    python -m benchmarks.docs_figures [--only SOURCE ...] [--list]

`benchmarks/docs_figures.toml` names each figure's pages, the command that it comes from, and how
far a new one may be away.  Commands that take minutes on two CPU cores are run again, or read where
they leave their result; the others need the machine that is named, and are only listed.  Exits 1
when a figure is further away than that.
"""

import argparse
import dataclasses
import functools
import json
import operator
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TABLE = pathlib.Path(__file__).with_suffix(".toml")
_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
AT_MOST = "at most"  # a tolerance: the page names a bound

Measured = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A command, and where it leaves its figures: a JSON file, or JSON lines that it prints.

    Attributes:
      machine: what it needs where that is more than two CPU cores and some minutes.
      result: a file of the repository that has the figures; read alone if it is there.
    """

    command: str
    machine: str = ""
    result: str = ""

    def measure(self) -> Measured:
        """Runs the command, if there is no result yet; figures by name.

        Raises subprocess.CalledProcessError: the command failed.
        """
        path = REPOSITORY / self.result
        if self.result and path.is_file():
            return json.loads(path.read_text())
        words = shlex.split(self.command)
        if words[0] == "python":
            words[0] = sys.executable
        # Benchmarks exit with 1 where what was asked of them does not hold here.
        done = subprocess.run(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
        if self.result:
            done.check_returncode()
            return json.loads(path.read_text())
        lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        return {figure["bar"]: figure["value"] for figure in lines}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A text with figures in it, on one page or several.

    Attributes:
      source: the name of the `Source`.
      says: the text.  {NAME} stands for a figure that is compared: what its source calls it, or a
        part of that which no other has; or "a/b" into objects, and " / 60" behind it divides.
      tolerance: "0.01" absolute, "10 %" of the page's, or `AT_MOST`.
    """

    source: str
    pages: tuple[str, ...]
    says: str
    tolerance: str = ""

    def stated(self, page: str) -> list[tuple[str, str]]:
        """Names and what the page has in their places; KeyError where the text is not there."""
        parts = re.split(r"\{([^}]+)\}", self.says)
        texts = [re.escape(part).replace(r"\ ", r"\s+") for part in parts[::2]]
        found = re.search(_NUMBER.join(texts), (REPOSITORY / page).read_text())
        if not found:
            raise KeyError(f"{page} does not say: {self.says}")
        return list(zip(parts[1::2], found.groups(), strict=True))

    def holds(self, stated: str, value: float) -> bool:
        """Whether a new value is near enough to the page's, which is rounded."""
        known = float(stated.replace(",", ""))
        half = 0.5 * 10.0 ** -len(stated.partition(".")[2])
        if self.tolerance == AT_MOST:
            return value <= known + half
        number, percent, _ = self.tolerance.partition(" %")
        allowed = float(number) * (abs(known) / 100 if percent else 1)
        return abs(value - known) <= allowed + half + 1e-9


def read() -> tuple[dict[str, Source], list[Figure]]:
    """The table: sources by name, and the figures."""
    table = tomllib.loads(TABLE.read_text())
    sources = {name: Source(**values) for name, values in table["sources"].items()}
    figures = [
        Figure(entry["source"], tuple(entry["pages"]), says, entry.get("tolerance", ""))
        for entry in table["figures"]
        for says in entry["says"]
    ]
    return sources, figures


def look_up(measured: Measured, name: str) -> float:
    """A figure by its name; KeyError where it was not measured."""
    if len(bars := [bar for bar in measured if name in bar]) == 1:
        return float(measured[bars[0]])
    path, _, divisor = name.partition(" / ")
    value = functools.reduce(operator.getitem, path.split("/"), measured)
    return float(value) / float(divisor or 1)


def compare(figures: list[Figure], measured: Measured) -> Iterator[tuple[str, str, float, bool]]:
    """Page and name, what the page says, what was measured, and whether that holds."""
    for figure in figures:
        for page in figure.pages:
            for name, stated in figure.stated(page):
                value = look_up(measured, name)
                yield f"{page}: {name}", stated, value, figure.holds(stated, value)


def main() -> int:
    sources, figures = read()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cheap = [name for name, source in sources.items() if not source.machine]
    parser.add_argument("--only", nargs="+", choices=cheap, default=cheap, help="sources")
    parser.add_argument("--list", action="store_true", help="all figures and their commands")
    flags = parser.parse_args()
    if flags.list:
        for figure in figures:
            source = sources[figure.source]
            machine = f" on {source.machine}" if source.machine else f", {figure.tolerance}"
            print(f"{', '.join(figure.pages)}: {figure.says}\n    {source.command}{machine}")
        return 0
    wrong = 0
    for name in flags.only:
        print(f"{sources[name].command}", flush=True)
        of_source = [figure for figure in figures if figure.source == name]
        for what, stated, value, holds in compare(of_source, sources[name].measure()):
            wrong += not holds
            print(f"  {what:<72} {stated:>8} {value:>10.4g}  {'' if holds else 'DIFFERS'}")
    print(f"{wrong or 'no'} figure{'s differ' if wrong > 1 else ' differs'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
