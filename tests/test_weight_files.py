"""The weights of CLIP folders: safetensors and PyTorch files, whole, in parts, damaged, hostile."""

import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import torch as safetensors_torch

from mofi_jax.common import errors
from mofi_jax.interop import huggingface
from mofi_jax.interop.folder import weights


@pytest.fixture(scope="module")
def model():
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**tower, "vocab_size": 300, "eos_token_id": 299, "bos_token_id": 298},
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )


@pytest.fixture
def folder(model, tmp_path):
    """config.json without weights."""
    model.config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    model.save_pretrained(folder)
    return huggingface.read(folder).params


def _old_buffers():
    return {
        f"{tower}.embeddings.position_ids": torch.arange(12)[None]
        for tower in ("text_model", "vision_model")
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_pytorch(zipped, folder, model, expected):
    """In both of its formats, with the buffers that old versions saved."""
    state = model.state_dict() | _old_buffers()
    path = folder / weights.TORCH_WEIGHTS
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(folder).params, expected)


def test_files_of_pytorch_in_parts(folder, model, expected):
    place = {}
    for i, part in enumerate((list(model.state_dict())[::2], list(model.state_dict())[1::2])):
        name = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({key: model.state_dict()[key] for key in part}, folder / name)
        place |= dict.fromkeys(part, name)
    index = folder / (weights.TORCH_WEIGHTS + weights.INDEX)
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(folder).params, expected)
    (folder / name).unlink()
    with pytest.raises(errors.BadInput, match=rf"{name}"):
        huggingface.read(folder)


def test_safetensors_come_first(folder, model, expected):
    safetensors_torch.save_file(model.state_dict(), folder / weights.WEIGHTS)
    (folder / weights.TORCH_WEIGHTS).write_bytes(b"not opened")
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(folder).params, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [weights.WEIGHTS, weights.TORCH_WEIGHTS])
def test_types_of_weights(name, dtype, folder, model):
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    save = torch.save if name == weights.TORCH_WEIGHTS else safetensors_torch.save_file
    save(state, folder / name)
    read = huggingface.read(folder).params
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    projection = state["visual_projection.weight"].float().numpy().T
    np.testing.assert_array_equal(read["image"]["projection"]["kernel"], projection)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [weights.WEIGHTS, weights.TORCH_WEIGHTS])
def test_other_types_are_no_weights(name, dtype, folder, model):
    state = model.state_dict() | {"logit_scale": torch.zeros(()).to(dtype)}
    save = torch.save if name == weights.TORCH_WEIGHTS else safetensors_torch.save_file
    save(state, folder / name)
    with pytest.raises(errors.BadInput, match=r"holds logit_scale as .*, which is no type of"):
        huggingface.read(folder)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["pickle", "torch", "in the state dict"])
def test_a_pickle_that_runs_a_program_is_not_opened(form, folder, model):
    """The pickle alone, in a zip of PyTorch, and as one value among good ones."""
    mark = folder / "ran"
    path = folder / weights.TORCH_WEIGHTS
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Hostile(mark)))
    elif form == "torch":
        torch.save(_Hostile(mark), path)
    else:
        torch.save(model.state_dict() | {"logit_scale": _Hostile(mark)}, path)
    with pytest.raises(errors.BadInput, match="could run anything and is not opened") as caught:
        huggingface.read(folder)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}]
)
def test_what_is_no_state_dict(content, folder):
    torch.save(content, folder / weights.TORCH_WEIGHTS)
    with pytest.raises(errors.BadInput, match="is no state dict of tensors by name"):
        huggingface.read(folder)


@pytest.mark.parametrize("name", [weights.WEIGHTS, weights.TORCH_WEIGHTS])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_files(name, share, folder, model):
    save = torch.save if name == weights.TORCH_WEIGHTS else safetensors_torch.save_file
    save(model.state_dict(), folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(errors.BadInput, match=rf"{name} (cannot be read|is damaged)") as caught:
        huggingface.read(folder)
    assert "\n" not in str(caught.value)


def test_an_expanded_tensor_is_measured_before_it_is_read(folder, model):
    """A stride of 0: four bytes that would become terabytes."""
    huge = torch.zeros(1).expand(2**40)
    torch.save(model.state_dict() | {"logit_scale": huge}, folder / weights.TORCH_WEIGHTS)
    with pytest.raises(errors.BadInput, match=r"logit_scale \[1099511627776\] instead of"):
        huggingface.read(folder)


def test_without_pytorch(folder, model):
    torch.save(model.state_dict(), folder / weights.TORCH_WEIGHTS)
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from mofi_jax.interop import huggingface
huggingface.read({str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is a file of PyTorch, which is not installed: pip install torch" in done.stderr


def test_a_pytorch_that_opens_pickles_unsafely(folder, model, monkeypatch):
    torch.save(model.state_dict(), folder / weights.TORCH_WEIGHTS)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(errors.BadInput, match=r"pip install 'torch>=2\.6'"):
        huggingface.read(folder)


@pytest.mark.parametrize(
    "place", [[1], {"x": 5}, {"x": "../model.safetensors"}, {"x": "/etc/passwd"}]
)
def test_an_index_names_files_beside_it(place, folder):
    (folder / (weights.WEIGHTS + weights.INDEX)).write_text(json.dumps({"weight_map": place}))
    with pytest.raises(errors.BadInput, match="has no weight_map from arrays to files beside it"):
        huggingface.read(folder)


def test_no_weights(folder):
    with pytest.raises(errors.BadInput, match=r"has no weights \(model\.safetensors"):
        huggingface.read(folder)
