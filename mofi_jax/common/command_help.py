"""What --help prints of a command: its flags, the keys of its config, and examples.

Read out of the command's source, so that nothing is imported but the config whose keys are shown.
"""

import ast
import os
import pathlib
import re
import shutil
import signal
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mofi_jax.common.errors import BadInput, nearest

if TYPE_CHECKING:
    from mofi_jax.common import config_help

CONFIG_HELP = (
    "NAME or NAME:ARGUMENTS of a config that comes with the project, or FILE.py or"
    " FILE.py:ARGUMENTS of yours; --config.KEY=VALUE sets one of its keys"
)
_HELP = ("--help", "-h", "-help")
_WIDEST = 100
_COLUMN = 34  # where explanations begin
_LONG = 60  # a default with more characters is cut


class Flag(NamedTuple):
    """A parameter of a command's ``main``."""

    name: str
    written: str  # as on a command line
    required: bool
    default: object
    says: str


class Command(NamedTuple):
    """What the source of a command says of it."""

    docstring: str  # without the examples
    examples: list[str]
    flags: list[Flag]
    config: str  # that of the first example; "" for a command without


def is_asked(argv: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] in _HELP for argument in argv)


def show(file: str | os.PathLike, argv: Sequence[str], default: str = "") -> None:
    """Prints the help of the command in a file, or for ``--help=NAME`` what a key or flag means.

    Args:
      default: the config that the command takes where --config is left out.

    Raises:
      BadInput: a NAME that is neither, or with it a config that cannot be read.
    """
    command = read(file)
    asked = next((a for a in argv if a.partition("=")[0] in _HELP and "=" in a), "")
    name = asked.partition("=")[2].lstrip("-")
    given = [a for a in argv if a.partition("=")[0] not in _HELP]
    columns = shutil.get_terminal_size((_WIDEST, 0)).columns
    wide = max(60, min(columns, _WIDEST))
    if name:
        write(_one(command, name.removeprefix("config."), given, default, wide))
    else:
        write(_all(command, given, default, wide))


def write(text: str) -> None:
    """Prints, for a reader that may go away, as `head` does."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text)


def read(file: str | os.PathLike) -> Command:
    """What the source of a command says of it, without running it."""
    tree = ast.parse(pathlib.Path(file).read_text("utf-8"))
    [main] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    # Of its arguments the docstring of `main` speaks; several may share a line.
    entries = re.findall(r"^  ([\w, ]+): (.+(?:\n    .+)*)", ast.get_docstring(main) or "", re.M)
    said = {name: " ".join(s.split()) for names, s in entries for name in names.split(", ")}
    arguments = main.args
    names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    defaults = [None] * (len(names) - len(defaults)) + defaults
    flags = []
    for name, default in zip(names, defaults, strict=True):
        if name == "config_source":
            continue
        value = ast.literal_eval(default) if default else None
        says = CONFIG_HELP if name == "config" else said.get(name, "")
        if isinstance(value, bool):
            written = f"--{name}"
        elif value == ():
            written = f"--{name} A [B ...]"
        else:
            written = f"--{name}={name.upper() if name != 'config' else 'NAME'}"
        flags.append(Flag(name, written, default is None, value, says))
    if arguments.vararg:
        name = arguments.vararg.arg
        flags.insert(0, Flag(name, f"{name.upper()} ...", True, None, said.get(name, "")))
    docstring, examples = _split(ast.get_docstring(tree) or "")
    named = re.search(r"--config[ =](\S+)", " ".join(examples))
    config = named[1] if named and "config" in names else ""
    return Command(docstring, examples, flags, config)


def _split(docstring: str) -> tuple[str, list[str]]:
    """A docstring without its indented command lines, and these."""
    kept: list[str] = []
    examples: list[str] = []
    goes_on = False
    for line in docstring.splitlines():
        if goes_on or re.match(r"    (.*\| )?mofi ", line):
            examples.append(line.strip() if not goes_on else f"    {line.strip()}")
            goes_on = line.endswith("\\")
        else:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip(), examples


def _all(command: Command, argv: Sequence[str], default: str, wide: int) -> str:
    flags = _rows([(flag.written, _told(flag)) for flag in command.flags], wide)
    parts = [command.docstring, f"Flags:\n{flags}"]
    if command.config:
        try:
            title, keys = _keys(command, argv, default)
            rows = [(f"{key.name}={_value(key.default, _LONG)}", key.comment) for key in keys]
            parts.append(f"Keys of {title}, each set by --config.KEY=VALUE:\n{_rows(rows, wide)}")
        except BadInput as error:
            parts.append(f"Its keys cannot be shown: {error}")
        parts.append("--help=NAME explains one flag, key or group of keys.")
    if command.examples:
        parts.append("Examples:\n" + "\n".join(f"  {example}" for example in command.examples))
    return "\n\n".join(parts)


def _keys(
    command: Command, argv: Sequence[str], default: str
) -> tuple[str, list["config_help.Key"]]:
    """The name of a config, and its keys."""
    from mofi_jax.common import config_files, config_help, packages  # these load ml_collections

    packages.prefer_ours()
    try:
        values, source, _ = config_files.read(argv, default or command.config.partition(":")[0])
    except BadInput:  # some need an argument
        values, source, _ = config_files.read(argv, default or command.config)
    return source.given, config_help.describe(source.path, values)


def _one(command: Command, name: str, argv: Sequence[str], default: str, wide: int) -> str:
    for flag in command.flags:
        if flag.name == name:
            return _rows([(flag.written, _told(flag))], wide)
    names, where = [flag.name for flag in command.flags], "this command"
    if command.config:
        where, keys = _keys(command, argv, default)
        found = [key for key in keys if f"{key.name}.".startswith(f"{name}.")]
        if found:
            rows = [(f"--config.{key.name}={_value(key.default)}", key.comment) for key in found]
            return f"Of {where}:\n{_rows(rows, wide)}"
        names += [key.name for key in keys]
        names += {key.name.rpartition(".")[0] for key in keys} - {""}
    remedy = nearest(name, names, "--help={}") or "--help shows all."
    raise BadInput(f"There is no flag or key {name!r} in {where.partition(':')[0]}: {remedy}")


def _told(flag: Flag) -> str:
    if flag.required and flag.name != "config":
        return f"{flag.says.removesuffix('.')} (must be given)"
    return f"{flag.says.removesuffix('.')} (default: {flag.default})" if flag.default else flag.says


def _value(value: object, most: int | None = None) -> str:
    written = '""' if value == "" else str(value).strip()
    return written if most is None or len(written) <= most else f"{written[: most - 3]}..."


def _rows(rows: Sequence[tuple[str, str]], wide: int) -> str:
    """What is written on the left, what it means on the right, or below where it is long."""
    lines, before = [], ""
    for written, says in rows:
        # Of several with one comment, as the keys of a group, the first one has it.
        told = textwrap.wrap("as above" if says and says == before else says, wide - _COLUMN)
        before = says
        if len(written) > _COLUMN - 4 or not told:
            # Paths stay whole, to be copied.
            whole = {"break_long_words": False, "break_on_hyphens": False}
            lines += textwrap.wrap(f"  {written}", wide, subsequent_indent="    ", **whole)
        else:
            lines.append(f"  {written}".ljust(_COLUMN) + told.pop(0))
        lines += [" " * _COLUMN + line for line in told]
    return "\n".join(lines)
