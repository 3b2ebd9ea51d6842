"""One item of a checkpoint on disk, such as the parameters: whole, or an array of it by rows."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from mofi_jax.common.errors import BadInput

_BLOCK = 8_192  # rows that are read at a time, unless more were written together


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array that stays on disk; iterating reads (number of the first row, rows) in order."""

    item: epath.Path
    name: str
    shape: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        # As Orbax writes: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
        base = {"driver": "file", "path": os.fspath(self.item) + "/"}
        key = {"driver": "ocdbt", "base": base, "path": self.name + "/"}
        with reading(self.item):
            array = tensorstore.open({"driver": "zarr", "kvstore": key}, open=True).result()
        together = array.chunk_layout.read_chunk.shape[0]
        size = together * -(-_BLOCK // together)
        for start in range(0, self.shape[0], size):
            with reading(self.item):
                rows = array[start : min(start + size, self.shape[0])].read().result()
            yield start, rows


def read_item(item: epath.Path, by_rows: Sequence[str] = ()) -> Any:
    """The tree in a folder of a checkpoint as numpy arrays, whole, on any number of devices.

    Those at the top of the tree that `by_rows` names are not read and come as `Rows`.
    """
    tree = saved_tree(item)
    apart = {
        name: Rows(item, name, tuple(tree.pop(name).shape)) for name in by_rows if name in tree
    }
    # An array of numpy's asks Orbax for one; these have no memory of their own.
    abstract = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree
    )
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=bool(apart),
    )
    handler = ocp.PyTreeCheckpointHandler(**single_host())
    with reading(item), ocp.Checkpointer(handler, **single_host()) as checkpointer:
        return checkpointer.restore(item, args=arguments) | apart


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Turns failures of reading into one sentence about the folder."""
    try:
        yield
    except (BadInput, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and tensorstore raise all kinds about damaged files
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{folder} cannot be read ({type(error).__name__}: {reason}): restore it from a copy, "
            "or move its step out of the folder, and the one before it is read."
        ) from error


def saved_tree(folder: epath.Path) -> Any:
    """The tree of a saved item with ArrayMetadata leaves."""
    # Not by a Checkpointer, which misses the metadata of a whole step here, and warns.
    handler = ocp.StandardCheckpointHandler(**single_host())
    with reading(folder), contextlib.closing(handler):
        return handler.metadata(folder).tree


def single_host() -> dict[str, Any]:
    """Options of a reader on one host; by default Orbax has all hosts meet after each read."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return {"multiprocessing_options": options}
