"""The GPR1200 protocol: against its published code, at random, with odd classes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mofi_jax import inference
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import retrieval
from mofi_jax.evaluators.features import embedding

SAMPLE = Path(__file__).parents[1] / "data_prep/sample"


class Fixed:
    """Towers whose embeddings are given: a picture's pixels are its row number."""

    preprocess = "none"
    tokenizer = entities = None

    def __init__(self, features: np.ndarray):
        self.features = features
        self.mesh = meshes.make_mesh()

    def decode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.int64)

    def embed_images(self, params, images):
        return self.features[images[:, 0]]


def scores_of(evaluator: retrieval.Evaluator) -> dict[str, float]:
    return dict(evaluator.run(embedding.Embedder(evaluator.towers, {})))


def write_set(path: Path, sizes: list[int]) -> Path:
    """A tar of len(sizes) classes; the file of picture i is the number i."""
    with tarfile.open(path, "w") as tar:
        row = 0
        for number, size in enumerate(sizes):
            for name in range(size):
                data = np.int64(row).tobytes()
                info = tarfile.TarInfo(f"{number}_{name:02d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                row += 1
    return path


def unit(seed: int, rows: int, dim: int = 16) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def official_precisions(features, categories, keep_self=True):
    """What eval/utils.py of Visual-Computing/GPR1200 computes: sort all, walk over the hits."""
    precisions = []
    for query, row in enumerate(features @ features.T):
        order = np.argsort(-row)
        if not keep_self:
            order = order[order != query]
        hits = np.flatnonzero(categories[order] == categories[query])
        seen = np.arange(1, len(hits) + 1)
        precisions.append((seen / (hits + 1.0)).sum() / len(hits) if len(hits) else np.nan)
    return np.array(precisions)


def expected_at_random(classes: int, size: int, keep_self: bool) -> float:
    """Mean AP when the ranks are a uniformly random subset, in closed form.

    The rank r of a given relevant picture is uniform; of the other m - 1, each stands above it with
    probability (number of places above) / (number of other places).
    """
    places, others = classes * size - 1, size - 1
    rank = np.arange(1, places + 1)
    above = 1 + (others - 1) * (rank - 1) / (places - 1)
    if keep_self:  # first, and everything else one place lower
        return (1 + others * np.mean((above + 1) / (rank + 1))) / size
    return np.mean(above / rank)


def test_equals_the_published_code(tmp_path):
    sizes = [2, 5, 3, 8, 2, 4, 9, 3]  # classes may differ in size
    features = unit(0, sum(sizes))
    # Signal, so that precisions are neither at the floor nor at the ceiling.
    categories = np.repeat(np.arange(len(sizes)), sizes)
    features += 0.5 * unit(1, len(sizes))[categories]
    images = write_set(tmp_path / "set.tar", sizes)
    evaluator = retrieval.Evaluator(Fixed(features), images=images)
    evaluator.domains = ("first", "second")
    expected = official_precisions(features, categories)
    others = official_precisions(features, categories, keep_self=False)
    assert 0.3 < expected.mean() < 0.9
    assert scores_of(evaluator) == pytest.approx(
        {
            "map": expected.mean(),
            "map_no_self": others.mean(),
            "map_macro": np.mean([expected[categories == c].mean() for c in range(8)]),
            "map_no_self_macro": np.mean([others[categories == c].mean() for c in range(8)]),
            "map_first": expected[:18].mean(),
            "map_second": expected[18:].mean(),
            "map_no_self_first": others[:18].mean(),
            "map_no_self_second": others[18:].mean(),
        },
        abs=1e-12,
    )


def test_leave_one_out(tmp_path):
    """R@k with copies of pictures, with a class of one, and with more places than pictures."""
    sizes = [1, 5, 3, 8, 2, 4, 9, 3]
    categories = np.repeat(np.arange(len(sizes)), sizes)
    features = unit(0, sum(sizes)) + 0.4 * unit(1, len(sizes))[categories]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[[3, 20]] = features[[2, 19]]  # whose copies are first, or not: by chance of order
    expected = {}
    for k in (1, 10, 100):
        found = []
        for query in range(len(features)):
            others = np.delete(np.arange(len(features)), query)
            order = others[np.argsort(-(features[others] @ features[query]), kind="stable")]
            found.append(np.any(categories[order[:k]] == categories[query]))
        expected[f"recall_at_{k}"] = np.mean(found[1:])
        expected[f"recall_at_{k}_macro"] = np.mean(
            [np.mean(np.array(found)[categories == c]) for c in range(1, 8)]
        )
    assert 0.3 < expected["recall_at_1"] < expected["recall_at_10"] < 1
    images = write_set(tmp_path / "set.tar", sizes)
    evaluator = retrieval.Evaluator(Fixed(features), images=images, protocol="leave_one_out")
    assert scores_of(evaluator) == pytest.approx({**expected, "left_out": 1.0}, abs=1e-12)
    assert evaluator.card()["self"] == "left out by its number"
    with pytest.raises(BadInput, match=r"Unknown protocol 'r@1': choose from gpr1200, leave_one"):
        retrieval.Evaluator(Fixed(features), images=images, protocol="r@1")


def test_ranks_of_large_classes_are_held_in_parts(tmp_path, monkeypatch):
    sizes = [9, 2, 30, 7]
    evaluator = retrieval.Evaluator(
        Fixed(unit(8, sum(sizes))), images=write_set(tmp_path / "set.tar", sizes)
    )
    whole = scores_of(evaluator)
    monkeypatch.setattr(retrieval, "_RANKS", 30 * 11)
    assert scores_of(evaluator) == whole


def test_classes_in_any_order():
    """Rows of a set need not come by class."""
    classes = np.array([7, 3, 7, 9, 3, 7])
    wanted = np.array([3, 9, 7, 5])
    rows = retrieval.same_class(wanted, classes)
    assert rows.tolist() == [[1, 4, -1], [3, -1, -1], [0, 2, 5], [-1, -1, -1]]


def test_labels_of_other_pictures_fall_to_chance(tmp_path):
    """Good features, whose pictures are then given each other's labels."""
    images = write_set(tmp_path / "set.tar", [10] * 60)
    features = unit(5, 60)[np.repeat(np.arange(60), 10)] + 0.3 * unit(6, 600)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shuffled = features[np.random.default_rng(7).permutation(600)]
    for protocol in retrieval.PROTOCOLS:
        right, wrong = (
            scores_of(retrieval.Evaluator(Fixed(rows), images=images, protocol=protocol))
            for rows in (features, shuffled)
        )
        if protocol == "gpr1200":
            assert right["map_no_self"] > 0.9
            for name, keep_self in (("map", True), ("map_no_self", False)):
                chance = expected_at_random(60, 10, keep_self)
                assert wrong[name] == pytest.approx(chance, abs=0.01)
        else:
            assert right["recall_at_1"] > 0.95
            assert wrong["recall_at_1"] == pytest.approx(9 / 599, abs=0.02)


def test_random_baseline(tmp_path):
    """The known baseline of GPR1200 in closed form, and the evaluator against it at 300 x 10."""
    assert expected_at_random(1200, 10, keep_self=True) == pytest.approx(0.102, abs=5e-4)
    assert expected_at_random(1200, 10, keep_self=False) == pytest.approx(0.0015, abs=5e-5)
    images = write_set(tmp_path / "set.tar", [10] * 300)
    scores = scores_of(retrieval.Evaluator(Fixed(unit(2, 3000, 64)), images=images))
    # Standard error of the mean over seeds: 2e-4 and 3e-4.
    assert scores["map"] == pytest.approx(expected_at_random(300, 10, True), abs=1e-3)
    assert scores["map_no_self"] == pytest.approx(expected_at_random(300, 10, False), abs=1.5e-3)


def test_gpr1200_is_known_by_its_shape(tmp_path):
    images = write_set(tmp_path / "gpr1200.tar", [10] * 1200)
    evaluator = retrieval.Evaluator(Fixed(unit(2, 4)), images=images)
    assert evaluator.domains == ("landmarks", "inaturalist", "sketch", "instre", "sop", "faces")
    # Ordered by number: the text order would put class 10 before class 2.
    np.testing.assert_array_equal(evaluator.pictures.classes, np.repeat(np.arange(1200), 10))


def test_equal_embeddings_are_no_success(tmp_path):
    """A collapsed model: by the mean rank it scores low."""
    images = write_set(tmp_path / "set.tar", [4] * 25)
    scores = scores_of(retrieval.Evaluator(Fixed(np.ones((100, 4))), images=images))
    # All ranks are (100 + 1) / 2, so AP is (1 + 2 + 3 + 4) / 4 / 50.5.
    assert scores["map"] == pytest.approx(2.5 / 50.5)


def test_a_picture_alone_in_its_class(tmp_path):
    sizes = [1, 4, 1, 4]
    features, categories = unit(3, 10), np.repeat(np.arange(4), sizes)
    images = write_set(tmp_path / "set.tar", sizes)
    evaluator = retrieval.Evaluator(Fixed(features), images=images)
    no_self = official_precisions(features, categories, keep_self=False)
    assert scores_of(evaluator) == pytest.approx(
        {
            "map": official_precisions(features, categories).mean(),
            "map_no_self": np.nanmean(no_self),
            "left_out_no_self": 2.0,
            "map_macro": official_precisions(features, categories)
            @ np.repeat([0.25, 1 / 16, 0.25, 1 / 16], sizes),
            "map_no_self_macro": np.nanmean(no_self),
        }
    )
    images = write_set(tmp_path / "alone.tar", [1] * 5)
    with pytest.raises(BadInput, match="single picture"):
        retrieval.Evaluator(Fixed(features), images=images)


def test_a_diverged_model_is_refused(tmp_path):
    features = unit(4, 4)
    features[2, 1] = np.nan
    images = write_set(tmp_path / "set.tar", [2, 2])
    with pytest.raises(BadInput, match=r"of 1_00.jpg are not finite \(row 2\)"):
        scores_of(retrieval.Evaluator(Fixed(features), images=images))


@pytest.mark.parametrize(("name", "score"), [("seen", 0.5291), ("unseen", 0.2487)])
def test_raw_pixels_on_the_sample(name, score):
    """The baseline of the results table."""
    towers = inference.RawPixels(40, meshes.make_mesh())
    evaluator = retrieval.Evaluator(towers, images=SAMPLE / f"{name}.tar")
    assert scores_of(evaluator)["map"] == pytest.approx(score, abs=1e-3)
