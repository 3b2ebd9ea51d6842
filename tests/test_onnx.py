"""ONNX graphs, as onnxruntime and transformers.js find them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_prep.dataset import files as dataset_files
from mofi_jax import export
from mofi_jax.common import errors
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity
from mofi_jax.interop.onnx import folder as folder_lib
from mofi_jax.model import mofi

installed = pytest.mark.skipif(
    not (folder_lib.EXPORTER / "jax2onnx").is_dir(),
    reason="jax2onnx is not in its folder: make .venv/.onnx_exporter",
)

# What a user without this project does.
ALONE = """
import json, sys
import numpy as np, onnx, onnxruntime

def names(values):
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    }

found = {}
inputs = np.load("inputs.npz")
for path in sys.argv[1:]:
    model = onnx.load(path, load_external_data=False)
    session = onnxruntime.InferenceSession(path)
    kind = session.get_inputs()[0].name
    for name in inputs:
        if name.startswith(kind):
            np.save(f"{name}.npy", session.run(None, {kind: inputs[name]})[0])
    found[path] = {
        "inputs": names(model.graph.input),
        "outputs": names(model.graph.output),
        "opsets": {opset.domain: opset.version for opset in model.opset_import},
        "outside": sum(len(array.external_data) for array in model.graph.initializer),
        "operators": sorted({node.op_type for node in model.graph.node}),
    }
json.dump(found, open("found.json", "w"))
assert not any(name.startswith(("mofi_jax", "jax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Deep enough for a loop over the layers of one tower."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "dogs in the snow"] * 3, 280, path)
    tokenizer = tokenizer_lib.Tokenizer(path, 12)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(16, 5, 2),
        text=mofi.TowerConfig(24, 1, 2),
        vocab_size=tokenizer.vocab_size,
        context_length=12,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
    )
    return huggingface.Clip(config, params(config), tokenizer, None, "decode|resize(16)")


def params(config):
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)


@installed
def test_opens_with_onnxruntime_alone(clip, tmp_path):
    report = export.export(clip, tmp_path, "onnx")
    assert report["reader"] == ["onnxruntime"]
    assert report["max_abs_diff"] <= 1e-5
    assert report["tokens"]["onnxruntime"]["differing"] == 0
    names = {str(path.relative_to(tmp_path)) for path in Path(tmp_path).rglob("*.*")}
    graphs = ["onnx/text_model.onnx", "onnx/vision_model.onnx"]
    assert names == {
        *graphs,
        *("config.json", "preprocess.json", "preprocessor_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    assert "{" not in (tmp_path / "README.md").read_text().replace("{ ", "")

    pictures = parity.probe_pictures(16)[1:]
    texts = ("a", "dogs in the snow", "", *"abcd")
    tokens = clip.tokenizer(list(texts)).astype(np.int64)
    inputs = {
        "pixel_values-2": parity.normalised(pictures[:2], clip.config),
        "pixel_values-7": parity.normalised(pictures, clip.config),
        "input_ids-7": tokens,
        # Texts need no padding: what follows the end of a text cannot reach it.
        "input_ids-1": tokens[:1, :3],
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    subprocess.run(
        [sys.executable, "-c", ALONE, *graphs],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": str(folder_lib.EXPORTER)},
    )
    expected = parity.embedder(clip)(pictures, texts)
    for name in inputs:
        kind, _, count = name.partition("-")
        ours = expected["image" if kind == "pixel_values" else "text"][: int(count)]
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), ours, rtol=0, atol=1e-5)

    found = json.loads((tmp_path / "found.json").read_text())
    text, vision = (found[graph] for graph in graphs)
    assert text["inputs"] == {"input_ids": ["INT64", ["batch_size", "sequence_length"]]}
    assert text["outputs"] == {"text_embeds": ["FLOAT", ["batch_size", 8]]}
    assert vision["inputs"] == {"pixel_values": ["FLOAT", ["batch_size", 3, 16, 16]]}
    assert vision["outputs"] == {"image_embeds": ["FLOAT", ["batch_size", 8]]}
    for graph in (text, vision):
        assert graph["opsets"] == {"": 18}
        assert graph["outside"] == 0
        assert not {"Loop", "Scan", "If"} & set(graph["operators"])


@installed
@pytest.mark.slow
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_tanh"])
def test_other_activations(clip, activation, tmp_path):
    clip = dataclasses.replace(clip, config=dataclasses.replace(clip.config, activation=activation))
    assert export.export(clip, tmp_path, "onnx")["max_abs_diff"] <= 1e-5


@installed
@pytest.mark.slow
def test_of_the_siglip_family(clip, tmp_path):
    config = dataclasses.replace(
        clip.config, family="siglip", embed_dim=16, activation="gelu_tanh", layer_norm_eps=1e-6
    )
    clip = dataclasses.replace(clip, config=config, params=params(config))
    assert export.export(clip, tmp_path, "onnx")["max_abs_diff"] <= 1e-5
    card = (tmp_path / "README.md").read_text()
    assert "SiglipVisionModel, SiglipTextModel, RawImage" in card
    # SigLIP's texts pool where their padding ends.
    assert '{ padding: "max_length", truncation: true }' in card
    assert "`input_ids` int64 [b, 12] | `pooler_output`" in card


@installed
@pytest.mark.slow
def test_an_image_tower_alone(clip, tmp_path):
    clip = dataclasses.replace(clip, params={"image": clip.params["image"]})
    report = export.export(clip, tmp_path, "onnx")
    assert report["probes"]["text"] == 0
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["vision_model.onnx"]
    assert "Text" not in (tmp_path / "README.md").read_text()


def test_not_installed(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lib, "EXPORTER", tmp_path / "exporter")
    with pytest.raises(errors.BadInput, match="pip install --no-deps --target"):
        folder_lib.write(tmp_path / "out", clip)
    assert not (tmp_path / "out").exists()


@installed
def test_a_tower_too_large_for_the_format(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lib, "LARGEST", 20_000)
    with pytest.raises(errors.BadInput, match="ends at 2: export"):
        folder_lib.write(tmp_path / "out", clip)
    assert not (tmp_path / "out").exists()
