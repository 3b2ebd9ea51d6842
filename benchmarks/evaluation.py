"""Exactness, speed and memory of the evaluation suite.

    python -m benchmarks.evaluation [--quick] [--only SECTION]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold.  What is compared in speed runs in turns in this one process, so that a busy
machine slows both: ratios are medians over these turns.  --quick takes smaller sets and towers.
"""

import argparse
import functools
import io
import pathlib
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from scipy import stats
from sklearn import linear_model

from benchmarks import figures, step_case
from mofi_jax import inference
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import linear_probe, retrieval
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.model import mofi

DIM = 512
CLASSES, SIZE = 1200, 10  # of GPR1200
BLOCK = 1024  # queries of one bare product


class Given:
    """An embedder whose features are given, for each number of pictures."""

    def __init__(self, features: np.ndarray, mesh: jax.sharding.Mesh, *more: np.ndarray):
        self.features = embedding.Features.of(features, mesh)
        sets = [self.features, *(embedding.Features.of(rows, mesh) for rows in more)]
        self.sets = {len(rows): rows for rows in sets}

    def pictures(self, pictures: Any) -> embedding.Features:
        return self.sets[len(pictures)]


def unit(rng: np.random.Generator, rows: int, dim: int = DIM) -> np.ndarray:
    features = rng.standard_normal((rows, dim), np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def structured(rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
    """Around a centre for each class; one row in fifty is a copy of another."""
    features = unit(rng, len(classes)) + 0.35 * unit(rng, classes.max() + 1)[classes]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    copies = rng.choice(len(classes), len(classes) // 25, replace=False)
    features[copies[::2]] = features[copies[1::2]]
    return features


def gpr1200(mesh: jax.sharding.Mesh, classes: int) -> retrieval.Evaluator:
    """The evaluator of so many classes; of their pictures there are but the names."""
    with tempfile.TemporaryDirectory() as folder:
        path = names_alone(folder, "set", np.arange(classes * SIZE) // SIZE)
        return retrieval.Evaluator(inference.RawPixels(8, mesh), images=path)


def names_alone(folder: str, name: str, classes: np.ndarray) -> pathlib.Path:
    """A picture set of empty files."""
    path = pathlib.Path(folder) / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(classes):
            tar.addfile(tarfile.TarInfo(f"{label}_{number}.jpg"), io.BytesIO())
    return path


def in_turns(first: Callable[[], Any], second: Callable[[], Any], turns: int) -> float:
    """Median over the turns of the first's seconds over the second's; one turn is not counted."""
    ratios = [seconds(first) / seconds(second) for _ in range(turns + 1)]
    return statistics.median(ratios[1:])


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device() -> str:
    return jax.devices()[0].device_kind


def extra_memory(run: Callable[[], Any]) -> float:
    """MB by which the resident memory of this process grows at its highest."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here on
    before = _memory("VmRSS")
    run()
    return (_memory("VmHWM") - before) / 1e6


def _memory(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) << 10


# ---------------------------------------------------------------------------- sections


def exactness(report: figures.Report, mesh: jax.sharding.Mesh, quick: bool) -> None:
    """GPR1200's mAP, with the query in the index and without, by its definition in float64."""
    rng = np.random.default_rng(0)
    evaluator = gpr1200(mesh, 120 if quick else CLASSES)
    classes = evaluator.pictures.classes
    kinds = {"random": unit(rng, len(classes)), "structured": structured(rng, classes)}
    for kind, features in kinds.items():
        scores = dict(evaluator.run(Given(features, mesh)))
        expected = np.mean([*precisions(features, classes)], axis=0)
        for name, value in zip(("map", "map_no_self"), expected, strict=True):
            bar = f"{name} of {len(classes):,} {kind} features against its definition in NumPy"
            report.add(bar, abs(float(scores[name]) - value), "", device(), "<= 1e-6")
            if kind == "random" and not quick:
                known = {"map": 0.102, "map_no_self": 0.0015}[name]
                asked = {"map": "<= 0.001", "map_no_self": "<= 0.0001"}[name]  # the last digit
                bar = f"{name} of random features against the known {known}"
                report.add(bar, abs(float(scores[name]) - known), "", device(), asked)


def precisions(features: np.ndarray, classes: np.ndarray) -> Iterator[tuple[float, float]]:
    """AP of every query from ranks among all sorted scores, and among all but its own."""
    # Scores of equal rows are one score.
    distinct, number = np.unique(features.astype(np.float64), axis=0, return_inverse=True)
    places = np.arange(1, SIZE + 1)
    for query, row in enumerate(features.astype(np.float64)):
        scores = (distinct @ row)[number]
        same = classes == classes[query]
        with_self = np.sort(stats.rankdata(-scores)[same])
        others = np.arange(len(classes)) != query
        without = np.sort(stats.rankdata(-scores[others])[same[others]])
        yield np.mean(places / with_self), np.mean(places[:-1] / without)


def memory(report: figures.Report, mesh: jax.sharding.Mesh, quick: bool) -> None:
    """Resident memory beside the features."""
    rng = np.random.default_rng(1)
    evaluator = gpr1200(mesh, CLASSES)
    given = Given(unit(rng, CLASSES * SIZE), mesh)
    found = extra_memory(lambda: dict(evaluator.run(given)))
    bar = f"extra memory of GPR1200's scores, {CLASSES * SIZE:,} x {DIM}"
    report.add(bar, found, "MB", device(), "<= 300")
    queries = unit(rng, 1000, 256)
    for rows in (100_000, 250_000) if quick else (250_000, 1_000_000):
        index = embedding.Features.of(unit(rng, rows, 256), mesh)
        relevant = rng.integers(0, rows, (len(queries), 5))

        def run(index: embedding.Features = index, relevant: np.ndarray = relevant) -> None:
            neighbours.top_k(queries, index, 100)
            neighbours.ranks(queries, index, relevant)

        run()  # until then the index itself is still on its way
        found = extra_memory(run)
        bar = f"extra memory of 1,000 queries, top 100 and ranks, index {rows:,} x 256"
        report.add(bar, found, "MB", device(), "<= 300")


def speed(report: figures.Report, mesh: jax.sharding.Mesh, quick: bool) -> None:
    """GPR1200's scores over the product alone; the 1,000 nearest of a larger index over its."""
    rng, turns = np.random.default_rng(2), 3 if quick else 7
    features = unit(rng, CLASSES * SIZE)
    evaluator, given = gpr1200(mesh, CLASSES), Given(features, mesh)

    def product(queries: np.ndarray, index: np.ndarray) -> None:
        for start in range(0, len(queries), BLOCK):
            queries[start : start + BLOCK] @ index.T

    ratio = in_turns(lambda: dict(evaluator.run(given)), lambda: product(features, features), turns)
    bar = f"GPR1200's scores over NumPy's bare product, {CLASSES * SIZE:,} x {DIM}"
    report.add(bar, ratio, "ratio", device(), "<= 1.2")
    ratio = in_turns(
        lambda: neighbours.top_k(given.features, given.features, 100),
        lambda: product(features, features),
        turns,
    )
    report.add("100 nearest of each over the same product", ratio, "ratio", device())


def in_the_loop(report: figures.Report, mesh: jax.sharding.Mesh, quick: bool) -> None:
    """What GPR1200's scores add to the time that its pictures take to embed."""
    rng = np.random.default_rng(3)
    number = (4 if quick else 16) * mesh.size
    dtype = "float32" if device() == "cpu" else "bfloat16"
    config = step_case.model_config(step_case.Case("B/16", "supervised", number, 1, dtype=dtype))
    create = functools.partial(mofi.create, config, towers=("image",))
    shapes = jax.eval_shape(create, jax.random.key(0))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), shapes)
    towers = inference.Towers(config, None, None, "none", mesh, batch_size=number)
    params, pictures = towers.put(params), np.zeros((number, 224, 224, 3), np.uint8)
    towers.embed_images(params, pictures)  # compiles
    embedded = seconds(lambda: towers.embed_images(params, pictures)) / number * CLASSES * SIZE
    evaluator, given = gpr1200(mesh, CLASSES), Given(unit(rng, CLASSES * SIZE), mesh)
    dict(evaluator.run(given))
    share = seconds(lambda: dict(evaluator.run(given))) / embedded
    bar = f"GPR1200's scores over embedding its pictures, B/16, {number} of them timed"
    report.add(bar, 100 * share, "%", device(), "<= 5")


def probe(report: figures.Report, mesh: jax.sharding.Mesh, quick: bool) -> None:
    """CLIP's linear probe with its search for C and the last fit, and scikit-learn for that C.

    scikit-learn at its own tolerance, as in CLIP's example, stops before its optimum on features of
    length 1, so that its time is that and its accuracy that of a much smaller tolerance.
    """
    rng = np.random.default_rng(4)
    rows, tested, dim, classes = (5000, 2001, 128, 20) if quick else (50_000, 10_000, DIM, 100)
    # A spectrum that falls as that of embeddings does, and a common mean.
    spectrum = np.arange(1, dim + 1) ** -0.5
    centres = 0.2 * rng.standard_normal((classes, dim))
    labels = [np.sort(rng.integers(0, classes, size)) for size in (rows, tested)]
    sets = []
    for own in labels:
        features = (centres[own] + rng.standard_normal((len(own), dim)) + 0.5) * spectrum
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        sets.append(features.astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        paths = [names_alone(folder, f"set{i}", own) for i, own in enumerate(labels)]
        evaluator = linear_probe.Evaluator(
            inference.RawPixels(8, mesh), train=paths[0], images=paths[1]
        )
    given, scores = Given(sets[0], mesh, sets[1]), {}
    ours = seconds(lambda: scores.update(evaluator.run(given)))
    model = linear_model.LogisticRegression(C=scores["clip_lbfgs_C"], max_iter=1000)
    theirs = seconds(lambda: model.fit(sets[0], labels[0]))
    size = f"{rows:,} x {dim}, {classes} classes"
    bar = f"linear probe, {size}: the whole search for C over scikit-learn's one"
    report.add(bar, ours / theirs, "ratio", device(), "<= 2")
    for name, tolerance in (("its own", None), ("the tolerance 1e-7", 1e-7)):
        if tolerance:
            model.set_params(tol=tolerance, max_iter=10_000).fit(sets[0], labels[0])
        difference = 100 * abs(scores["clip_lbfgs_top1"] - model.score(sets[1], labels[1]))
        bar = f"its accuracy and that of scikit-learn at {name}: the difference"
        report.add(bar, difference, "points", device(), "<= 0.1" if tolerance else None)


# A section is a function of the report, the mesh, and whether it is to be quick.
SECTIONS = {
    "memory": memory,  # first: what others leave behind is in no peak
    "exactness": exactness,
    "speed": speed,
    "in_the_loop": in_the_loop,
    "probe": probe,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    options = parser.parse_args()
    report, mesh = figures.Report(), meshes.make_mesh()
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            section(report, mesh, options.quick)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
