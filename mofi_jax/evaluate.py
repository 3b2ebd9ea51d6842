"""Measures a finished model: one table, result.json with protocol cards, pictures of neighbours.

    python -m mofi_jax.evaluate --config configs/eval.py:sample --model W [--out D]

W is a training run, an exported Hugging Face folder, or ``raw_pixels``, the baseline that compares
pictures by their pixels.  On several hosts, start it on all of them with the flags of
`mofi_jax.train`.  D (by default W/evaluation) receives

    gallery_NAME.png  queries and neighbours, for every retrieval evaluator
    result.json       {"model", "metrics": {evaluator: {metric: value}},
                       "protocols": {evaluator: card}, "left_out": {evaluator: reason}, "seconds"}
"""

import dataclasses
import time
from collections.abc import Mapping

import jax
import ml_collections
from absl import logging

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts, meshes
from mofi_jax.evaluators import retrieval
from mofi_jax.evaluators import suite as evaluation
from mofi_jax.evaluators.features import embedding

RAW_PIXELS = "raw_pixels"


def main(
    config: ml_collections.ConfigDict,
    model: str,
    out: str | None = None,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> None:
    """Evaluates `model` by `config` and writes to the folder `out`.

    Args:
      coordinator, processes, process: HOST:PORT of process 0, how many there are, and which one
        this is, counted from 0; left out where jax finds them by itself.
    """
    start = time.monotonic()
    default = f"runs/evaluation/{RAW_PIXELS}" if model == RAW_PIXELS else f"{model}/evaluation"
    files.input_folder(model, "--model")
    out = files.output_folder(out or default, "--out", bucket=True)
    # It saves nothing that a signal should wait for.
    jax.config.update("jax_enable_preemption_service", False)
    # A config of one's own needs none of what concerns several hosts.
    distributed, timeout = config.get("distributed", False), config.get("start_timeout", 300)
    hosts.start(distributed, coordinator, processes, process, timeout)
    mesh = meshes.make_mesh(**config.get("mesh", {}))

    # ---------------------------------------------------------------------- model
    if model == RAW_PIXELS:
        if config.preprocess:
            raise BadInput(
                "config.preprocess does not apply to raw_pixels: set config.raw_pixels_size."
            )
        towers = inference.RawPixels(config.raw_pixels_size, mesh)
        params, description = {}, "raw pixels"
    else:
        loaded = inference.load(model, mesh=mesh, batch_size=config.batch_size * mesh.size)
        towers, params, description = loaded.towers, loaded.params, loaded.description
        if config.preprocess:
            towers = dataclasses.replace(towers, preprocess=config.preprocess)

    # ---------------------------------------------------------------------- evaluators
    suite = hosts.all_or_none(lambda: evaluation.build_all(towers, config.evaluators.to_dict()))
    if not suite.evaluators:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in suite.skipped.items())
        raise BadInput(f"No evaluator of --config applies to {model} ({reasons}): use another one.")
    embedder = embedding.Embedder(towers, params, config.batch_size)
    scores = evaluation.run_all(suite.evaluators, embedder)

    # ---------------------------------------------------------------------- results
    for name, evaluator in suite.evaluators.items():
        if isinstance(evaluator, retrieval.Evaluator):
            evaluator.gallery(embedder, out / f"gallery_{name}.png")
    if jax.process_index() != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, _, metric = key.partition("/")
        metrics.setdefault(name, {})[metric] = value
    files.write_json(
        out / "result.json",
        {
            "model": description,
            "metrics": metrics,
            "protocols": {name: e.card() for name, e in suite.evaluators.items()},
            "left_out": suite.skipped,
            "seconds": round(time.monotonic() - start, 1),
        },
    )
    print(table(description, metrics, suite.skipped), flush=True)
    logging.info("written: %s", out)


def table(
    title: str, metrics: Mapping[str, Mapping[str, float]], left_out: Mapping[str, str]
) -> str:
    """The numbers for people: a line per evaluator and metric, four decimals."""
    rows = [
        (name, metric, f"{value:.4f}")
        for name, values in metrics.items()
        for metric, value in values.items()
    ]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title, "-" * max(len(title), sum(wide) + 4)]
    previous = ""
    for name, metric, value in rows:
        shown = name if name != previous else ""
        lines.append(f"{shown:<{wide[0]}}  {metric:<{wide[1]}}  {value:>{wide[2]}}")
        previous = name
    lines += [f"{name}: left out, {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
