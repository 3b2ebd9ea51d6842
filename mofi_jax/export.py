"""Exports a model and proves that what was written reads back the same.

    python -m mofi_jax.export --model runs/quickstart/multitask --format hf --out exported

writes a folder that `transformers.CLIPModel.from_pretrained` and `mofi_jax.inference.load` open,
and in it result.json, the parity report: the largest and mean difference of L2-normalised
embeddings, for pictures and texts, between the model and each reader of the folder, in float32.
The readers are mofi_jax and, where torch and transformers are installed, transformers. A difference
above 1e-4 is a failure: the folder does not appear and the exit code is not 0.

It runs on one host, on its CPU: what is written and compared are whole arrays in float32, and the
accelerators of a pod would wait for all of their hosts.
"""

import contextlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.interop import huggingface
from mofi_jax.model import image as image_lib
from mofi_jax.model import mofi

MAX_ABS_DIFF = 1e-4
PICTURES = 8

# Texts around every edge of a tokenizer: none, one letter, other scripts, composed characters,
# spelt special tokens, longer than any context.
TEXTS = (
    "",
    "a",
    "a photo of a cat",
    "Ein schwarzer Großpudel, 2019",
    "富士山と桜",
    "e\u0301 ﬁ ½ 👩‍🔬",
    "<|endoftext|> <|startoftext|> </s>",
    "  spaces\tand\nlines  ",
    "a very long caption about a black dog in the snow " * 20,
)

# From pictures, uint8 [n, s, s, 3], and texts to {"image", "text"}: L2-normalised float32 [n, d].
Reader = Callable[[np.ndarray, tuple[str, ...]], dict[str, np.ndarray]]


class ParityError(RuntimeError):
    """What was written does not give the same embeddings."""


def main(model: str, out: str, format: str = "hf", step: str = "") -> None:
    """Exports the model folder `model` to the new folder `out`.

    Args:
      step: of a training run, a saved step or best (config.checkpoint.keep_best); else the last.

    Raises:
      BadInput: unknown format, `out` taken by something else, or a model that the format cannot
        express.
      ParityError: a reader differs by more than 1e-4.
    """
    if format != "hf":
        raise BadInput(f"--format={format} is unknown: choose hf (Hugging Face CLIPModel).")
    target = files.replaced_folder(out, "--out")
    if target.is_dir() and any(target.iterdir()) and not (target / huggingface.PREPROCESS).exists():
        raise BadInput(
            f"--out={out} holds something else than an export: name a folder that is new or empty."
        )
    jax.config.update("jax_platforms", "cpu")
    saved = inference.read(model, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = epath.Path(scratch) / "new", epath.Path(scratch) / "old"
        report = export(saved, new) | {"model": str(model)}
        files.write_json(new / "result.json", report)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
    logging.info(
        "wrote %s, read back by %s with a largest difference of %.1e",
        target,
        " and ".join(report["reader"]),
        report["max_abs_diff"],
    )


def export(saved: huggingface.Clip, folder: epath.PathLike) -> dict[str, Any]:
    """Writes the Hugging Face folder and compares; returns the parity report.

    Raises:
      BadInput: a model that CLIPModel cannot express.
      ParityError: a reader differs by more than `MAX_ABS_DIFF`.
    """
    huggingface.write(folder, saved)
    pictures = probe_pictures(saved.config.image_size)
    expected = _reader(saved)(pictures, TEXTS)
    readers: dict[str, Reader] = {"mofi_jax": _reader(huggingface.read(folder))}
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        readers["transformers"] = _transformers_reader(folder)
    differences = {
        name: _compare(reader(pictures, TEXTS), expected) for name, reader in readers.items()
    }
    largest = max(difference["max"] for d in differences.values() for difference in d.values())
    # This way round NaN fails too.
    if not largest <= MAX_ABS_DIFF:
        raise ParityError(
            f"The exported model differs by {largest:.1e} where {MAX_ABS_DIFF:.0e} is allowed: "
            f"{differences}."
        )
    return {
        "format": "hf",
        "reader": list(readers),
        "max_abs_diff": largest,
        "differences": differences,
        "asked": MAX_ABS_DIFF,
        "probes": {"image": len(pictures), "text": len(TEXTS)},
        "versions": _versions(),
        "tokenizer": saved.tokenizer.fingerprint,
        "vocab_size": saved.config.vocab_size,
    }


def _compare(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    return {
        kind: {
            "max": float(np.max(np.abs(actual[kind] - ours))),
            "mean": float(np.mean(np.abs(actual[kind] - ours))),
            "min_cosine": float(np.min(np.sum(ours * actual[kind], axis=-1))),
        }
        for kind, ours in expected.items()
    }


def probe_pictures(size: int) -> np.ndarray:
    """uint8 [PICTURES, size, size, 3]: flat colours, noise and smooth pictures, always the same."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (PICTURES - 4, size, size, 3))
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    smooth = [np.stack([y, x, 1 - y], -1), np.stack([y * x, np.sin(9 * y) ** 2, x], -1)]
    flat = [np.zeros((size, size, 3)), np.ones((size, size, 3))]
    return np.concatenate([noise, 255 * np.array(flat + smooth)]).astype(np.uint8)


def _reader(saved: huggingface.Clip) -> Reader:
    """The model's own functions in float32, also on accelerators that would round products."""
    config = mofi.MofiConfig.from_dict(
        saved.config.to_dict() | {"dtype": "float32", "remat": "none"}
    )
    towers = {name: saved.params[name] for name in ("image", "text")}

    def read(pictures: np.ndarray, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
        tokens = saved.tokenizer(list(texts))
        with jax.default_matmul_precision("highest"):
            image = jax.jit(mofi.embed_images, static_argnums=0)(config, towers, pictures)
            text = jax.jit(mofi.embed_texts, static_argnums=0)(config, towers, tokens)
        return {"image": np.asarray(image), "text": np.asarray(text)}

    return read


def _transformers_reader(folder: epath.PathLike) -> Reader:
    """transformers itself, which this project never requires."""
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))

    def unit(output: Any) -> np.ndarray:
        # transformers 5 returns an object, transformers 4 the tensor.
        vectors = getattr(output, "pooler_output", output)
        return torch.nn.functional.normalize(vectors, dim=-1).numpy()

    def read(pictures: np.ndarray, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
        mean, std = (np.float32(v) for v in (image_lib.PIXEL_MEAN, image_lib.PIXEL_STD))
        pixels = ((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        ids = tokenizer(list(texts), padding="max_length", truncation=True)["input_ids"]
        with torch.no_grad():
            image = model.get_image_features(pixel_values=pixels)
            text = model.get_text_features(input_ids=torch.tensor(ids))
        return {"image": unit(image), "text": unit(text)}

    return read


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("mofi_jax", "jax", "flax", "safetensors", "tokenizers", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


if __name__ == "__main__":
    cli.run(main)
