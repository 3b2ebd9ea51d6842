"""`mofi_jax.load` and what a Model does with whatever a user holds."""

import io
import pathlib
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

import mofi_jax
from data_prep.dataset import files as dataset_files
from mofi_jax import inference
from mofi_jax.common import errors
from mofi_jax.data import records, tokenizer
from mofi_jax.distributed import meshes
from mofi_jax.inference import towers
from mofi_jax.interop import huggingface
from mofi_jax.losses import mapped_table
from mofi_jax.model import mofi

SIZE = 16
NAMES = ["poodle", "husky", "cat", "oak", "violin"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of an untrained model of both towers and five entities."""
    root = tmp_path_factory.mktemp("api")
    dataset_files.train_bpe([f"a photo of a {n}" for n in NAMES], 280, root / "tokenizer.json")
    texts = tokenizer.Tokenizer(root / "tokenizer.json", 8)
    config = mofi.MofiConfig(
        image_size=SIZE,
        patch_size=8,
        image=mofi.TowerConfig(16, 1, 2),
        text=mofi.TowerConfig(16, 1, 2),
        vocab_size=texts.vocab_size,
        context_length=8,
        eos_id=texts.eos_id,
        embed_dim=8,
        dtype="float32",
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    params["entity_table"] = rng.normal(size=(5, 8)).astype(np.float32)
    entities = records.Entities(
        *([f"Q{i}" for i in range(5)], NAMES, [f"a {n}" for n in NAMES], np.arange(5, 0, -1))
    )
    spec = f"decode|resize_short({SIZE})|center_crop({SIZE})"
    huggingface.write(root / "hf", huggingface.Clip(config, params, texts, entities, spec))
    return root / "hf"


@pytest.fixture(scope="module")
def model(folder):
    return mofi_jax.load(folder, batch_size=8)


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    small = np.random.default_rng(height * width).integers(0, 256, (5, 5, *shape[2:]), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_the_import_is_cheap_and_brings_nothing():
    code = """
import sys
import mofi_jax
heavy = {"jax", "numpy", "flax", "PIL", "cv2"} & set(sys.modules)
assert callable(mofi_jax.load) and not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [(40, 25), (16, 16), (9, 30)])
def test_path_bytes_picture_and_array_are_the_same(model, tmp_path, size):
    array = noise(*size)
    picture = Image.fromarray(array)
    path = tmp_path / "a [1]* picture.png"
    picture.save(path)
    data = path.read_bytes()
    forms = [path, str(path), data, bytearray(data), memoryview(data), picture, Image.open(path)]
    forms += [array, array[:, ::-1][:, ::-1], np.asfortranarray(array), jax.numpy.asarray(array)]
    found = model.embed_images(forms)
    assert (found.dtype, found.shape) == (np.float32, (len(forms), 8))
    np.testing.assert_array_equal(found, found[:1].repeat(len(forms), 0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for one in forms:  # alone, as a list of one would be
        np.testing.assert_allclose(model.embed_images(one), found[:1], atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_odd_pictures_are_as_their_files(model, mode):
    if mode == "I;16":
        picture = Image.fromarray(noise(20, 31, 0).astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        alpha = Image.fromarray(noise(31, 20, 0)).resize((31, 20))
        picture = Image.fromarray(noise(20, 31)).convert(mode)
        picture.putalpha(alpha)
    else:
        picture = Image.fromarray(noise(20, 31)).convert(mode)
    kind = {"kind": "TIFF"} if mode == "CMYK" else {"kind": "PNG"}
    forms = [picture, saved(picture, **kind)]
    if mode in ("L", "RGBA"):
        forms.append(np.asarray(picture))
    if mode == "L":
        forms.append(np.asarray(picture)[..., None])
    found = model.embed_images(forms)
    np.testing.assert_array_equal(found, found[:1].repeat(len(forms), 0))


def test_orientation_is_applied_as_in_files(model):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(noise(30, 20)), "PNG", exif=exif)
    opened = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(opened)
    found = model.embed_images([data, opened, upright, np.asarray(upright)])
    np.testing.assert_array_equal(found, found[:1].repeat(4, 0))
    assert np.abs(found[0] - model.embed_images(noise(30, 20))[0]).max() > 1e-3


def test_mixed_many_and_lazy(model, tmp_path):
    arrays = [noise(17 + i, 40 - i) for i in range(21)]
    expected = np.concatenate([model.embed_images(array) for array in arrays])

    def mixture():
        for i, array in enumerate(arrays):
            if i % 3 == 0:
                Image.fromarray(array).save(tmp_path / f"{i}.png")
                yield tmp_path / f"{i}.png"
            else:
                yield saved(Image.fromarray(array)) if i % 3 == 1 else array

    np.testing.assert_allclose(model.embed_images(mixture()), expected, atol=1e-6)
    np.testing.assert_allclose(model.embed_images([*mixture()]), expected, atol=1e-6)
    same = [Image.open(tmp_path / "0.png")] * 20  # one picture, which reads its file once
    found = model.embed_images(same)
    np.testing.assert_allclose(found, expected[:1].repeat(20, 0), atol=1e-6)
    column = np.array([str(tmp_path / f"{i}.png") for i in (0, 3)], object)
    np.testing.assert_allclose(model.embed_images(column), expected[[0, 3]], atol=1e-6)
    block = np.stack([arrays[0]] * 3)
    np.testing.assert_allclose(model.embed_images(block), expected[:1].repeat(3, 0), atol=1e-6)


def test_nothing_gives_nothing(model):
    for nothing in ([], (), iter(()), np.zeros((0, 20, 20, 3), np.uint8)):
        assert model.embed_images(nothing).shape == (0, 8)
    none = np.zeros((0, SIZE, SIZE, 3), np.float32)
    assert model.embed_images(none, preprocessed=True).shape == (0, 8)
    assert model.embed_texts([]).shape == (0, 8)
    assert model.name_entities([]) == []
    assert model.similarity(np.zeros((0, 8)), np.ones((3, 8))).shape == (0, 3)


def test_preprocessed_pixels(model):
    pixels = np.stack([noise(SIZE, SIZE), 255 - noise(SIZE, SIZE)])
    mean = np.float32([0.48145466, 0.4578275, 0.40821073])
    std = np.float32([0.26862954, 0.26130258, 0.27577711])
    normalised = (pixels / np.float32(255) - mean) / std
    expected = model.towers.embed_images(model.params, pixels)
    for given in (normalised, list(normalised), normalised.astype(np.float64)):
        found = model.embed_images(given, preprocessed=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    nan = normalised * np.float32(np.nan)
    first = normalised.transpose(0, 3, 1, 2)
    for wrong in (pixels, 255 * normalised, nan, first, normalised[:, :8], iter(normalised)):
        with pytest.raises(errors.BadInput, match=r"float \[n, 16, 16, 3\]"):
            model.embed_images(wrong, preprocessed=True)


def test_a_wrong_picture_is_named(model, tmp_path):
    fine = noise(20, 20)
    (tmp_path / "text.jpg").write_text("no picture")
    whole = saved(Image.fromarray(noise(200, 200)))
    half = whole[: len(whole) // 2]
    wrong = [
        (b"GIF89a?", " cannot be decoded (not_a_picture)"),
        (half, " cannot be decoded (truncated)"),
        (Image.open(io.BytesIO(half)), " cannot be decoded (truncated)"),
        (Image.new("1", (9000, 9000)), " cannot be decoded (too_many_pixels)"),
        (tmp_path / "text.jpg", f" ({tmp_path / 'text.jpg'}) cannot be decoded (not_a_picture)"),
        (tmp_path / "absent.jpg", f" ({tmp_path / 'absent.jpg'}) cannot be read (no such file"),
        (str(tmp_path), f" ({tmp_path}) cannot be read (is a directory)"),
        (3, " is of type int: give a path"),
        (None, " is of type NoneType"),
        (fine / 255, " is an array [20, 20, 3] of float64"),
        (fine.transpose(2, 0, 1), " is an array [3, 20, 20] of uint8"),
        (fine[:0], " is an array [0, 20, 3] of uint8"),
    ]
    for one, message in wrong:
        with pytest.raises(errors.BadInput) as caught:
            model.embed_images([fine, one, fine])
        assert str(caught.value).startswith(f"Picture 1{message}"), caught.value
        assert ". " not in str(caught.value)
    for alone in (3, np.float32(3)):
        with pytest.raises(errors.BadInput, match=r"icture (0 )?is (of type int|an array \[\])"):
            model.embed_images(alone)


def test_similarity(model):
    a, b = np.random.default_rng(0).normal(size=(2, 4, 8))
    expected = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    found = model.similarity(a, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for wrong in (b[:, :7], b[0], b[None]):
        with pytest.raises(errors.BadInput, match="have no cosines"):
            model.similarity(a, wrong)


def test_texts(model):
    words = ["a photo of a cat", ""]
    found = model.embed_texts(words)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.embed_texts(words[0]), found[:1], atol=1e-6)
    np.testing.assert_allclose(model.embed_texts(iter(words)), found, atol=1e-6)
    for wrong in ([b"a"], [None], ["a", 3]):
        with pytest.raises(errors.BadInput, match=r"Text \d is of type"):
            model.embed_texts(wrong)


def test_names(model, folder):
    table = huggingface.read(folder).params["entity_table"]
    pictures = [noise(20, 20), noise(18, 30)]
    cosines = model.similarity(model.embed_images(pictures), table)
    named = model.name_entities(pictures, k=3)
    for row, entities in zip(cosines, named, strict=True):
        order = np.argsort(-row)[:3]
        assert [e.qid for e in entities] == [f"Q{i}" for i in order]
        assert [e.name for e in entities] == [NAMES[i] for i in order]
        assert [e.description for e in entities] == [f"a {NAMES[i]}" for i in order]
        np.testing.assert_allclose([e.score for e in entities], row[order], atol=1e-6)
    [[best]] = model.name_entities(pictures[0], 1)
    assert best.qid == named[0][0].qid
    for k in (0, 6):
        with pytest.raises(errors.BadInput, match=f"k={k}"):
            model.name_entities(pictures, k)


def test_eight_devices_and_one(folder):
    pictures = [noise(20 + i, 30) for i in range(11)]
    found = []
    for devices in (jax.local_devices()[:1], jax.local_devices()):
        model = mofi_jax.load(folder, mesh=meshes.make_mesh(devices=devices), batch_size=4)
        assert model.towers.mesh.size == len(devices)
        found.append((model.embed_images(pictures), model.name_entities(pictures, 2)))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    one, eight = ([[e.qid for e in row] for row in names] for _, names in found)
    assert one == eight
    assert inference.load(folder).towers.mesh.size == len(jax.local_devices())


def test_on_accelerators_the_table_lies_on_the_devices(folder, model, monkeypatch):
    monkeypatch.setattr(towers, "_on_cpus", lambda mesh: False)
    there = mofi_jax.load(folder, batch_size=8)
    assert there.params["entity_table"].shape == (8, 8)  # five, padded to eight devices
    assert isinstance(model.params["entity_table"], mapped_table.MappedTable)
    pictures = [noise(20 + i, 30) for i in range(11)]
    for ours, theirs in zip(
        model.name_entities(pictures), there.name_entities(pictures), strict=True
    ):
        assert [e[:3] for e in ours] == [e[:3] for e in theirs]
        np.testing.assert_allclose([e[3] for e in ours], [e[3] for e in theirs], atol=1e-6)


def test_the_notebook_runs(folder, monkeypatch):
    """Every cell, on a tiny model and from the notebook's own folder."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    path = pathlib.Path(__file__).parent.parent / "docs" / "use_a_model.ipynb"
    assert path.stat().st_size < 200_000
    assert "/tmp/" not in path.read_text()
    notebook = nbformat.read(path, 4)
    monkeypatch.setenv("MODEL", str(folder))
    where = {"metadata": {"path": path.parent}}
    nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 3
    assert "cannot be decoded" in outputs[-1].text
