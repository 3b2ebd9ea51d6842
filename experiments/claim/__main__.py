"""The paper's claim, measured: entities and captions together embed better than captions alone.

    python -m experiments.claim --config claim --out O
    python -m experiments.claim --config claim:photos=DIR,kb=KB,gpu --out O

Data sets are made of noisy pairs (`experiments.claim.data`), and on each a model is trained by one
loss or both, several seeds each, all with as many pictures (`experiments.claim.runs`).  Labels are
chosen once a data set, by the first seed of the contrastive run on its raw pairs; seeds differ in
the initial weights and in the order of the examples.  The parts:

    main       captions against entities against both, beside true and shuffled labels
    noise      the same where 0, 20, 40 and 60 % of the captions are another thing's
    ablations  loss weights, texts, margin and scale

or some runs of them, such as ``--parts clip,clip_i2e,supervised,multitask``.

Measured are retrieval by the GPR1200 protocol, query by query, of things trained on (`seen`) and of
others, k-NN, zero-shot by name, and the entity's place in the class table.  O gets

    runs.jsonl   a line for each run, once it is finished
    claim.md     the tables: means over seeds with 95 % intervals, and differences pair by pair
    claim.svg    the drawing of it, and claim.png
    result.json  the same figures

The same command goes on behind the last finished run, and prints the tables when there is none
left.  It may be started several times at once, as with `taskset -c 0` and `taskset -c 1` on two
cores: each process takes what no other has taken.  Flags such as
``--config.train.total="1000 steps"`` hold for all runs.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.claim import data, results, runs
from mofi_jax import inference, train
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import retrieval, suite
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.training import run_folder, settings

SETS = ("unseen", "seen")


def main(config: Any, out: str, parts: str = "main,noise,ablations", seeds: str = "") -> None:
    """Runs what is missing, one seed of every run after the other, and prints the tables.

    Args:
      out: folder of the results.
      parts: some of the parts, or names of runs.
      seeds: of each run; by default 0 to 4, of noise and ablations 0 to 2.
    """
    if not all(map(str.isdecimal, seeds.split(","))) and seeds:
        raise BadInput(f"--seeds={seeds}: write whole numbers with commas between them.")
    if unknown := {*parts.split(",")} - {*runs.PARTS, *results.SAYS}:
        choose = ", ".join((*runs.PARTS, *runs.MAIN))
        raise BadInput(f"--parts has {min(unknown)!r}: choose from {choose}.")
    if missing := {*SETS} - {*config.evaluators}:
        raise BadInput(f"config.evaluators has no {min(missing)!r}: see configs/claim.py.")
    settings.validate(config.train)
    out = files.absolute(files.output_folder(out, "--out"))
    Experiment(config, out, plan(parts.split(","), seeds)).run()


def plan(parts: list[str], seeds: str) -> list[tuple[str, int]]:
    """Names and seeds in the order in which they run: of a part, a seed after the other."""
    whole = {part: runs.PARTS[part] for part in parts if part in runs.PARTS}
    single = [name for name in parts if name not in whole]
    planned = []
    for names in (*whole.values(), single):
        for seed in map(int, seeds.split(",")) if seeds else range(5):
            planned += [(n, seed) for n in names if seeds or seed < 3 or n in runs.MAIN]
    return planned


class Experiment:
    """The runs of one folder."""

    def __init__(self, config: Any, out: epath.Path, planned: list[tuple[str, int]]):
        self.config, self.out, self.planned = config, out, planned
        self.runs = {name: run for part in runs.PARTS.values() for name, run in part.items()}
        self.data = data.DataSets(out / "data", config)
        self.mesh = meshes.make_mesh(**config.train.mesh)
        self.evaluators = config.evaluators.to_dict()
        self.classes = {
            name: picture_sets.read_set(self.evaluators[name]["images"]).classes for name in SETS
        }
        out.mkdir(parents=True, exist_ok=True)
        halves = data.halves(self.evaluators["unseen"]["images"], out / "data" / "halves")
        self.evaluators["knn_unseen"] = {"kind": "knn", "k": (1, 3, 5), **halves}

    def run(self) -> None:
        if (results.BASELINE, 0) not in self.lines():
            pixels = inference.RawPixels(self.config.train.model.image_size, self.mesh)
            self.write_line(results.BASELINE, 0, {}, pixels, None, {}, time.monotonic())
        for name, seed in self.planned:
            self.train(name, seed)
        print(results.write(self.out, self.lines(), self.classes))

    def train(self, name: str, seed: int) -> epath.Path:
        """The folder of a run, after training and measuring it if no process has or does.

        Of models that choose labels it stays, and another process's is waited for.
        """
        run, folder = self.runs[name], self.out / "trainings" / f"{name}-{seed}"
        chooses = run.data.startswith("raw") and seed == 0

        def done() -> bool:
            return (name, seed) in self.lines() and (not chooses or folder.exists())

        folder.parent.mkdir(exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if chooses else fcntl.LOCK_NB))
            except BlockingIOError:
                return folder
            if done():
                return folder
            start = time.monotonic()
            dataset = self.data.get(run.data, lambda: self.train(self.scorer(run), 0))
            programs = str(folder.parent / "programs")
            own = runs.config_of(run, self.config.train, seed, dataset, programs)
            settings.validate(own)
            train.main(own, str(folder))
            model = inference.load(folder, mesh=self.mesh)
            training = files.read_json(folder / "result.json", "delete its folder")
            labels = self.data.quality(dataset)
            self.write_line(name, seed, training, model.towers, model.params, labels, start)
            if not chooses:
                shutil.rmtree(folder)
        results.write(self.out, self.lines(), self.classes)
        return folder

    def scorer(self, run: runs.Run) -> str:
        """The run whose first seed chooses the labels of this one's data set."""
        raw = run.data.replace(run.data.partition("@")[0], "raw")
        return next(name for name, other in self.runs.items() if other.data == raw)

    def write_line(
        self,
        name: str,
        seed: int,
        training: Mapping[str, Any],
        towers: Any,
        params: Any,
        labels: Mapping[str, float],
        start: float,
    ) -> None:
        embedder = embedding.Embedder(towers, params)
        precision = {}
        for of in SETS:
            evaluator = retrieval.Evaluator(towers, images=self.evaluators[of]["images"])
            for own, found in zip(("", "_no_self"), evaluator.precisions(embedder), strict=True):
                # None where a query has nothing to find.
                precision[of + own] = [None if np.isnan(p) else round(float(p), 5) for p in found]
        others = {of: options for of, options in self.evaluators.items() if of not in SETS}
        scores = suite.run_all(suite.build_all(towers, others).evaluators, embedder)
        line = {
            "run": name,
            "seed": seed,
            "config": self.described(name, seed),
            "device": jax.devices()[0].device_kind,
            "labels": labels,
            "training": training,
            "precision": precision,
            "scores": {of: round(float(value), 5) for of, value in scores.items()},
            "seconds": round(time.monotonic() - start, 2),
        }
        # One write, which those of other processes cannot mix with; apart from one cut short.
        with open(self.out / "runs.jsonl", "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(line)}\n".encode())

    def described(self, name: str, seed: int) -> dict[str, Any]:
        """What a line must agree with to be this run."""
        config = run_folder.as_json(self.config)
        if name != results.BASELINE:
            own = runs.config_of(self.runs[name], self.config.train, seed, ("", ""), "")
            config["train"] = run_folder.as_json(own)
        return config

    def lines(self) -> dict[tuple[str, int], dict]:
        """The finished runs by name and seed; a line cut short, or of another config, is none."""
        path, lines = self.out / "runs.jsonl", {}
        for text in path.read_text().split("\n") if path.exists() else ():
            try:
                line = json.loads(text)
                key = line["run"], line["seed"]
            except (ValueError, TypeError, KeyError):
                continue
            known = key[0] in self.runs or key == (results.BASELINE, 0)
            if known and line["config"] == self.described(*key):
                lines[key] = line
        return lines


if __name__ == "__main__":
    cli.run(main)
