"""Templates to self-contained pages: no script, no font and no picture from elsewhere.

How they write numbers is in `numbers`.
"""

import os
from collections.abc import Callable, Mapping

import jinja2

from mofi_jax.common.pages import numbers

_FOLDER = os.path.dirname(__file__)


def fill(template: str, values: Mapping, *filters: Callable) -> str:
    """A page in the look of this folder; all values are text, which is escaped.

    Args:
      template: the path of a Jinja template, which may extend and import those of this folder.
      values: its variables.
      filters: functions that the template uses beside those of `numbers`, by their names.
    """
    folder, name = os.path.split(template)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = (
        getattr(numbers, n) for n in ("count", "decimal", "fixed", "percent", "scale", "short")
    )
    environment.filters |= {function.__name__: function for function in (*known, flat, *filters)}
    return environment.get_template(name).render(values)


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
