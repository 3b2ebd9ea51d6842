"""Measures finished models: a table, protocols, and a page with what they find.

    mofi evaluate --config eval:sample --model W
    mofi evaluate --config eval:sample --models W CLIP raw_pixels --out D

A model is a training run, a Hugging Face CLIP folder, exported or anybody's, or ``raw_pixels``, the
baseline that compares pictures by their pixels.  On several hosts, start it on all of them with the
flags of `mofi_jax.train`.  D (by default W/evaluation) receives

    result.json  {"models": [{"model", "metrics": {evaluator: {metric: value}},
                  "intervals": {evaluator: {metric: [low, high]}},  # 95 %, where there are queries
                  "protocols": {evaluator: card}, "left_out": {evaluator: reason},
                  "undecodable": {picture set: [name]}, "seconds"}],
                  "versions"}
    results.md   metrics by models, intervals, the best of each row in bold
    index.html   the same; queries with neighbours, worst queries, confused classes, maps; protocols
"""

from mofi_jax.common import console

if __name__ == "__main__":
    console.begin("evaluation: loading jax")

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common import versions as version_numbers
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts, meshes
from mofi_jax.evaluators import suite as evaluation
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.pages import page, table
from mofi_jax.interop import from_hub

RAW_PIXELS = "raw_pixels"
# What decides pixels, features and scores beside this code.
_LIBRARIES = ("jax", "jaxlib", "numpy", "opencv-python-headless", "pillow")


def main(
    config: ml_collections.ConfigDict,
    model: str = "",
    out: str | None = None,
    models: Sequence[str] = (),
    step: str = "",
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> None:
    """Evaluates models by `config` and writes to the folder `out`.

    Args:
      model: a training run, a Hugging Face CLIP folder or raw_pixels.
      models: several of them, in one table.
      out: the folder of the results; by default evaluation/ in that of the only model.
      step: of training runs, a saved step or best (config.checkpoint.keep_best); else the last.
      coordinator, processes, process: HOST:PORT of process 0, how many there are, and which one
        this is, counted from 0; left out where jax finds them by itself.
    """
    models = [*([model] if model else []), *models]
    places = {name if files.is_remote(name) else os.path.realpath(name) for name in models}
    if not models or len(places) < len(models):
        raise BadInput(
            f"--models names {'no model' if not models else 'a model twice'}: write --models A B, "
            "each a training run, a Hugging Face CLIP folder or raw_pixels."
        )
    default = f"runs/evaluation/{RAW_PIXELS}" if models[0] == RAW_PIXELS else None
    if len(models) > 1 and not out:
        raise BadInput("--out is missing: several models need a folder for their table.")
    for name in models:
        if not from_hub.is_address(name):
            files.input_folder(name, "--model")
        elif not out:
            raise BadInput("--out is missing: a model of the hub needs a folder for its table.")
    out = files.output_folder(out or default or f"{models[0]}/evaluation", "--out", bucket=True)
    # It saves nothing that a signal should wait for.
    jax.config.update("jax_enable_preemption_service", False)
    # A config of one's own needs none of what concerns several hosts.
    distributed, timeout = config.get("distributed", False), config.get("start_timeout", 300)
    hosts.start(distributed, coordinator, processes, process, timeout)
    mesh = meshes.make_mesh(**config.get("mesh", {}))
    for name in models:
        if name == RAW_PIXELS and config.preprocess:
            raise BadInput(
                "config.preprocess does not apply to raw_pixels: set config.raw_pixels_size."
            )
        if name != RAW_PIXELS:
            inference.kind(name)  # a mistyped name is told before the first model is measured

    # ---------------------------------------------------------------------- models
    measured: list[dict[str, Any]] = []
    shown: dict[tuple[str, ...], page.Shown] = {}
    for name in models:
        start = time.monotonic()
        logging.info("model %d of %d: %s", len(measured) + 1, len(models), name)
        console.now("opening the model and the evaluation sets")
        if name == RAW_PIXELS:
            towers = inference.RawPixels(config.raw_pixels_size, mesh)
            params, description = {}, "raw pixels"
        else:
            batch = config.batch_size * mesh.size
            loaded = inference.load(name, mesh=mesh, batch_size=batch, step=step)
            towers, params, description = loaded.towers, loaded.params, loaded.description
            if config.preprocess:
                towers = dataclasses.replace(towers, preprocess=config.preprocess)
        suite = build(towers, config, name)
        embedder = embedding.Embedder(towers, params, config.batch_size)
        result = measure(suite, embedder)
        for evaluator, of in suite.evaluators.items():
            if not hasattr(of, "search"):
                continue
            search = of.search(evaluator)
            # Several evaluators may look within one set.
            alone = search.classes is not None
            key = (str(search.index.path),) if alone else (evaluator, "")
            seen = shown.setdefault(key, page.Shown(search, {}))
            if description not in seen.looks:
                seen.looks[description] = page.look(seen.search, *of.features(embedder))
        console.close()
        result["seconds"] = round(time.monotonic() - start, 1)
        measured.append({"model": description, **result})

    # ---------------------------------------------------------------------- results
    if jax.process_index() != 0:
        return
    result = {"models": measured, "versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "result.json", result)
    files.write_text(out / "results.md", table.markdown(measured) + "\n")
    files.write_text(out / "index.html", page.render(result, list(shown.values())))
    print("\n".join([table.text(measured), *table.notes(measured)]), flush=True)
    logging.info("written: %s", out)


def build(towers: Any, config: ml_collections.ConfigDict, model: str) -> evaluation.Suite:
    """The evaluators of a config that apply to a model; BadInput where none does."""
    suite = hosts.all_or_none(lambda: evaluation.build_all(towers, config.evaluators.to_dict()))
    if not suite.evaluators:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in suite.skipped.items())
        raise BadInput(f"No evaluator of --config applies to {model} ({reasons}): use another one.")
    return suite


def measure(suite: evaluation.Suite, embedder: embedding.Embedder) -> dict[str, Any]:
    """The entry of a model in result.json, without its name and time."""
    metrics: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name, evaluator in suite.evaluators.items():
        start = time.monotonic()
        console.now(f"evaluator {name}")
        for key, value in evaluation.run_all({name: evaluator}, embedder).items():
            metric = key.removeprefix(f"{name}/")
            metrics.setdefault(name, {})[metric] = float(value)
            if hasattr(value, "interval"):
                intervals.setdefault(name, {})[metric] = value.interval()
        logging.info("evaluator %s: %.1f s", name, time.monotonic() - start)
    return {
        "metrics": metrics,
        "intervals": intervals,
        "protocols": {name: of.card() for name, of in suite.evaluators.items()},
        "left_out": suite.skipped,
        "undecodable": embedder.undecodable(),
    }


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return version_numbers.of(*_LIBRARIES) | {"device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    cli.run(main)
