"""Sections of `benchmarks.interop`: the import, and names of entities out of millions."""

import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

import mofi_jax
from benchmarks import figures, step_case
from mofi_jax.data import records
from mofi_jax.distributed import sharding
from mofi_jax.interop import huggingface
from mofi_jax.interop.folder import weights
from mofi_jax.model import mofi

DIM = 512
K = 10
BLOCK = 100_000  # rows


def imports(report: figures.Report, quick: bool) -> None:
    """`import mofi_jax` in new processes, the best of several."""
    command = [sys.executable, "-X", "importtime", "-c", "import mofi_jax"]
    found = []
    for _ in range(3 if quick else 10):
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found.append(int(re.search(r"(\d+) \| mofi_jax$", told, re.M)[1]) / 1e6)
    report.add("import mofi_jax", min(found), "s", figures.CPU, "<= 0.2")


def naming(report: figures.Report, quick: bool) -> None:
    """`Model.name_entities` of one picture with an export of so many entities on this machine."""
    entities = 200_000 if quick else 2_000_000
    device = jax.devices()[0].device_kind
    picture = np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8)
    with tempfile.TemporaryDirectory(prefix="naming-") as scratch:
        folder = epath.Path(scratch)
        write(folder, entities)
        os.sync()  # gigabytes on their way to the disk would be measured too
        before = anonymous_memory()
        took, model = seconds(lambda: mofi_jax.load(folder))
        report.add(f"load an export of {entities:,} entities x {DIM}", took, "s", device)
        held = (anonymous_memory() - before) / 1e6
        report.add("memory it takes, with the weights of a ViT-S/16", held, "MB", device)
        took, _ = seconds(lambda: model.name_entities(picture, K))
        report.add("name_entities, the first time: the tower is compiled", took, "s", device)
        embedding = model.embed_images(picture)
        turns = range(3 if quick else 7)
        runs = {
            "name_entities of one picture": lambda: model.name_entities(picture, K),
            "of it the tower, ViT-S/16 at 224 pixels": lambda: model.embed_images(picture),
        }
        for name, run in runs.items():
            took = statistics.median(seconds(run)[0] for _ in turns)
            asked = "<= 0.5" if name.startswith("name") else None
            report.add(f"{name}, {entities:,} entities", took, "s", device, asked)
        named = [int(entity.qid[1:]) for entity in model.name_entities(picture, K)[0]]
        wrong = sum(a != b for a, b in zip(named, brute_force(entities, embedding[0]), strict=True))
        bar = f"of its {K} entities others than those of brute force in float64"
        report.add(bar, wrong, "", device, "<= 0")


def write(folder: epath.Path, entities: int) -> None:
    """An export with random weights, of an image tower alone."""
    config = step_case.model_config(step_case.Case("S/16", "supervised", 1, 1, dtype="float32"))
    config = mofi.MofiConfig.from_dict(config.to_dict() | {"embed_dim": DIM})
    create = functools.partial(mofi.create, config, towers=("image",))
    params = jax.tree.map(np.asarray, jax.jit(create)(jax.random.key(0)))
    spec = "decode|resize_short(224)|center_crop(224)"
    huggingface.write(folder, huggingface.Clip(config, params, None, None, spec))
    table = weights.Rows((entities, DIM), table_blocks(entities))
    weights.save(folder / huggingface.ENTITY_TABLE_FILE, {sharding.ENTITY_TABLE: table})
    vocabulary = records.Entities(
        [f"Q{i:08d}" for i in range(entities)],
        [f"entity number {i}" for i in range(entities)],
        [f"one thing out of {entities:,}, found in place {i % 77_777}" for i in range(entities)],
        np.full(entities, 5),
    )
    records.write_entities(folder / records.ENTITIES_FILE, vocabulary)


def table_blocks(entities: int) -> Iterator[np.ndarray]:
    for start in range(0, entities, BLOCK):
        rng = np.random.default_rng(start)
        yield rng.standard_normal((min(BLOCK, entities - start), DIM), np.float32)


def brute_force(entities: int, embedding: np.ndarray) -> list[int]:
    """The nearest of the rows that were written, each compared in float64."""
    cosines = []
    for rows in table_blocks(entities):
        rows = rows.astype(np.float64)
        cosines.append(rows @ embedding.astype(np.float64) / np.linalg.norm(rows, axis=1))
    return np.argsort(-np.concatenate(cosines), kind="stable")[:K].tolist()


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def anonymous_memory() -> int:
    """Resident bytes of this process that are no mapped file's."""
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) << 10
