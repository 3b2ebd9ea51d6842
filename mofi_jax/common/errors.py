"""The exceptions meant for people, each one sentence with its exit code."""

import difflib
import errno
import os
import re
from collections.abc import Iterable


class BadInput(ValueError):
    """Input that cannot be used.

    The message is one sentence that says what is wrong, where (file, key or flag) and what to do
    about it. The mains print it without a traceback and exit with code 2 (`mofi_jax.common.cli`).
    """


class StorageFailed(BadInput):
    """Output that could not be written; the process exits at once (`cli.complain`).

    Threads of libraries and other hosts may wait for a write that will never end.

    Attributes:
      exit_code: 2, or 1 where the same command may succeed the next time.
    """

    exit_code = 2


class Preempted(Exception):
    """Raised after a preemption checkpoint: the same command resumes from it.

    The mains exit with code 75, the EX_TEMPFAIL of sysexits.h, which tells a launcher to run the
    same command again; after Ctrl-C with 130, as a person has stopped it.
    """

    exit_code = 75


def nearest(name: str, known: Iterable[str], shown: str = "{}") -> str:
    """Asks for the known name that is most like this one, as `shown` has it; "" where none is."""
    close = difflib.get_close_matches(name, [*known], 1)
    return f"did you mean {shown.format(close[0])}?" if close else ""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # can only be about writing
_CLOSED = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT),
    # Something else lies where a file or a folder should.
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
)

_BUCKET_CLIENTS = ("gcsfs", "google", "aiohttp", "requests")


def storage_problem(error: BaseException | None, folder: os.PathLike | str) -> str | None:
    """Why a folder cannot be written, in the system's words; None for errors about anything else.

    Libraries in C++ report an OSError as text inside an exception of their own, and clients of
    buckets have exceptions of their own.
    """
    inside = os.path.abspath(folder)
    bucket = re.match("gs://[^/]+", str(folder))
    while error is not None:
        # gcsfs names the bucket in what is refused or not there, TensorStore in everything.
        if bucket and (
            type(error).__module__.partition(".")[0] in _BUCKET_CLIENTS
            or bucket[0] in str(error)
            or (isinstance(error, OSError) and f"/b/{bucket[0][5:]}/" in str(error))
        ):
            return " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, OSError):
            # In the folder, or one of its parents.
            path = os.path.abspath(str(error.filename))
            near = error.filename and os.path.commonpath([path, inside]) in (path, inside)
            if error.errno in _FULL or (error.errno in _CLOSED and near):
                return os.strerror(error.errno).lower()
        for number in (*_FULL, *_CLOSED):
            if os.strerror(number) in str(error) and str(folder) in str(error):
                return os.strerror(number).lower()
        error = error.__cause__ or error.__context__
    return None


def may_pass(error: BaseException) -> bool:
    """Whether reading failed for a reason that is no damage: a server away, too many open files."""
    numbers = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
    return isinstance(error, OSError) or any(os.strerror(n) in str(error) for n in numbers)
