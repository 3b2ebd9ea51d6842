"""Ctrl-C: a sentence and exit code 130, wherever the main thread is; twice ends at once."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent

PROGRAM = """
    import sys, threading, time
    from mofi_jax.common import console

    console.begin("begun")
    {imports}
    from mofi_jax.common import cli

    def main():
        # Said while the work is under way.
        threading.Timer(0.5, lambda: print("ready", file=sys.stderr, flush=True)).start()
        try:
            {work}
        finally:
            time.sleep({unwinding})

    cli.run(main)
"""


def interrupted(times, *, imports="pass", work="time.sleep(60)", unwinding=0, after="ready"):
    """Exit code and lines of a program that is sent SIGINT so many times, from a line on."""
    code = textwrap.dedent(PROGRAM.format(imports=imports, work=work, unwinding=unwinding))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Ignored where the tests themselves run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if line.strip().endswith(after):
            break
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        lines.append(process.stderr.readline().strip())
        time.sleep(0.1)
    lines += [line.strip() for line in process.stderr.read().splitlines()]
    return process.wait(timeout=60), [line for line in lines if line]


def test_once_ends_in_good_order_and_says_how_to_go_on():
    code, lines = interrupted(1)
    assert code == 130
    assert lines[-2] == "Ctrl-C: stopping; once more stops at once"
    assert lines[-1].startswith("stopped; to go on: python -c ")


def test_during_the_imports_nothing_can_be_lost():
    code, lines = interrupted(1, imports="time.sleep(60)", after="begun")
    assert code == 130
    assert lines[1:] == ["Ctrl-C: stopped, there was nothing to save"]


# In C, where no handler of Python runs for a minute.
DEAF = "__import__('hashlib').pbkdf2_hmac('sha256', b'a', b'b', 10**9)"


@pytest.mark.parametrize("case", [{"unwinding": 60}, {"work": DEAF}])
def test_twice_ends_at_once(case):
    code, lines = interrupted(2, **case)
    assert code == 130
    assert lines[-2:] == [
        "Ctrl-C: stopping; once more stops at once",
        "Ctrl-C: again: stopped at once",
    ]


CHILD = """
import sys, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved", file=sys.stderr)
    sys.exit(130)
"""


def test_a_command_is_waited_for():
    """Both hear of Ctrl-C: what was started ends first, and nothing is left behind."""
    waits = (
        "from mofi_jax.common import processes; "
        f"print(processes.wait_for([sys.executable, '-c', {CHILD!r}]), file=sys.stderr)"
    )
    code, lines = interrupted(1, work=waits)
    assert code == 0
    assert lines[-1] == "130"
    assert {
        "saved",
        "Ctrl-C: waiting for the command above to stop; once more stops both at once",
    } < {*lines}
