"""Embedding a collection, beside the bare model, and searching in one, beside comparing all."""

import collections
import io
import json
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from benchmarks import figures, input_pipeline
from mofi_jax import inference
from mofi_jax.data.pictures import containers
from mofi_jax.distributed import meshes
from mofi_jax.inference import embeddings, piecework
from mofi_jax.inference.index import Index
from mofi_jax.model import mofi

DIM, CLUSTER = 256, 50  # pictures of one thing


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device() -> str:
    return jax.devices()[0].device_kind


# ----------------------------------------------------------------------------------------- embed


def embed(report: figures.Report, quick: bool) -> None:
    """From a tar to the finished files, beside decoding and the jitted model alone.

    Both decode by as many threads, one batch or more ahead of the devices, and take the same
    batches.  On CPUs the tower is a small one, so that what is measured is not the tower alone.
    """
    on_cpu = device() == "cpu"
    size, turns = (128, 2) if quick else (512, 3) if on_cpu else (8192, 5)
    shape = dict(mofi.VARIANTS["B/16"])
    if on_cpu:
        shape |= {"image": mofi.TowerConfig(width=192, layers=6, heads=3)}
    config = mofi.MofiConfig(
        **{"image_size": 224, "vocab_size": 1000, "context_length": 16, "eos_id": 999},
        **{"dtype": "float32" if on_cpu else "bfloat16"} | shape,
    )
    params = mofi.create(config, jax.random.key(0), towers=("image",))
    batch = 64 * jax.local_device_count()
    spec = "decode|resize_short(224)|center_crop(224)"
    towers = inference.Towers(config, None, None, spec, meshes.make_mesh(), batch_size=batch)
    model = inference.Model(towers, towers.put(params), "random")
    jpegs = input_pipeline.pictures(input_pipeline.SAMPLE, 512)
    jpegs = [jpegs[i % len(jpegs)] for i in range(size)]

    def bare() -> None:
        def batches() -> Iterator[np.ndarray]:
            starts = range(0, size, batch)
            jobs = [pool.submit(towers.decode, jpeg) for jpeg in jpegs[: 2 * batch]]
            for start in starts:
                jobs += [
                    pool.submit(towers.decode, of) for of in jpegs[start + 2 * batch :][:batch]
                ]
                ready, jobs = jobs[:batch], jobs[batch:]
                yield np.stack([job.result() for job in ready])

        with futures.ThreadPoolExecutor(piecework.THREADS) as pool:
            for _ in towers.embed_image_batches(model.params, batches()):
                pass

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        with tarfile.open(folder / "pictures.tar", "w") as tar:
            for i, jpeg in enumerate(jpegs):
                member = tarfile.TarInfo(f"{i:06d}.jpg")
                member.size = len(jpeg)
                tar.addfile(member, io.BytesIO(jpeg))

        def whole() -> None:
            out = epath.Path(tempfile.mkdtemp(dir=folder))
            found = containers.find(folder / "pictures.tar", collections.Counter())
            embeddings.write_listing(out, found, batch, {"passed_over": {}})
            pieces = embeddings.Pieces(out)
            work = piecework.Work(model, containers.Reader(folder), pieces, 0)
            work.run(range(len(pieces)))
            assert pieces.assemble()["pictures"] == size

        bare(), whole()  # compiles
        ratios = []
        for _ in range(turns):  # in this order a load that grows slows both
            first, ours, again, last = (seconds(run) for run in (bare, whole, whole, bare))
            ratios.append((first + last) / (ours + again))
        rate = size / seconds(whole)
    bar = f"embed, {size} pictures of a tar: speed over that of decoding and the bare model"
    report.add(bar, statistics.median(ratios), "ratio", device(), ">= 0.95")
    report.add("pictures embedded", rate, "img/s", device())


# ---------------------------------------------------------------------------------------- search


def search(report: figures.Report, quick: bool) -> None:
    """Vectors as models give them: clusters, a spectrum that falls, a common mean.

    Queries lie near pictures, off by half their standard deviation along each axis.
    """
    size, turns = (200_000, 11) if quick else (1_000_000, 41)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        vectors = write_vectors(folder, size)
        index = Index.open(folder)
        rng = np.random.default_rng(1)
        queries = np.array(vectors[np.sort(rng.integers(0, size, 200))])
        queries += 0.5 * queries.std(0) * rng.standard_normal(queries.shape, np.float32)
        made = seconds(lambda: index.search(queries[:1], 10))
        of = f"{size:,} x {DIM}"
        report.add(f"index of {of}, made at the first search", made, "s", device(), "<= 10")
        for k in (10, 24):
            exact, _ = index.search(queries, k, exact=True)
            found, _ = index.search(queries, k)
            pairs = zip(found.tolist(), exact.tolist(), strict=True)
            recall = statistics.mean(len({*a} & {*b}) / k for a, b in pairs)
            asked = ">= 0.995" if k == 10 else None
            report.add(f"recall@{k} of exact search, {of}", recall, "", device(), asked)

        def compare_all(query: np.ndarray) -> None:
            cosines = vectors @ query
            np.argpartition(-cosines, 10)[:10]

        ours, ratios = [], []
        for query in queries[:turns]:
            # The threads of NumPy's product spin for a while after it, on others' cores.
            time.sleep(0.1)
            ours.append(seconds(lambda query=query: index.search(query[None], 10)))
            ratios.append(ours[-1] / seconds(lambda query=query: compare_all(query)))
        bar = f"a query over NumPy's exact float32 search, {of}"
        report.add(bar, statistics.median(ratios), "ratio", device(), "<= 0.15")
        report.add(f"a query, {of}", 1e3 * statistics.median(ours), "ms", device())
        bits = os.path.getsize(folder / "index.npy") / 1e6
        report.add(f"index.npy of {of}", bits, "MB", device())


def write_vectors(folder: pathlib.Path, size: int) -> np.ndarray:
    """A folder of embeddings without pictures; returns its vectors, memory-mapped."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((size // CLUSTER, DIM), np.float32)
    path = folder / embeddings.VECTORS
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (size, DIM))
    for start in range(0, size, 50_000):
        rows = centres[rng.integers(0, len(centres), min(50_000, size - start))]
        rows = rows + 0.7 * rng.standard_normal(rows.shape, np.float32) + np.float32(0.5)
        rows *= np.arange(1, DIM + 1, dtype=np.float32) ** -0.5
        vectors[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    vectors.flush()
    keys = pa.table({"key": np.arange(size).astype(str)})
    pq.write_table(keys, folder / embeddings.PICTURES)
    (folder / embeddings.RESULT).write_text(json.dumps({"images": str(folder)}))
    return np.load(path, mmap_mode="r")
