"""The prefetch buffer on the devices, filled by a thread.

Batches in it have no part in the position of a run: that counts the batches that a step has taken.
Data workers never import this file, because it starts jax.
"""

import collections
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from mofi_jax.distributed import global_batch

_CLOSE_SECONDS = 60.0  # for a batch that is being decoded while the run ends


class DeviceBatches(Iterator[dict[str, jax.Array]]):
    """This host's part of each batch on its devices, some batches ahead; `close` it at the end.

    Batches come in the order of the stream, as `global_batch.to_global` makes them.  An exception
    of the stream, its end among them, is raised after the batches that came before it.

    Args:
      stream: this host's parts of the global batches (`pipeline.training_stream`); it is closed
        with the result.  Its arrays must not be written to again.
      mesh: leading dimensions go over its batch axes.
      depth: whole batches on the devices besides the one in use; at least 1.
    """

    def __init__(self, stream: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, depth: int):
        self._stream = stream
        self._mesh = mesh
        self._depth = depth
        self._ready: collections.deque[tuple[Any, BaseException | None]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="to_devices", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            try:
                item = global_batch.to_global(self._mesh, next(self._stream)), None
            except BaseException as error:  # noqa: BLE001  raised by `__next__`
                item, ended = (None, error), True
            with self._changed:
                self._ready.append(item)
                self._changed.notify_all()
            del item  # or this frame would keep a batch that is used up

    def __next__(self) -> dict[str, jax.Array]:
        with self._changed:
            if self._closed:
                raise StopIteration
            self._changed.wait_for(lambda: self._ready or self._closed)
            if not self._ready:
                raise StopIteration
            batch, error = self._ready[0]
            if error is not None:
                raise error  # also at the next call
            self._ready.popleft()
            self._changed.notify_all()
        return batch

    def close(self) -> None:
        """Ends the thread and the stream and drops the buffer; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logging.warning("the next batch is still being read after %.0f s", _CLOSE_SECONDS)
            return
        self._ready.clear()
        if hasattr(self._stream, "close"):
            self._stream.close()
