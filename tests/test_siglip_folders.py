"""SigLIP folders: transformers' own models give our embeddings, and ours theirs; NaFlex too."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from etils import epath
from PIL import Image

from data_prep.dataset import files as dataset_files
from mofi_jax import export, inference
from mofi_jax.common import errors
from mofi_jax.data import ops
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import hub, huggingface, parity
from mofi_jax.model import mofi

# Empty, short, and longer than the context.
TEXTS = ("", "a photo of a cat", "a husky dog in the snow " * 9)
CONTEXT = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As SigLIP's: no BOS, and texts padded with their EOS."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "a husky dog in the snow"] * 5, 300, path)
    backend = tokenizers.Tokenizer.from_file(str(path))
    eos = backend.token_to_id(tokenizer_lib.EOS)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", tokenizer_lib.EOS], special_tokens=[(tokenizer_lib.EOS, eos)]
    )
    backend.save(str(path))
    names = {"eos_token": tokenizer_lib.EOS, "pad_token": tokenizer_lib.EOS}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": CONTEXT}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.Tokenizer(path, CONTEXT)


def tower(width, mlp, layers, heads, act):
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
    }


# B/16, So400m/14 and one whose towers differ, at reduced depth and width.
SHAPES = {
    "base": (
        tower(64, 256, 3, 4, "gelu_pytorch_tanh") | {"image_size": 32, "patch_size": 16},
        tower(64, 256, 3, 4, "gelu_pytorch_tanh"),
    ),
    "so400m": (
        tower(72, 269, 4, 1, "gelu_pytorch_tanh") | {"image_size": 42, "patch_size": 14},
        tower(72, 269, 2, 2, "gelu_pytorch_tanh"),
    ),
    "towers that differ": (
        tower(48, 80, 2, 3, "gelu") | {"image_size": 24, "patch_size": 8},
        tower(32, 128, 2, 4, "gelu") | {"projection_size": 48},
    ),
}


def random(model):
    """All its parameters, the scales of norms around 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            ones = weight.ndim == 1 and "norm" in name and name.endswith("weight")
            weight.copy_(ones + 0.15 * torch.randn_like(weight))
    return model.eval()


def saved(folder, model, tokenizer, size=None):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tokenizer.path.parent / name).read_text())
    if size:
        processor = transformers.SiglipImageProcessor(size={"height": size, "width": size})
        processor.save_pretrained(folder)
    return folder


def siglip(shape, tokenizer):
    vision, text = SHAPES[shape]
    text = text | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    return random(
        transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    )


def unit(output):
    vectors = getattr(output, "pooler_output", output)
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def embeddings(model, folder, config, pictures):
    """By transformers, its own tokenizer included."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        list(TEXTS), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = torch.from_numpy(parity.normalised(pictures, config))
        image = model.get_image_features(pixel_values=pixels)
        text = model.get_text_features(input_ids=ids["input_ids"])
    return {"image": unit(image), "text": unit(text), "tokens": ids["input_ids"].numpy()}


def pictures_of(config):
    return np.random.default_rng(1).integers(0, 256, (3, *2 * [config.image_size], 3), np.uint8)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tokenizer):
    """A model of theirs and its folder."""
    model = siglip("towers that differ", tokenizer)
    return model, saved(tmp_path_factory.mktemp("theirs"), model, tokenizer, 24)


@pytest.mark.parametrize("shape", SHAPES)
def test_their_model_gives_its_embeddings_here(shape, tokenizer, tmp_path):
    model, folder = siglip(shape, tokenizer), tmp_path / "theirs"
    saved(folder, model, tokenizer, model.config.vision_config.image_size)
    clip = huggingface.read(folder)
    size = clip.config.image_size
    assert clip.config.family == "siglip"
    assert clip.preprocess == f"decode|resize({size}, 'bicubic')"
    pictures = pictures_of(clip.config)
    expected = embeddings(model, folder, clip.config, pictures)
    ours = parity.embedder(clip)(pictures, TEXTS)
    np.testing.assert_array_equal(ours["tokens"], expected["tokens"])
    for kind in ("image", "text"):
        np.testing.assert_allclose(ours[kind], expected[kind], atol=1e-5)
    # There and back: the same arrays under the same names.
    ours = tmp_path / "ours"
    huggingface.write(ours, clip)
    again, loading = transformers.SiglipModel.from_pretrained(ours, output_loading_info=True)
    assert not any(loading.values())
    state = again.state_dict()
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(state[name], weight, err_msg=name)
    back = huggingface.read(ours)
    assert back.config == clip.config
    assert back.preprocess == clip.preprocess
    assert back.tokenizer.fingerprint == clip.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, back.params, clip.params)


def test_export_of_a_trained_model_is_read_by_others(tokenizer, tmp_path):
    """With a tokenizer of its own, which has a BOS; every reader is really run."""
    path = tmp_path / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "a husky dog in the snow"] * 5, 300, path)
    with_bos = tokenizer_lib.Tokenizer(path, CONTEXT)
    config = mofi.MofiConfig(
        image_size=24,
        patch_size=8,
        image=mofi.TowerConfig(24, 2, 2, mlp_width=40),
        text=mofi.TowerConfig(16, 2, 4),
        vocab_size=with_bos.vocab_size,
        context_length=CONTEXT,
        eos_id=with_bos.eos_id,
        embed_dim=24,
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
        family="siglip",
        dtype="float32",
    )
    params = jax.tree.map(np.asarray, mofi.create(config, jax.random.key(0)))
    clip = huggingface.Clip(config, params, with_bos, None, "decode|resize(24, 'bicubic')")
    report = export.export(clip, tmp_path / "out")
    assert {"transformers", "sentence_transformers"} <= {*report["reader"], *report["not_run"]}
    assert "transformers" in report["reader"]
    assert report["max_abs_diff"] <= 1e-5
    assert all(found["differing"] == 0 for found in report["tokens"].values())
    assert report["pixels"]["transformers"]["max"] <= 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SiglipModel" in card
    assert "CLIPModel" not in card


def test_a_tower_alone(theirs, tmp_path):
    """SiglipVisionModel, whose parameters have no prefix in transformers 5."""
    model, _ = theirs
    alone = transformers.SiglipVisionModel(model.config.vision_config).eval()
    alone.load_state_dict(model.vision_model.state_dict())
    alone.save_pretrained(tmp_path / "theirs")
    clip = huggingface.read(tmp_path / "theirs")
    assert clip.params.keys() == {"image"}
    pictures = pictures_of(clip.config)
    with torch.no_grad():
        expected = unit(alone(torch.from_numpy(parity.normalised(pictures, clip.config))))
    np.testing.assert_allclose(parity.embedder(clip)(pictures, ())["image"], expected, atol=1e-5)
    hub.write(tmp_path / "ours", clip)
    read = hub.readers(tmp_path / "ours")["transformers"](pictures, ())
    np.testing.assert_allclose(read["image"], expected, atol=1e-5)


def test_naflex_at_its_square(tokenizer, tmp_path):
    """Siglip2Model takes patches of any grid; ours takes those of a square."""
    vision, text = SHAPES["base"]
    vision = {k: v for k, v in vision.items() if k != "image_size"} | {"num_patches": 9}
    text = text | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    config = transformers.Siglip2Config(vision_config=vision, text_config=text)
    model = random(transformers.Siglip2Model(config))
    saved(tmp_path, model, tokenizer)
    processor = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=9)
    processor.save_pretrained(tmp_path)
    clip = huggingface.read(tmp_path)
    assert (clip.config.image_size, clip.preprocess) == (
        48,
        "decode|resize(48, 'bilinear_antialias')",
    )
    pictures = pictures_of(clip.config)
    inputs = processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
    with torch.no_grad():
        expected = unit(model.get_image_features(**inputs))
    np.testing.assert_allclose(parity.embedder(clip)(pictures, ())["image"], expected, atol=1e-5)


def test_pixels_of_their_processor(theirs):
    _, folder = theirs
    clip = huggingface.read(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for data in parity.picture_files(((33, 47), (90, 41))):
        ours = ops.decode_to(clip.config.image_size, clip.preprocess, data)
        opened = Image.open(io.BytesIO(data))
        pixels = processor(opened, return_tensors="np")["pixel_values"]
        expected = np.rint((pixels[0].transpose(1, 2, 0) / 2 + 0.5) * 255)
        assert np.abs(ours - expected).max() <= 2


def test_other_normalisation_is_folded(theirs, tmp_path):
    model, folder = theirs
    clip = huggingface.read(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    values |= {"image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.3, 0.25]}
    path.write_text(json.dumps(values))
    folded = huggingface.read(tmp_path)
    pictures = pictures_of(clip.config)
    pixels = (pictures / 255 - values["image_mean"]) / values["image_std"]
    with torch.no_grad():
        tensor = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
        expected = unit(model.get_image_features(pixel_values=tensor))
    found = parity.embedder(folded)(pictures, ())["image"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("vision_config", {"vision_use_head": False}, "vision_use_head"),
        ("text_config", {"projection_size": 40}, "projection_size"),
        ("vision_config", {"image_size": [24, 32]}, "image_size"),
        ("text_config", {"hidden_act": "relu"}, "hidden_act"),
        ("vision_config", {"intermediate_size": 88}, "fc1.weight"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(theirs, tmp_path, section, change, sentence):
    _, folder = theirs
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values[section].update(change)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(errors.BadInput, match=sentence):
        huggingface.read(tmp_path)


def test_fields_at_their_defaults_may_be_missing(theirs, tmp_path):
    """As transformers saves since 4.32."""
    model, folder = theirs
    expected = huggingface.read(folder).config
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_diff_dict()))
    assert huggingface.read(tmp_path).config == expected


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """SigLIP's own tokenizer, over a small SentencePiece model; saved as transformers saves it."""
    folder = tmp_path_factory.mktemp("slow")
    captions = ["a photo of a cat", "a husky dog in the snow", "a red car of 2019, it's new"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 50),
        model_prefix=str(folder / "trained"),
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    found = transformers.SiglipTokenizer(str(folder / "trained.model"), model_max_length=CONTEXT)
    found.save_pretrained(folder / "saved")
    return found, folder / "saved"


def test_their_own_tokenizer_gives_its_ids(slow, tmp_path):
    theirs, folder = slow
    ours = tokenizer_lib.Tokenizer(tokenizer_lib.find(epath.Path(folder)), CONTEXT)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 1, 1)
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789  .,-'ÉéßﬁＡ½\t\n한국🤗")
    texts = [
        *TEXTS,
        "A Photo, of\tA  CAT!",
        *("".join(rng.choice(letters, n)) for n in rng.integers(0, 40, 500)),
    ]
    ids = theirs(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ours(texts), ids)
    # And by its export, for everyone, without SentencePiece.
    huggingface.write_tokenizer(epath.Path(tmp_path), ours, "siglip")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = exported(texts, padding="max_length", truncation=True, return_tensors="np")
    assert ids.keys() == {"input_ids"}
    np.testing.assert_array_equal(ours(texts), ids["input_ids"])
    again = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", CONTEXT)
    assert again.fingerprint == ours.fingerprint


def test_damaged_pieces_are_one_sentence(slow, tmp_path):
    data = (slow[1] / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    rng = np.random.default_rng(0)
    damaged = [data[: len(data) // 2], b"", b"\x80" * 100_000, b"\x0a" + b"\xff" * 9, bytes(99)]
    for _ in range(30):
        copy = bytearray(data)
        for at in rng.integers(0, 2_000, 3):
            copy[at] = rng.integers(256)
        damaged.append(bytes(copy))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            tokenizer_lib.Tokenizer(path, CONTEXT)(["a cat"])
        except errors.BadInput:
            refused += 1
    assert refused >= 5


def test_opened_as_a_model(theirs, mesh_of):
    model = inference.load(theirs[1], mesh=mesh_of["1x1x1"], batch_size=2)
    found = model.embed_texts(list(TEXTS))
    expected = parity.embedder(huggingface.read(theirs[1]))(
        pictures_of(model.towers.config), TEXTS
    )["text"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert dataclasses.asdict(model.towers.config)["family"] == "siglip"
