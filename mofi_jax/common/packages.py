"""Whose ``configs`` and ``data_prep`` are imported: ours, wherever a command is started.

Names as common as these may be folders of the user's as well, and `python -m` and PYTHONPATH look
into the current folder first.
"""

import importlib.util
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]  # holds this package and those beside it
BESIDE = ("configs", "data_prep", "quickstart")


def prefer_ours() -> None:
    """Puts the current folder behind all others, where modules of the user's are found still.

    The processes that this one starts by multiprocessing take over its ``sys.path``.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # deleted, so that nothing of the user's is in it
        here = ""
    sys.path[:] = [path for path in sys.path if path not in ("", here)]
    if not all(map(_is_ours, BESIDE)):
        sys.path.insert(0, str(ROOT))
    if here:
        sys.path.append(here)


def _is_ours(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    origin = (spec and spec.origin) or ""  # a folder without __init__.py has none
    return os.path.realpath(origin) == str(ROOT / name / "__init__.py")
