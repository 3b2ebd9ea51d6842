"""Zero-shot classification: the order of normalising and averaging, labels, templates."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import zeroshot
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.sets import prompts

ANGLE = np.deg2rad(40)


class Spoken:
    """Towers with given embeddings: pictures by the number in the file, texts by a dictionary."""

    preprocess = "none"
    tokenizer = "one"
    entities = None

    def __init__(self, pictures, texts):
        self.mesh = meshes.make_mesh()
        self.pictures, self.texts = np.array(pictures, np.float32), texts

    def decode(self, data):
        return np.array([int(data)])

    def embed_images(self, params, images):
        return self.pictures[images[:, 0]]

    def embed_texts(self, params, texts):
        return np.array([self.texts[text] for text in texts], np.float32)


@pytest.fixture
def files(tmp_path):
    """Three pictures of classes 7 and 9, which are no consecutive numbers."""
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for row, name in enumerate(["7_a.jpg", "7_b.jpg", "9_a.jpg"]):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(str(row).encode()))
    rows = [{"class": 7, "label": "cat"}, {"class": 8, "label": "-"}, {"class": 9, "label": "{}"}]
    (tmp_path / "classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"images": tmp_path / "set.tar", "classes": tmp_path / "classes.jsonl"}


def test_prompts_are_normalised_before_they_are_averaged(files):
    texts = {
        # A loud and a quiet prompt: the mean of raw embeddings would lie on the loud one.
        "cat": [100.0, 0.0],
        "a cat": [0.0, 0.1],
        # A label is put in as it is, braces and all.
        "{}": [np.cos(-ANGLE), np.sin(-ANGLE)],
        "a {}": [np.cos(-ANGLE), np.sin(-ANGLE)],
    }
    towers = Spoken([[np.cos(ANGLE), np.sin(ANGLE)], [1.0, 0.0], [1.0, -0.1]], texts)
    evaluator = zeroshot.Evaluator(towers, **files, templates=["{}", "a {}"])
    embedder = embedding.Embedder(towers, {})
    np.testing.assert_allclose(
        evaluator.embed_classes(embedder),
        [[np.sqrt(0.5), np.sqrt(0.5)], [np.cos(ANGLE), -np.sin(ANGLE)]],
        atol=1e-6,
    )
    # Cat lies at 45 degrees, the other class at -40: pictures at 40, 0 and -6 degrees.
    assert dict(evaluator.run(embedder)) == pytest.approx(
        {"top1": 2 / 3, "top5": 1.0, "mean_per_class": 3 / 4}
    )
    assert evaluator.card()["templates"] == ["{}", "a {}"]


def test_default_prompt_is_the_label(files):
    texts = {"cat": [0.0, 1.0], "{}": [1.0, 0.0]}
    towers = Spoken([[0.0, 1.0], [0.1, 0.9], [0.2, 0.8]], texts)
    evaluator = zeroshot.Evaluator(towers, **files)
    scores = dict(evaluator.run(embedding.Embedder(towers, {})))
    assert scores["top1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"], ["{}", "{label}"]])
def test_templates_without_a_place_for_the_label(files, templates):
    with pytest.raises(BadInput, match=r"one \{\} each"):
        zeroshot.Evaluator(Spoken([[1.0]], {}), **files, templates=templates)


@pytest.mark.parametrize("templates", ["openai", ""])
def test_unknown_set_of_templates(files, templates):
    with pytest.raises(BadInput, match="choose from openai_imagenet, openai_imagenet_subset"):
        zeroshot.Evaluator(Spoken([[1.0]], {}), **files, templates=templates)


def test_named_templates_are_the_published_ones(files):
    """By their number and a hash of their text, taken when they were compared with the source."""
    digests = {
        name: (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])
        for name, lines in prompts.TEMPLATES.items()
    }
    assert digests == {
        "openai_imagenet": (80, "4f976686fb651bb5"),
        "openai_imagenet_subset": (7, "6ef3883987d224b7"),
        "openai_cifar": (18, "9bbf912e1144ca4c"),
    }
    evaluator = zeroshot.Evaluator(Spoken([[1.0]], {}), **files, templates="openai_cifar")
    assert evaluator.card()["templates"][0] == "a photo of a {}."


def write_labels(files, cat, other):
    rows = [{"class": 7, "label": cat}, {"class": 9, "label": other}]
    files["classes"].write_text("\n".join(map(json.dumps, rows)))


def test_aliases(files):
    """As rows of their class in one mean, the first alone, or the label as it is written."""
    write_labels(files, "cat, pussy cat", "dog")
    texts = {"cat": [1.0, 0.0], "pussy cat": [0.0, 3.0], "cat, pussy cat": [0.6, 0.8]}
    towers = Spoken([[1.0, 0.0]] * 3, texts | {"dog": [0.0, -1.0]})
    for names, direction in (
        ("aliases", [np.sqrt(0.5), np.sqrt(0.5)]),
        ("first", [1.0, 0.0]),
        ("label", [0.6, 0.8]),
    ):
        evaluator = zeroshot.Evaluator(towers, **files, names=names)
        classes = evaluator.embed_classes(embedding.Embedder(towers, {}))
        np.testing.assert_allclose(classes, [direction, [0.0, -1.0]], atol=1e-6)
        assert evaluator.card()["names"] == names
    with pytest.raises(BadInput, match="choose from label, first, aliases"):
        zeroshot.Evaluator(towers, **files, names="last")


def test_names_that_are_missing_or_shared(files, caplog):
    towers = Spoken([[1.0]], {})
    with pytest.raises(BadInput, match=r"The layout of .* names no classes: give `classes`"):
        zeroshot.Evaluator(towers, images=files["images"])
    write_labels(files, "cat", " , dog")
    for names in ("first", "aliases"):
        with pytest.raises(BadInput, match=r"Class 9 of .* has an empty name"):
            zeroshot.Evaluator(towers, **files, names=names)
    write_labels(files, "cat", "cat")
    evaluator = zeroshot.Evaluator(towers, **files)
    assert evaluator.card()["shared_names"] == ["cat"]
    assert "1 names of" in caplog.text
    files["classes"].write_text('{"class": 7, "label": "cat"}')
    with pytest.raises(BadInput, match=r"Class 9 of .* is not in the class table"):
        zeroshot.Evaluator(towers, **files)


def test_equal_classes_come_in_order_of_their_numbers(files):
    """Of two classes with one name the lower number wins: a tie is half right, not all or none."""
    texts = {"cat": [0.0, 1.0], "{}": [0.0, 1.0]}
    towers = Spoken([[0.0, 1.0], [0.1, 0.9], [0.2, 0.8]], texts)
    evaluator = zeroshot.Evaluator(towers, **files)
    scores = dict(evaluator.run(embedding.Embedder(towers, {})))
    assert scores == pytest.approx({"top1": 2 / 3, "top5": 1.0, "mean_per_class": 1 / 2})
