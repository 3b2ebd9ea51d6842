"""Ctrl-C: once ends a command in good order, twice at once; a sentence, and exit code 130.

Python's own handlers wait until the main thread is back from C++, where compiling takes minutes.
So a thread hears of the signal too, which says what happens now and leaves when it is asked twice.
"""

import os
import pathlib
import shlex
import signal
import sys
import threading
from typing import Any

EXIT_CODE = 130  # 128 + SIGINT, as shells have it

_STOPPING = "stopping; once more stops at once"
_NOTHING = "stopped, there was nothing to save"
_AGAIN = "again: stopped at once"
_watching = _raised = False
_grace: float | None = None
_sentence = _STOPPING
_leaving = threading.Lock()
_said = threading.Event()  # the sentence of the first


def install() -> None:
    """Handles Ctrl-C in this program from here on, with a KeyboardInterrupt the first time.

    Not in other threads than the main one, nor where the shell has turned Ctrl-C off, as it does
    for what runs in the background.
    """
    global _watching, _raised
    # Python's own, or that of the command ``mofi`` until now.
    default = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL)
    if _watching or not default or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="interrupts").start()
    _watching, _raised = True, False


def uninstall() -> None:
    """Undoes `install`: what comes after a program in the same process has its own ideas."""
    global _watching
    if _watching and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watching = False


def expect(sentence: str = _STOPPING, *, grace: float | None = None) -> None:
    """What the first Ctrl-C does from here on.

    Args:
      sentence: which says so.
      grace: seconds after which the process ends by itself, as nothing would be lost; None: never.
    """
    global _grace, _sentence
    _sentence, _grace = sentence if grace is None else _NOTHING, grace


def wait() -> None:
    """Until the first Ctrl-C has been answered, which on a busy machine takes a moment."""
    if _watching:
        _said.wait(2.0)


def command() -> str:
    """The command of this process, as one would write it."""
    words = sys.orig_argv[1:]
    mine = bool(words) and pathlib.PurePath(words[0]).name == "mofi"
    return shlex.join(["mofi", *words[1:]] if mine else ["python", *words])


def interrupt(number: int, frame: Any) -> None:
    """The handler: raises KeyboardInterrupt where this may be caught in good order."""
    global _raised
    if _watching and _grace == 0:
        _leave(_NOTHING)  # an exception in the middle of an import may crash the process
    if _watching and _raised:
        _leave(_AGAIN)
    _raised = True
    raise KeyboardInterrupt


def _watch(pipe: int) -> None:
    times = 0
    while True:
        for number in os.read(pipe, 64):
            times += number == signal.SIGINT
            if number != signal.SIGINT:
                continue
            if times > 1:
                _leave(_AGAIN)
            if _grace == 0:
                _leave(_sentence)
            _say(_sentence)
            _said.set()
            if _grace is not None:
                threading.Timer(_grace, os._exit, (EXIT_CODE,)).start()


def _leave(sentence: str) -> None:
    """Ends the process; its workers end with it (`common.processes`)."""
    with _leaving:
        _say(sentence)
        os._exit(EXIT_CODE)


def _say(sentence: str) -> None:
    # Not print: the signal may have interrupted another one.
    clear = "\r\x1b[K" if os.isatty(2) else ""
    os.write(2, f"{clear}Ctrl-C: {sentence}\n".encode())
