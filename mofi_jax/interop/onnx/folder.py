"""The folder of an ONNX export: graphs, and the files by which transformers.js opens them."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

import mofi_jax
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity, stablehlo
from mofi_jax.interop.folder import processor, weights
from mofi_jax.interop.onnx import graph
from mofi_jax.model import mofi

EXPORTER = Path(sys.prefix) / "onnx_exporter"  # where REQUIREMENTS are installed
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ROOT = Path(mofi_jax.__file__).parents[1]

# Files of protocol buffers end at 2 GiB; some bytes are left for the graph itself.
LARGEST = 2**31 - 2**25

_CARD = """---
library_name: transformers.js
tags:
- onnx
- mofi
- image-feature-extraction
---
# Embeddings trained with mofi_jax, as ONNX

```js
import {{ AutoProcessor, AutoTokenizer, {classes}, RawImage }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained(FOLDER);
const vision = await {vision_class}.from_pretrained(FOLDER, {{ dtype: "fp32" }});
const {{ {image} }} = await vision(await processor(await RawImage.read("cat.jpg")));
{use}```

| graph | input | output |
|---|---|---|
| `onnx/vision_model.onnx` | `pixel_values` float32 [b, 3, {c.image_size}, {c.image_size}], \
normalised | `{image}` float32 [b, {c.embed_dim}] |
{row}
The vectors have length 1, unlike those of PyTorch's CLIP, so that a product is a cosine. Opset
{opset}; batches of any size; float32, weights inside. `result.json` holds the largest difference
from the model itself, by onnxruntime.
"""

_TEXT = """
const tokenizer = await AutoTokenizer.from_pretrained(FOLDER);
const words = await {text_class}.from_pretrained(FOLDER, {{ dtype: "fp32" }});
const tokens = tokenizer(["a photo of a cat"], {{ padding: {padding}, truncation: true }});
const {{ {text} }} = await words(tokens);
"""
_ROW = """| `onnx/text_model.onnx` | `input_ids` int64 [b, {length}] | \
`{text}` float32 [b, {c.embed_dim}] |
"""


def write(folder: epath.PathLike, clip: huggingface.Clip) -> None:
    """Writes the graphs, and the Hugging Face folder without its weights.

    Raises BadInput: jax2onnx is not installed, a tower above 2 GiB, or what `huggingface.write`
      refuses.
    """
    folder, config = epath.Path(folder), clip.config
    if not (EXPORTER / "jax2onnx").is_dir():
        raise BadInput(
            "The ONNX export runs jax2onnx from a folder of its own: run `python -m pip install "
            f"--no-deps --target {EXPORTER} -r {REQUIREMENTS}`."
        )
    towers = [name for name in mofi.TOWERS if name in clip.params]
    for name in towers:
        size = 4 * sum(leaf.size for leaf in jax.tree.leaves(clip.params[name]))
        if size > LARGEST:
            raise BadInput(
                f"The {name} tower has {size / 2**30:.1f} GiB, and an ONNX file with its weights "
                "ends at 2: export this model with --format=hf."
            )
    huggingface.write(folder, clip)
    _start("write", folder)
    (folder / weights.WEIGHTS).unlink()
    (folder / "README.md").write_text(_card(config, towers))


def transformers_js(config: mofi.MofiConfig) -> dict[str, Any]:
    """By which names transformers.js has the towers, their outputs, and padding of texts."""
    siglip = config.family == "siglip"
    return {
        "vision_class": "SiglipVisionModel" if siglip else "CLIPVisionModelWithProjection",
        "text_class": "SiglipTextModel" if siglip else "CLIPTextModelWithProjection",
        "image": graph.output("image", config.family),
        "text": graph.output("text", config.family),
        # SigLIP's texts pool where their padding ends; CLIP's need none but for one another.
        "padding": "max_length" if siglip else True,
    }


def _card(config: mofi.MofiConfig, towers: list[str]) -> str:
    names = transformers_js(config) | {"c": config, "opset": graph.OPSET, "use": "", "row": ""}
    names["classes"] = names["vision_class"]
    if "text" in towers:
        names["classes"] += f", {names['text_class']}"
        names["padding"] = json.dumps(names["padding"])
        names["length"] = stablehlo.text_shape(config)[1]
        names |= {"use": _TEXT.format(**names), "row": _ROW.format(**names)}
    return _CARD.format(**names)


def _start(*arguments: os.PathLike | str) -> None:
    """Runs `graph` where its packages are, in a process of its own."""
    paths = [str(EXPORTER), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", graph.__name__, *map(os.fspath, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    # Whatever goes well, jax2onnx prints tracebacks about packages that it could have used.
    if done.returncode:
        raise RuntimeError(f"{graph.__name__} failed:\n{done.stderr[-5000:]}")


def readers(folder: epath.PathLike) -> dict[str, parity.Reader]:
    """Who opens the folder."""
    return {"onnxruntime": functools.partial(_read, epath.Path(folder))}


def _read(
    folder: epath.Path, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Pixels by the mean and deviation of the preprocessor's own file, ids of the tokenizer's."""
    remedy = "export the model again"
    pixels = files.read_json_object(folder / processor.PREPROCESSOR, remedy)
    mean, std = (np.float32(pixels[key]) for key in ("image_mean", "image_std"))
    values = (pictures.astype(np.float32) / 255 - mean) / std
    inputs = {"image": np.ascontiguousarray(values.transpose(0, 3, 1, 2))}
    if (folder / "onnx" / graph.GRAPHS["text"]).exists():
        length = files.read_json_object(folder / "tokenizer_config.json", remedy)[
            "model_max_length"
        ]
        tokenizer = tokenizer_lib.Tokenizer(folder / records.TOKENIZER_FILE, length)
        inputs["text"] = tokenizer(list(texts)).astype(np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = (epath.Path(scratch) / name for name in ("in.npz", "out.npz"))
        np.savez(source, **inputs)
        _start("run", folder, source, target)
        found = dict(np.load(target))
    return found | ({"tokens": inputs["text"]} if "text" in inputs else {})
