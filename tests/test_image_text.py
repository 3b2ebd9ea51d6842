"""Image-text retrieval against its definition, with equal texts and more places than texts."""

import json

import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators import image_text
from mofi_jax.evaluators.features import embedding
from tests.test_query_index import Towers
from tests.test_retrieval import unit, write_set

PICTURES = 40


def scores_of(evaluator):
    return dict(evaluator.run(embedding.Embedder(evaluator.towers, {})))


def recalls(queries, index, own, other, places=(1, 5, 10)):
    """By a full sort, lower rows first among equals."""
    values = {}
    for k in places:
        near = [np.argsort(-(index @ query), kind="stable")[:k] for query in queries]
        values[k] = np.mean([np.any(other[rows] == own[i]) for i, rows in enumerate(near)])
    return values


@pytest.fixture(scope="module")
def features():
    """Rows 0 to 39 are pictures, the others texts, five of each picture."""
    pictures = unit(0, PICTURES)
    texts = unit(1, 5 * PICTURES) + 0.5 * np.repeat(pictures, 5, axis=0)
    texts[7] = texts[3]  # a caption that two pictures share
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return np.concatenate([pictures, texts]).astype(np.float32)


def test_karpathy(features, tmp_path):
    """Five captions each, in any order of lines; a sixth does not count."""
    images = write_set(tmp_path / "set.tar", [1] * PICTURES)
    order = np.random.default_rng(2).permutation(PICTURES)
    lines = [
        {"image": f"{i}_00.jpg", "captions": [*(str(PICTURES + 5 * i + j) for j in range(5)), "0"]}
        for i in order.tolist()
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluator = image_text.Evaluator(Towers(features), images=images, captions=tmp_path / "c.jsonl")
    rows = (PICTURES + 5 * order[:, None] + np.arange(5)).ravel()
    texts, owners = features[rows], np.repeat(order, 5)
    pictures, numbers = features[:PICTURES], np.arange(PICTURES)
    expected = {}
    for name, values in (
        ("text_to_image", recalls(texts, pictures, owners, numbers)),
        ("image_to_text", recalls(pictures, texts, numbers, owners)),
    ):
        expected |= {f"{name}_recall_at_{k}": value for k, value in values.items()}
    scores = scores_of(evaluator)
    assert 0.2 < scores["text_to_image_recall_at_1"] < scores["text_to_image_recall_at_10"] < 1
    assert scores == pytest.approx(expected, abs=1e-9)
    assert evaluator.card()["texts"] == 5 * PICTURES
    assert evaluator.card()["ties"].startswith("recall: the lower row")


def test_names_of_classes(features, tmp_path):
    """Text to image by category name: six names, of which two are equal, for 40 pictures."""
    sizes = [3, 10, 1, 12, 9, 5]
    images = write_set(tmp_path / "set.tar", sizes)
    names = [40, 61, 40, 100, 120, 150]
    lines = [{"class": c, "label": str(name)} for c, name in enumerate([*names, 9])]
    (tmp_path / "k.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluator = image_text.Evaluator(Towers(features), images=images, classes=tmp_path / "k.jsonl")
    assert evaluator.card()["equal_texts"] == 1
    texts, pictures = features[names], features[:PICTURES]
    classes, numbers = np.repeat(np.arange(6), sizes), np.arange(6)
    precisions = []
    for number, text in enumerate(texts):
        hits = np.flatnonzero(classes[np.argsort(-(pictures @ text))] == number)
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    expected = {"text_to_image_map": np.mean(precisions)}
    for name, values in (
        ("text_to_image", recalls(texts, pictures, numbers, classes)),
        ("image_to_text", recalls(pictures, texts, classes, numbers)),
    ):
        expected |= {f"{name}_recall_at_{k}": value for k, value in values.items()}
    assert scores_of(evaluator) == pytest.approx(expected, abs=1e-9)
    # The same texts as captions of classes.
    lines = [{"class": c, "captions": [str(name)]} for c, name in enumerate(names)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    again = image_text.Evaluator(Towers(features), images=images, captions=tmp_path / "c.jsonl")
    assert scores_of(again) == pytest.approx(expected, abs=1e-9)


def test_one_source_of_texts(features, tmp_path):
    images = write_set(tmp_path / "set.tar", [2, 2])
    for texts, message in (
        ({}, "have no names of their own: set `classes`"),
        ({"captions": "a.jsonl", "classes": "b.jsonl"}, "`captions` or `classes`: leave one out"),
    ):
        with pytest.raises(BadInput, match=message):
            image_text.Evaluator(Towers(features), images=images, **texts)
