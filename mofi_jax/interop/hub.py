"""The export for the Hugging Face hub: the folder as its libraries open it."""

import functools
import io
import os
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mofi_jax.common import files
from mofi_jax.interop import huggingface, parity
from mofi_jax.model import mofi


def write(folder: epath.PathLike, clip: huggingface.Clip) -> None:
    """Writes the folder that transformers, sentence-transformers and `huggingface.read` open.

    Raises BadInput: what the format cannot express, see `huggingface.write`.
    """
    folder = epath.Path(folder)
    huggingface.write(folder, clip)
    if all(tower in clip.params for tower in mofi.TOWERS):
        for name, value in _sentence_transformers(clip.config).items():
            files.write_json(folder / name, value)


def _sentence_transformers(config: mofi.MofiConfig) -> dict[str, Any]:
    """Files that say how sentence-transformers runs the model; it guesses right without them.

    With them it normalises, and models that read their padding get as much of it as in training.
    """
    towers = {"text": "get_text_features", "image": "get_image_features"}
    module = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            kind: {"method": method, "method_output_name": "pooler_output"}
            for kind, method in towers.items()
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"padding": "max_length", "truncation": True}},
    }
    modules = (
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Normalize", "sentence_transformers.models.Normalize"),
    )
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": module,
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def readers(folder: epath.PathLike) -> dict[str, parity.Reader]:
    """Who opens the folder."""
    found = {
        "mofi_jax": functools.partial(_read_here, folder),
        "transformers": functools.partial(_read_by_transformers, folder),
    }
    if (epath.Path(folder) / "modules.json").exists():
        found["sentence_transformers"] = functools.partial(_read_by_sentence_transformers, folder)
    return found


def _read_here(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    return parity.embedder(huggingface.read(folder))(pictures, texts)


def _read_by_transformers(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """transformers itself, which this project never requires."""
    with parity.imports():
        import torch
        import transformers

    folder = os.fspath(folder)
    values = files.read_json_object(epath.Path(folder) / "config.json", huggingface.COPY_AGAIN)
    architecture = getattr(transformers, values["architectures"][0])
    model = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = {}

    def unit(output: Any) -> np.ndarray:
        # transformers 5 returns an object, transformers 4 the tensor.
        vectors = getattr(output, "pooler_output", output)
        return torch.nn.functional.normalize(vectors, dim=-1).numpy()

    with torch.no_grad():
        as_they_are = {"do_resize": False, "do_center_crop": False}
        pixels = processor(list(pictures), return_tensors="pt", **as_they_are)
        if hasattr(model, "get_image_features"):
            found["image"] = unit(model.get_image_features(**pixels))
        else:
            output = model(**pixels)  # SigLIP has no projection
            found["image"] = unit(getattr(output, "image_embeds", output))
        if hasattr(model, "get_text_features"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            ids = tokenizer(
                list(texts), padding="max_length", truncation=True, return_tensors="pt"
            )["input_ids"]
            found |= {"text": unit(model.get_text_features(input_ids=ids)), "tokens": ids.numpy()}
    opened = [Image.open(io.BytesIO(data)) for data in parity.picture_files()]
    return found | {"pixels": processor(opened, return_tensors="np")["pixel_values"]}


def _read_by_sentence_transformers(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    with parity.imports():
        import sentence_transformers

    model = sentence_transformers.SentenceTransformer(os.fspath(folder), device="cpu")
    as_they_are = {"image": {"do_resize": False, "do_center_crop": False}}
    opened = [Image.fromarray(picture) for picture in pictures]
    encode = functools.partial(model.encode, convert_to_numpy=True, show_progress_bar=False)
    return {
        "image": encode(opened, processing_kwargs=as_they_are),
        "text": encode(list(texts)),
    }
