"""Finds the nearest of the pictures that `mofi_jax.embed` has written; NumPy alone, no server.

By default in two steps.  Each vector has 512 bits, the signs of its products with fixed random
directions; the vectors whose bits differ from the query's in the fewest places are candidates, and
their exact cosines, from the memory-mapped vectors, decide.  The mean is taken off before, and the
directions are orthogonal ("super-bit" hashing, Ji et al., arXiv 1203.3727): embeddings lie in a
narrow cone and vary along some axes far more than along others, so that their own signs say little.
A million pictures take 64 MB of bits; `python -m benchmarks.interop --only search` measures it.

The bits are computed at the first search and kept beside the vectors, in ``index.npy``.
"""

import functools
import os
import threading
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from etils import epath
from jaxtyping import Float, Float32, Int64, UInt8, UInt64

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import containers
from mofi_jax.inference import embeddings, graph

FILE = "index.npy"
_BITS = 512
_FORMAT = 1  # of the file
_THREADS = min(8, os.cpu_count() or 1)  # more wait for memory
# Candidates, whose exact cosines are computed: so many, or this share of the pictures, or so many
# times what is asked for.
_CANDIDATES, _SHARE, _TIMES = 1280, 1 / 800, 100
_FIRST = 4  # times as many after half of the bits
_SCALE = 32  # with so many times the candidates as pictures or fewer, all are compared
_FROM_GRAPH = 4  # times as many as are asked for are looked at exactly
_BLOCK = 32_768  # rows at a time: what belongs to them stays in the caches
_SCANNED = 65_536  # the same of the bits, of which one word a row is read at a time
_SCORES = 1 << 22  # computed at a time where all are compared
_SAME = 0.9  # cosine of a picture's embeddings by the same model on other devices, at least
_SAMPLE = 16  # of so many distances one is looked at to find how near candidates are
_MEAN_ROWS = 65_536


class Index:
    """Pictures by their vectors, for any number of threads; use `Index.open`."""

    def __init__(
        self, folder: epath.Path, root: epath.Path, vectors: np.ndarray, table: Any, of_graph: Any
    ):
        self._folder, self._table, self._graph = folder, table, of_graph
        self._lock = threading.Lock()
        self._reader = containers.Reader(containers.folder_of(root))
        self.vectors: Float32[np.ndarray, "n d"] = vectors  # memory-mapped

    @classmethod
    def open(
        cls, folder: epath.PathLike, *, images: epath.PathLike = "", kind: str = "bits"
    ) -> "Index":
        """Opens a folder that `mofi_jax.embed` has written.

        Args:
          images: where its pictures lie now, if they were moved.
          kind: "bits", or "usearch" (`graph`, an extra) for very many queries.

        Raises BadInput: it is none, is not finished or is damaged.
        """
        folder = epath.Path(folder)
        result = embeddings.read_result(folder)
        path = folder / embeddings.VECTORS
        try:
            vectors = np.load(path, mmap_mode="r")
            table = pq.ParquetFile(str(folder / embeddings.PICTURES))
            rows = table.metadata.num_rows
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"{path} cannot be read ({reason}): embed the pictures again."
            ) from error
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != rows:
            raise BadInput(
                f"{path} holds {list(vectors.shape)} of {vectors.dtype}, and {embeddings.PICTURES} "
                f"{rows} rows: copy both again, or embed the pictures again."
            )
        if kind not in ("bits", "usearch"):
            raise BadInput(f"There is no kind of index {kind!r}: take bits or usearch.")
        root = epath.Path(images or result.get("images", ""))
        return cls(
            folder, root, vectors, table, graph.load(folder, vectors) if kind == "usearch" else None
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int, *, exact: bool = False
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """Rows and cosines of the `k` nearest pictures, best first; of all if there are fewer.

        Args:
          queries: embeddings by the same model, of any length.
          exact: compares every vector, ten times slower.

        Raises BadInput: vectors of another size than the pictures', or not finite; k below 1.
        """
        queries = np.asarray(queries, np.float32)
        if k < 1:
            raise BadInput(f"k={k} nearest pictures: choose 1 or more.")
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise BadInput(
                f"Queries of {list(queries.shape)} do not fit vectors of {self.vectors.shape[1]} "
                f"numbers in {self._folder}: embed both by the same model."
            )
        if not np.isfinite(queries).all():
            raise BadInput("Queries hold values that are not finite, which are near to nothing.")
        queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        k = min(k, len(self))
        rows = np.zeros((len(queries), k), np.int64)
        cosines = np.zeros((len(queries), k), np.float32)
        wanted = max(_CANDIDATES, int(len(self) * _SHARE), _TIMES * k)
        if exact or len(self) <= _SCALE * wanted:
            for start in range(0, len(queries), 64):
                part = slice(start, start + 64)
                rows[part], cosines[part] = self._compare_all(queries[part], k)
            return rows, cosines
        if self._graph is None:
            mean, directions, bits = self._bits
            signs = _signs(queries, mean, directions)
        for i, query in enumerate(queries):
            if self._graph is None:
                found = _candidates(bits, signs[i], wanted, self._threads)
            else:
                found = self._graph.search(query, _FROM_GRAPH * k).keys.astype(np.int64)
            # Not a product: BLAS would wake its threads for two thousand rows.
            exact_cosines = np.einsum("nd,d->n", self.vectors[found], query)
            rows[i], cosines[i] = _best(found, exact_cosines, k)
        return rows, cosines

    def made_by(self, first: Float32[np.ndarray, " d"]) -> bool:
        """Whether a model whose embedding of the first picture this is has made the vectors."""
        fits = first.shape == self.vectors.shape[1:]
        return fits and bool(first @ self.vectors[0] >= _SAME)

    def picture(self, row: int) -> bytes:
        """The file of a picture; raises `containers.Unreadable` where it is gone."""
        of = self.describe(row)
        place = [of[name] for name in ("key", "container", "offset", "length", "row")]
        return self._reader.read(containers.Place(*place))[1]

    def describe(self, row: int) -> dict[str, Any]:
        """The row of pictures.parquet of a picture."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        start = self._ends[group - 1] if group else 0
        with self._lock:  # a ParquetFile is for one thread at a time
            table = self._group(group)
        return table.slice(row - start, 1).to_pylist()[0]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        facts = self._table.metadata
        return np.cumsum([facts.row_group(i).num_rows for i in range(facts.num_row_groups)])

    @functools.lru_cache(maxsize=64)  # noqa: B019  an index lives as long as its process
    def _group(self, number: int) -> Any:
        return self._table.read_row_group(number)

    def _compare_all(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in queries]
        size = _SCORES // max(1, len(queries))
        for start in range(0, len(self), size):
            scores = self.vectors[start : start + size] @ queries.T
            for i, of in enumerate(scores.T):
                rows, cosines = best[i]
                if len(cosines) == k:  # most blocks have next to nothing that is nearer
                    near = np.flatnonzero(of > cosines[-1])
                else:
                    most = min(k, len(of))
                    near = np.flatnonzero(of >= np.partition(of, -most)[-most])
                merged = np.append(rows, near + start), np.append(cosines, of[near])
                best[i] = _best(*merged, k)
        return np.stack([rows for rows, _ in best]), np.stack([cosines for _, cosines in best])

    @functools.cached_property
    def _threads(self) -> futures.Executor:
        return futures.ThreadPoolExecutor(_THREADS)

    @functools.cached_property
    def _bits(self) -> tuple[np.ndarray, np.ndarray, "_Bits"]:
        """Mean [d], directions [d, 512] and bits, from the file or made for it."""
        path = self._folder / FILE
        stat = os.stat(self._folder / embeddings.VECTORS)
        stamp = np.array([_FORMAT, stat.st_size, stat.st_mtime_ns], np.int64)
        directions = _directions(self.vectors.shape[1])
        if (kept := _read(path, stamp)) is not None:
            return kept[0], directions, kept[1]
        logging.info("making the index of %d vectors, once: %s", len(self), path)
        mean = self.vectors[:: -(-len(self) // _MEAN_ROWS)].mean(axis=0)
        shape = _BITS // 128, len(self)
        bits = _Bits(np.empty(shape, np.uint64), np.empty(shape[::-1], np.uint64))
        for start in range(0, len(self), _BLOCK):
            part = slice(start, start + _BLOCK)
            signs = _signs(self.vectors[part], mean, directions)
            first, second = np.split(signs, 2, axis=1)
            bits.first[:, part], bits.second[part] = first.T, second
        try:
            with embeddings.appears(path.parent, path.name) as new, open(new, "wb") as file:
                for array in (stamp, mean, *bits):  # one behind the other
                    np.save(file, array)
        except OSError as error:
            logging.warning("%s cannot be written (%s): made anew each time", path, error.strerror)
        return mean, directions, bits


class _Bits(NamedTuple):
    """Each half as it is read: the first of all vectors, the second of some."""

    first: UInt64[np.ndarray, "words n"]
    second: UInt64[np.ndarray, "n words"]


def _read(path: epath.Path, stamp: np.ndarray) -> tuple[np.ndarray, _Bits] | None:
    """Mean and memory-mapped bits; None where there are none for these vectors."""
    try:
        with open(path, "rb") as file:
            if not np.array_equal(np.load(file), stamp):
                return None
            mean, mapped = np.load(file), []
            for _ in _Bits._fields:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                mapped.append(np.memmap(path, dtype, "r", file.tell(), shape))
                file.seek(mapped[-1].nbytes, os.SEEK_CUR)
            return mean, _Bits(*mapped)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None


def _directions(dim: int) -> Float32[np.ndarray, "d bits"]:
    """Fixed random directions, orthogonal in sets of as many as there are dimensions."""
    rng = np.random.default_rng(0)
    sets = [
        np.linalg.qr(rng.standard_normal((dim, min(dim, _BITS))))[0]
        for _ in range(-(-_BITS // dim))
    ]
    return np.concatenate(sets, axis=1)[:, :_BITS].astype(np.float32)


def _signs(
    vectors: np.ndarray, mean: np.ndarray, directions: np.ndarray
) -> UInt64[np.ndarray, "n words"]:
    return np.packbits(vectors @ directions > mean @ directions, axis=1).view(np.uint64)


def _candidates(
    bits: _Bits, query: UInt64[np.ndarray, " words"], wanted: int, threads: futures.Executor
) -> Int64[np.ndarray, " m"]:
    """Rows whose bits differ from the query's in the fewest places, ascending."""
    half = len(query) // 2
    distances = _distances(bits.first, query[:half], threads)
    found = _nearest(distances, _FIRST * wanted)
    # The other half only for what may be among the nearest.
    others = np.bitwise_count(bits.second[found] ^ query[half:])
    total = distances[found].astype(np.uint16) + others.sum(1, np.uint16)
    return np.sort(found[np.argpartition(total, wanted)[:wanted]])


def _distances(
    bits: UInt64[np.ndarray, "words n"], query: np.ndarray, threads: futures.Executor
) -> UInt8[np.ndarray, " n"]:
    """In how many of 256 bits each vector differs from the query; 0 for all of them, too."""
    found = np.empty(bits.shape[1], np.uint8)

    def count(rows: range) -> None:
        different = np.empty(_SCANNED, np.uint64)
        number = np.empty(_SCANNED, np.uint8)
        for start in rows:
            total = found[start : start + _SCANNED]
            size = len(total)
            total[:] = 0
            for word, of_query in zip(bits, query, strict=True):
                np.bitwise_xor(word[start : start + size], of_query, out=different[:size])
                np.bitwise_count(different[:size], out=number[:size])
                total += number[:size]

    blocks = range(0, len(found), _SCANNED)
    share = -(-len(blocks) // _THREADS)
    parts = [blocks[i : i + share] for i in range(0, len(blocks), share)]
    for _ in threads.map(count, parts):
        pass
    return found


def _nearest(distances: UInt8[np.ndarray, " n"], wanted: int) -> Int64[np.ndarray, " m"]:
    """Rows of the smallest distances, ascending: about `wanted`, which is less than a half."""
    counts = np.bincount(distances[::_SAMPLE], minlength=256).cumsum()
    limit = int(np.searchsorted(counts, wanted / _SAMPLE))
    found = np.flatnonzero(distances <= limit)
    while len(found) < wanted // 2:  # the sample was not like the others
        limit += 8
        found = np.flatnonzero(distances <= limit)
    return found[: 8 * wanted]  # thousands of copies


def _best(rows: np.ndarray, cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest, of equals the first row."""
    order = np.lexsort((rows, -cosines))[:k]
    return rows[order], cosines[order]
