"""What a person sees of a command, and Ctrl-C; imported before anything heavy."""

from mofi_jax.common.console.lines import (
    WAITING,
    WORKING,
    begin,
    close,
    duration,
    now,
    speak_first,
    start_logging,
)
