"""open_clip folders: written for open_clip and timm themselves, and read from open_clip itself."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from data_prep.dataset import files as dataset_files
from mofi_jax import export, inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, open_clip
from mofi_jax.model import mofi
from tests import with_readers

PREPROCESS = "decode|resize_short(16, 'bicubic')|center_crop(16)"


def random_params(config, seed=0):
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    dataset_files.train_bpe(["a photo of a cat", "dogs in the snow"] * 3, 280, folder / "own.json")
    return tokenizer_lib.Tokenizer(folder / "own.json", 16)


def model(tokenizer, **changes):
    values = {
        "image_size": 16,
        "patch_size": 8,
        "image": mofi.TowerConfig(16, 2, 2),
        "text": mofi.TowerConfig(24, 1, 2),
        "vocab_size": tokenizer.vocab_size + 5,
        "context_length": 16,
        "eos_id": tokenizer.eos_id,
        "embed_dim": 8,
        "dtype": "float32",
    }
    config = mofi.MofiConfig(**values | changes)
    return huggingface.Clip(config, random_params(config), tokenizer, None, PREPROCESS)


def variants(tokenizer):
    return {
        "gelu": model(tokenizer),
        "tanh": model(tokenizer, activation="gelu_tanh", text=mofi.TowerConfig(24, 2, 3, 70)),
        "quick": model(tokenizer, activation="quick_gelu", image=mofi.TowerConfig(18, 1, 3, 67)),
        "eps": model(tokenizer, layer_norm_eps=1e-3),
    }


def test_export_in_open_clip_and_timm_themselves(tokenizer, tmp_path):
    names = list(variants(tokenizer))
    for name, clip in variants(tokenizer).items():
        huggingface.write(tmp_path / name, clip)
    with_readers.run(
        "from mofi_jax import export\n"
        f"for name in {names}:\n"
        f"    export.main('{tmp_path}/' + name, '{tmp_path}/open_clip_' + name, 'open_clip')\n"
    )
    for name in names:
        report = json.loads((tmp_path / f"open_clip_{name}" / "result.json").read_text())
        assert report["max_abs_diff"] <= 1e-5
        assert report["differences"]["open_clip"].keys() == {"image", "text"}
        assert report["tokens"]["open_clip"]["texts"] == report["probes"]["text"]
        # Pillow's filter, but for the way it rounds.
        assert report["pixels"]["open_clip"]["max"] <= 2
        if name == "eps":
            assert "layer_norm_eps" in report["not_run"]["timm"]
        else:
            assert report["differences"]["timm"].keys() == {"image"}
            assert report["not_run"] == {}


def test_what_is_not_installed_is_said(tokenizer, tmp_path):
    huggingface.write(tmp_path / "model", model(tokenizer))
    export.main(str(tmp_path / "model"), str(tmp_path / "out"), "open_clip")
    report = json.loads((tmp_path / "out" / "result.json").read_text())
    assert report["reader"] == ["mofi_jax"]
    assert report["not_run"]["open_clip"] == "cannot be imported: No module named 'open_clip'"


@pytest.mark.parametrize("name", ["gelu", "tanh", "quick", "eps"])
def test_parameters_come_back_identical(tokenizer, tmp_path, name):
    clip = variants(tokenizer)[name]
    rng = np.random.default_rng(1)
    columns = [[f"{kind}{i}" for i in range(37)] for kind in ("Q", "name ", "of ")]
    entities = records.Entities(*columns, np.arange(37)[::-1])
    table = rng.normal(size=(37, 8)).astype(np.float32)
    clip = dataclasses.replace(
        clip, params=clip.params | {"entity_table": table}, entities=entities
    )
    open_clip.write(tmp_path / "out", clip)
    assert inference.kind(tmp_path / "out") == "open_clip"
    again = inference.read(tmp_path / "out")
    assert again.config == clip.config
    assert again.preprocess == PREPROCESS
    np.testing.assert_array_equal(again.params["entity_table"], table)
    read = again.params | {"entity_table": table}  # which lies in its file until it is asked for
    jax.tree.map(np.testing.assert_array_equal, read, clip.params)


FOREIGN = """
import json, pathlib
import numpy as np, open_clip, torch
from safetensors import torch as safetensors_torch
from mofi_jax.interop import open_clip as ours
from mofi_jax.interop import parity

torch.manual_seed(0)
base = pathlib.Path({base!r})
for name, config, wrap in {cases!r}:
    cls = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = cls(**{{k: v for k, v in config.items() if k != "custom_text"}})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.3)
    folder = base / name
    state = {{wrap + key: value.contiguous() for key, value in model.state_dict().items()}}
    if wrap:  # as training saves it
        halved = {{k: v.half() for k, v in state.items()}}
        torch.save(halved, folder / "open_clip_pytorch_model.bin")
        model.load_state_dict({{k: v.half().float() for k, v in model.state_dict().items()}})
        state = {{k: v.contiguous() for k, v in model.state_dict().items()}}
        safetensors_torch.save_file(state, base / "halved.safetensors")
    else:
        safetensors_torch.save_file(state, folder / "open_clip_model.safetensors")
    values = {{"model_cfg": config, "preprocess_cfg": {{"resize_mode": "squash"}}}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    readers = ours.readers(folder)
    pictures = parity.probe_pictures(32)
    mine = readers["mofi_jax"](pictures, parity.TEXTS)
    if wrap:  # which open_clip itself reads from its own training alone
        (base / "halved.safetensors").rename(folder / "open_clip_model.safetensors")
    theirs = readers["open_clip"](pictures, parity.TEXTS)
    for kind in ("image", "text"):
        assert np.abs(mine[kind] - theirs[kind]).max() <= 1e-5, (name, kind)
    assert ours.read(folder).preprocess == "decode|resize(32, 'bicubic')"
    print(name, "same")
"""


def test_import_of_what_open_clip_makes(tokenizer, tmp_path):
    """Fields left out, as open_clip saves them: its defaults, and CustomTextCLIP's names."""
    text = {
        "context_length": 12,
        "vocab_size": tokenizer.vocab_size,
        "hf_tokenizer_name": "x",
        "width": 64,
        "layers": 2,
    }
    image = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 128}
    plain = {"embed_dim": 16, "vision_cfg": image, "text_cfg": text}
    norms = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    tanh = {"embed_dim": 16, "vision_cfg": image | norms, "text_cfg": text | norms}
    cases = [
        ("plain", plain, ""),
        ("custom", plain | {"custom_text": True, "quick_gelu": True}, ""),
        ("tanh", tanh, ""),
        ("wrapped", plain, "module."),
    ]
    for name, _, _ in cases:
        (tmp_path / name).mkdir()
        huggingface.write_tokenizer(epath.Path(tmp_path / name), tokenizer)
    printed = with_readers.run(FOREIGN.format(base=str(tmp_path), cases=cases))
    assert printed.count("same") == len(cases)


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "model"
    open_clip.write(folder, model(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name='vit_base'"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool=True"),
        ("vision_cfg", {"layers": [2, 2, 2, 2]}, "vision_cfg.layers"),
        ("vision_cfg", {"head_width": 0}, "vision_cfg.head_width"),
        ("vision_cfg", {"image_size": [16, 32]}, "image_size"),
        ("vision_cfg", {"patch_size": 5}, "describes no model that can be built"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type='last'"),
        ("text_cfg", {"pool_type": "eos", "eos_id": 3}, "pools texts at id 3"),
        ("text_cfg", {"act_kwargs": {"approximate": "tanh"}}, "text_cfg.act_kwargs"),
        ("text_cfg", {"vocab_size": 20}, "not below vocab_size 20"),
        ("text_cfg", {"width": 48}, "of another shape: .*token_embedding"),
        ("text_cfg", {"layers": 3}, "missing: text_model.encoder.layers.1"),
    ],
)
def test_bad_config(written, tmp_path, part, values, message):
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][part] |= values
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        inference.read(folder)


def test_bad_folders(written, tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    (folder / open_clip.folder.WEIGHTS).unlink()
    with pytest.raises(BadInput, match="has no weights"):
        inference.read(folder)
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"_config\.json lacks model_cfg"):
        inference.read(folder)
    clip = model(tokenizer)
    image = dataclasses.replace(clip, params={"image": clip.params["image"]})
    with pytest.raises(BadInput, match="has no text tower, without which open_clip"):
        open_clip.write(tmp_path / "out", image)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_both_is_read_as_clip_model(written, tokenizer, tmp_path):
    """As on the hub, where LAION's repositories hold either library's files."""
    huggingface.write(tmp_path / "model", model(tokenizer))
    shutil.copy(written / "open_clip_config.json", tmp_path / "model")
    assert inference.kind(tmp_path / "model") == "clip"
