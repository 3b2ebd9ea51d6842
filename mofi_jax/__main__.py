"""The command ``mofi``: each of its subcommands is a module that ``python -m`` runs as well.

mofi train --config mofi:variant=B/16 --workdir RUN
python -m mofi_jax train --config mofi:variant=B/16 --workdir RUN
"""

import os
import signal
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "mofi":
    # Until a subcommand sees to Ctrl-C itself (`common.console`), there is no traceback; where the
    # shell has turned it off, it stays so.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_DFL if ours else signal.SIG_IGN)

import ast
import pathlib
import runpy
from collections.abc import Sequence

import mofi_jax
from mofi_jax.common import command_help, packages
from mofi_jax.common.errors import BadInput, nearest

# In the order in which they are needed.
COMMANDS = {
    "quickstart": "quickstart",
    "kb": "data_prep.build_kb",
    "anchors": "data_prep.build_anchors",
    "class-folders": "data_prep.class_folders",
    "labels": "data_prep.build_i2e",
    "label-quality": "data_prep.label_quality",
    "remove": "data_prep.remove_keys",
    "plan": "mofi_jax.plan",
    "doctor": "mofi_jax.doctor",
    "train": "mofi_jax.train",
    "sweep": "mofi_jax.sweep",
    "curves": "mofi_jax.curves",
    "grow": "mofi_jax.grow",
    "interpolate": "mofi_jax.interpolate",
    "eval-sets": "mofi_jax.make_eval_sets",
    "evaluate": "mofi_jax.evaluate",
    "export": "mofi_jax.export",
    "embed": "mofi_jax.embed",
    "search": "mofi_jax.search",
    "serve": "mofi_jax.serve",
}


def main() -> None:
    """Runs the subcommand that ``sys.argv`` names, as ``python -m`` would run its module."""
    name, rest = (sys.argv[1] if sys.argv[1:] else "--help"), sys.argv[2:]
    try:
        if name in ("--help", "-h", "help"):
            command_help.write(usage())
        elif name == "--version":
            print(f"mofi_jax {mofi_jax.__version__}")
        elif name not in COMMANDS:
            remedy = nearest(name, COMMANDS, "`mofi {}`") or "`mofi --help` lists them."
            raise BadInput(f"There is no command {name!a}: {remedy}")
        elif command_help.is_asked(rest):
            command_help.show(source(name), rest)
        else:
            packages.prefer_ours()
            check_config(name, rest)
            sys.argv[:] = [f"mofi {name}", *rest]
            runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_config(name: str, argv: Sequence[str]) -> None:
    """Tells of a mistyped config, key or value before the imports of the command, which take long.

    Raises:
      BadInput: what `mofi_jax.common.cli` would raise after them.
    """
    given = any(argument.partition("=")[0] == "--config" for argument in argv)
    if given and any(flag.name == "config" for flag in command_help.read(source(name)).flags):
        from mofi_jax.common import config_files  # here: the list of commands needs no library

        config_files.read(argv)


def usage() -> str:
    """All subcommands with a line each, without the import of any."""
    wide = max(map(len, COMMANDS))
    lines = [f"  {name:<{wide}}  {summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "mofi COMMAND [--flag=value ...]: image embeddings from noisy web pictures.",
            "",
            *lines,
            "",
            "`mofi COMMAND --help` shows the flags and config keys of one, `mofi --version` the"
            " version.",
        ]
    )


def source(name: str) -> pathlib.Path:
    """The file that holds a subcommand."""
    path = packages.ROOT.joinpath(*COMMANDS[name].split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def summary(name: str) -> str:
    """The first line of its docstring."""
    docstring = ast.get_docstring(ast.parse(source(name).read_text("utf-8")))
    return docstring.partition("\n")[0]


if __name__ == "__main__":
    main()
