"""The exceptions that are meant for people: told in one sentence, each with its exit code."""


class BadInput(ValueError):
    """Input that cannot be used.

    The message is one sentence that says what is wrong, where (file, key or flag) and what to do
    about it. The mains print it without a traceback and exit with code 2 (`mofi_jax.cli`).
    """


class Preempted(Exception):
    """Asked to leave, and everything is saved: the same command goes on.

    The mains exit with code 75, the EX_TEMPFAIL of sysexits.h, which tells a launcher to run the
    same command again.
    """

    exit_code = 75
