"""Exports a model and proves that what was written reads back the same.

    mofi export --model runs/quickstart/multitask --format hf --out exported
    mofi export --model RUN --step best --format onnx --out exported

writes a folder that others open, and in it result.json, the parity report: the largest and mean
difference of L2-normalised embeddings, for pictures and texts, between the model and each reader of
the folder, in float32; with readers that have preprocessing of their own, the texts whose tokens
differ and the difference of pixels, and what that does to cosines. The readers are mofi_jax and
other people's where they are installed; of the others it says why they were `not_run`. An embedding
that differs by more than 1e-4 is a failure: the folder does not appear and the exit code is not 0.

| --format | who opens it |
|---|---|
| hf | transformers (`CLIPModel.from_pretrained`), sentence-transformers, `inference.load` |
| open_clip | open_clip (`local-dir:FOLDER`), timm its image tower, `inference.load` |
| onnx | onnxruntime, transformers.js (`onnx/vision_model.onnx`, `onnx/text_model.onnx`) |
| stablehlo | jax alone (`jax.export.deserialize`), on CPUs, GPUs and TPUs |
| web | a browser: a page with the ONNX export in it, for any server of static files |

It runs on one host, on its CPU: what is written and compared are whole arrays in float32, and the
accelerators of a pod would wait for all of their hosts.
"""

from mofi_jax.common import console

if __name__ == "__main__":
    console.begin("export: loading jax")

import os
import signal
import tempfile
from typing import Any

import jax
from absl import logging
from etils import epath

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.interop import hub, huggingface, model_card, onnx, open_clip, parity, stablehlo
from mofi_jax.interop.onnx import web

# A format: `write(folder, clip)`, and `readers(folder)`, who opens it, by name.
FORMATS = {"hf": hub, "open_clip": open_clip, "onnx": onnx, "stablehlo": stablehlo, "web": web}


def main(
    model: str,
    out: str,
    format: str = "hf",
    step: str = "",
    license: str = "",
    data_card: str = "",
) -> None:
    """Exports the model folder `model` to the new folder `out`.

    Args:
      model: a training run, or a Hugging Face CLIP folder.
      out: the new folder.
      format: hf, open_clip, onnx, stablehlo or web.
      step: of a training run, a saved step or best (config.checkpoint.keep_best); else the last.
      license: of the model, by the hub's short names, as apache-2.0; for the model card.
      data_card: of what it was trained on, as OWNER/NAME on the hub or an address; for the card.

    Raises:
      BadInput: unknown format, `out` taken by something else, or a model that the format cannot
        express.
      ParityError: a reader differs by more than 1e-4.
    """
    if format not in FORMATS:
        raise BadInput(f"--format={format} is unknown: choose from {', '.join(FORMATS)}.")
    origin = model_card.Origin(license, data_card, _scores(model, step))
    target = target_folder(out)
    jax.config.update("jax_platforms", "cpu")
    console.now("reading the model")
    saved = inference.read(model, step, by_rows=True)
    # Its name: where it lies on this machine is nobody's business.
    write(saved, target, format, {"model": epath.Path(model).name or str(model)}, origin)


def target_folder(out: str) -> epath.Path:
    """The folder of an export; BadInput where something else lies there."""
    target = files.replaced_folder(out, "--out")
    if target.is_dir() and any(target.iterdir()) and not _is_export(target):
        raise BadInput(
            f"--out={out} holds something else than an export: name a folder that is new or empty."
        )
    return target


def write(
    saved: huggingface.Clip,
    target: epath.Path,
    format: str,
    source: dict[str, Any],
    origin: model_card.Origin | None = None,
) -> None:
    """Exports to a folder, which appears, in place of an older export, once it has been compared.

    The model is used up: see `keep` of `parity.report`.

    Args:
      target: by `target_folder`.
      source: what result.json says of where the model is from.
      origin: what the model card says of it.

    Raises BadInput, ParityError: as `export`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = epath.Path(scratch) / "new", epath.Path(scratch) / "old"
        report = export(saved, new, format, keep=False) | source
        card = new / "README.md"
        if card.exists():
            text = model_card.complete(card.read_text(), origin or model_card.Origin(), report)
            card.write_text(text)
        files.write_json(new / "result.json", report)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
    console.close()
    logging.info(
        "wrote %s, read back by %s with a largest difference of %.1e",
        target,
        " and ".join(report["reader"]),
        report["max_abs_diff"],
    )


def _scores(model: str, step: str) -> dict[str, Any]:
    """What `mofi_jax.evaluate` has measured of a model, in MODEL/evaluation, if it has."""
    path = epath.Path(model) / "evaluation" / "result.json"
    if files.is_remote(path) or not path.exists():
        return {}
    remedy = "evaluate the model again, or move the folder away"
    measured = files.read_json_object(path, remedy).get("models", [])
    # `evaluate` names a model as it was named there: by another path to the same folder, perhaps.
    of_step = f", step {step}" if step else ""
    name = f"{epath.Path(model).name}{of_step}"
    return next((m for m in measured if epath.Path(m["model"]).name == name), {})


def _is_export(folder: epath.Path) -> bool:
    """Whether `main` wrote the folder: result.json is its report."""
    if not (folder / "result.json").exists():
        return False
    remedy = "name a folder that is new or empty"
    return "max_abs_diff" in files.read_json_object(folder / "result.json", remedy)


def export(
    saved: huggingface.Clip, folder: epath.PathLike, format: str = "hf", *, keep: bool = True
) -> dict[str, Any]:
    """Writes the folder and compares; returns the parity report. `keep` is as for `parity.report`.

    Raises:
      BadInput: a model that the format cannot express.
      ParityError: a reader differs by more than `parity.MAX_ABS_DIFF`.
    """
    console.now(f"writing {format}")
    FORMATS[format].write(epath.Path(folder), saved)
    console.now("comparing what its readers make of it")
    report = parity.report(saved, FORMATS[format].readers(folder), keep=keep)
    return report | {
        "format": format,
        "tokenizer": saved.tokenizer and saved.tokenizer.fingerprint,
        "vocab_size": saved.config.vocab_size,
    }


if __name__ == "__main__":
    # What is half written goes away when a scheduler stops the process, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The bars of other people's readers, each of which loads the model.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    cli.run(main)
