"""mteb's protocol, with a stand-in for its loaders; and a real task where mteb is installed."""

import importlib.util
import io

import jax
import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import files as dataset_files
from mofi_jax import inference
from mofi_jax.data import tokenizer
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import retrieval
from mofi_jax.evaluators.features import embedding
from mofi_jax.interop import mteb_model
from mofi_jax.model import mofi

TASK = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model of both towers that looks at 16 pixels, 4 pictures at a time."""
    path = tmp_path_factory.mktemp("texts") / "tokenizer.json"
    dataset_files.train_bpe(["a red circle", "a blue square"], 280, path)
    texts = tokenizer.Tokenizer(path, 8)
    tower = mofi.TowerConfig(width=16, layers=1, heads=2)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=tower,
        text=tower,
        vocab_size=texts.vocab_size,
        context_length=8,
        eos_id=texts.eos_id,
        embed_dim=8,
        dtype="float32",
    )
    spec = "decode|resize_short(16)|center_crop(16)"
    towers = inference.Towers(config, texts, None, spec, meshes.make_mesh(), batch_size=8)
    params = jax.jit(lambda key: mofi.create(config, key))(jax.random.key(1))
    return inference.Model(towers, towers.put(params), "untrained")


@pytest.fixture(scope="module")
def pictures():
    """PNG files of 5 classes with 4 pictures each: noise of 6 x 6 squares around a class's own."""
    rng = np.random.default_rng(0)
    files = []
    for own in rng.integers(0, 256, (5, 6, 6, 3)):
        for _ in range(4):
            squares = np.clip(own + rng.normal(0, 40, own.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(squares.repeat(4, 0).repeat(5, 1)).save(file, "PNG")
            files.append(file.getvalue())
    return files


def loader(size, **columns):
    """Batches of mteb's loaders, of another size than the model's."""
    count = len(next(iter(columns.values())))
    for start in range(0, count, size):
        yield {name: values[start : start + size] for name, values in columns.items()}


def opened(files):
    return [Image.open(io.BytesIO(data)) for data in files]


def test_pictures_are_embedded_as_by_the_model_itself(model, pictures):
    ours = mteb_model.MtebModel(model, "us/model")
    found = ours.encode(loader(3, image=opened(pictures)), batch_size=3, **TASK)
    np.testing.assert_allclose(found, model.embed_images(pictures), atol=1e-6)
    cosines = ours.similarity(found, found[:2])
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)
    np.testing.assert_allclose(ours.similarity_pairwise(found, found), 1, atol=1e-6)


def test_texts_and_pictures_with_texts(model, pictures):
    ours = mteb_model.MtebModel(model, "us/model")
    words = ["a red circle", "blue", "square"]
    found = ours.encode(loader(2, text=words), **TASK)
    np.testing.assert_allclose(found, model.embed_texts(words), atol=1e-6)
    both = ours.encode(loader(2, text=words, image=opened(pictures[:3])), **TASK)
    total = found + model.embed_images(pictures[:3])
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(both, total, atol=1e-6)
    assert ours.encode(loader(2, text=[]), **TASK).shape == (0, 8)


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="needs mteb, an extra")
def test_a_local_task_of_mtebs_gives_our_scores(model, pictures, tmp_path):
    import datasets
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    classes = np.repeat(np.arange(5), 4).tolist()
    names = [f"{number}_{i}" for i, number in enumerate(classes)]

    class Local(AbsTaskRetrieval):
        ignore_identical_ids = True
        metadata = TaskMetadata(
            name="LocalI2IRetrieval",
            description="Pictures of one class find one another.",
            dataset={"path": "local", "revision": "1"},
            type="Any2AnyRetrieval",
            category="i2i",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
            modalities=["image"],
            **dict.fromkeys(
                (
                    *("reference", "date", "domains", "task_subtypes", "license", "dialect"),
                    *("annotations_creators", "sample_creation", "bibtex_citation"),
                )
            ),
        )

        def load_data(self, **options):
            rows = datasets.Dataset.from_dict(
                {"id": names, "image": opened(pictures)},
                features=datasets.Features(
                    {"id": datasets.Value("string"), "image": datasets.Image()}
                ),
            )
            relevant = {
                name: {o: 1 for o, c in zip(names, classes, strict=True) if c == own and o != name}
                for name, own in zip(names, classes, strict=True)
            }
            split = {"corpus": rows, "queries": rows, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    ours = mteb_model.MtebModel(model, "us/model")
    meta = ours.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.modalities) == ("us/model", 8, ["image", "text"])
    assert isinstance(ours, mteb.models.EncoderProtocol)
    [result] = mteb.evaluate(ours, Local(), cache=None, co2_tracker=False).task_results
    [theirs] = result.scores["test"]
    for data, name in zip(pictures, names, strict=True):
        (tmp_path / f"{name}.png").write_bytes(data)
    own = {}
    for protocol in retrieval.PROTOCOLS:
        evaluator = retrieval.Evaluator(model.towers, images=tmp_path, protocol=protocol)
        own |= dict(evaluator.run(embedding.Embedder(model.towers, model.params)))
    assert theirs["hit_rate_at_1"] == pytest.approx(own["recall_at_1"], abs=1e-4)
    assert theirs["map_at_100"] == pytest.approx(own["map_no_self"], abs=1e-4)
