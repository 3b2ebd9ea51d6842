"""A class table that stays in its file: memory-mapped, and compared by the CPU's threads."""

import concurrent.futures
import dataclasses
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath
from jaxtyping import Float, Float32, Int, Int32

from mofi_jax.common.errors import BadInput
from mofi_jax.losses import class_order

_BLOCK = 4 << 20  # bytes that a thread reads from memory and then compares within its cache
# By the format's own names.
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}


@jax.tree_util.register_static  # to jax a tree's part without arrays: nothing of it goes anywhere
@dataclasses.dataclass(eq=False)
class MappedTable:
    """Entities' rows in a file; `np.asarray` gives the class table that they are, in memory."""

    path: str
    rows: Float[np.ndarray, "e d"]  # memory-mapped; row i is entity i

    def __post_init__(self):
        self._lengths = np.zeros(len(self.rows), np.float32)  # 0 until a row's is known

    @classmethod
    def open(cls, path: epath.PathLike, name: str) -> "MappedTable":
        """The array of a name in a safetensors file.

        Raises BadInput: a file that is damaged, or without a matrix of floats of this name.
        """
        path = os.fspath(path)
        try:
            with safetensors.safe_open(path, "np") as file:  # checks the header and the length
                file.get_slice(name)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(length))[name]
            offset, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
            dtype = _TYPES.get(entry["dtype"])
            if len(shape) != 2 or 0 in shape or dtype is None:
                raise ValueError(f"{entry['dtype']} {list(shape)} is no matrix of floats")
            return cls(path, np.asarray(np.memmap(path, dtype, "r", offset, shape)))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise BadInput(
                f"The class table {path} cannot be read ({error}): copy the file again."
            ) from error

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
        """These rows of the class table, whose order is that of `class_order`."""
        ids = class_order.table_entities(rows, len(self))
        return self.rows[ids].astype(np.float32, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.float32, copy=False)

    def nearest(
        self, embeddings: Float32[np.ndarray, "n d"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Ids and cosines of the k nearest entities, best first; of equal ones the lower id first.

        Args:
          embeddings: L2-normalised.

        Raises BadInput: k beyond the vocabulary, or a table with values that are not finite.
        """
        if not 0 < k <= len(self):
            raise BadInput(f"k={k} nearest of {len(self)} entities: choose 1 to {len(self)}.")
        number = len(embeddings)
        best = np.full((number, k), -np.inf, np.float32), np.full((number, k), len(self))
        lock = threading.Lock()

        def keep(start: int, cosines: np.ndarray) -> None:
            nonlocal best
            # After the first blocks these are few.
            high = np.flatnonzero((cosines >= best[0][:, -1:]).any(0))
            if not len(high):
                return
            with lock:
                values = np.concatenate([best[0], cosines[:, high]], 1)
                ids = np.broadcast_to(start + high, (number, len(high)))
                ids = np.concatenate([best[1], ids], 1)
                order = np.lexsort((ids, -values))[:, :k]
                best = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)

        self._for_blocks(embeddings, keep)
        return best[1].astype(np.int32), best[0]

    def log_sum(
        self, embeddings: Float32[np.ndarray, "n d"], scale: float
    ) -> Float32[np.ndarray, " n"]:
        """log sum exp(scale * cosine) over all entities; arguments and errors as of `nearest`."""

        def log_sum(start: int, cosines: np.ndarray) -> np.ndarray:
            return np.logaddexp.reduce(scale * cosines.astype(np.float64), axis=1)

        sums = self._for_blocks(embeddings, log_sum)
        return np.logaddexp.reduce(sums, axis=0).astype(np.float32)

    def _for_blocks(
        self, embeddings: np.ndarray, function: Callable[[int, np.ndarray], Any]
    ) -> list[Any]:
        """function(first entity, cosines [n, block]) of every block, in order."""
        size = max(1, _BLOCK // (4 * self.rows.shape[1]))

        def run(start: int) -> Any:
            block = self.rows[start : start + size].astype(np.float32, copy=False)
            lengths = self._lengths[start : start + size]
            if not lengths.all():
                lengths[:] = np.maximum(np.sqrt(np.vecdot(block, block)), 1e-12)
                if not np.isfinite(lengths).all():
                    lengths[:] = 0
                    raise BadInput(
                        f"{self.path} holds values that are not finite: nothing can be computed "
                        "with them; export another checkpoint."
                    )
            # A product of matrices would start BLAS's own threads in each of these.
            return function(start, np.vecdot(embeddings[:, None], block) / lengths)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(run, range(0, len(self), size)))
