"""Loading models of both kinds, and embeddings that do not depend on batch, padding or mesh."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image

from data_prep.dataset import files as dataset_files
from mofi_jax import inference
from mofi_jax.common import errors
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import hosts, meshes
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.interop import huggingface
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import checkpoint, run_folder

SIZE = 16
PREPROCESS = f"decode|resize_short({SIZE})|center_crop({SIZE})"
NAMES = ["poodle", "husky", "cat", "oak", "violin"]
SAMPLE = epath.Path(__file__).parent.parent / "data_prep" / "sample"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe([f"a photo of a {name}" for name in NAMES], 280, path)
    return tokenizer_lib.Tokenizer(path, 8)


@pytest.fixture(scope="module")
def config(tokenizer):
    return mofi.MofiConfig(
        image_size=SIZE,
        patch_size=8,
        image=mofi.TowerConfig(16, 1, 2),
        text=mofi.TowerConfig(16, 1, 2),
        vocab_size=tokenizer.vocab_size,
        context_length=tokenizer.context_length,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def entities():
    counts = np.arange(len(NAMES), 0, -1)
    return records.Entities([f"Q{i}" for i in range(5)], NAMES, [""] * 5, counts)


@pytest.fixture(scope="module")
def params(config):
    """With a class table of 5 real rows, as a run on a mesh of 6 would pad it."""
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    table = rng.normal(size=(6, config.embed_dim)).astype(np.float32)
    table[5] = 100  # a padding row that must never be named
    return tree | {"entity_table": table}


def _towers(config, tokenizer, entities, mesh, batch_size):
    return inference.Towers(
        config=config,
        tokenizer=tokenizer,
        entities=entities,
        preprocess=PREPROCESS,
        mesh=mesh,
        batch_size=batch_size,
    )


def _picture(color, size=(30, 20), format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, config, params, tokenizer, entities):
    folder = tmp_path_factory.mktemp("exported")
    huggingface.write(folder, huggingface.Clip(config, params, tokenizer, entities, PREPROCESS))
    return folder


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2", "8x1x1"])
def test_the_same_on_every_mesh_and_batch(mesh_of, mesh, config, params, tokenizer, entities):
    images = np.random.default_rng(2).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
    texts = [f"a photo of a {name}" for name in NAMES] * 2 + [""]
    expected_images = np.asarray(
        jax.jit(mofi.embed_images, static_argnums=0)(config, params, images)
    )
    expected_texts = np.asarray(
        jax.jit(mofi.embed_texts, static_argnums=0)(config, params, tokenizer(texts))
    )
    table = params["entity_table"][:5]
    cosines = expected_images @ (table / np.linalg.norm(table, axis=1, keepdims=True)).T
    towers = _towers(config, tokenizer, entities, mesh_of[mesh], batch_size=4)
    on_devices = towers.put(params)
    found = towers.embed_images(on_devices, images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_images, atol=1e-6)
    np.testing.assert_allclose(towers.embed_texts(on_devices, texts), expected_texts, atol=1e-6)
    # Any length is accepted for the embeddings; the cosine is what comes back.
    ids, values = towers.nearest_entities(on_devices, 3 * expected_images, 2)
    np.testing.assert_array_equal(ids, np.argsort(-cosines, axis=1)[:, :2])
    np.testing.assert_allclose(values, -np.sort(-cosines, axis=1)[:, :2], atol=1e-6)


def test_nothing_in_nothing_out(mesh_of, config, params, tokenizer, entities):
    towers = _towers(config, tokenizer, entities, mesh_of["1x1x1"], batch_size=4)
    images = np.zeros((0, SIZE, SIZE, 3), np.uint8)
    assert towers.embed_images(params, images).shape == (0, config.embed_dim)
    assert towers.embed_texts(params, []).shape == (0, config.embed_dim)


def test_compiled_once_for_all_batches(mesh_of, config, params, tokenizer, entities):
    towers = _towers(config, tokenizer, entities, mesh_of["1x1x1"], batch_size=2)
    on_devices = towers.put(params)
    for number in (2, 3, 5):
        towers.embed_images(on_devices, np.zeros((number, SIZE, SIZE, 3), np.uint8))
    assert towers._image_step._cache_size() == 1
    towers.embed_images(on_devices, np.zeros((1, SIZE, SIZE, 3), np.uint8))
    assert towers._image_step._cache_size() == 2  # less than a batch costs less


def test_load_exported_folder(exported, mesh_of, config, params):
    # It has no steps.
    model = inference.load(exported, mesh=mesh_of["2x2x2"], batch_size=8, step="7")
    assert model.description == str(exported)
    files = [_picture("red"), _picture((0, 90, 200), (16, 16), "JPEG"), _picture("white", (1, 1))]
    embeddings = model.embed_images(files)
    pixels = np.stack([model.towers.decode(data) for data in files])
    expected = jax.jit(mofi.embed_images, static_argnums=0)(config, params, pixels)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_load_training_run(monkeypatch, tmp_path, mesh_of, config, params, tokenizer, entities):
    description = run_folder.describe_model(config, PREPROCESS)
    description["attention"] = "cudnn"  # trained on a GPU, read on a CPU
    (tmp_path / "model.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    records.write_entities(tmp_path / "entities.parquet", entities)
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_, **__: params)
    model = inference.load(tmp_path, mesh=mesh_of["8x1x1"])
    assert model.towers.config == config
    assert model.towers.entities.names == NAMES
    expected = jax.jit(mofi.embed_texts, static_argnums=0)(config, params, tokenizer(["a cat"]))
    np.testing.assert_allclose(model.embed_texts(["a cat"]), expected, atol=1e-6)


def test_a_class_table_in_another_order_is_refused(
    monkeypatch, tmp_path, config, params, tokenizer, entities
):
    description = run_folder.describe_model(config, PREPROCESS)
    del description["table_order"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    records.write_entities(tmp_path / "entities.parquet", entities)
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_, **__: params)
    with pytest.raises(errors.BadInput, match="trained by another version, whose class table"):
        inference.load(tmp_path, mesh=meshes.make_mesh())


def test_names_follow_the_order_of_the_class_table(tmp_path, mesh_of, config, params, tokenizer):
    """200 entities, whose rows are not their ids: named, exported and read back as themselves."""
    count = 200
    qids = [f"Q{i:03d}" for i in range(count)]
    many = records.Entities(qids, qids, [""] * count, np.full(count, 3))
    by_id = np.random.default_rng(0).normal(size=(count, config.embed_dim)).astype(np.float32)
    rows = class_order.table_rows(np.arange(count), count)
    assert np.any(rows != np.arange(count))
    table = np.zeros_like(by_id)
    table[rows] = by_id
    towers = _towers(config, tokenizer, many, mesh_of["2x2x2"], batch_size=16)
    with_table = {**params, "entity_table": table}
    found, cosines = towers.nearest_entities(towers.put(with_table), by_id, 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(count))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)

    clip = huggingface.Clip(config, with_table, tokenizer, many, PREPROCESS)
    huggingface.write(tmp_path / "hf", clip)
    # In the file, row i is entity i.
    file = safetensors.numpy.load_file(tmp_path / "hf" / huggingface.ENTITY_TABLE_FILE)
    np.testing.assert_array_equal(file["entity_table"], by_id)
    again = huggingface.read(tmp_path / "hf")
    np.testing.assert_array_equal(again.params["entity_table"], table)


def test_bad_folders(tmp_path, exported):
    with pytest.raises(errors.BadInput, match="neither a training run"):
        inference.load(tmp_path, mesh=meshes.make_mesh())
    with pytest.raises(errors.BadInput, match="neither a training run"):
        inference.load(tmp_path / "absent", mesh=meshes.make_mesh())
    (tmp_path / "model.json").write_text('{"image_size": 16}')
    with pytest.raises(errors.BadInput, match="does not describe a model"):
        inference.load(tmp_path, mesh=meshes.make_mesh())


def test_host_0_says_what_a_folder_is_and_none_reads_alone(tmp_path, exported, monkeypatch):
    """A host that refused before the others ask would leave them waiting for its answer."""

    def refuse(_):
        raise errors.BadInput("as host 0 says")

    for ask in ("agree", "all_or_none"):
        with monkeypatch.context() as patch:
            patch.setattr(hosts, ask, refuse)
            with pytest.raises(errors.BadInput, match="as host 0 says"):
                inference.read(tmp_path if ask == "agree" else exported)


def test_without_text_or_entities(mesh_of, config, params):
    towers = _towers(config, None, None, mesh_of["1x1x1"], batch_size=4)
    with pytest.raises(errors.BadInput, match=r"no tokenizer\.json"):
        towers.embed_texts(params, ["a"])
    with pytest.raises(errors.BadInput, match="no entity table"):
        towers.nearest_entities(params, np.zeros((1, config.embed_dim), np.float32), 1)


def test_supervised_model_has_no_text_tower(mesh_of, config, params, tokenizer):
    towers = _towers(config, tokenizer, None, mesh_of["1x1x1"], batch_size=4)
    with pytest.raises(errors.BadInput, match="no text tower"):
        towers.embed_texts({"image": params["image"]}, ["a"])


def test_preprocessing_of_another_size(mesh_of, config, tokenizer):
    towers = _towers(config, tokenizer, None, mesh_of["1x1x1"], batch_size=4)
    towers = dataclasses.replace(towers, preprocess="decode|resize_short(20)")
    with pytest.raises(errors.BadInput, match=r"center_crop\(16\)"):
        towers.decode(_picture("red"))


# -------------------------------------------------------------------------------------- raw pixels


def test_raw_pixels_feature():
    baseline = inference.RawPixels(SIZE, meshes.make_mesh())
    image = baseline.decode(_picture("white"))
    feature = baseline.embed_images(None, image[None])
    assert feature.shape == (1, 3 * SIZE**2)
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    white = (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / std
    expected = np.tile(white / np.linalg.norm(white), SIZE**2) / SIZE
    np.testing.assert_allclose(feature[0], expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "score"), [("unseen", 0.249), ("seen", 0.529)])
def test_raw_pixels_on_the_sample(name, score):
    """The first row of the table of results, by plain numpy from the definition of the protocol."""
    pictures = picture_sets.read_set(SAMPLE / f"{name}.tar")
    towers = inference.RawPixels(40, meshes.make_mesh())
    features = embedding.Embedder(towers, None).pictures(pictures).numpy()
    order = np.argsort(-features @ features.T, axis=1, kind="stable")
    precisions = []
    for query, ranking in enumerate(order):
        ranks = np.flatnonzero(pictures.classes[ranking] == pictures.classes[query]) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert np.mean(precisions) == pytest.approx(score, abs=1e-3)
