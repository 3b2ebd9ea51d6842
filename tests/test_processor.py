"""preprocessor_config.json of other people: our pixels and embeddings against their processor's."""

import contextlib
import io
import json

import hypothesis
import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from PIL import Image

from mofi_jax.common import errors
from mofi_jax.data import ops
from mofi_jax.interop import huggingface
from mofi_jax.interop.folder import processor
from mofi_jax.model import image as image_lib
from mofi_jax.model import mofi

SIZE = 24
CROP = {"height": SIZE, "width": SIZE}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}}
CLIP |= {"crop_size": CROP}


def _pictures(count, low=9, high=90):
    """Smooth pictures with an edge and some grain, of odd sizes."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        height, width = rng.integers(low, high, 2)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        picture = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
        picture[height // 3 : height // 2, width // 4 :] = rng.integers(0, 256, 3)
        noisy = picture + rng.integers(-9, 10, picture.shape)
        yield Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _write(folder, values, name=processor.PREPROCESSOR):
    (folder / name).write_text(json.dumps(values))
    # transformers' fallback for a file without a type.
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return folder


def _theirs(folder):
    # Pillow's backend; torchvision's is within 1 of it.
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize(
    "values",
    [
        CLIP,
        CLIP | {"size": 30, "crop_size": SIZE},
        CLIP | {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
        CLIP | {"size": [SIZE, SIZE], "do_center_crop": False, "crop_size": None},
        CLIP | {"size": {"height": 30, "width": 30}, "crop_size": [SIZE, SIZE]},
        CLIP | {"size": {"shortest_edge": 31, "longest_edge": None}, "resample": 2},
        *(CLIP | {"resample": resample} for resample in (0, 1, 4, 5)),
        CLIP | {"image_processor_type": "CLIPImageProcessorFast", "do_convert_rgb": None},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 27, "crop_size": SIZE},
        {"size": SIZE, "crop_size": SIZE, "resample": 3, "do_resize": True},
        {"image_processor_type": "ViTImageProcessor", "size": SIZE},
        {"image_processor_type": "SiglipImageProcessor", "size": CROP},
        {"image_processor_type": "BitImageProcessor", "size": 40, "crop_size": CROP},
    ],
)
def test_pixels_are_theirs(values, tmp_path):
    read = processor.read(_write(tmp_path, values), SIZE, "clip")
    theirs = _theirs(tmp_path)
    for picture in _pictures(50):
        expected = theirs(picture, return_tensors="np", do_rescale=False, do_normalize=False)
        ours = ops.decode_to(SIZE, read.operations, _png(picture))
        expected = np.moveaxis(expected["pixel_values"][0], 0, -1)
        np.testing.assert_allclose(ours, expected, atol=2)


def test_no_resizing(tmp_path):
    """Only cropped, and a smaller picture has a border."""
    read = processor.read(_write(tmp_path, CLIP | {"do_resize": False}), SIZE, "clip")
    theirs = _theirs(tmp_path)
    for picture in [*_pictures(20, low=SIZE), *(p.resize((20, 18)) for p in _pictures(2))]:
        expected = theirs(picture, return_tensors="np", do_rescale=False, do_normalize=False)
        ours = ops.decode_to(SIZE, read.operations, _png(picture))
        np.testing.assert_array_equal(ours, np.moveaxis(expected["pixel_values"][0], 0, -1))


def test_the_file_of_transformers_5_comes_first(tmp_path):
    _write(tmp_path, CLIP | {"size": 30})
    _write(tmp_path, {"image_processor": CLIP | {"size": 28}}, processor.PROCESSOR)
    read = processor.read(tmp_path, SIZE, "clip")
    assert read.operations == "decode|resize_short(28, 'bicubic')|center_crop(24, 'floor')"
    assert _theirs(tmp_path).size["shortest_edge"] == 28
    _write(tmp_path, {"processor_class": "CLIPProcessor"}, processor.PROCESSOR)  # of 4.x
    assert "resize_short(30," in processor.read(tmp_path, SIZE, "clip").operations


def test_names_of_filters(tmp_path):
    read = processor.read(_write(tmp_path, CLIP | {"resample": "BILINEAR"}), SIZE, "clip")
    assert "'bilinear_antialias'" in read.operations


@pytest.mark.parametrize("name", processor.DEFAULTS)
def test_defaults_are_those_of_transformers(name):
    theirs = getattr(transformers, f"{name}ImageProcessorPil")()
    for key, value in processor.DEFAULTS[name].items():
        found = getattr(theirs, key)
        if isinstance(value, dict):
            found = {side: n for side, n in dict(found).items() if n is not None}
        if key in ("image_mean", "image_std"):
            found = tuple(found)
        assert (found or None) == (value or None), key


# ----------------------------------------------------------------------------------- normalisation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        **tower, intermediate_size=64, image_size=SIZE, patch_size=8, projection_dim=16
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    folder = tmp_path_factory.mktemp("vision")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]},
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 60, 70]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
        {"image_mean": [0.48145466, 0.4578275, 0.40821073]},
    ],
)
def test_another_normalisation_is_folded_into_the_weights(change, model, tmp_path):
    theirs, folder = model
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / processor.PREPROCESSOR).write_text(json.dumps(CLIP | change))
    clip = huggingface.read(tmp_path)
    pictures = list(_pictures(6))
    ours = np.stack([ops.decode_to(SIZE, clip.preprocess, _png(p)) for p in pictures])
    ours = jax.jit(mofi.embed_images, static_argnums=0)(clip.config, clip.params, ours)
    as_floats = change.get("image_mean") == 0.5  # which this backend refuses, unlike torchvision's
    if as_floats:
        (tmp_path / processor.PREPROCESSOR).write_text(
            json.dumps(CLIP | {key: [value] * 3 for key, value in change.items()})
        )
    pixels = _theirs(tmp_path)(pictures, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**pixels).image_embeds
    found = torch.nn.functional.normalize(found, dim=-1).numpy()
    np.testing.assert_allclose(ours, found, atol=1e-5)
    # What is written says so: the same embeddings through our normalisation.
    huggingface.write(tmp_path / "again", clip)
    again = json.loads((tmp_path / "again" / processor.PREPROCESSOR).read_text())
    assert again["image_mean"] == list(image_lib.pixel_statistics("clip")[0])
    jax.tree.map(
        np.testing.assert_array_equal, huggingface.read(tmp_path / "again").params, clip.params
    )


def test_weights_alone_have_the_preprocessing_of_every_clip(model):
    assert huggingface.read(model[1]).preprocess == ops.expand("clip_hf", SIZE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"crop_size": 32}, "has crop_size 32, where the model takes 24 x 24"),
        ({"size": {"height": 24, "width": 32}}, "size"),
        ({"size": {"shortest_edge": 24, "longest_edge": 40}}, "size"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "takes 24 x 24"),
        ({"size": 10**9}, "size"),
        ({"size": "24"}, "size"),
        ({"size": []}, "size"),
        ({"resample": 7}, "resample"),
        ({"resample": [3]}, "resample"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": [10**400, 0.4, 0.4]}, "image_mean"),
        ({"rescale_factor": "x"}, "rescale_factor"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(change, named, tmp_path):
    with pytest.raises(errors.BadInput, match=named):
        processor.read(_write(tmp_path, CLIP | change), SIZE, "clip")


JUNK = [None, True, -1, 0, 24, 10**9, 10**400, 2.5, float("inf"), float("nan"), "", "x", [], {}]
JUNK += [[24, 24], [None], {"height": 24}, {"shortest_edge": None}, {"height": "x", "width": 24}]


@hypothesis.settings(deadline=None, derandomize=True, max_examples=200)
@hypothesis.given(
    changes=st.dictionaries(
        st.sampled_from([*processor.DEFAULTS["CLIP"], "image_processor_type"]),
        st.sampled_from(JUNK),
        min_size=1,
        max_size=3,
    )
)
def test_any_damage_is_one_sentence(changes, tmp_path_factory):
    folder = _write(tmp_path_factory.getbasetemp(), CLIP | changes)
    with contextlib.suppress(errors.BadInput):
        ops.parse(processor.read(folder, SIZE, "clip").operations)


def test_operations_beside_a_file_that_cannot_be_read(tmp_path):
    """As its sentence says."""
    _write(tmp_path, CLIP | {"crop_size": 32, "do_rescale": False})
    (tmp_path / processor.PREPROCESS).write_text('{"preprocess": "clip_hf"}')
    read = processor.read(tmp_path, SIZE, "clip")
    assert read.operations == "clip_hf"
    assert read.scale[0] > 1


def test_pictures_that_would_keep_their_aspect_are_cropped(tmp_path, caplog):
    """transformers gives its model rectangles then, which that refuses."""
    read = processor.read(_write(tmp_path, CLIP | {"do_center_crop": False}), SIZE, "clip")
    assert read.operations.endswith("center_crop(24, 'floor')")
    assert "they are cropped" in caplog.text


@pytest.mark.parametrize(
    "operations",
    [
        "decode|resize_short(30, 'bicubic')|center_crop(24, 'floor')",
        "decode|resize(30, 'lanczos')|center_crop(24, 'floor')",
        "decode|resize(24, 'bilinear_antialias')",
        "decode|center_crop(24, 'floor')",
    ],
)
def test_what_is_written_reads_back_as_the_same_operations(operations, tmp_path):
    values = processor.to_config(operations, SIZE, "clip")
    assert processor.read(_write(tmp_path, values), SIZE, "clip").operations == operations
    assert processor.expresses(operations, SIZE, "clip")
    for other in ("bilinear", "area"):
        assert not processor.expresses(f"decode|resize({SIZE}, {other!r})", SIZE, "clip")
