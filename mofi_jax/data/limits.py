"""What reading data needs of the machine: open files, shared memory.  Nothing here imports jax."""

import resource
import shutil

from absl import logging

from mofi_jax.common.errors import BadInput

OTHER_FILES = 256  # that Python, jax and the logs keep open
SHARED_MEMORY = "/dev/shm"


def allow_open_files(shards: int) -> int:
    """Raises this process's limit of open files, which its children inherit; returns it.

    Raises BadInput: the hard limit, which only an administrator can raise, is too low.
    """
    needed = shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return soft
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInput(
            f"A process may open at most {hard} files here, and {shards} shards need {needed}: "
            f"have the hard limit raised (ulimit -Hn {needed}; docker run --ulimit "
            f"nofile={needed}), or write larger shards (config.shard_examples)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    logging.info("raised the limit of open files from %d to %d for %d shards", soft, needed, shards)
    return needed


def require_shared_memory(needed: int, workers: int, folder: str = SHARED_MEMORY) -> None:
    """Raises BadInput where ``workers`` processes have less than ``needed`` bytes to hand over.

    A process that writes to a page without room is killed without a message (SIGBUS).
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # a system that shares memory in another way
    if free < needed:
        raise BadInput(
            f"config.data.workers={workers} need {needed / 2**20:.0f} MiB of shared memory, and "
            f"{folder} has {free / 2**20:.0f} MiB free: start the container with a larger one "
            "(docker run --shm-size=1g), use fewer workers, or set config.data.workers=0."
        )
