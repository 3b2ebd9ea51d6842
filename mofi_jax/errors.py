"""The one exception that is meant for people: bad input, told in one sentence."""


class BadInput(ValueError):
    """Input that cannot be used.

    The message is one sentence that says what is wrong, where (file, key or flag) and what to do
    about it. The mains print it without a traceback and exit with code 2 (`mofi_jax.cli`).
    """
