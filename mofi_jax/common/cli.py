"""How every main starts: flags from the signature of ``main``, one sentence for bad input.

``cli.run(main)`` turns the parameters of ``main`` into flags: ``config`` is an ml_collections
config (``--config name:args`` or ``--config file.py:args``, single keys with
``--config.key=value``) and ``config_source`` where it is from (`config_files.Source`); every other
is a text flag, optional if it has a default; one with the default False is a switch; ``*names``
takes what is written without a flag, and wants at least one; one with the default () takes all that
follows it, up to the next flag.  A ``~`` at the start of a flag's or a config key's text is the
home folder: shells leave it alone behind ``--flag=``.
"""

import inspect
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging

from mofi_jax.common import command_help, config_files, console, packages
from mofi_jax.common.console import interrupts
from mofi_jax.common.errors import BadInput, Preempted, StorageFailed, nearest

_UNREAD = 128 + 13  # SIGPIPE, of which programs die whose output nobody reads any more


def run(main: Callable[..., Any], config: str = "") -> None:
    """Parses the command line, calls ``main`` and exits.

    Exit codes: 0 done, 2 `BadInput` (1 for a workdir in a bucket that has failed), 75 `Preempted`,
    130 Ctrl-C, 141 nobody reads what is printed any more, 1 any other exception.

    Args:
      config: the one that is read where ``--config`` is left out; "" where it may not be.
    """
    named = dict(inspect.signature(main).parameters)
    has_config = named.pop("config", None) is not None
    wants_source = named.pop("config_source", None) is not None
    several = {f"--{n}" for n, parameter in named.items() if parameter.default == ()}
    positional = next((n for n, p in named.items() if p.kind is p.VAR_POSITIONAL), None)
    named.pop(positional, None)
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    for name, parameter in named.items():
        default = None if name in required else parameter.default
        define = {bool: flags.DEFINE_bool, tuple: flags.DEFINE_multi_string}.get(
            type(default), flags.DEFINE_string
        )
        define(name, default, "")
    configured: dict[str, Any] = {}

    def parse(argv: Sequence[str]) -> Sequence[str]:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        try:
            if command_help.is_asked(argv):
                command_help.show(inspect.getfile(main), argv, config)
                sys.exit(0)
            if has_config:
                values, source, argv = config_files.read(argv, config)
                configured["config"] = _with_home(values).lock()
                if wants_source:
                    configured["config_source"] = source
            rest = flags.FLAGS([_with_home(argument) for argument in _repeated(argv, several)])
        except BadInput as error:
            complain(error)
        except flags.UnrecognizedFlagError as error:
            known = [*named, *["config"] * has_config]
            remedy = nearest(error.flagname, known, "--{}") or "see --help."
            complain(f"There is no flag --{error.flagname}: {remedy}")
        except flags.Error as error:
            complain(f"{str(error).removesuffix('.')}: see --help.")
        if positional and len(rest) == 1:
            complain(f"No {positional} given: write one or more without a flag.")
        if not positional and len(rest) > 1:
            complain(
                f"Unexpected argument {rest[1]!r}: flags are written --name=value, and values "
                "with spaces in quotes."
            )
        if missing := [f"--{name}" for name in required if not flags.FLAGS[name].value]:
            complain(f"{' and '.join(missing)} missing: see --help for what they mean.")
        return rest

    def call(argv: Sequence[str]) -> Any:
        console.close()
        kwargs = {name: flags.FLAGS[name].value for name in named} | configured
        try:
            code = main(*argv[1:], **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has gone is no surprise
            return code
        except BadInput as error:
            complain(error)
        except Preempted as preempted:
            console.close()
            logging.warning("%s", preempted)
            if preempted.exit_code == interrupts.EXIT_CODE:
                stopped()
            sys.exit(preempted.exit_code)
        except (KeyError, AttributeError) as error:
            # Of the config itself, where it is that of another command.
            if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            complain(
                f"The config has no key {_key(error)!r}, which this command reads: give --config"
                " one for it, see --help."
            )

    packages.prefer_ours()
    for stream in (sys.stdout, sys.stderr):
        # Characters that a terminal or log cannot show are replaced.
        if stream is not None:
            stream.reconfigure(errors="replace")
    console.start_logging()
    interrupts.install()
    interrupts.expect()
    try:
        app.run(call, flags_parser=parse)
    except KeyboardInterrupt:
        stopped()
    except BrokenPipeError:
        if not _unread():
            raise
        os._exit(_UNREAD)
    finally:
        interrupts.uninstall()


def _unread() -> bool:
    """Whether the reader of what is printed has gone, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always told
    return bool(poll.poll(0))


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


def _key(error: BaseException) -> str:
    """The key that an ml_collections config did not find: the first of what its error quotes."""
    quoted = re.search(r"""['"]([\w.-]+)\\?['"]""", str(error))
    return quoted[1] if quoted else str(error)


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


def stopped() -> None:
    """Says after Ctrl-C how to go on, and exits."""
    console.close()
    interrupts.wait()
    print(f"stopped; to go on: {printable(interrupts.command())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Python would wait for workers, which end with this process and are in the middle of something.
    os._exit(interrupts.EXIT_CODE)


def complain(error: BaseException | str) -> None:
    """Prints one line on stderr and exits with code 2; what it quotes cannot steer a terminal."""
    console.close()
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    if isinstance(error, StorageFailed):
        os._exit(error.exit_code)
    sys.exit(2)
