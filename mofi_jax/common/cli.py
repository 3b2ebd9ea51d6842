"""How every main starts: flags from the signature of ``main``, one sentence for bad input.

``cli.run(main)`` turns the parameters of ``main`` into flags: ``config`` is an ml_collections
config file (``--config file.py:args``, single keys with ``--config.key=value``), every other
parameter is a text flag, optional if it has a default; one with the default False is a switch;
``*names`` takes what is written without a flag, and wants at least one; one with the default ()
takes all that follows it, up to the next flag.  A ``~`` at the start of a
flag's or a config key's text is the home folder: shells leave it alone behind ``--flag=``.
"""

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from mofi_jax.common import config_files, packages
from mofi_jax.common.errors import BadInput, Preempted, StorageFailed

_CONFIG_HELP = (
    "a config that comes with the project, NAME or NAME:ARGUMENTS, or a file of yours, FILE.py or"
    " FILE.py:ARGUMENTS; --config.KEY=VALUE sets a key"
)


def run(main: Callable[..., Any]) -> None:
    """Parses the command line, calls ``main`` and exits.

    Exit codes: 0 done, 2 `BadInput` (1 for a workdir in a bucket that has failed), 75 `Preempted`,
    1 any other exception.
    """
    named = dict(inspect.signature(main).parameters)
    has_config = named.pop("config", None) is not None
    several = {f"--{n}" for n, parameter in named.items() if parameter.default == ()}
    positional = next((n for n, p in named.items() if p.kind is p.VAR_POSITIONAL), None)
    named.pop(positional, None)
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    if has_config:
        config_flags.DEFINE_config_file("config", help_string=_CONFIG_HELP)
    # What the docstring of ``main`` says of its arguments; the module's is printed above them.
    entries = re.findall(r"^  ([\w, ]+): (.+(?:\n    .+)*)", inspect.getdoc(main) or "", re.M)
    described = {name: text for names, text in entries for name in names.split(", ")}
    for name, parameter in named.items():
        default = None if name in required else parameter.default
        define = {bool: flags.DEFINE_bool, tuple: flags.DEFINE_multi_string}.get(
            type(default), flags.DEFINE_string
        )
        define(name, default, described.get(name, "see above"))
    for name in [*named, *["config"] * has_config]:
        # --help shows the flags of the main module, and these are defined in this one.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(argv: Sequence[str]) -> Sequence[str]:
        if {"--help", "-h"} & {*argv}:
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
        try:
            # The values of keys are read out of sys.argv.
            sys.argv[:] = argv = _spelled_out(argv)
            rest = flags.FLAGS([_with_home(argument) for argument in _repeated(argv, several)])
            if positional and len(rest) == 1:
                raise BadInput(f"No {positional} given: write one or more without a flag.")
            if not positional and len(rest) > 1:
                raise BadInput(
                    f"Unexpected argument {rest[1]!r}: flags are written --name=value, and values "
                    "with spaces in quotes."
                )
            if has_config:
                if flags.FLAGS["config"].value is None:
                    raise BadInput(
                        "--config is missing: write --config NAME:ARGUMENTS, as mofi, or --config"
                        " FILE.py:ARGUMENTS."
                    )
                # A file that could not be loaded raises only here.
                _with_home(flags.FLAGS.config).lock()
            missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
            if missing:
                raise BadInput(f"{' and '.join(missing)} missing: see --help for what they mean.")
            return rest
        except Exception as error:  # noqa: BLE001  a config file may raise anything
            complain(_explain(error, argv))

    def call(argv: Sequence[str]) -> Any:
        kwargs = {name: flags.FLAGS[name].value for name in named}
        if has_config:
            kwargs["config"] = flags.FLAGS.config
        try:
            return main(*argv[1:], **kwargs)
        except BadInput as error:
            complain(error)
        except Preempted as preempted:
            logging.warning("%s", preempted)
            sys.exit(preempted.exit_code)
        except (KeyError, AttributeError) as error:
            # Of the config itself, where it is that of another command.
            if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            complain(
                f"The config has no key {_key(error)!r}, which this command reads: give --config a "
                "file for it, see configs/."
            )

    packages.prefer_ours()
    for stream in (sys.stdout, sys.stderr):
        # Characters that a terminal or log cannot show are replaced.
        if stream is not None:
            stream.reconfigure(errors="replace")
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_from_here)
    app.run(call, flags_parser=parse)


def _spelled_out(argv: Sequence[str]) -> list[str]:
    """The same with the path of the config that --config names."""
    before, found = "", []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if equals and flag.strip("-") == "config":
            argument = f"{flag}={config_files.find(value)}"
        elif before.strip("-") == "config" and before.startswith("-"):
            argument = config_files.find(argument)
        before = argument
        found.append(argument)
    return found


def _repeated(argv: Sequence[str], several: set[str]) -> Iterator[str]:
    """``--names a b`` as ``--names=a --names=b``."""
    flag = ""
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if name.startswith("-"):
            flag = name if name in several else ""
            if flag and not equals:
                continue
        yield f"{flag}={argument}" if flag and not name.startswith("-") else argument


def _with_home(value: Any) -> Any:
    """The same with the home folder for ``~``, also behind ``NAME=``; a config in place."""
    if isinstance(value, str):
        name, text = re.fullmatch(r"((?:[^/=]*=)?)(.*)", value, re.DOTALL).groups()
        return name + os.path.expanduser(text)
    if isinstance(value, tuple | list):
        return type(value)(map(_with_home, value))
    if isinstance(value, dict):
        return {key: _with_home(inner) for key, inner in value.items()}
    if isinstance(value, ml_collections.ConfigDict):
        for key, inner in value.items():
            # By a flag a text that is None can be given in no other way.
            if (expanded := None if inner == "None" else _with_home(inner)) != inner:
                value[key] = expanded
    return value


def _from_here(record: Any) -> bool:
    """Libraries log from warnings on, as Orbax writes ten lines about every checkpoint.

    Without tracebacks: what fails in their threads is raised again in ours, or does not matter.
    """
    own = tuple(str(packages.ROOT / name) for name in ("mofi_jax", "data_prep", "quickstart"))
    if record.pathname.startswith(own):
        return True
    record.exc_info = record.exc_text = None
    return record.levelno >= 30


def _explain(error: BaseException, argv: Sequence[str]) -> str:
    """One sentence about what went wrong while reading the command line."""
    paths = [
        a.partition("=")[2] or b
        for a, b in zip(argv, [*argv[1:], ""], strict=True)
        if a.partition("=")[0].strip("-") == "config"
    ]
    # config_flags raises the type that the config file raised, with the whole traceback as message.
    last, mark = str(error).strip().splitlines()[-1], f"{BadInput.__name__}: "
    # What it says itself comes first: its own files may be missing, and the traceback says so.
    if isinstance(error, BadInput) or mark in last:
        return last.rpartition(mark)[2]
    if isinstance(error, FileNotFoundError) or "No such file" in str(error):
        path = paths[0].partition(":")[0]
        return f"There is no config file {path!r}: check the path of --config."
    if paths and (told := _unknown_key(_with_home(paths[0]), argv)):
        return told
    return f"{last.removesuffix('.')}: see --help."


def _unknown_key(path: str, argv: Sequence[str]) -> str | None:
    """One sentence about the first flag of a key that the config has not."""
    try:
        config = flags.FLAGS["config"].parser.parse(path).to_dict()
    except Exception:  # noqa: BLE001  a config file may raise anything, which is told elsewhere
        return None
    known = [*_keys_of(config)]
    for argument in argv:
        flag = re.match(r"--?config\.([^=[]+)", argument)
        if flag and flag[1] not in known:
            close = difflib.get_close_matches(flag[1], known, 1)
            remedy = f"did you mean --config.{close[0]}?" if close else "see which it has."
            return f"There is no key --config.{flag[1]} in {path.partition(':')[0]}: {remedy}"
    return None


def _keys_of(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        yield key
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _keys_of(value))


def _key(error: BaseException) -> str:
    """The key that an ml_collections config did not find."""
    return " ".join(str(error.args[0] if error.args else error).split()).strip("'\"")


def whole(flag: str, text: str, least: int = 0) -> int:
    """The whole number that a flag gives; BadInput for anything else or a smaller one."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise BadInput(f"{flag}={text} cannot be used: give a whole number from {least} on.")
    return int(text)


# Control characters, embeddings and overrides of direction, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escapes for what could steer a terminal."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def complain(error: BaseException | str) -> None:
    """Prints one line on stderr and exits with code 2; what it quotes cannot steer a terminal."""
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    if isinstance(error, StorageFailed):
        os._exit(error.exit_code)
    sys.exit(2)
