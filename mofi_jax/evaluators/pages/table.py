"""Scores of several models side by side: a row for each metric, a column for each model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mofi_jax.common.pages import numbers

# Metrics that say something of the set or of what was tuned, and are no better for being larger.
FACTS = re.compile(r"left_out|coverage|_(C|weight_decay|validation)$")
# Errors: the smallest is the best.
ERRORS = re.compile(r"(^|_)(ece|error|brier)")


class Cell(NamedTuple):
    value: str  # "" where the model has no such score
    interval: str  # "" where there is none
    best: bool  # of several models that have it


class Row(NamedTuple):
    evaluator: str
    metric: str
    cells: list[Cell]


def rows(models: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The table.

    Args:
      models: entries of result.json's ``models``, with ``metrics`` and ``intervals`` by evaluator.
    """
    # In the order in which they were measured, which is that of the config.
    names = dict.fromkeys(
        (evaluator, metric)
        for model in models
        for evaluator, metrics in model["metrics"].items()
        for metric in metrics
    )
    found = []
    # A model may lack evaluators before the ones that another has.
    order = {evaluator: i for i, (evaluator, _) in enumerate(names)}
    for evaluator, metric in sorted(names, key=lambda name: order[name[0]]):
        values = [model["metrics"].get(evaluator, {}).get(metric) for model in models]
        known = [value for value in values if value is not None and value == value]
        best = None
        if len(known) > 1 and not FACTS.search(metric):
            best = min(known) if ERRORS.search(metric) else max(known)
        cells = [
            Cell(shown(value), _interval(model, evaluator, metric), value == best)
            if value is not None
            else Cell("", "", False)
            for model, value in zip(models, values, strict=True)
        ]
        found.append(Row(evaluator, metric, cells))
    return found


def shown(value: float) -> str:
    """Three digits after the point; counts as they are, and what is far from 0..1 by its digits."""
    if abs(value) > 1 or 0 < abs(value) < 5e-4:
        return numbers.decimal(value)
    return numbers.fixed(value)


def _interval(model: Mapping[str, Any], evaluator: str, metric: str) -> str:
    ends = model["intervals"].get(evaluator, {}).get(metric)
    return "–".join(map(numbers.fixed, ends)) if ends and ends[0] <= ends[1] else ""


def labels(models: Sequence[str]) -> list[str]:
    """Short names: the last parts of the paths, as many as tell them apart."""
    parts = [model.split("/") for model in models]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(models)):
            return short
    return list(models)


def markdown(models: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, the best of each row in bold, 95 % intervals in brackets."""

    def line(*cells: str) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    names = labels([model["model"] for model in models])
    lines = [line("metric", *names), line("---", *["---:"] * len(names))]
    for evaluator, metric, cells in rows(models):
        words = []
        for cell in cells:
            value = f"**{cell.value}**" if cell.best else cell.value
            words.append(f"{value} [{cell.interval}]" if cell.interval else value or "–")
        lines.append(line(f"{evaluator}/{metric}", *words))
    return "\n".join(lines)


def text(models: Sequence[Mapping[str, Any]]) -> str:
    """The table for terminals, without intervals."""
    names = labels([model["model"] for model in models])
    cells = [("", "", *names)]
    previous = ""
    for evaluator, metric, values in rows(models):
        name = "" if evaluator == previous else evaluator
        cells.append((name, metric, *(cell.value or "–" for cell in values)))
        previous = evaluator
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in cells
    )


def notes(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on what the scores do not say: what was left out of which model and why, and which
    pictures could not be decoded, which is the same for all models."""
    names = labels([model["model"] for model in models])
    found = [
        f"{evaluator}: left out of {name}, {reason}"
        for name, model in zip(names, models, strict=True)
        for evaluator, reason in model["left_out"].items()
    ]
    for model in models:
        for path, broken in model["undecodable"].items():
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            found.append(
                f"{path}: {', '.join(broken[:3])}{more} cannot be decoded and "
                f"{'has a random feature' if len(broken) == 1 else 'have random features'}"
            )
    return list(dict.fromkeys(found))
