"""What a process may take of its machine while it reads data: open files, shared memory.

Nothing here imports jax: data workers must never start it.
"""

import resource
import shutil

from absl import logging

from mofi_jax.common.errors import BadInput

# Files that Python, jax and the logs keep open, beside the shards.
OTHER_FILES = 256
SHARED_MEMORY = "/dev/shm"


def allow_open_files(shards: int) -> int:
    """Sees to it that all shards can be open at once, in this process and those that it starts.

    Returns:
      How many files may be open now.

    Raises:
      BadInput: the hard limit, which only an administrator can raise, is too low.
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
    """Raises BadInput where ``workers`` processes could not hand over what they have made.

    A page that has no room left kills the process that writes to it, without a word (SIGBUS).

    Args:
      needed: bytes that lie there at once.
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
