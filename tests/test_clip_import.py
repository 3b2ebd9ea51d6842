"""CLIP folders of other people: opened as transformers opens them, whatever shape they come in."""

import dataclasses
import itertools
import json
import logging

import jax
import numpy as np
import pytest
import torch
import transformers

from data_prep.dataset import files as dataset_files
from mofi_jax import inference
from mofi_jax.common import errors
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import clip_config, huggingface
from mofi_jax.model import activations, mofi
from mofi_jax.model import image as image_lib
from mofi_jax.model import text as text_lib

# Width, heads (of the size they have in the published models: 64, and 80 for pictures of H/14) and
# patch; width and heads of the text tower; embedding size. All at two layers.
TOWERS = {
    "B/16": ((128, 2, 16), (128, 2), 64),
    "L/14": ((192, 3, 14), (128, 2), 96),
    "H/14": ((160, 2, 14), (192, 3), 128),
}
SIDE = 56  # pixels, for patches of 14; 64 for those of 16
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
ENDS = ((49_408, 49_407), (49_408, 2), (50_272, 50_264), (50_272, 2))
CASES = [
    (variant, ACTIVATIONS[(i + j) % 3], *end)
    for (i, variant), (j, end) in itertools.product(enumerate(TOWERS), enumerate(ENDS))
]


def _full_config(variant, activation, vocab, eos):
    """config.json as transformers before 4.32 saved it: every field."""
    (width, heads, patch), (text_width, text_heads), embed = TOWERS[variant]

    def tower(hidden, heads, **more):
        return {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "projection_dim": embed,
            "output_attentions": False,
            "torch_dtype": None,
            **more,
        }

    text = tower(
        text_width, text_heads, vocab_size=vocab, max_position_embeddings=77, eos_token_id=eos
    )
    side = 64 if patch == 16 else SIDE
    vision = tower(width, heads, image_size=side, patch_size=patch, num_channels=3)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "projection_dim": embed,
        "text_config": {"model_type": "clip_text_model", **text, "bos_token_id": 0},
        "text_config_dict": None,
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "vision_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": "4.27.0",
    }


def _config(values, path):
    return clip_config.from_config(clip_config.resolve(values, path), path)


def _sparse_config(full):
    """As 4.32 and later saved it: of the sections only what differs from the defaults."""
    defaults = transformers.CLIPConfig().to_dict()
    sections = ("text_config", "vision_config")
    sparse = {
        section: {
            key: value
            for key, value in full[section].items()
            if key == "model_type" or defaults[section].get(key, value) != value
        }
        for section in sections
    }
    return {key: value for key, value in full.items() if "_config" not in key} | sparse


def _random_model(values):
    values = {key: values[key] for key in ("text_config", "vision_config", "projection_dim")}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**values)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # So large that activations, and the order of heads, are told apart.
            weight.add_(0.03 * torch.randn_like(weight))
    return model


def _ids(vocab, eos, length=77):
    """Rows as a tokenizer gives them, short and padded, full, and one without an end."""
    rng = np.random.default_rng(0)
    top = vocab - 10
    ids = rng.integers(3, top, (4, length))
    end = top if eos == 2 else eos
    ids[0, 3:], ids[1, -1] = end, end  # CLIP pads with its EOS
    ids[2, 5], ids[2, 6:] = end, 1
    return ids.astype(np.int32)


def _theirs(model, pictures, ids):
    mean, std = (np.float32(v) for v in image_lib.pixel_statistics("clip"))
    pixels = ((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=torch.tensor(np.ascontiguousarray(pixels)))
        text = model.get_text_features(input_ids=torch.tensor(ids).long())
    found = [getattr(x, "pooler_output", x) for x in (image, text)]
    return [torch.nn.functional.normalize(x, dim=-1).numpy() for x in found]


def _ours(clip, pictures, ids):
    with jax.default_matmul_precision("highest"):
        image = jax.jit(mofi.embed_images, static_argnums=0)(clip.config, clip.params, pictures)
        text = jax.jit(mofi.embed_texts, static_argnums=0)(clip.config, clip.params, ids)
    return np.asarray(image), np.asarray(text)


def _agree(folder, model, ids):
    clip = huggingface.read(folder)
    side = clip.config.image_size
    pictures = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), np.uint8)
    for ours, theirs in zip(_ours(clip, pictures, ids), _theirs(model, pictures, ids), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    return clip


def _saves(model, full, folder):
    """The folder with config.json in every way that versions of transformers write it."""
    model.save_pretrained(folder)
    now = json.loads((folder / "config.json").read_text())
    overridden = _sparse_config(full)
    overridden["text_config_dict"] = full["text_config"]
    overridden["text_config"] = full["text_config"] | {"hidden_act": "relu", "eos_token_id": 7}
    overridden["vision_config_dict"] = full["vision_config"]
    overridden["vision_config"] = None
    for form in (now, full, _sparse_config(full), overridden):
        (folder / "config.json").write_text(json.dumps(form))
        yield folder


@pytest.mark.parametrize(
    ("variant", "activation", "vocab", "eos"),
    [
        pytest.param(*case, marks=() if i % 5 == 0 else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_their_embeddings_in_every_shape(variant, activation, vocab, eos, tmp_path):
    full = _full_config(variant, activation, vocab, eos)
    model = _random_model(full)
    ids = _ids(vocab, eos)
    configs = set()
    for folder in _saves(model, full, tmp_path):
        # The weights are the same: what else a form of config.json could change is in the config.
        values = json.loads((folder / "config.json").read_text())
        configs.add(_config(values, folder / "config.json"))
        theirs = transformers.CLIPConfig.from_pretrained(folder)
        assert theirs.text_config.hidden_act == theirs.vision_config.hidden_act == activation
        assert theirs.text_config.eos_token_id == eos
    assert len(configs) == 1
    clip = _agree(tmp_path, model, ids)
    assert clip.config.eos_id == (text_lib.LARGEST_ID if eos == 2 else eos)


def test_defaults_are_those_of_transformers():
    theirs = transformers.CLIPConfig().to_dict()
    for section, defaults in clip_config.DEFAULTS.items():
        for key, value in defaults.items():
            assert (theirs[section] if section else theirs)[key] == value


@pytest.mark.parametrize("name", clip_config.ACTIVATION_FROM)
def test_names_of_activations(name):
    x = np.linspace(-6, 6, 501, dtype=np.float32)
    theirs = transformers.activations.get_activation(name)(torch.tensor(x)).numpy()
    ours = activations.ACTIVATIONS[clip_config.ACTIVATION_FROM[name]](jax.numpy.asarray(x))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(text_config=None, vision_config=None),
        lambda v: (v.pop("text_config"), v.pop("vision_config"), v.pop("projection_dim")),
        lambda v: v.update(text_config_dict={}, vision_config_dict={}),
        lambda v: v.update(text_config={"hidden_size": 64}, text_config_dict={"vocab_size": 60000}),
        lambda v: v["vision_config"].update(patch_size=[16, 16], image_size=240),
        lambda v: v.update(text_config={"dropout": 0.0}, projection_dim=None),
    ],
)
def test_fields_that_are_missing_null_or_overridden(change, tmp_path):
    """Against what the installed transformers makes of the same file."""
    path = tmp_path / "config.json"
    values = _sparse_config(_full_config("B/16", "quick_gelu", 49_408, 49_407))
    values["text_config"] = {"model_type": "clip_text_model"}
    change(values)
    path.write_text(json.dumps(values))
    if values.get("projection_dim", 0) is None:  # which transformers builds no model of
        values["projection_dim"] = 512
    theirs = transformers.CLIPConfig(**{k: v for k, v in values.items() if k != "model_type"})
    ours = _config(json.loads(path.read_text()), path)
    text, vision = theirs.text_config, theirs.vision_config
    assert ours.text.width == text.hidden_size
    assert ours.text.hidden_width == text.intermediate_size
    assert ours.vocab_size == text.vocab_size
    assert ours.image.width == vision.hidden_size
    assert vision.image_size == ours.image_size
    assert vision.patch_size in (ours.patch_size, [ours.patch_size] * 2)
    assert ours.embed_dim == theirs.projection_dim


def test_defaults_that_were_taken_are_logged(caplog, tmp_path):
    values = _full_config("B/16", "quick_gelu", 49_408, 49_407)
    del values["text_config"]["hidden_act"], values["vision_config"]["num_channels"]
    with caplog.at_level(logging.INFO, logger="absl"):
        clip_config.resolve(values, tmp_path / "config.json")
    [record] = caplog.records
    assert record.getMessage().endswith(
        "leaves at transformers' defaults: text_config.hidden_act='quick_gelu', "
        "vision_config.num_channels=3"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v.update(model_type="blip"), "of type 'blip': give a folder of type 'clip'"),
        (lambda v: v.pop("model_type"), "of type None"),
        (lambda v: v.update(text_config=[1]), r"text_config=\[1\], not an object"),
        (lambda v: v["vision_config"].update(num_channels=1), "num_channels"),
        (lambda v: v["vision_config"].update(hidden_size="768"), "hidden_size='768', not a whole"),
    ],
)
def test_what_is_no_clip_configuration(change, named, tmp_path):
    values = _full_config("B/16", "gelu", 49_408, 49_407)
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(errors.BadInput, match=named):
        huggingface.read(tmp_path)


def test_mlps_of_other_widths(tmp_path):
    full = _full_config("B/16", "gelu", 300, 299)
    full["text_config"]["intermediate_size"] = 300
    full["vision_config"]["intermediate_size"] = 500
    model = _random_model(full)
    model.save_pretrained(tmp_path)
    _agree(tmp_path, model, _ids(300, 299))


# ------------------------------------------------------------------------------- image towers alone


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    full = _full_config("B/16", "gelu", 300, 299)
    model = _random_model(full)
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("of_clip", [True, False], ids=["of a CLIPModel", "made alone"])
@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_an_image_tower_alone_is_read(name, of_clip, whole, tmp_path):
    """Made alone, CLIPVisionModel has names without a prefix."""
    values, kind = whole[0].config.vision_config, getattr(transformers, name)
    theirs = kind.from_pretrained(whole[1], config=values) if of_clip else kind(values)
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    clip = huggingface.read(tmp_path)
    assert set(clip.params) == {"image"}
    pictures = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
    ours = jax.jit(mofi.embed_images, static_argnums=0)(clip.config, clip.params, pictures)
    mean, std = (np.float32(v) for v in image_lib.pixel_statistics("clip"))
    pixels = torch.tensor((pictures.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = theirs(pixel_values=pixels)
    found = found.image_embeds if name.endswith("Projection") else found.pooler_output
    found = torch.nn.functional.normalize(found, dim=-1).numpy()
    np.testing.assert_allclose(ours, found, atol=1e-5)
    with pytest.raises(errors.BadInput, match="no text tower"):
        mofi.embed_texts(clip.config, clip.params, jax.numpy.zeros((1, 77), int))


def test_an_image_tower_alone_is_written_and_read_back(whole, tmp_path):
    """With its class table; what comes back is identical."""
    saved = huggingface.read(whole[1])
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, saved.config.embed_dim)).astype(np.float32)
    entities = records.Entities(
        ["Q1", "Q2", "Q3"], ["a", "b", "c"], ["", "x", ""], np.arange(3)[::-1]
    )
    params = {"image": saved.params["image"], "entity_table": table}
    clip = dataclasses.replace(saved, params=params, entities=entities)
    huggingface.write(tmp_path, clip)
    again = huggingface.read(tmp_path)
    np.testing.assert_array_equal(again.params["entity_table"], table)
    read = again.params | {"entity_table": table}  # which lies in its file until it is asked for
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert again.entities.qids == entities.qids
    assert again.preprocess == ops.expand(clip.preprocess, 64)
    model, loading = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values())
    assert model.config.projection_dim == saved.config.embed_dim
    assert not (tmp_path / "tokenizer.json").exists()
    card = (tmp_path / "README.md").read_text()
    assert "CLIPVisionModelWithProjection" in card
    assert "| text |" not in card
    assert inference.read(tmp_path).tokenizer is None


def test_a_tokenizer_beside_an_image_tower_is_no_part_of_it(whole, tmp_path):
    saved = huggingface.read(whole[1])
    huggingface.write(tmp_path, dataclasses.replace(saved, params={"image": saved.params["image"]}))
    dataset_files.train_bpe(["a cat"], 280, tmp_path / "tokenizer.json")
    assert huggingface.read(tmp_path).tokenizer is None


def test_a_text_tower_needs_its_tokenizer(whole, tmp_path):
    with pytest.raises(errors.BadInput, match="The model has no tokenizer"):
        huggingface.write(tmp_path / "out", huggingface.read(whole[1]))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(whole, tmp_path):
    for path in whole[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset_files.train_bpe(["a cat", "a dog"], 290, tmp_path / "tokenizer.json")
    with pytest.raises(errors.BadInput, match=r"eos_token_id 299 and .* has"):
        huggingface.read(tmp_path)
    assert tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", 77).eos_id != 299


def test_the_vocabulary_of_a_slow_tokenizer_becomes_a_tokenizer_json(whole, tmp_path):
    """vocab.json and merges.txt are what transformers 4 saved of CLIP's slow tokenizer."""
    for path in whole[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    words = [*map(chr, range(33, 127)), "a</w>", "t</w>", "at</w>", tokenizer_lib.BOS]
    vocabulary = {word: i for i, word in enumerate(words)} | {tokenizer_lib.EOS: 299}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t</w>\n")
    saved = huggingface.read(tmp_path)
    assert saved.tokenizer.eos_id == saved.config.eos_id == 299
    huggingface.write(tmp_path / "out", saved)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(["a at"])["input_ids"] == [saved.tokenizer(["a at"])[0, :4].tolist()]
