"""What every benchmark prints: a table for people, then a JSON object for each figure."""

import json
import operator
from typing import Any

CPU = "cpu"

_COMPARE = {"<=": operator.le, ">=": operator.ge}


class Report:
    """Collects figures; people see each at once, scripts all of them at the end."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        print(f"{'figure':<85} {'value':>10} {'unit':<9} asked")

    def add(self, bar: str, value: float, unit: str, device: str, asked: str | None = None) -> None:
        holds = None
        if asked:
            comparison, bound = asked.split()
            holds = bool(_COMPARE[comparison](value, float(bound)))
        self.figures.append(
            {
                "bar": bar,
                "value": float(f"{value:.4g}"),
                "unit": unit,
                "asked": asked,
                "holds": holds,
                "device": device,
            }
        )
        verdict = "" if asked is None else f"{asked} {'holds' if holds else 'FAILS'}"
        print(f"{bar:<85} {value:>10.4g} {unit:<9} {verdict}", flush=True)

    def finish(self) -> int:
        print()
        for figure in self.figures:
            print(json.dumps(figure))
        return int(any(figure["holds"] is False for figure in self.figures))
