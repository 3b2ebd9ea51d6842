"""Entity top-k of the class table: coverage, macro average, buckets, sharded table."""

import io
import json
import tarfile

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mofi_jax import inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.evaluators import classification
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.scores import classification as scores_lib
from mofi_jax.losses import class_order
from mofi_jax.model import mofi

DIM = 16
CONFIG = mofi.MofiConfig(
    image_size=8,
    patch_size=8,
    image=mofi.TowerConfig(width=8, layers=1, heads=1),
    text=mofi.TowerConfig(width=8, layers=1, heads=1),
    vocab_size=32,
    context_length=4,
    eos_id=3,
    embed_dim=DIM,
)


class Given(inference.Towers):
    """Towers whose image embeddings are the parameters' rows, told by the number in the file."""

    def decode(self, data):
        return np.full((8, 8, 3), int(data), np.uint8)

    def embed_images(self, params, images):
        return params["given"][images[:, 0, 0, 0]]


def towers(mesh, entities):
    return Given(CONFIG, tokenizer=None, entities=entities, preprocess="none", mesh=mesh)


def scores_of(evaluator, params):
    return dict(evaluator.run(embedding.Embedder(evaluator.towers, params)))


def vocabulary(counts):
    names = [f"Q{i}" for i in range(len(counts))]
    return records.Entities(names, names, [""] * len(counts), np.array(counts, np.int64))


def write_set(path, numbers, first=0):
    with tarfile.open(path, "w") as tar:
        for row, number in enumerate(numbers, first):
            info = tarfile.TarInfo(f"{number}_{row:03d}.jpg")
            info.size = len(str(row))
            tar.addfile(info, io.BytesIO(str(row).encode()))
    return path


def write_classes(path, qids):
    rows = [{"class": i, "label": f"thing {i}", "id": qid} for i, qid in enumerate(qids)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def unit(rng, rows):
    features = rng.normal(size=(rows, DIM)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1", "2x2x2"])
def test_scores_by_hand(tmp_path, mesh_of, mesh):
    """Eleven entities on eight devices; class 2 is not in the vocabulary."""
    rng = np.random.default_rng(0)
    entities = vocabulary([2000, 1000, 999, 100, 50, 20, 19, 5, 5, 4, 3])
    table = unit(rng, len(entities))
    # Class -> entity: 0 -> Q0 (2000 pictures), 1 -> Q4 (50), 3 -> Q7 (5).
    classes = write_classes(tmp_path / "classes.jsonl", ["Q0", "Q4", "elsewhere", "Q7"])
    numbers = [0, 0, 0, 0, 1, 1, 2, 2, 3]
    images = write_set(tmp_path / "set.tar", numbers)
    # Each picture lies on an entity: 3 of 4 right, 1 of 2, (two uncovered), 1 of 1.
    given = table[[0, 0, 0, 5, 4, 9, 4, 4, 7]]
    model = towers(mesh_of[mesh], entities)
    # Raw rows have any length: only the direction counts.
    params = model.put({"entity_table": table * rng.uniform(0.5, 3, (len(table), 1))})
    evaluator = classification.Evaluator(model, images=images, classes=classes)
    scores = scores_of(evaluator, params | {"given": given.astype(np.float32)})
    top5 = np.argsort(-given @ table.T, axis=1)[:, :5]
    labels = np.array([0, 0, 0, 0, 4, 4, -1, -1, 7])
    covered = labels >= 0
    assert scores == pytest.approx(
        {
            "coverage": 7 / 9,
            "top1": 5 / 7,
            "top5": (top5 == labels[:, None]).any(1)[covered].mean(),
            "entity_macro": np.mean([3 / 4, 1 / 2, 1]),
            "top1_5_to_19": 1.0,
            "top1_20_to_99": 1 / 2,
            "top1_1000_up": 3 / 4,
        }
    )


def test_nothing_covered(tmp_path, mesh_of):
    """Coverage is told; no score stands for pictures that could not be right."""
    evaluator = classification.Evaluator(
        towers(mesh_of["1x1x1"], vocabulary([5, 5])),
        images=write_set(tmp_path / "set.tar", [0, 1]),
        classes=write_classes(tmp_path / "classes.jsonl", ["A", "B"]),
    )
    assert scores_of(evaluator, {}) == {"coverage": 0.0}


def test_fewer_than_five_entities(tmp_path, mesh_of):
    table = unit(np.random.default_rng(1), 3)
    model = towers(mesh_of["1x8x1"], vocabulary([9, 8, 7]))
    evaluator = classification.Evaluator(
        model,
        images=write_set(tmp_path / "set.tar", [0, 1, 2]),
        classes=write_classes(tmp_path / "classes.jsonl", ["Q0", "Q1", "Q2"]),
    )
    params = model.put({"entity_table": table}) | {"given": table[[1, 1, 2]]}
    scores = scores_of(evaluator, params)
    assert scores["top1"] == pytest.approx(2 / 3)
    assert scores["top5"] == 1.0


@pytest.mark.parametrize("learned", [False, True])
def test_calibration_and_open_set(tmp_path, mesh_of, learned):
    """Against the definitions; the unseen picture of a known entity is left out."""
    rng = np.random.default_rng(2)
    entities = vocabulary(np.full(203, 9))
    table = unit(rng, len(entities))
    labels = rng.integers(0, 4, 60)
    seen = table[labels] + rng.normal(scale=0.35, size=(60, DIM))
    given = np.concatenate([seen, rng.normal(size=(21, DIM))]).astype(np.float32)
    given = given[np.argsort(np.r_[labels, np.full(21, 99)], kind="stable")]
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    labels = np.sort(labels)
    images = write_set(tmp_path / "set.tar", labels)
    unseen = write_set(tmp_path / "unseen.tar", [2] + [7] * 21, first=59)
    classes = write_classes(tmp_path / "classes.jsonl", ["Q0", "Q1", "Q2", "Q3"])
    model = towers(mesh_of["2x2x2"], entities)
    rows = np.empty_like(table)
    rows[class_order.table_rows(np.arange(203), 203)] = table
    params = {"entity_table": rows} | ({"entity_log_scale": np.log(12.0)} if learned else {})
    params = model.put(params) | {"given": given}
    evaluator = classification.Evaluator(
        *(model,), images=images, classes=classes, unseen=unseen, scale=99.0 if learned else 12.0
    )
    scores = scores_of(evaluator, params)

    cosines = given.astype(np.float64) @ table.T
    p = np.exp(12.0 * cosines[:60])
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert scores["ece"] == pytest.approx(error, abs=1e-6)
    highest, known = cosines.max(1), np.arange(81) < 60
    assert scores["open_set_auroc"] == pytest.approx(roc_auc_score(known, highest), abs=1e-6)
    assert evaluator.card()["unseen"]["pictures"] == 22
    assert evaluator.card()["unseen_pictures"] == 21


def test_equal_scores_are_half_in_order():
    positive, negative = np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0])
    expected = roc_auc_score([1, 1, 1, 0, 0], [*positive, *negative])
    assert scores_lib.auroc(positive, negative) == pytest.approx(expected, abs=1e-12)


def test_class_table_must_name_entities_and_all_classes(tmp_path, mesh_of):
    model = towers(mesh_of["1x1x1"], vocabulary([5]))
    images = write_set(tmp_path / "set.tar", [0, 1])
    nameless = tmp_path / "nameless.jsonl"
    nameless.write_text('{"class": 0, "label": "a"}\n{"class": 1, "label": "b"}\n')
    with pytest.raises(BadInput, match="names no entities"):
        classification.Evaluator(model, images=images, classes=nameless)
    short = write_classes(tmp_path / "short.jsonl", ["Q0"])
    with pytest.raises(BadInput, match=r"Class 1 of .* is not in the class table"):
        classification.Evaluator(model, images=images, classes=short)
