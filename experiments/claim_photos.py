"""The paper's claim, measured: entities and captions together embed better than captions alone.

    python -m experiments.claim_photos --out O \\
        --config configs/claim.py:data=DIR,seen=SET,unseen=SET

Trains on one set of I2E shards (DIR holds i2e/, as `data_prep.build_i2e` writes it), with as many
steps and several seeds each,

    contrastive_raw  pictures against their captions, by CLIP's loss, which sees no label
    contrastive_i2e  pictures against captions and entity texts, which knows who shares an entity
    supervised       the entity softmax
    multitask        both

and measures retrieval by the GPR1200 protocol on two picture sets, of things trained on and of
others.  ``--pairs DIR`` takes the raw pairs from DIR/i2t (``dataset=i2t``), that is all of them and
not those alone that got a label.  O gets

    runs.jsonl   a line for each run, once it is finished: average precision of every query
    claim.md     the tables: means over seeds, and differences with 95 % intervals
    result.json  the same figures

The same command goes on behind the last finished run, and prints the tables when there is none
left.  Intervals are a bootstrap over the classes of a picture set and over the seeds at once, of
the differences by query of two runs of one seed.  All trainings share this process and its compiled
programs.  Flags such as ``--config.total="1000 steps"`` and ``--config.data.workers=12`` hold for
all of them.
"""

import copy
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from mofi_jax import inference, train
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import retrieval
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.training import run_folder, settings

RUNS = {
    "contrastive_raw": ("contrastive",),
    "contrastive_i2e": ("contrastive",),
    "supervised": ("entity",),
    "multitask": ("entity", "contrastive"),
}
BASELINE = "raw_pixels"
COMPARED = (
    ("multitask", "contrastive_raw"),  # the claim
    ("supervised", "contrastive_raw"),
    ("contrastive_i2e", "contrastive_raw"),
    ("multitask", "contrastive_i2e"),
    ("multitask", "supervised"),
)
SETS = ("unseen", "seen")
METRICS = tuple(f"{name}{own}" for name in SETS for own in ("_no_self", ""))
DRAWS = 10_000


def main(
    config: Any,
    out: str,
    pairs: str = "",
    runs: str = ",".join(RUNS),
    seeds: str = "0,1,2,3,4",
    trainings: str = "",
) -> None:
    """Runs what is missing, one seed of every run after the other, and prints the tables.

    Args:
      out: folder of the results.
      pairs: folder that holds i2t/, where the raw pairs are not those of the I2E shards.
      runs: some of the runs. Processes with other runs or seeds may share `out` and one device; the
        tables are of those of one command, so that in the end one with all of them tells all.
      seeds: of each run.
      trainings: folder of the trainings, each removed once it is measured; in `out` by default.
    """
    if not all(map(str.isdecimal, seeds.split(","))):
        raise BadInput(f"--seeds={seeds}: write whole numbers with commas between them.")
    if unknown := set(runs.split(",")) - set(RUNS):
        raise BadInput(f"--runs has {min(unknown)!r}: choose from {', '.join(RUNS)}.")
    if missing := set(SETS) - set(config.evaluators):
        raise BadInput(f"config.evaluators has no {min(missing)!r}: see configs/claim.py.")
    out = files.output_folder(out, "--out")
    work = files.output_folder(trainings or out / "trainings", "--trainings")
    planned = {
        (name, seed): of_run(config, name, seed, pairs, str(files.absolute(work / "programs")))
        for seed in map(int, seeds.split(","))
        for name in runs.split(",")
    }
    for own in planned.values():
        settings.validate(own)
    # What every line must agree with to be one of these runs.
    wanted = {key: run_folder.as_json(own) for key, own in planned.items()}
    wanted[BASELINE, 0] = run_folder.as_json(config.evaluators)
    classes = {name: picture_sets.read_set(config.evaluators[name].images).classes for name in SETS}
    mesh = meshes.make_mesh(**config.mesh)
    pixels = inference.RawPixels(config.model.image_size, mesh)

    out.mkdir(parents=True, exist_ok=True)
    lines = read_lines(out / "runs.jsonl", wanted)
    for (name, seed), described in wanted.items():
        if (name, seed) in lines:
            continue
        folder, start = work / f"{name}-{seed}", time.monotonic()
        if name == BASELINE:
            training, towers, params = None, pixels, None
        else:
            train.main(planned[name, seed], str(folder))
            training = files.read_json(folder / "result.json", "delete its folder")
            model = inference.load(folder, mesh=mesh)
            towers, params = model.towers, model.params
        line = {
            "run": name,
            "seed": seed,
            "config": described,
            "device": jax.devices()[0].device_kind,
            "training": training,
            "precision": measure(embedding.Embedder(towers, params), config.evaluators),
            "seconds": round(time.monotonic() - start, 2),
        }
        # One write, which those of other processes cannot mix with; apart from one cut short.
        with open(out / "runs.jsonl", "ab", buffering=0) as file:
            file.write(f"\n{json.dumps(line)}\n".encode())
        lines[name, seed] = line
        shutil.rmtree(folder, ignore_errors=True)
        write_results(out, lines, classes)
    print(write_results(out, lines, classes))


def of_run(config: Any, name: str, seed: int, pairs: str, programs: str) -> Any:
    """The config of one run, of `config`, which has both losses."""
    own = copy.deepcopy(config)
    with own.unlocked():
        own.seed, own.compile_cache = seed, programs
        own.losses = {task: config.losses[task].to_dict() for task in RUNS[name]}
        if len(own.losses) == 1:
            own.losses[RUNS[name][0]].weight = 1.0
        if name == "contrastive_raw":
            own.data.text_sources = {"alt_text": 1.0}
            if pairs:
                own.data.dir, own.data.name = pairs, "i2t"
            else:  # without pairs of its own this would be told by labels
                own.losses.contrastive.same_entity = "off"
    return own


def measure(embedder: embedding.Embedder, evaluators: Any) -> dict[str, list[float | None]]:
    """Average precision of every query by metric; None where it has nothing to find."""
    found = {}
    for name in SETS:
        evaluator = retrieval.Evaluator(embedder.towers, images=evaluators[name].images)
        for own, precision in zip(("", "_no_self"), evaluator.precisions(embedder), strict=True):
            shown = [None if np.isnan(p) else round(float(p), 5) for p in precision]
            found[name + own] = shown
    return found


def read_lines(path: epath.Path, wanted: Mapping[Any, Any]) -> dict[tuple[str, int], dict]:
    """The finished runs among those wanted, by name and seed; a line cut short is none."""
    lines = {}
    for text in path.read_text().split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            key = line["run"], line["seed"]
        except (ValueError, TypeError, KeyError):
            continue
        if key in wanted and line["config"] == wanted[key]:
            lines[key] = line
    return lines


def bootstrap(
    differences: Float[np.ndarray, "s q"], classes: Int[np.ndarray, " q"]
) -> tuple[float, float, float]:
    """Mean of the differences of seeds and queries, and its 95 % interval.

    Seeds and classes are drawn with replacement, each as often as there are of them; the queries of
    a class stay together, because they find one another.  NaN is no query, and a class without any
    is none.  `classes` ascend.
    """
    firsts = np.unique(classes, return_index=True)[1]
    valid = np.isfinite(differences)
    totals = np.add.reduceat(np.where(valid, differences, 0.0), firsts, axis=1)
    counts = np.add.reduceat(valid.astype(float), firsts, axis=1)
    totals, counts = totals[:, counts.any(0)], counts[:, counts.any(0)]
    rng = np.random.default_rng(0)
    seeds, drawn = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in totals.shape)
    means = (seeds @ totals * drawn).sum(1) / (seeds @ counts * drawn).sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(totals.sum() / counts.sum()), float(low), float(high)


def write_results(
    out: epath.Path, lines: Mapping[tuple[str, int], dict], classes: Mapping[str, np.ndarray]
) -> str:
    """Writes claim.md and result.json of the runs there are; returns the tables."""

    def precision(name: str, metric: str, seeds: Sequence[int]) -> Float[np.ndarray, "s q"]:
        return np.array([lines[name, seed]["precision"][metric] for seed in seeds], np.float64)

    finished = {
        name: [seed for of, seed in lines if of == name]
        for name in (BASELINE, *RUNS)
        if any(of == name for of, _ in lines)
    }
    scores = {
        name: {m: np.nanmean(precision(name, m, seeds), axis=1).tolist() for m in METRICS}
        for name, seeds in finished.items()
    }
    differences = {}
    for more, less in COMPARED:
        seeds = [seed for seed in finished.get(more, ()) if (less, seed) in lines]
        if seeds:
            differences[f"{more} - {less}"] = {
                m: bootstrap(
                    precision(more, m, seeds) - precision(less, m, seeds),
                    classes[m.removesuffix("_no_self")],
                )
                for m in METRICS
            }
    files.write_json(
        out / "result.json",
        {
            "devices": sorted({line["device"] for line in lines.values()}),
            "seeds": finished,
            "scores": scores,
            "differences": differences,
        },
    )
    heads = [m.replace("_no_self", " without self") for m in METRICS]
    rows = [["mAP, mean and standard deviation over seeds", "seeds", *heads]]
    for name, of in scores.items():
        values = [f"{np.mean(of[m]):.4f} ± {np.std(of[m]):.4f}" for m in METRICS]
        rows.append([name, str(len(finished[name])), *values])
    table = markdown(rows)
    if differences:
        rows = [["difference [95 % interval]", *heads]]
        for name, of in differences.items():
            values = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*of[m]) for m in METRICS]
            rows.append([name, *values])
        table += "\n\n" + markdown(rows)
    files.write_text(out / "claim.md", table + "\n")
    return table


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


if __name__ == "__main__":
    cli.run(main)
