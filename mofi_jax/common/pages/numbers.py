"""How pages write numbers, and where the ticks of their charts are."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_RAISED = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
_EMPTY = (0.1, 1.0)  # the ends of an axis without numbers


def count(number: float | int) -> str:
    """A whole number with thin spaces between thousands: no comma or point to mistake."""
    return f"{round(number):,}".replace(",", "\u2009").replace("-", "\u2212")


def fixed(number: float | int, digits: int = 3) -> str:
    """So many digits after the point: scores, and whatever else is compared down a column."""
    return f"{number:.{digits}f}".replace("-", "\u2212")


def decimal(number: float | int) -> str:
    """At least three digits, and a power of ten where it is very large or small."""
    if 1000 <= abs(number) < 1e7:
        return count(number)
    if number and math.isfinite(number) and not 1e-3 <= abs(number) < 1e7:
        digits, _, power = f"{number:.2e}".partition("e")
        digits = digits.rstrip("0").rstrip(".").replace("-", "\u2212")
        power = "10" + str(int(power)).translate(_RAISED)
        return {"1": power, "\u22121": f"\u2212{power}"}.get(digits, f"{digits}·{power}")
    return f"{number:.3g}".replace("-", "\u2212")


def short(number: float | int) -> str:
    """A number for narrow places: 2.1M, 33k; as `decimal` below 10,000."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(power, 1e4):
            digits = f"{number / power:.3g}" if power > 1e3 else f"{number / power:.0f}"
            return digits.replace("-", "\u2212") + letter
    return decimal(number)


def percent(part: float | int, whole: float | int = 1) -> str:
    """A share as people write it; never 0.0 % of something nor 100.0 % of less than everything."""
    share = 100 * part / (whole or 1)
    if 0 < share < 0.1:
        return "<\u20090.1 %"
    if 99.9 < share < 100:
        return ">\u200999.9 %"
    return f"{share:.1f} %" if whole else "–"


class Scale(NamedTuple):
    """An axis: the values at its ends, and its ticks, whose steps are 1, 2 or 5."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]  # value, and how it is written

    def at(self, value: float | int) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        ends = (self.low, self.high, value)
        low, high, value = map(math.log, ends) if self.log else ends
        return (value - low) / (high - low)


def scale(values: Iterable[float | int], kind: str = "whole", most: int = 5) -> Scale:
    """The axis of these values.

    Args:
      values: what is drawn; what is not finite is passed over, on a logarithmic axis also what is
        not positive.
      kind: ``whole``: its ends are ticks; ``zero``: the same from zero; ``tight``: it ends with the
        values; ``log``: logarithmic, and ends with the values.
      most: about as many ticks, of a logarithmic one rather fewer.
    """
    found = [float(v) for v in values if math.isfinite(v) and (kind != "log" or v > 0)]
    if kind == "zero":
        found.append(0.0)
    low, high = (min(found), max(found)) if found else _EMPTY
    if kind == "log":
        if low == high:
            low, high = low / 2, high * 2
        return Scale(low, high, True, [(v, short(v)) for v in _log_ticks(low, high, most)])
    # Where digits would not tell them apart the axis begins at zero, and so small numbers are zero.
    if high - low <= max(1e-9 * max(-low, high), 1e-99):
        low, high = (low, 0.0) if low < -1e-99 else (0.0, high if high > 1e-99 else 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * most >= (high - low) * 0.999)
    if kind == "tight":
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    ticks = [number * step for number in range(first, last + 1)]
    return Scale(low, high, False, [*zip(ticks, words(ticks), strict=True)])


def words(ticks: Sequence[float]) -> list[str]:
    """How evenly spaced ticks are written: all with as many digits as their step needs."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=0.0) or 1.0
    if max(map(abs, ticks), default=0.0) >= 1e4 or step < 1e-4:
        return [short(tick) for tick in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [fixed(tick, digits) if digits else count(tick) for tick in ticks]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, every other one where there are many; with their 2 and 5 where few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in exponents for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]
