"""Exported programs: other batches, other lengths, a process that has nothing but jax."""

import dataclasses
import json
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest

from data_prep.dataset import files as dataset_files
from mofi_jax import export
from mofi_jax.common import errors
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity, stablehlo
from mofi_jax.model import mofi

# What a user without this project does.
ALONE = """
import sys
import jax, jax.export, numpy as np

def call(name, inputs):
    program = jax.export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    return jax.jit(program.call)(inputs)

inputs = np.load(sys.argv[1])
for name in inputs:
    np.save(f"{name}.npy", call(name.split("-")[0], inputs[name]))
assert not any(name.startswith("mofi_jax") for name in sys.modules)
"""


@pytest.fixture(autouse=True)
def symbolic_lengths():
    """A symbolic length is no int, which is what annotations say of lengths."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Deep enough for a loop over the layers of one tower."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "dogs in the snow"] * 3, 280, path)
    tokenizer = tokenizer_lib.Tokenizer(path, 12)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(16, 6, 2),
        text=mofi.TowerConfig(24, 2, 2),
        vocab_size=tokenizer.vocab_size,
        context_length=12,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
    )
    params = parameters(config)
    rng = np.random.default_rng(1)
    params["entity_table"] = rng.normal(0, 1, (3, 8)).astype(np.float32)
    entities = records.Entities(["Q1", "Q2", "Q3"], ["a", "b", "c"], [""] * 3, np.ones(3, int))
    return huggingface.Clip(config, params, tokenizer, entities, "decode|resize(16)")


def parameters(config):
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)


def test_opens_with_jax_alone(clip, tmp_path):
    report = export.export(clip, tmp_path, "stablehlo")
    assert report["reader"] == ["jax.export"]
    assert report["max_abs_diff"] <= 1e-5
    assert report["tokens"]["jax.export"]["differing"] == 0
    written = json.loads((tmp_path / "stablehlo.json").read_text())
    assert written["jax"] == jax.__version__
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "preprocess.json", "entities.parquet", "README.md"} <= names
    assert "entity_table.safetensors" in names
    assert "model.safetensors" not in names

    pictures = parity.probe_pictures(16)[1:]
    tokens = clip.tokenizer(["a", "dogs in the snow", "", *"abcd"])
    inputs = {"image-2": pictures[:2], "image-7": pictures, "text-7": tokens}
    # Texts need no padding: what follows the end of a text cannot reach it.
    inputs["text-short"] = tokens[:1, :3]
    np.savez(tmp_path / "inputs.npz", **inputs)
    subprocess.run(
        [sys.executable, "-I", "-c", ALONE, "inputs.npz"],
        cwd=tmp_path,
        check=True,
        env={"JAX_PLATFORMS": "cpu"},
    )
    expected = parity.embedder(clip)(pictures, ("a", "dogs in the snow", "", *"abcd"))
    for name in inputs:
        kind, _, count = name.partition("-")
        theirs = np.load(tmp_path / f"{name}.npy")
        ours = expected[kind][: int(count) if count.isdigit() else 1]
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)


def test_of_the_siglip_family(clip, tmp_path):
    config = dataclasses.replace(
        clip.config, family="siglip", embed_dim=16, activation="gelu_tanh", layer_norm_eps=1e-6
    )
    clip = dataclasses.replace(clip, config=config, params=parameters(config), entities=None)
    assert export.export(clip, tmp_path, "stablehlo")["max_abs_diff"] <= 1e-5
    written = json.loads((tmp_path / "stablehlo.json").read_text())
    # SigLIP's texts pool at the last position, where their padding ends.
    assert written["programs"]["text"]["input"] == "int32[batch_size, 12]"


def test_an_image_tower_alone(clip, tmp_path):
    clip = dataclasses.replace(clip, params={"image": clip.params["image"]}, tokenizer=None)
    report = export.export(dataclasses.replace(clip, entities=None), tmp_path, "stablehlo")
    assert report["max_abs_diff"] <= 1e-5
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "image.stablehlo", "preprocess.json", "stablehlo.json"]
    assert "text" not in (tmp_path / "README.md").read_text()


def test_a_text_tower_without_tokenizer(clip, tmp_path):
    with pytest.raises(errors.BadInput, match="The model has no tokenizer"):
        stablehlo.write(tmp_path / "out", dataclasses.replace(clip, tokenizer=None))
    assert not (tmp_path / "out").exists()


def test_a_tower_too_large_for_the_format(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "LARGEST", 20_000)
    with pytest.raises(errors.BadInput, match=r"The image tower has 0\.0 GiB"):
        stablehlo.write(tmp_path / "out", clip)
    assert not (tmp_path / "out").exists()
