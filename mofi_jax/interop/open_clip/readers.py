"""Who opens an open_clip folder."""

import functools
import io
import os

import numpy as np
from etils import epath
from PIL import Image

from mofi_jax.interop import parity
from mofi_jax.interop.open_clip import folder as folder_lib
from mofi_jax.interop.open_clip.config import TIMM_EPSILON


def readers(folder: epath.PathLike) -> dict[str, parity.Reader]:
    """Who opens the folder."""
    return {
        "mofi_jax": functools.partial(_read_here, folder),
        "open_clip": functools.partial(_read_by_open_clip, folder),
        "timm": functools.partial(_read_by_timm, folder),
    }


def _read_here(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    return parity.embedder(folder_lib.read(folder))(pictures, texts)


def _read_by_open_clip(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Its tokenizer cleans texts before it reads them (HTML, Unicode, spaces), as ours does not:
    embeddings are those of the texts as they are, and the tokens those of the cleaned ones."""
    with parity.imports():
        import open_clip
        import torch

    name = f"local-dir:{os.fspath(folder)}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    tokens = tokenizer(list(texts))
    tokenizer.clean_fn = str
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
        image = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(list(texts)), normalize=True)
    opened = [preprocess(Image.open(io.BytesIO(data))) for data in parity.picture_files()]
    return {
        "image": image.numpy(),
        "text": text.numpy(),
        "tokens": tokens.numpy(),
        "pixels": torch.stack(opened).numpy(),
    }


def _read_by_timm(
    folder: epath.PathLike, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    with parity.imports():
        import timm
        import torch

    if not (epath.Path(folder) / "config.json").exists():
        raise parity.NotRun(f"its CLIP towers have a layer_norm_eps of {TIMM_EPSILON} alone")
    model = timm.create_model(f"local-dir:{os.fspath(folder)}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
        image = torch.nn.functional.normalize(model(pixels), dim=-1).numpy()
    opened = [transform(Image.open(io.BytesIO(data))) for data in parity.picture_files()]
    return {"image": image, "pixels": torch.stack(opened).numpy()}
