"""Figures of the README and docs/: each comes from a command, and is where the table says."""

import dataclasses
import pathlib
import re
import shlex

import pytest

from benchmarks import docs_figures
from tests import reference

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCES, FIGURES = docs_figures.read()
MEASURED = re.compile(r"\b0\.\d{2,}\b|\d (?:%|ms|s|seconds|minutes|hours|GB|GiB|MiB|times)(?!\w)")
# What looks like it and is a setting, a size to download, or how intervals are made.
SET = re.compile(r"95 %|\(1 %, at least one shard|one tar \(1\.3 GB\)")
COMMAND = re.compile(
    r"python\s+-m\s+benchmarks|make\s+(?:quickstart|compare)|mofi (?:quickstart|plan)"
    r"|\bbenchmarks\.\w+|\bexperiments\.\w+|tests/test_\w+|arxiv\.org"
    r"|\]\((?:results|benchmarks|losses)\.md"
)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.says[:40])
def test_a_figure_stands_on_its_pages(figure):
    source = SOURCES[figure.source]
    for page in figure.pages:
        stated = figure.stated(page)
        # What is compared has a tolerance, and is measured here.
        assert bool(stated) == bool(figure.tolerance) == (not source.machine), page
        for _, text in stated:
            assert figure.holds(text, float(text.replace(",", "")))


def test_commands_of_figures_exist():
    used = {figure.source for figure in FIGURES}
    assert used == set(SOURCES)
    for source in SOURCES.values():
        first, *rest = shlex.split(source.command)
        if first == "make":
            assert f"\n{rest[0]}:" in (REPOSITORY / "Makefile").read_text()
        else:
            module = REPOSITORY / rest[1].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
        if page.name not in reference.PAGES
    ],
    ids=lambda page: page.name,
)
def test_a_section_with_figures_names_where_they_come_from(page):
    text = re.sub(
        r"^```.*?^```", lambda m: m[0].replace("#", ""), page.read_text(), flags=re.M | re.S
    )
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        figures = MEASURED.findall(SET.sub("", section))
        assert not figures or COMMAND.search(section), f"{section.splitlines()[0]}: {figures}"


@pytest.mark.parametrize(
    ("stated", "value", "tolerance", "holds"),
    [
        ("0.60", 0.604, "0", True),
        ("0.60", 0.606, "0", False),
        ("0.60", 0.58, "0.02", True),
        ("1,000", 1099.0, "10 %", True),
        ("1,000", 1101.0, "10 %", False),
        ("5.8", 5.84, docs_figures.AT_MOST, True),
        ("5.8", 5.9, docs_figures.AT_MOST, False),
        ("5.8", 0.1, docs_figures.AT_MOST, True),
    ],
)
def test_how_far_a_figure_may_be_away(stated, value, tolerance, holds):
    figure = docs_figures.Figure("s", ("p",), "{x}", tolerance)
    assert figure.holds(stated, value) is holds


def test_what_a_page_says_is_compared_with_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_figures, "REPOSITORY", tmp_path)
    (tmp_path / "a.md").write_text("It took 2.5\nminutes and 1,024 MiB (|*|).\n")
    figure = docs_figures.Figure("s", ("a.md",), "took {all/s / 60} minutes and {M} MiB (|*|)", "0")
    assert figure.stated("a.md") == [("all/s / 60", "2.5"), ("M", "1,024")]
    found = docs_figures.compare([figure], {"all": {"s": 150.0}, "M": 1000})
    assert [(stated, value, holds) for _, stated, value, holds in found] == [
        ("2.5", 2.5, True),
        ("1,024", 1000.0, False),
    ]
    with pytest.raises(KeyError, match="does not say: no"):
        dataclasses.replace(figure, says="no {M}").stated("a.md")
