"""One run per folder: a lock on a file in it, released when its holder ends or dies."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import IO, Any

from absl import logging
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts

FILE = "run.lock"

# A file server releases the locks of a machine that vanished after its lease, on NFS 90 seconds.
_LEASE_SECONDS = 120.0
_RETRY_SECONDS = 5.0


@contextlib.contextmanager
def held(workdir: epath.Path, flag: str = "--workdir") -> Iterator[None]:
    """Makes the folder and holds its lock inside the block; host 0 holds it for all hosts.

    Where there are no locks (a bucket, some mounts of buckets), a warning says so.  BadInput where
    another run holds it, with where that runs and since when.
    """
    file: IO[str] | None = None

    def take() -> None:
        nonlocal file
        file = _take(workdir, flag)

    new = not workdir.exists()
    hosts.agree(take)
    try:
        yield
    finally:
        if file is not None:
            (workdir / FILE).unlink(missing_ok=True)
            file.close()
            if new:  # empty if the run was refused
                with contextlib.suppress(OSError):
                    os.rmdir(workdir)


def _take(workdir: epath.Path, flag: str) -> IO[str] | None:
    """The locked file, or None where there are no locks."""
    unlocked = "%s cannot be locked (%s): start no second run in it"
    if files.is_remote(workdir):
        logging.warning(unlocked, workdir, "buckets have no locks")
        return None
    deadline = time.monotonic() + _LEASE_SECONDS

    def open_file(path: str, flags: int) -> int:  # not through a link, as in a copied folder
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)

    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        # It stays open while it is locked.
        file = open(workdir / FILE, "a+", opener=open_file)  # noqa: SIM115
        try:
            # Held by the process, unlike flock: children that outlive it do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    logging.warning(unlocked, workdir, error.strerror)
                    return None
                owner = _owner(file)
            if owner.get("host") == socket.gethostname() or time.monotonic() > deadline:
                raise BadInput(
                    f"{flag}={workdir} is in use by process {owner.get('process', '?')} on "
                    f"{owner.get('host', '?')} since {owner.get('since', '?')}: let it finish, end "
                    "it, or name another folder; processes of one run need config.distributed."
                ) from error
            logging.info("%s is held by a run on %s: waiting", workdir, owner.get("host", "?"))
            time.sleep(_RETRY_SECONDS)
            continue
        with contextlib.suppress(OSError):  # a stale handle, where it was removed on a server
            if os.fstat(file.fileno()).st_nlink:
                break
        file.close()  # its holder removed it a moment ago
    now = datetime.datetime.now(datetime.UTC)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{now:%F %T} UTC"}
    file.truncate(0)
    file.write(json.dumps(owner) + "\n")
    file.flush()
    return file


def _owner(file: IO[str]) -> dict[str, Any]:
    """Who holds the lock, as far as the file says."""
    file.seek(0)
    with contextlib.suppress(ValueError, TypeError):
        return dict(json.loads(file.read()))
    return {}
