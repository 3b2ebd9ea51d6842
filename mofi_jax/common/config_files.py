"""Config files: found by name or path, loaded, and changed by what stands on the command line.

``--config FILE.py:ARGUMENTS`` and ``--config.KEY=VALUE`` are those of `ml_collections`'
config_flags, which knows no names, adds none to a dictionary and says what is wrong in tracebacks.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from mofi_jax.common import config_keys, packages
from mofi_jax.common.errors import BadInput, nearest

SUFFIX = ".py"
_FLAG = ("--config", "-config")
_SHARED = ("__init__", "common")  # no configs themselves


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a config comes from: what was given, its file, and the keys that flags have set."""

    given: str
    path: str
    arguments: str | None
    overrides: Mapping[str, Any]


def read(
    argv: Sequence[str], default: str = ""
) -> tuple[ml_collections.ConfigDict, Source, list[str]]:
    """The config that a command line names, with the values that it gives; and its other arguments.

    Args:
      default: the config where --config is not there.

    Raises:
      BadInput: no such config, one that cannot be loaded, or a key or value that it has not.
    """
    given = default
    for argument, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = argument.partition("=")
        if flag in _FLAG:
            given = value if equals else following
    if not given:
        raise BadInput(
            "--config is missing: write --config NAME:ARGUMENTS for one that comes with the"
            " project, as mofi, or --config FILE.py:ARGUMENTS."
        )
    path, config_argument = find(given)
    config = load(path, config_argument)
    opened, rest = config_keys.open_groups(config), []
    texts: dict[str, list[str]] = collections.defaultdict(list)
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        key = flag.partition(".")[2]
        if flag in _FLAG:
            _ = equals or next(arguments, "")
        elif not re.match(r"--?(no)?config\.", flag):
            rest.append(argument)
        elif equals:
            texts[key].append(value)
        elif config_keys.find(config, key, given, opened).kind is bool:
            texts[key].append(str(not flag.strip("-").startswith("no")))
        elif (following := next(arguments, None)) is not None:
            texts[key].append(following)
        else:
            raise BadInput(f"--config.{key} has no value: write --config.{key}=VALUE.")
    overrides = {
        key: config_keys.assign(config, key, values, given, opened) for key, values in texts.items()
    }
    return config, Source(given, path, config_argument, overrides), rest


def find(given: str) -> tuple[str, str | None]:
    """NAME:ARGUMENTS or FILE.py:ARGUMENTS -> the file's path, and what stands behind the colon.

    Raises:
      BadInput: a name that no shipped config has, or no such file.
    """
    name, colon, arguments = given.partition(":")
    path, known = os.path.expanduser(name), shipped()
    if not name.endswith(SUFFIX):
        if name not in known:
            remedy = nearest(name, known) or f"choose {', '.join(known)}, or a file FILE.py."
            if os.path.isfile(f"{path}{SUFFIX}"):
                remedy = f"did you mean the file {name}{SUFFIX}?"
            raise BadInput(f"There is no config {name!r}: {remedy}")
        path = f"{packages.ROOT / 'configs' / name}{SUFFIX}"
    if not os.path.isfile(path):
        stem = os.path.basename(path).removesuffix(SUFFIX)
        remedy = (
            f"write --config {stem} for the one that comes with the project."
            if stem in known
            else "check the path of --config."
        )
        raise BadInput(f"There is no config file {name!r}: {remedy}")
    return path, arguments if colon else None


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


def module(path: str) -> types.ModuleType:
    """A config file as a module, new at each call.

    Raises:
      BadInput: the line in which it fails.
    """
    spec = importlib.util.spec_from_file_location("config_file", path)
    loaded = importlib.util.module_from_spec(spec)
    with failures_told(path):
        spec.loader.exec_module(loaded)
    if not callable(getattr(loaded, "get_config", None)):
        raise BadInput(f"{path} is no config file: it has no function get_config.")
    return loaded


def load(path: str, arguments: str | None) -> ml_collections.ConfigDict:
    """What ``get_config`` of a file returns.

    Raises:
      BadInput: what it raises itself, or the line in which it fails.
    """
    made = module(path)
    with failures_told(path):
        config = made.get_config(*([] if arguments is None else [arguments]))
    if isinstance(config, dict):
        return ml_collections.ConfigDict(config)
    if not isinstance(config, ml_collections.ConfigDict):
        raise BadInput(
            f"get_config of {path} returns {type(config).__name__}: let it return an"
            " ml_collections.ConfigDict."
        )
    return config


@contextlib.contextmanager
def failures_told(path: str) -> Iterator[None]:
    """Whatever a config file raises, in one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        where = f" in line {lines[-1]}" if lines else ""
        reason = str(error.msg if isinstance(error, SyntaxError) else error).removesuffix(".")
        raise BadInput(
            f"The config file {path} fails{where} ({type(error).__name__}: {reason}): mend it, or"
            " begin with a copy of one in configs/."
        ) from error
