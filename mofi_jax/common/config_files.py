"""Config files: those of the project by name, those of users by path."""

import difflib
import os

from mofi_jax.common import packages
from mofi_jax.common.errors import BadInput

SUFFIX = ".py"
_SHARED = ("__init__", "common")  # no configs themselves


def find(given: str) -> str:
    """``mofi:ARGUMENTS`` with the path of the shipped file for its name; ``FILE.py:...`` as it is.

    Raises:
      BadInput: a name that no shipped config has.
    """
    name, colon, arguments = given.partition(":")
    if name.endswith(SUFFIX):
        return given
    known = shipped()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(known)},"
        raise BadInput(
            f"There is no config {name!r}: {remedy}"
            f"{'' if close else ' or write the path of a file that ends in .py.'}"
        )
    return f"{packages.ROOT / 'configs' / name}{SUFFIX}{colon}{arguments}"


def shipped() -> list[str]:
    """The names of the configs that come with the project, those of folders as FOLDER/NAME."""
    folder = packages.ROOT / "configs"
    found = []
    for inner, _, names in os.walk(folder):
        for name in names:
            path = os.path.relpath(os.path.join(inner, name), folder)
            stem = path.removesuffix(SUFFIX).replace(os.sep, "/")
            if name.endswith(SUFFIX) and os.path.basename(stem) not in _SHARED:
                found.append(stem)
    return sorted(found)
