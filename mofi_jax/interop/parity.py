"""Does a folder that was written give the same embeddings, when others read it?

`report` asks each reader of an exported folder, ours and other people's, for the embeddings of the
same pictures and texts, and compares them with those of the model itself, in float32.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import Float32, UInt8

from mofi_jax.data import ops
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

# Height and width of picture files: margins of every remainder, enlarged, shrunk by odd factors.
SIZES = ((33, 47), (47, 33), (224, 224), (225, 300), (226, 301), (227, 302), (223, 299), (640, 481))

# From pictures, uint8 [n, s, s, 3], and texts to {"image", "text"}: L2-normalised float32 [n, d];
# no "text" from a model without text tower. A reader that has preprocessing of its own adds
# "tokens", its ids [n, t] of the texts, and "pixels", normalised float32 [m, 3, s, s], of
# `picture_files()`. One that cannot run here raises NotRun.
Reader = Callable[[np.ndarray, tuple[str, ...]], dict[str, np.ndarray]]


class NotRun(RuntimeError):
    """A reader cannot run on this machine; the message is the reason."""


class ParityError(RuntimeError):
    """What was written does not give the same embeddings."""


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the imports of a reader: one that fails, however it does, is a reason in NotRun."""
    try:
        yield
    except Exception as error:  # a library for another version of torch fails in many ways
        raise NotRun(f"cannot be imported: {error}") from error


def probe_pictures(size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """`PICTURES` pictures: flat colours, noise and smooth pictures, always the same."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (PICTURES - 4, size, size, 3))
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    smooth = [np.stack([y, x, 1 - y], -1), np.stack([y * x, np.sin(9 * y) ** 2, x], -1)]
    flat = [np.zeros((size, size, 3)), np.ones((size, size, 3))]
    return np.concatenate([noise, 255 * np.array(flat + smooth)]).astype(np.uint8)


def picture_files(sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[bytes, ...]:
    """PNG files, a size (height, width) each: something smooth with edges and fine grain in it."""
    rng = np.random.default_rng(1)
    files = []
    for height, width in sizes:
        small = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
        picture[height // 3 : height // 2, width // 4 : width // 3] = rng.integers(0, 256, 3)
        picture = np.clip(picture + rng.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
        files.append(cv2.imencode(".png", picture)[1].tobytes())
    return tuple(files)


def normalised(
    pictures: UInt8[np.ndarray, "n s s 3"], config: mofi.MofiConfig
) -> Float32[np.ndarray, "n 3 s s"]:
    """The pixels of pictures as other people's models take them."""
    mean, std = (np.float32(v) for v in image_lib.pixel_statistics(config.family))
    pixels = ((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels)


def _bytes(pixels: np.ndarray, config: mofi.MofiConfig) -> UInt8[np.ndarray, "n s s 3"]:
    """What `normalised` was made from."""
    zero, one = (
        normalised(np.full((1, 1, 1, 3), value, np.uint8), config)[0] for value in (0, 255)
    )
    values = np.rint((np.asarray(pixels) - zero) / (one - zero) * 255)
    return np.clip(values, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def embedder(clip: huggingface.Clip) -> Reader:
    """The model's own functions in float32, also on accelerators that would round products."""
    config = dataclasses.replace(clip.config, dtype="float32", remat="none")
    embed = {"image": mofi.embed_images, "text": mofi.embed_texts}

    def run(tower: str, inputs: np.ndarray) -> np.ndarray:
        # Alone, since jax copies what it is given, and one tower may be most of the memory.
        params = {tower: clip.params[tower]}
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(embed[tower], static_argnums=0)(config, params, inputs))

    def read(pictures: np.ndarray, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
        found = {"image": run("image", pictures)}
        if texts and "text" in clip.params:
            tokens = clip.tokenizer(list(texts))
            found |= {"tokens": tokens, "text": run("text", tokens)}
        return found

    return read


def report(
    clip: huggingface.Clip, readers: Mapping[str, Reader], *, keep: bool = True
) -> dict[str, Any]:
    """The differences of all readers from a model.

    Args:
      keep: False takes the text tower out of `clip.params` once it has been run, so that readers
        of a large model find room beside the rest.

    Raises ParityError: one of the embeddings differs by more than `MAX_ABS_DIFF`.
    """
    config = clip.config
    pictures = probe_pictures(config.image_size)
    model = embedder(clip)
    expected = model(pictures, TEXTS)
    if not keep:
        clip.params.pop("text", None)
    decode = functools.partial(ops.decode_to, config.image_size, clip.preprocess)
    ours = np.stack([decode(data) for data in picture_files()])
    values: dict[str, Any] = {"differences": {}, "tokens": {}, "pixels": {}, "not_run": {}}
    for name, reader in readers.items():
        try:
            theirs = reader(pictures, TEXTS)
        except NotRun as reason:
            values["not_run"][name] = str(reason)
            continue
        values["differences"][name] = {
            kind: _difference(theirs[kind], expected[kind])
            for kind in ("image", "text")
            if kind in expected and kind in theirs
        }
        if "tokens" in theirs and "tokens" in expected:
            values["tokens"][name] = _token_difference(
                theirs["tokens"], expected["tokens"], config.eos_id
            )
        if "pixels" in theirs:
            pixels = _bytes(theirs["pixels"], config)
            off = np.abs(pixels.astype(int) - ours)
            cosines = np.sum(model(pixels, ())["image"] * model(ours, ())["image"], -1)
            values["pixels"][name] = {
                "sizes": len(ours),
                "max": int(off.max()),
                "mean": float(off.mean()),
                "min_cosine": float(cosines.min()),
            }
    largest = max(d["max"] for reader in values["differences"].values() for d in reader.values())
    # This way round NaN fails too.
    if not largest <= MAX_ABS_DIFF:
        raise ParityError(
            f"The exported model differs by {largest:.1e} where {MAX_ABS_DIFF:.0e} is allowed: "
            f"{values['differences']}."
        )
    return values | {
        "reader": list(values["differences"]),
        "max_abs_diff": largest,
        "asked": MAX_ABS_DIFF,
        "probes": {"image": len(pictures), "text": len(TEXTS) if "text" in expected else 0},
        "versions": _versions(),
    }


def _difference(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    return {
        "max": float(np.max(np.abs(theirs - ours))),
        "mean": float(np.mean(np.abs(theirs - ours))),
        "min_cosine": float(np.min(np.sum(ours * theirs, axis=-1))),
    }


def _token_difference(theirs: np.ndarray, ours: np.ndarray, eos_id: int) -> dict[str, int]:
    """Texts whose ids differ up to the end of text, after which paddings may be others."""

    def read(row: np.ndarray) -> list[int]:
        row = list(map(int, row))
        return row[: row.index(eos_id) + 1] if eos_id in row else row

    differing = sum(read(a) != read(b) for a, b in zip(theirs, ours, strict=True))
    return {"texts": len(ours), "differing": differing}


def _versions() -> dict[str, str]:
    versions = {}
    for name in (
        *("mofi_jax", "jax", "flax", "safetensors", "tokenizers", "torch", "transformers"),
        *("sentence-transformers", "open_clip_torch", "timm", "onnx", "onnxruntime"),
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
