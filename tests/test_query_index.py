"""Queries apart from their index: every protocol against its published code, written anew."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from mofi_jax import inference
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import meshes
from mofi_jax.evaluators import query_index, suite
from mofi_jax.evaluators.features import embedding
from tests.test_retrieval import Fixed, unit, write_set

SIZES = [6, 1, 9, 4, 12, 3, 5]  # pictures by class
CLASSES = np.repeat(np.arange(len(SIZES)), SIZES)
NAMES = [f"{c}_{i:02d}.jpg" for c, size in enumerate(SIZES) for i in range(size)]
QUERIES = 12


class Towers(Fixed):
    """Of pictures, the first are those of the queries; a text is the number of its row."""

    tokenizer = "numbers"

    def embed_texts(self, params, texts):
        return self.features[[int(text) for text in texts]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Features of 12 queries of the classes 0, 2, 4, 5 and of the index; their two tars."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "queries.tar", [3] * 4)
    index = write_set(folder / "index.tar", SIZES)
    labels = np.repeat([0, 2, 4, 5], 3)
    queries = unit(0, QUERIES) + 0.6 * unit(1, len(SIZES))[labels]
    rows = unit(2, len(NAMES)) + 0.6 * unit(1, len(SIZES))[CLASSES]
    queries, rows = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, rows))
    return folder, index, queries.astype(np.float32), rows.astype(np.float32), labels


def build(sets, lines, protocol, queries=None, rows=None):
    """The evaluator and its scores; a picture of either set is known by its length of bytes."""
    folder, index, own_queries, own_rows, _ = sets
    queries = own_queries if queries is None else queries
    rows = own_rows if rows is None else rows
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    towers = Towers(queries)
    texts = "text" in lines[0]
    evaluator = query_index.Evaluator(
        towers,
        queries=folder / "q.jsonl",
        index=index,
        protocol=protocol,
        **({} if texts else {"images": folder / "queries.tar"}),
    )
    embedder = embedding.Embedder(towers, {})
    embedder.pictures = lambda pictures: embedding.Features.of(
        rows if pictures is evaluator.index else queries, towers.mesh
    )
    return evaluator, dict(evaluator.run(embedder))


def image(query):
    return f"{query // 3}_{query % 3:02d}.jpg"


def order_of(sets, query):
    """The index, nearest first."""
    return np.argsort(-(sets[3] @ sets[2][query]), kind="stable")


def test_revisited(sets):
    """As revisitop's evaluate.py: junk is taken out of the list, then positions are counted."""
    rng = np.random.default_rng(3)
    lines, setups = [], {"easy": [], "hard": []}
    for query in range(QUERIES):
        line = {"image": image(query), "positives": {}, "junk": {}}
        for setup, truth in setups.items():
            drawn = rng.permutation(len(NAMES))
            count = 0 if query == 5 or (setup == "hard" and query == 7) else rng.integers(1, 9)
            truth.append((drawn[:count], drawn[20:26]))
            line["positives"][setup] = [NAMES[row] for row in drawn[:count]]
            line["junk"][setup] = [NAMES[row] for row in drawn[20:26]]
        lines.append(line)
    expected = {}
    for setup, truth in setups.items():
        values = []
        for query, (positives, junk) in enumerate(truth):
            if not len(positives):
                continue
            listed = [row for row in order_of(sets, query) if row not in junk]
            places = np.array([i for i, row in enumerate(listed) if row in positives])
            area = 0.0
            for j, place in enumerate(places):
                area += (1.0 if place == 0 else j / place) + (j + 1) / (place + 1)
            at = [min(max(places + 1), k) for k in (1, 5, 10)]
            values.append([area / 2 / len(places), *((places < k).sum() / k for k in at)])
        names = ("map", "mp_at_1", "mp_at_5", "mp_at_10")
        means = np.mean(values, axis=0)
        expected |= {f"{name}_{setup}": v for name, v in zip(names, means, strict=True)}
        expected[f"left_out_{setup}"] = float(QUERIES - len(values))
    evaluator, scores = build(sets, lines, "revisited")
    assert scores == pytest.approx(expected, abs=1e-9)
    assert scores["left_out_hard"] == 2
    assert evaluator.card()["ties"] == "mean"


@pytest.mark.parametrize(("protocol", "k"), [("gldv2", 100), ("ilias", 1000), ("inquire", 50)])
def test_average_precision_of_the_first_places(sets, protocol, k):
    """More places than pictures, a query of nothing, two splits."""
    truth = [np.flatnonzero(c == CLASSES) for c in sets[4]]
    truth[3] = np.array([], int)
    lines = [
        {
            **({"text": str(query)} if protocol == "inquire" else {"image": image(query)}),
            "positives": [NAMES[row] for row in rows],
            "split": ("private", "public")[query % 2],
        }
        for query, rows in enumerate(truth)
    ]
    expected = {}
    for split in (0, 1):
        values = []
        for query in range(split, QUERIES, 2):
            if len(truth[query]):
                right = np.isin(order_of(sets, query), truth[query])[:k]
                found = metrics.average_precision_score(right, -np.arange(len(right)))
                values.append(found * right.sum() / min(k, len(truth[query])))
        expected[f"map_at_{k}_{('private', 'public')[split]}"] = np.mean(values)
    _, scores = build(sets, lines, protocol)
    assert scores == pytest.approx(expected | {"left_out_public": 1.0}, abs=1e-9)


def test_uned(sets):
    """A merged index; where queries lie in it, each is its own junk; the mean is over domains."""
    rows = sets[3]
    own = [0, 1, 7, 8, 16, 20, 21, 30, 6, 33, 34, 39]  # rows of the index that are queries
    domains = ["sop"] * 4 + ["met"] * 8
    lines = [
        {
            **{"image": image(query), "classes": [int(CLASSES[row])]},
            **{"junk": [NAMES[row]], "domain": domain},
        }
        for query, (row, domain) in enumerate(zip(own, domains, strict=True))
    ]
    values = {"sop": [], "met": []}
    for row, domain in zip(own, domains, strict=True):
        others = np.delete(np.arange(len(rows)), row)
        near = others[np.argsort(-(rows[others] @ rows[row]), kind="stable")]
        count = (CLASSES[others] == CLASSES[row]).sum()
        if count:  # the class of row 6 has no other picture
            same = CLASSES[near] == CLASSES[row]
            values[domain].append([same[: min(5, count)].mean(), same[0]])
    evaluator, scores = build(sets, lines, "uned", queries=rows[own])
    names = ("mmp_at_5", "recall_at_1")
    expected = {"left_out": 1.0}
    for i, name in enumerate(names):
        parts = {domain: np.mean(each, axis=0)[i] for domain, each in values.items()}
        expected |= {name: np.mean(list(parts.values()))}
        expected |= {f"{name}_{domain}": value for domain, value in parts.items()}
    assert scores == pytest.approx(expected, abs=1e-9)
    assert evaluator.card()["queries_with_a_copy"] == 0


def test_a_query_left_in_the_index_is_told(sets, caplog):
    rows = sets[3]
    own = list(range(QUERIES))
    lines = [{"image": image(q), "classes": [int(CLASSES[row])]} for q, row in enumerate(own)]
    evaluator, scores = build(sets, lines, "uned", queries=rows[own])
    assert scores["recall_at_1"] == 1
    assert evaluator.card()["queries_with_a_copy"] == 1
    assert "100 % of the queries" in caplog.text


def test_met(sets):
    """As nikosips/met: classes by their nearest picture, a softmax over all classes, GAP."""
    rng = np.random.default_rng(5)
    labels = [int(c) if rng.random() < 0.7 else -1 for c in sets[4]]
    split = ["val" if query % 3 == 0 else "test" for query in range(QUERIES)]
    lines = [
        {"image": image(q), "classes": [labels[q]] if labels[q] >= 0 else [], "split": split[q]}
        for q in range(QUERIES)
    ]

    def evaluate(part, k, scale, distractors=True):
        rows = [q for q in range(QUERIES) if split[q] == part and (distractors or labels[q] >= 0)]
        predictions = []
        for query in rows:
            near, best = order_of(sets, query)[:k], {}
            for row in near:
                score = float(sets[3][row] @ sets[2][query])
                best[CLASSES[row]] = max(best.get(CLASSES[row], 0), score)
            powers = {c: np.exp(scale * score) for c, score in best.items()}
            total = sum(powers.values()) + len(SIZES) - len(powers)
            winner = max(powers, key=powers.get)
            predictions.append((powers[winner] / total, winner == labels[query]))
        predictions.sort(key=lambda prediction: -prediction[0])
        right = np.array([hit for _, hit in predictions])
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        return (precision * right).sum() / sum(labels[q] >= 0 for q in rows), right

    best, chosen = -1, None
    for k in query_index.MET_NEIGHBOURS:
        for scale in query_index.MET_SCALES:
            score, _ = evaluate("val", k, scale)
            if score > best + 1e-12:
                best, chosen = score, (k, scale)
    evaluator, scores = build(sets, lines, "met")
    assert tuple(evaluator.card()["tuned_on_val"].values()) == chosen
    gap_minus, right = evaluate("test", *chosen, distractors=False)
    expected = {"gap": evaluate("test", *chosen)[0], "gap_minus": gap_minus}
    assert scores == pytest.approx({**expected, "accuracy": right.mean()}, abs=1e-9)
    assert 0 < scores["gap"] < scores["gap_minus"] < 1


@pytest.mark.parametrize(
    ("protocol", "line", "message"),
    [
        ("map", {"image": "0_00.jpg", "classes": [0]}, "Unknown protocol 'map': choose from"),
        ("revisited", {"image": "0_00.jpg", "classes": [0]}, "revisited needs `positives`"),
        ("met", {"image": "0_00.jpg", "classes": [0]}, "met needs `classes` and the splits"),
    ],
)
def test_protocols_that_do_not_fit(sets, protocol, line, message):
    with pytest.raises(BadInput, match=message):
        build(sets, [line], protocol)


def test_queries_in_words_need_a_text_tower(sets):
    folder, index, queries, _, _ = sets
    (folder / "t.jsonl").write_text('{"text": "0", "classes": [0]}')
    config = {"kind": "query_index", "protocol": "inquire", "queries": folder / "t.jsonl"}
    config["index"] = index
    built = suite.build_all(Fixed(queries), {"words": config})
    assert built.skipped == {"words": "the model has no tokenizer"}
    assert list(suite.build_all(Towers(queries), {"words": config}).evaluators) == ["words"]
    with pytest.raises(BadInput, match="are texts: leave `images` out"):
        suite.build_all(Towers(queries), {"words": {**config, "images": folder / "queries.tar"}})
    (folder / "t.jsonl").write_text('{"image": "0_00.jpg", "classes": [0]}')
    with pytest.raises(BadInput, match="are pictures: name their set in `images`"):
        suite.build_all(Towers(queries), {"words": config})


def test_boxes_and_distractors_of_real_pictures(tmp_path):
    """Each query is one quarter of a picture, and the index has that quarter as a picture."""
    rng = np.random.default_rng(6)
    quarters = rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    whole = np.vstack([np.hstack(quarters[:2]), np.hstack(quarters[2:])])
    for name in ("index", "more", "images"):
        (tmp_path / name).mkdir()
    Image.fromarray(whole).save(tmp_path / "images" / "0_whole.png")
    for i, quarter in enumerate(quarters):
        Image.fromarray(quarter).save(tmp_path / "index" / f"0_{i}.png")
        Image.fromarray(255 - quarter).save(tmp_path / "more" / f"0_{i}_.png")
    lines = [
        {
            "image": "0_whole.png",
            "box": [8.3 * (i % 2), 8 * (i // 2), 8 + 8 * (i % 2), 8 + 8 * (i // 2)],
            "positives": [f"0_{i}.png"],
        }
        for i in range(4)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"kind": "query_index", "protocol": "ilias", "queries": tmp_path / "q.jsonl"}
    config |= {"index": tmp_path / "index", "images": tmp_path / "images"}
    config["distractors"] = (tmp_path / "more",)
    towers = inference.RawPixels(8, meshes.make_mesh())
    evaluators = suite.build_all(towers, {"mine": config}).evaluators
    assert suite.run_all(evaluators, embedding.Embedder(towers, {})) == {"mine/map_at_1000": 1.0}
    card = evaluators["mine"].card()
    assert (card["queries"], card["boxes"], card["distractors"]) == (4, 4, 4)
    assert card["index"]["pictures"] == 8
    assert card["queries_with_a_copy"] == 1.0
    config["distractors"] = (tmp_path / "more", tmp_path / "more")
    with pytest.raises(BadInput, match="share a name: rename pictures"):
        suite.build_all(towers, {"mine": config})


def test_one_file_of_queries_for_pictures_of_two_sets(tmp_path):
    """As of a set and its blurred copy: each has features, and thumbnails, of its own."""
    for name in ("index", "images", "copy"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[:, 4 * (i == 1) : 4 + 4 * (i != 0)] = 255
            Image.fromarray(255 - pixels if name == "copy" else pixels).save(
                tmp_path / name / f"0_{i}.png"
            )
    (tmp_path / "q.jsonl").write_text('{"image": "0_0.png", "positives": ["0_0.png"]}')
    config = {"kind": "query_index", "protocol": "gldv2", "index": tmp_path / "index"}
    config["queries"] = tmp_path / "q.jsonl"
    towers = inference.RawPixels(8, meshes.make_mesh())
    configs = {name: {**config, "images": tmp_path / name} for name in ("images", "copy")}
    evaluators = suite.build_all(towers, configs).evaluators
    scores = suite.run_all(evaluators, embedding.Embedder(towers, {}))
    assert scores["images/map_at_100"] == 1
    assert scores["copy/map_at_100"] < 1
    assert len({of.pictures.key for of in evaluators.values()}) == 2


def test_features_that_are_not_finite(sets):
    """Of texts and of pictures."""
    folder, index, queries, _, _ = sets
    broken = np.full_like(queries, np.nan)
    (folder / "t.jsonl").write_text('{"text": "0", "classes": [0]}')
    towers = Towers(np.concatenate([unit(0, 40), broken]))
    evaluator = query_index.Evaluator(
        towers, queries=folder / "t.jsonl", index=index, protocol="inquire"
    )
    assert dict(evaluator.run(embedding.Embedder(towers, {})))["map_at_50"] > 0
    (folder / "t.jsonl").write_text('{"text": "45", "classes": [0]}')
    evaluator = query_index.Evaluator(
        towers, queries=folder / "t.jsonl", index=index, protocol="inquire"
    )
    with pytest.raises(BadInput, match=r"not finite \(row 0\)"):
        dict(evaluator.run(embedding.Embedder(towers, {})))
