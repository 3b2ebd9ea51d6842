"""Templates to self-contained pages: no script, no font and no picture from elsewhere.

Below is how they write numbers.
"""

import os
from collections.abc import Callable, Mapping

import jinja2

_FOLDER = os.path.dirname(__file__)


def fill(template: str, values: Mapping, *filters: Callable) -> str:
    """A page in the look of this folder; all values are text, which is escaped.

    Args:
      template: the path of a Jinja template, which may extend and import those of this folder.
      values: its variables.
      filters: functions that the template uses beside those below, by their names.
    """
    folder, name = os.path.split(template)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = (count, decimal, even_top, fixed, flat, percent, *filters)
    environment.filters |= {function.__name__: function for function in known}
    return environment.get_template(name).render(values)


def count(number: float | int) -> str:
    """A whole number with thin spaces between thousands: no comma or point to mistake."""
    return f"{round(number):,}".replace(",", "\u2009")


def decimal(number: float | int) -> str:
    """A number of at most three digits with a true minus sign."""
    return f"{number:.3g}".replace("-", "\u2212")


def fixed(number: float, digits: int = 3) -> str:
    """So many digits after the point: scores, and whatever else is compared down a column."""
    return f"{number:.{digits}f}".replace("-", "\u2212")


def percent(part: float | int, whole: float | int) -> str:
    """A share as people write it; never 0.0 % of something nor 100.0 % of less than everything."""
    share = 100 * part / (whole or 1)
    if 0 < share < 0.1:
        return "<\u20090.1 %"
    if 99.9 < share < 100:
        return ">\u200999.9 %"
    return f"{share:.1f} %" if whole else "–"


def flat(config: Mapping, prefix: str = "") -> list[tuple[str, object]]:
    """Keys as they are written on the command line, with their values."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        else:
            words = isinstance(value, list | tuple)
            found.append((prefix + key, ", ".join(map(str, value)) if words else value))
    return found


def even_top(value: int) -> int:
    """An even whole number of two digits and zeros, not below `value`."""
    step = 2 * 10 ** max(0, len(str(value)) - 2)
    return max(2, -(-value // step) * step)
