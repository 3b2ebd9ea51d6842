"""A graph of neighbours (HNSW) over embeddings, by usearch: the extra ``search``.

A query of it takes a fraction of a millisecond, whatever the number of pictures; to make it takes
half an hour a million pictures on two cores.  Where queries are few, the bits of `index` do.
"""

import os
from typing import Any

import numpy as np
import tqdm
from absl import logging
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.inference import embeddings

FILE = "index.usearch"
_BLOCK = 10_000  # vectors added at a time


def load(folder: epath.Path, vectors: np.ndarray) -> Any:
    """The `usearch.index.Index` of a folder's vectors, memory-mapped; made where there is none.

    Raises BadInput: usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise BadInput(
            "usearch is not installed: pip install usearch, or leave out kind (the default index "
            "needs nothing)."
        ) from error
    path, made_of = folder / FILE, folder / embeddings.VECTORS
    if path.exists() and os.stat(path).st_mtime_ns >= os.stat(made_of).st_mtime_ns:
        graph = Index.restore(str(path), view=True)
        if graph is not None and (len(graph), graph.ndim) == vectors.shape:
            return graph
    logging.info("making the graph of %d vectors, once: %s", len(vectors), path)
    graph = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
    starts = range(0, len(vectors), _BLOCK)
    for start in tqdm.tqdm(starts, desc="graph", leave=False, delay=2, disable=None):
        block = np.asarray(vectors[start : start + _BLOCK])
        graph.add(np.arange(start, start + len(block)), block)
    with embeddings.appears(folder, FILE) as new:
        graph.save(new)
    return graph
