"""Pictures of evaluation sets among the pairs. pairs/, embeddings/ -> eval_matches/, eval_cosines/.

A picture of an evaluation set is found again in three layers:

    sha256   the same file
    phash    at most `max_hamming` of the 64 bits of the perceptual hash differ: scaled, compressed
    cosine   of CLIP embeddings, nearer than innocent pictures come (`nearest`): cropped, recoloured

Stages, per shard of pairs/:

    eval_matches/   NNNNN.parquet  key, set, layer (sha256 or phash), distance (bits), name
    eval_cosines/   NNNNN.parquet  the same of layer cosine, with distance 1 - cosine, by `nearest`

A key has one row for each set and stage: the first layer that finds it, there the nearest picture.
The sets themselves are hashed and embedded by `eval_sets`.
"""

import itertools
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Int64

from data_prep import engine
from data_prep.filters import eval_sets, nearest
from data_prep.pairs import pictures
from data_prep.selection import embed

LAYERS = ("sha256", "phash")

_CANDIDATES = 1 << 20  # pairs of hashes compared at a time: some 40 MB


def match_sets(
    config: ml_collections.ConfigDict, work: engine.Engine, shards: Sequence[str]
) -> list[str]:
    """Writes eval_matches/ and, where pictures are embedded, eval_cosines/.

    Args:
      config: `filters.eval_sets` (name -> folder or tar of pictures), `filters.max_hamming`,
        `filters.eval_false_positives` (0: no layer of cosines); `dataset`, `labels`, `clip`,
        `batch_size`.
      work: the engine; its work directory holds pairs/ and, for the cosines,
        embeddings/.
      shards: names of the shards to look at.

    Returns:
      The stages that were run; counts `SET:LAYER`, of all pairs, labelled or not.
    """
    filters, workdir = config.filters, work.workdir
    embedded = embed.is_on(config) and filters.eval_false_positives > 0
    parts = eval_sets.run(config, work, embedded)
    hashes = [workdir / f"eval_hashes/{part}.parquet" for part in parts]
    tasks = [engine.Task(shard, (workdir / f"pairs/{shard}.parquet", *hashes)) for shard in shards]
    settings = {"max_hamming": filters.max_hamming}
    matched = work.map_shards("eval_matches", _match, tasks, settings)
    if not embedded:
        return ["eval_matches"]
    embeddings = [workdir / f"eval_embeddings/{part}.npy" for part in parts]
    shards = [manifest["shard"] for manifest in matched]
    nearest.run(work, shards, hashes, embeddings, filters.eval_false_positives)
    return ["eval_matches", "eval_cosines"]


# ------------------------------------------------------------------------------------------- hashes


class HashIndex:
    """Finds the hashes within a few bits of others.

    With at most d bits different, at least one of d + 1 bands of the bits is equal (pigeonhole): so
    hashes that share a band with the query are compared, all of them, and nothing is missed.
    """

    def __init__(self, hashes: Int64[np.ndarray, " m"], max_distance: int):
        """
        Args:
          hashes: the bits of 64-bit hashes.
          max_distance: bits that may differ, 0 to 63.
        """
        self._hashes = np.asarray(hashes, np.int64)
        self._max_distance = max_distance
        edges = np.linspace(0, 64, max_distance + 2).astype(int)
        self._bands = list(itertools.pairwise(edges))
        orders = [np.argsort(_band(self._hashes, *band), kind="stable") for band in self._bands]
        self._sorted = [
            (order, _band(self._hashes[order], *band))
            for order, band in zip(orders, self._bands, strict=True)
        ]

    def near(
        self, queries: Int64[np.ndarray, " n"]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All pairs within the distance, in pieces of bounded size; a pair may come repeatedly.

        Yields:
          (positions in `queries`, positions in the index, uint8 distances).
        """
        queries = np.asarray(queries, np.int64)
        for band, (order, values) in zip(self._bands, self._sorted, strict=True):
            for query, position in equal_ranges(_band(queries, *band), values):
                found = order[position]
                distance = pictures.hamming(queries[query], self._hashes[found])
                close = distance <= self._max_distance
                yield query[close], found[close], distance[close]


def _band(hashes: np.ndarray, first: int, last: int) -> np.ndarray:
    """The bits [first, last) of int64 hashes, counted from the highest, as uint64."""
    bits = hashes.view(np.uint64) << np.uint64(first)
    return bits >> np.uint64(64 - (last - first))


def equal_ranges(
    queries: np.ndarray, values: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with queries[i] == values[j] for sorted values, a bounded number at a time.

    A single query that equals more values than that comes in one piece.
    """
    starts = np.searchsorted(values, queries, "left")
    lengths = np.searchsorted(values, queries, "right") - starts
    ends = np.cumsum(lengths)
    first = 0
    while first < len(queries):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _CANDIDATES, "right")))
        of = lengths[first:last]
        query = np.repeat(np.arange(first, last), of)
        within = np.arange(len(query)) - np.repeat(np.cumsum(of) - of, of)
        yield query, np.repeat(starts[first:last], of) + within
        first = last


class _Evaluation:
    """All pictures of all sets, ready to be looked up by their hashes."""

    def __init__(self, paths: Sequence[str], max_hamming: int):
        table = read_tables(paths, ["set", "name", "sha256", "phash"])
        self.sets, self.set_of = np.unique(table["set"].to_numpy(), return_inverse=True)
        self.names = table["name"]
        digests = _digests(table["sha256"])
        self.by_digest = np.argsort(digests, kind="stable")
        self.digests = digests[self.by_digest]
        self.with_hash = np.flatnonzero(table["phash"].is_valid().to_numpy())
        hashes = table["phash"].drop_null().to_numpy()
        # Blank pictures and copies share a hash: one of each set is enough.
        _, distinct = np.unique(
            np.stack([hashes, self.set_of[self.with_hash]]), axis=1, return_index=True
        )
        distinct = np.sort(distinct)
        self.with_hash = self.with_hash[distinct]
        self.index = HashIndex(hashes[distinct], max_hamming)


@engine.kept
def _evaluation(paths: Sequence[str], max_hamming: int) -> _Evaluation:
    return _Evaluation(paths, max_hamming)


def _digests(column) -> np.ndarray:
    """S32 [n] of hex digests. numpy pads with zeros what it cuts off, so that equal is equal."""
    return np.array([bytes.fromhex(digest) for digest in column.to_pylist()], "S32")


def _match(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    pairs_path, *paths = task.inputs
    known = _evaluation(paths, settings["max_hamming"])
    pairs = read_tables([pairs_path], ["key", "sha256", "phash"])
    best = _Nearest(len(known.sets))
    for row, position in equal_ranges(_digests(pairs["sha256"]), known.digests):
        found = known.by_digest[position]
        best.add(row, known.set_of[found], LAYERS.index("sha256"), np.zeros(len(row)), found)
    hashed = np.flatnonzero(pairs["phash"].is_valid().to_numpy())
    for row, position, distance in known.index.near(pairs["phash"].drop_null().to_numpy()):
        found = known.with_hash[position]
        best.add(hashed[row], known.set_of[found], LAYERS.index("phash"), distance, found)
    return _write_matches(task, outputs, best, pairs["key"], known.sets, known.names)


class _Nearest:
    """For each (row, set) the first layer, there the smallest distance, there the first picture."""

    def __init__(self, sets: int):
        self._sets = sets
        self.found = np.zeros((0, 5))  # row, set, layer, distance, position of the picture

    def add(
        self,
        row: np.ndarray,
        set_: np.ndarray,
        layer: int,
        distance: np.ndarray,
        position: np.ndarray,
    ) -> None:
        new = np.stack([row, set_, np.full(len(row), layer), distance, position], axis=1)
        # float64 holds row numbers exactly.
        found = np.concatenate([self.found, new.astype(np.float64)])
        found = found[np.lexsort(found.T[::-1])]
        _, first = np.unique(found[:, 0] * self._sets + found[:, 1], return_index=True)
        self.found = found[first]


def _write_matches(task, outputs, best: _Nearest, keys, sets, names) -> dict[str, int]:
    import pyarrow as pa

    row, set_, layer, distance, position = best.found.T
    row, set_, layer, position = (x.astype(np.int64) for x in (row, set_, layer, position))
    table = {
        "key": keys.take(pa.array(row)),
        "set": pa.array(list(sets[set_]), pa.string()),
        "layer": pa.array([LAYERS[i] for i in layer], pa.string()),
        "distance": pa.array(distance.astype(np.float32)),
        "name": names.take(pa.array(position)),
    }
    outputs.write_table(f"{outputs.stage}/{task.name}.parquet", pa.table(table))
    counts = {"pairs": len(keys)}
    for i, j in zip(set_, layer, strict=True):
        name = f"{sets[i]}:{LAYERS[j]}"
        counts[name] = counts.get(name, 0) + 1
    return counts


# ------------------------------------------------------------------------------------------- files


def read_tables(paths: Sequence[str | epath.Path], columns: Sequence[str]):
    """The rows of parquet files, one file after the other."""
    import pyarrow as pa

    tables = [engine.read_table(path, columns=list(columns)) for path in paths]
    return pa.concat_tables(tables).combine_chunks()
