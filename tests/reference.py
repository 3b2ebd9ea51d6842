"""Writes docs/configuration.md and docs/commands.md from the sources: `make reference`.

Both are committed, so that they can be read where the sources are; `tests/test_docs.py` compares.
"""

import ast
import functools
import importlib
import os
import pathlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import ml_collections

from configs import common
from mofi_jax.__main__ import COMMANDS, source
from mofi_jax.common import command_help, config_help, processes
from mofi_jax.model import mofi as model

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
WRITTEN_BY = "<!-- Written by `make reference`: change the sources, not this file. -->"

# Name of a config -> the argument with which it has every key, and the config that it is made from.
CONFIGS = {
    "mofi": ("task=multitask", ""),
    "quickstart": ("task=multitask", "mofi"),
    "finetune": ("recipe=classes,model=MODEL,retrieval=PATH", "mofi"),
    "claim": ("", ""),
    "small": ("", "quickstart"),
    "sweeps/learning_rate": ("", "quickstart"),
    "i2e": ("folder=PAIRS,kb=KB", ""),
    "kb": ("", ""),
    "eval": ("gpr1200=PATH", ""),
}


def configuration() -> str:
    """docs/configuration.md."""
    page = [
        "# Configuration",
        WRITTEN_BY,
        "Every key of every shipped config, with its value there and the comment beside it in the "
        "source. `--config NAME:ARGUMENTS` finds a config by name, `--config.KEY=VALUE` sets one "
        "key, with dots into groups: `--config.data.dir=W`. Groups of names of your choice take "
        "new ones: `--config.filters.eval_sets.NAME=PATH`, `--config.evaluators.NAME.kind=knn`. "
        "`mofi COMMAND --help=KEY` explains a key. [Commands](commands.md) says which "
        "command takes which. A config of your own is a Python file with such a `get_config`, as "
        "`--config my.py:ARGUMENTS`.",
        "Durations are texts: `20 epochs`, `2000 steps`, `1e6 examples`, `5 percent` of the run.",
    ]
    for name, (_, base) in CONFIGS.items():
        page += _config(name, base)
    return "\n\n".join(page) + "\n"


def commands() -> str:
    """docs/commands.md."""
    page = [
        "# Commands",
        WRITTEN_BY,
        "`mofi NAME` and `python -m MODULE` are the same. Every command takes `--help`; one that "
        "takes `--config` takes `--config.KEY=VALUE` for each key of "
        "[that config](configuration.md) as well. Exit codes: 0 done, 2 bad input, told in one "
        "sentence, 75 stopped by a signal after a checkpoint, 130 by Ctrl-C, 1 anything else.",
        "| command | module | what it does |\n|---|---|---|\n" + "\n".join(map(_line, COMMANDS)),
    ]
    for name in COMMANDS:
        page += [f"## mofi {name}", *map(_text, _paragraphs(_docstring(name)))]
        if rows := [*flags(name)]:
            table = "\n".join(f"| `{flag}` | {default} | {text} |" for flag, default, text in rows)
            page.append(f"| flag | default | what it is |\n|---|---|---|\n{table}")
    return "\n\n".join(page) + "\n"


PAGES = {"configuration.md": configuration, "commands.md": commands}


@functools.cache
def config_of(name: str) -> tuple[pathlib.Path, ml_collections.ConfigDict, dict[str, Any]]:
    """The file, the config and the arguments behind the colon with their defaults."""
    module = importlib.import_module(f"configs.{name.replace('/', '.')}")
    parse, arguments = common.parse_arg, {}

    def seen(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
        arguments.setdefault("of", defaults)  # the first call is its own, others those of its base
        return parse(arg, **defaults)

    # As if MODEL were a folder with a small model.
    shape = common.model(min(model.VARIANTS), image_size=224, context_length=77)
    with (
        mock.patch.object(common, "parse_arg", seen),
        mock.patch.object(common, "model_of", return_value=(shape, "decode")),
        mock.patch.object(processes, "cores", return_value=16),  # not those of this machine
    ):
        config = module.get_config(CONFIGS[name][0])
    return pathlib.Path(module.__file__), config, arguments["of"] if arguments else {}


def _config(name: str, base: str) -> Iterator[str]:
    path, config, arguments = config_of(name)
    source = ast.parse(path.read_text())
    [function] = [node for node in source.body if getattr(node, "name", "") == "get_config"]
    yield f"## {name}"
    yield from map(_text, _paragraphs(ast.get_docstring(source)))
    if arguments:
        shown = ", ".join(f"`{key}={value}`" for key, value in arguments.items())
        shown = shown.replace(f"{REPOSITORY}/", "")
        yield f"Arguments, with what they are when left out: {shown}."
    said = ast.get_docstring(function)
    if "docstring of this file" not in said:
        yield from map(_text, _paragraphs(said))
    found = config_help.comments(str(path))
    leaves = dict(config_help.leaves(config))
    if base:
        before = dict(config_help.leaves(config_of(base)[1]))
        yield f"Keys and values are [those of {base}](#{_anchor(base)}) but for these:"
        changed = (k for k, value in leaves.items() if k not in before or before[k] != value)
        rows = ((k, _code(leaves[k]), config_help.own(found, k)) for k in changed)
        yield _table(((key, value, config_help.added(text)) for key, value, text in rows), "why")
        return
    groups: dict[str, dict[config_help.Path, Any]] = {}
    for key, value in leaves.items():
        groups.setdefault(key[0] if len(key) > 1 else "", {})[key] = value
    for group in sorted(groups):  # keys of no group first
        if group:
            yield f"### {name}: {group}"
            if text := config_help.own(found, (group,)):
                yield _text(text[0].upper() + text[1:])
        yield _table(_rows(found, groups[group]))


def _rows(
    found: dict[config_help.Path, str], leaves: dict[config_help.Path, Any]
) -> Iterator[tuple[config_help.Path, str, str]]:
    """Keys of a group; where a group inside it has a comment, that comes first."""
    told: set[config_help.Path] = set()
    for key, value in leaves.items():
        for inner in (key[:length] for length in range(2, len(key))):
            if inner not in told and (text := config_help.own(found, inner)):
                yield inner, "", text
            told.add(inner)
        yield key, _code(value), config_help.own(found, key)


def _table(rows: Iterable[tuple[config_help.Path, str, str]], third: str = "what it is") -> str:
    lines = (f"| `{'.'.join(key)}` | {value} | {_text(text)} |" for key, value, text in rows)
    return "\n".join([f"| key | value | {third} |", "|---|---|---|", *lines])


def _line(name: str) -> str:
    first = _text(_paragraphs(_docstring(name))[0])
    return f"| [`mofi {name}`](#mofi-{name}) | `{COMMANDS[name]}` | {first} |"


def _docstring(command: str) -> str:
    return ast.get_docstring(ast.parse(source(command).read_text())) or ""


def flags(command: str) -> Iterator[tuple[str, str, str]]:
    """Flag, default and meaning, as `--help` shows them."""
    for flag in command_help.read(source(command)).flags:
        shown = "required" if flag.required else _code(flag.default) if flag.default else ""
        if flag.written.startswith("--"):
            if flag.name == "config" and command == "kb":
                shown = _code("kb")
            yield f"--{flag.name}", shown, _text(flag.says)
        else:
            yield flag.written, "", _text(flag.says)


def _paragraphs(docstring: str | None) -> list[str]:
    return re.split(r"\n\n+", docstring or "")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _code(value: Any) -> str:
    """A value as in a config file, for a cell of a table: GitHub and the site read it alike."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    text = repr(value).replace(f"{REPOSITORY}{os.sep}", "")
    if isinstance(value, tuple) and len(text) > 200:
        text = f"({value[0]!r}, {value[1]!r}, ...)"
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def _text(paragraph: str) -> str:
    """A paragraph of a docstring or a comment as Markdown; indented ones are code."""
    if paragraph.startswith("    "):
        return f"```\n{textwrap.dedent(paragraph)}\n```"
    parts = re.split(r"(`+[^`]+`+)", " ".join(paragraph.split()))
    for i, part in enumerate(parts):
        parts[i] = f"`{part.strip('`')}`" if i % 2 else _escaped(part).replace("*", r"\*")
    return "".join(parts)


if __name__ == "__main__":
    for file, text in PAGES.items():
        (REPOSITORY / "docs" / file).write_text(text())
