"""k-NN, few-shot ridge and linear probes against scikit-learn and plain NumPy."""

import io
import tarfile

import numpy as np
import pytest
from sklearn import linear_model, neighbors

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators import few_shot, knn, linear_probe
from mofi_jax.evaluators.features import adamw, embedding, linear, logistic
from mofi_jax.evaluators.sets import split

DIM = 7
# Class numbers are not consecutive, sizes divide by no number of devices, and class 40 has fewer
# pictures than some numbers of shots.
TRAIN = np.repeat([3, 17, 18, 40], [31, 19, 24, 4])
TEST = np.repeat([3, 18, 40], [9, 11, 3])


class Given:
    """Towers whose embeddings are given: a picture's pixels are its row number."""

    preprocess = "none"
    tokenizer = entities = None

    def __init__(self, features, mesh):
        self.features, self.mesh = features, mesh

    def decode(self, data):
        return np.frombuffer(data, np.int64)

    def embed_images(self, params, images):
        return self.features[images[:, 0]]


def write_set(path, numbers, first_row=0):
    """A tar of pictures of these classes; the file of picture i is the number first_row + i."""
    with tarfile.open(path, "w") as tar:
        for row, number in enumerate(numbers, first_row):
            data = np.int64(row).tobytes()
            info = tarfile.TarInfo(f"{number}_{row:05d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def clusters(numbers, seed, dim=DIM, noise=0.9):
    """Unit vectors around one centre a class, with unequal variances and a common mean."""
    centres = np.random.default_rng(99).normal(size=(100, dim))
    rng = np.random.default_rng(seed)
    rows = centres[numbers] + noise * rng.normal(size=(len(numbers), dim))
    rows = (rows + 1) * np.arange(1, dim + 1) ** -0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def sets(tmp_path):
    return {
        "train": write_set(tmp_path / "train.tar", TRAIN),
        "images": write_set(tmp_path / "test.tar", TEST, len(TRAIN)),
    }


X, X_TEST = clusters(TRAIN, 0), clusters(TEST, 1)


def scores_of(kind, mesh, features=None, **keys):
    features = np.concatenate([X, X_TEST]) if features is None else features
    evaluator = kind.Evaluator(Given(features, mesh), **keys)
    scores = dict(evaluator.run(embedding.Embedder(evaluator.towers, {})))
    card = evaluator.card()
    assert card["train"]["pictures"] == len(evaluator.split.train_labels)
    assert card["test"]["sha256"] != card["train"]["sha256"]
    return scores


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_knn_as_scikit_learn(sets, mesh_of, mesh):
    expected = {}
    for k in (1, 5, 20, 60):
        votes = neighbors.KNeighborsClassifier(
            k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute"
        )
        expected[f"dino_k{k}"] = votes.fit(X, TRAIN).score(X_TEST, TEST)
    expected["dino_best"] = max(expected.values())
    assert len(set(expected.values())) > 1
    scores = scores_of(knn, mesh_of[mesh], **sets, k=(1, 5, 20, 60))
    assert scores == pytest.approx(expected, abs=1e-6)


def test_knn_of_more_neighbours_than_pictures(sets, mesh_of):
    """All of them vote."""
    scores = scores_of(knn, mesh_of["1x8x1"], **sets, k=(len(TRAIN), 500))
    assert scores[f"dino_k{len(TRAIN)}"] == scores["dino_k500"]
    assert scores_of(knn, mesh_of["1x8x1"], **sets, k=500)["dino_best"] == scores["dino_k500"]


def official_shots(labels, shots, seed):
    """How big_vision draws them."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.where(labels == c)[0])[:shots] for c in range(labels.max() + 1)]
    return np.concatenate(rows)


@pytest.mark.parametrize("shots", [1, 5])  # fewer and more pictures than features
def test_few_shot_as_scikit_learn(sets, mesh_of, shots):
    labels = np.unique(TRAIN, return_inverse=True)[1]
    strengths = (2.0**-3, 2.0**10)
    expected = np.zeros(2)
    for seed in range(3):
        rows = official_shots(labels, shots, seed)
        np.testing.assert_array_equal(few_shot.draw(labels, shots, seed), rows)
        x = X[rows].astype(np.float64)
        mean, std = x.mean(0), x.std(0) + 1e-5
        targets = 2.0 * np.eye(4)[labels[rows]] - 1
        solved = few_shot.ridge(X[rows], labels[rows], 4, strengths)
        for i, (weights, bias) in enumerate(solved):
            model = linear_model.Ridge(strengths[i], fit_intercept=False, solver="svd")
            model.fit(np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0), targets)
            whitened = np.pad((X_TEST - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
            logits = model.predict(whitened)
            np.testing.assert_allclose(X_TEST @ weights + bias, logits, atol=1e-6)
            expected[i] += (np.unique(TRAIN)[logits.argmax(1)] == TEST).mean() / 3
    scores = scores_of(few_shot, mesh_of["1x8x1"], **sets, shots=(shots,), l2=strengths)
    wanted = {f"big_vision_{shots}shot": expected[1], f"big_vision_{shots}shot_best": max(expected)}
    assert scores == pytest.approx(wanted, abs=1e-6)


def objective(weights, bias, x, labels, strength):
    """scikit-learn's, divided by C n; of two classes it penalises the difference alone."""
    if weights.shape[1] == 1:
        weights, bias = np.pad(weights, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
        ridge = (weights**2).sum()
    else:
        ridge = (weights**2).sum() * (2 if weights.shape[1] == 2 else 1)
    logits = x.astype(np.float64) @ weights + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), labels]
    return losses.mean() + ridge / (2 * strength * len(x))


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_reaches_scikit_learns_optimum(mesh_of, classes):
    """Whatever was solved before; rows that take no part leave no trace."""
    numbers = np.random.default_rng(0).integers(0, classes, 203)
    x = clusters(numbers, 2, noise=1.5)
    labels = numbers.astype(np.int32)
    labels[::5] = linear.NO_LABEL
    features = embedding.Features.of(x, mesh_of["2x2x2"])
    fit = logistic.Trainer(features, classes, seed=0)
    kept = labels >= 0
    for strength in (1e-3, 1e4, 1.0):
        weights, bias = fit(labels, strength)
        model = linear_model.LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
        model.fit(x[kept], labels[kept])
        ours = objective(weights, bias, x[kept], labels[kept], strength)
        best = objective(model.coef_.T, model.intercept_, x[kept], labels[kept], strength)
        assert best - 1e-7 < ours < best + 2 * logistic.GAP
        accuracy = (linear.answers(features, weights, bias) == numbers).mean()
        assert accuracy == pytest.approx(model.score(x, numbers), abs=0.001)


def test_clip_lbfgs_as_scikit_learn(sets, mesh_of):
    scores = scores_of(linear_probe, mesh_of["1x8x1"], **sets)
    model = linear_model.LogisticRegression(C=scores["clip_lbfgs_C"], tol=1e-6, max_iter=1000)
    right = model.fit(X, TRAIN).predict(X_TEST) == TEST
    assert scores["clip_lbfgs_top1"] == pytest.approx(right.mean(), abs=0.001)
    mean = np.mean([right[number == TEST].mean() for number in np.unique(TEST)])
    assert scores["clip_lbfgs_mean_per_class"] == pytest.approx(mean, abs=0.001)
    assert 0.5 < scores["clip_lbfgs_validation"] <= 1


def numpy_adamw(x, labels, order, start, decay):
    """AdamW by torch's definition, rate 0.1 with cosine decay, over batches of rows."""
    weights = np.concatenate([start[0], start[1][None]]).astype(np.float64)
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0)
    first = second = np.zeros_like(weights)
    for step, batch in enumerate(order):
        rows = batch[batch < len(x)]
        p = np.exp(x[rows] @ weights)
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), labels[rows]] -= 1
        gradient = x[rows].T @ p / len(rows)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.05 * (1 + np.cos(np.pi * step / len(order)))
        weights = weights * (1 - rate * decay)
        corrected = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        weights = weights - rate * first / (1 - 0.9 ** (step + 1)) / corrected
    return weights[:-1], weights[-1]


def test_adamw_by_its_definition(mesh_of, monkeypatch):
    """The last batch of an epoch is short, and none is dropped."""
    monkeypatch.setattr(adamw, "EPOCHS", 3)
    monkeypatch.setattr(adamw, "BATCH", 32)
    labels = np.unique(TRAIN, return_inverse=True)[1].astype(np.int32)
    labels[7] = linear.NO_LABEL
    fit = adamw.Trainer(embedding.Features.of(X, mesh_of["2x2x2"]), 4, seed=5)
    order, start = fit.plan(labels)
    assert sorted(order[:3].ravel()) == sorted([*range(7), *range(8, 78), *[78] * 19])
    expected = numpy_adamw(X, labels, order, start, 0.02)
    for ours, theirs in zip(fit(labels, 0.02), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_clip_benchmark_adamw_survives_its_own_grid(sets, mesh_of):
    """At its upper end the rate times the decay is 10, and weights grow beyond all bounds."""
    scores = scores_of(linear_probe, mesh_of["1x1x1"], **sets, form="clip_benchmark_adamw")
    assert scores["clip_benchmark_adamw_top1"] > 0.5
    assert scores["clip_benchmark_adamw_weight_decay"] < 1


def test_search_is_coarse_to_fine():
    asked = []

    def score(place):
        asked.append(place)
        return -abs(place - 37.0)

    assert linear_probe.find_peak(score, 97) == (37, 0)
    assert asked == [0, 16, 32, 48, 64, 80, 96, 24, 40, 36, 44, 34, 38, 35, 37]
    assert linear_probe.find_peak(lambda place: 1.0, 97) == (0, 1.0)
    assert linear_probe.find_peak(lambda place: float(place), 97) == (96, 96.0)


def test_classes_named_by_their_folders(tmp_path):
    """Folders are numbered in their order: one that the test set lacks shifts those behind it."""
    for name in (
        "train/ant/1",
        "train/bee/1",
        "train/cat/1",
        "train/cat/2",
        "test/ant/1",
        "test/cat/1",
    ):
        path = tmp_path / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = split.read_split(tmp_path / "train", tmp_path / "test")
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([0, 1, 2, 2], [0, 2])


def test_held_out_pictures_are_a_share_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 3, 50]))
    held = linear_probe.hold_out(labels, 0.2, 0)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=3), [2, 0, 10])
    assert (held != linear_probe.hold_out(labels, 0.2, 1)).any()


@pytest.mark.parametrize("kind", [knn, few_shot, linear_probe])
def test_what_cannot_be_learned_from(tmp_path, sets, mesh_of, kind):
    def build(**keys):
        return kind.Evaluator(Given(None, mesh_of["1x1x1"]), **sets | keys)

    with pytest.raises(BadInput, match="would find itself"):
        build(train=sets["images"])
    fewer = write_set(tmp_path / "fewer.tar", [3, 3, 40])
    with pytest.raises(BadInput, match=r"Class 18 of .* has no pictures in .*1 such classes of 3"):
        build(train=fewer)
    one = write_set(tmp_path / "one.tar", [3, 3])
    with pytest.raises(BadInput, match="of one class"):
        build(train=one, images=write_set(tmp_path / "other.tar", [3]))
    features = np.concatenate([X, X_TEST])
    features[-1, 0] = np.nan
    with pytest.raises(BadInput, match="not finite"):
        scores_of(kind, mesh_of["1x8x1"], features, **sets)


@pytest.mark.parametrize(
    ("kind", "keys", "sentence"),
    [
        (knn, {"k": ()}, "numbers of neighbours"),
        (knn, {"k": (0,)}, "numbers of neighbours"),
        (knn, {"temperature": 0.0}, "temperature above 0"),
        (knn, {"k": 0}, "numbers of neighbours from 1 on"),
        (few_shot, {"shots": (0,)}, "numbers above 0"),
        (few_shot, {"shots": 0}, "of shots and seeds whole ones"),
        (few_shot, {"l2": ()}, "numbers above 0"),
        (few_shot, {"seeds": 0}, "numbers above 0"),
        (linear_probe, {"form": "sgd"}, "choose from clip_lbfgs"),
        (linear_probe, {"held_out": 0.001}, "a share between 0 and 1"),
        (linear_probe, {"held_out": 1.0}, "a share between 0 and 1"),
    ],
)
def test_settings_without_a_meaning(sets, mesh_of, kind, keys, sentence):
    with pytest.raises(BadInput, match=sentence):
        kind.Evaluator(Given(None, mesh_of["1x1x1"]), **sets, **keys)
