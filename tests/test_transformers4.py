"""transformers 4: it opens our folders, and what it saves is read, of both families."""

import jax
import numpy as np
import pytest

from data_prep.dataset import files as dataset_files
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity
from mofi_jax.model import mofi
from tests import with_readers

TEXTS = ("", "a photo of a cat", "A Husky <|endoftext|> puppy", "a dog in the snow " * 20)
FAMILIES = {
    "clip": ({"activation": "quick_gelu"}, "decode|resize_short(24, 'bicubic')|center_crop(24)"),
    "siglip": (
        {"activation": "gelu_tanh", "layer_norm_eps": 1e-6},
        "decode|resize(24, 'bicubic')",
    ),
}
# Reads each folder, saves the model anew, and keeps what it gives for the probes.
SCRIPT = """
import pathlib, numpy, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
root, texts = pathlib.Path({root!r}), {texts!r}
for family in {families!r}:
    folder, probes = root / family, numpy.load(root / (family + ".npz"))
    model, lost = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(lost.values()), lost
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixel_values=torch.from_numpy(probes["pixels"]))
        text = model.get_text_features(input_ids=ids["input_ids"])
    unit = [torch.nn.functional.normalize(x, dim=-1).numpy() for x in (image, text)]
    numpy.savez(root / (family + ".out.npz"), image=unit[0], text=unit[1], ids=ids["input_ids"])
    again = root / (family + ".again")
    for part in (model, tokenizer, transformers.AutoImageProcessor.from_pretrained(folder)):
        part.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Our models by family, and the folder where transformers 4 has read and saved them."""
    root, clips = tmp_path_factory.mktemp("exchanged"), {}
    path = root / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "a husky dog in the snow"] * 5, 300, path)
    tokenizer, rng = tokenizer_lib.Tokenizer(path, 12), np.random.default_rng(0)
    for family, (fields, preprocess) in FAMILIES.items():
        config = mofi.MofiConfig(
            image_size=24,
            patch_size=8,
            image=mofi.TowerConfig(24, 2, 2, mlp_width=40),
            text=mofi.TowerConfig(16, 2, 4),
            vocab_size=tokenizer.vocab_size,
            context_length=12,
            eos_id=tokenizer.eos_id,
            embed_dim=24,
            family=family,
            dtype="float32",
            **fields,
        )
        shapes = jax.eval_shape(lambda config=config: mofi.create(config, jax.random.key(0)))
        # Random in every array: biases, scales and positions too, or a swap would go unseen.
        params = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
        clips[family] = huggingface.Clip(config, params, tokenizer, None, preprocess)
        huggingface.write(root / family, clips[family])
        pixels = parity.normalised(parity.probe_pictures(24), config)
        np.savez(root / f"{family}.npz", pixels=pixels)
    code = SCRIPT.format(root=str(root), texts=TEXTS, families=list(FAMILIES))
    with_readers.run(code, "transformers4")
    return root, clips


@pytest.mark.parametrize("family", FAMILIES)
def test_our_folder_gives_our_tokens_and_embeddings(exchanged, family):
    root, clips = exchanged
    theirs = np.load(root / f"{family}.out.npz")
    ours = parity.embedder(clips[family])(parity.probe_pictures(24), TEXTS)
    np.testing.assert_array_equal(theirs["ids"], ours["tokens"])
    for kind in ("image", "text"):
        np.testing.assert_allclose(theirs[kind], ours[kind], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_saves_is_the_same_model(exchanged, family):
    root, clips = exchanged
    # Without our own file the preprocessing is what its processor says.
    again, clip = huggingface.read(root / f"{family}.again"), clips[family]
    assert again.config == clip.config
    assert again.tokenizer(list(TEXTS)).tolist() == clip.tokenizer(list(TEXTS)).tolist()
    jax.tree.map(np.testing.assert_array_equal, again.params, clip.params)
    assert again.preprocess == clip.preprocess.replace("crop(24)", "crop(24, 'floor')")
