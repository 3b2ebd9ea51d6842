"""What people see of an evaluation: the table, what is near to what, the map, the page."""

import html
import html.parser
import re

import numpy as np
import pytest
from etils import epath

from mofi_jax.data import ops
from mofi_jax.distributed import meshes
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.evaluators.pages import feature_map, gallery, page, table
from mofi_jax.evaluators.sets import pictures as picture_sets

EVIL = "<script>alert('x')</script>{{ 7 * 7 }}\" onload=\"x|y"


def features_of(rows):
    rows = np.asarray(rows, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Features.of(rows, meshes.make_mesh())


# ------------------------------------------------------------------------------------- the table


def result(model, metrics, intervals=None, **more):
    known = {"metrics": metrics, "intervals": intervals or {}, "left_out": {}, "undecodable": {}}
    return {"model": model} | known | more


def search_in(classes, title="x", pictures=None, words=None, groups=None, names=()):
    """Every picture is looked for among the others of its class."""
    classes = np.asarray(classes)
    if pictures is None:
        files = tuple(f"{i}.jpg" for i in range(len(classes)))
        pictures = picture_sets.PictureSet(epath.Path("none"), files, classes, lambda i: b"")
    words = words or [f"class {n}" for n in classes]
    return gallery.Search(
        *(title, pictures, words, pictures, words),
        leave_out=np.arange(len(classes))[:, None],
        right=lambda asked, rows: classes[rows] == classes[asked][:, None],
        relevant=np.bincount(classes)[classes] - 1,
        classes=classes,
        groups=np.unique(classes, return_inverse=True)[1] if groups is None else groups,
        group_names=names or [str(n) for n in np.unique(classes)],
    )


def look_at(rows, classes):
    features = features_of(rows)
    return gallery.look(search_in(classes), features, features)


MODELS = (
    result("a/run", {"x": {"map": 0.5, "ece": 0.1, "left_out": 3.0}}, {"x": {"map": (0.4, 0.6)}}),
    result("b/run", {"x": {"map": 0.5, "ece": 0.3, "left_out": 9.0}, "y": {"top1": 1.0}}),
    result("raw|pixels", {"x": {"map": 0.25}}, left_out={"y": "the model has no tokenizer"}),
)


def test_the_best_is_the_largest_score_or_the_smallest_error_and_no_fact():
    rows = table.rows(MODELS)
    best = {f"{row.evaluator}/{row.metric}": [cell.best for cell in row.cells] for row in rows}
    assert best == {
        "x/map": [True, True, False],
        "x/ece": [True, False, False],
        "x/left_out": [False, False, False],
        "y/top1": [False, False, False],
    }
    assert [cell.best for row in table.rows(MODELS[:1]) for cell in row.cells] == [False] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0.000"), (1.0, "1.000"), (0.00123, "0.001"), (12.0, "12"), (1e-6, "10⁻⁶")],
)
def test_numbers_keep_digits_that_say_something(value, words):
    assert table.shown(value) == words


def test_a_score_that_is_no_number_is_not_the_best():
    rows = table.rows([result("a", {"x": {"map": np.nan}}), result("b", {"x": {"map": 0.1}})])
    assert [cell.best for cell in rows[0].cells] == [False, False]


def test_markdown_has_a_column_for_each_model_whatever_its_name():
    lines = table.markdown(MODELS).splitlines()
    assert lines[0] == r"| metric | a/run | b/run | raw\|pixels |"
    assert lines[2] == "| x/map | **0.500** [0.400–0.600] | **0.500** | 0.250 |"
    assert lines[4] == "| x/left_out | 3 | 9 | – |"
    assert table.notes(MODELS) == ["y: left out of raw|pixels, the model has no tokenizer"]


def test_pictures_that_cannot_be_decoded_are_told_once_for_all_models():
    broken = {"a.tar": ["1.jpg"], "b.tar": [f"{i}.jpg" for i in range(5)]}
    assert table.notes([result(name, {}, undecodable=broken) for name in "ab"]) == [
        "a.tar: 1.jpg cannot be decoded and has a random feature",
        "b.tar: 0.jpg, 1.jpg, 2.jpg and 2 more cannot be decoded and have random features",
    ]


def test_models_are_called_by_what_tells_them_apart():
    assert table.labels(["/x/a/run, step best", "/x/b/other"]) == ["run, step best", "other"]
    assert table.labels(["/x/a/run", "/x/b/run", "raw pixels"]) == ["a/run", "b/run", "raw pixels"]
    assert table.labels(["/x/run"]) == ["run"]


# ----------------------------------------------------------------------------------- what is near


@pytest.fixture(scope="module")
def found():
    """Two classes of three that lie together, but one of the first among the second's."""
    angles = np.array([0.0, 0.1, 1.42, 1.4, 1.5, 1.55])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    return look_at(rows, [4, 4, 4, 9, 9, 9])


def test_neighbours_leave_out_the_query_and_are_marked(found):
    first = found.even[0]
    assert first.number == 0
    assert [row for row, _, _ in first.nearest] == [1, 3, 2, 4, 5]
    assert [right for _, _, right in first.nearest] == [True, False, True, False, False]
    assert first.nearest[0][1] == pytest.approx(np.cos(0.1))
    assert (found.asked, found.depth) == (6, 5)


def test_worst_queries_and_confusions(found):
    # Picture 2 finds its own class at place 4, picture 3 at place 2; all others at once.
    assert [(query.number, query.first_right) for query in found.worst] == [(2, 4), (3, 2)]
    assert found.confused == [
        gallery.Confusion(4, 9, 1, 3, (2, 3)),
        gallery.Confusion(9, 4, 1, 3, (3, 2)),
    ]


def test_a_picture_alone_in_its_class_is_no_worst_query_and_few_are_enough():
    found = look_at([[1, 0], [0.9, 0.1], [0, 1]], [0, 0, 7])
    assert found.worst == []
    assert len(found.even) == 3
    assert found.confused == [gallery.Confusion(7, 0, 1, 1, (2, 1))]


def test_of_a_large_set_evenly_spaced_pictures_are_queries(monkeypatch):
    monkeypatch.setattr(gallery, "ASKED", 4)
    rows = np.random.default_rng(0).normal(size=(40, 4))
    found = look_at(rows, np.arange(40) // 2)
    assert [query.number for query in found.even] == [5, 15, 25, 35]


def test_texts_find_pictures_without_junk():
    """Of three texts the second has nothing to find; the third's nearest picture is junk."""
    angles = np.array([0.0, 0.2, 0.4, 1.5])
    index = features_of(np.stack([np.cos(angles), np.sin(angles)], 1))
    queries = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    positives = {0: [0, 3], 1: [], 2: [3]}
    search = search_in([0, 0, 0, 0])._replace(
        queries=None,
        query_words=["a", "b", "c"],
        classes=None,
        groups=None,
        leave_out=np.array([[-1], [-1], [0]]),
        right=lambda asked, rows: np.array(
            [np.isin(of, positives[i]) for i, of in zip(asked, rows, strict=True)]
        ),
        relevant=np.array([2, 0, 1]),
    )
    found = gallery.look(search, queries, index)
    assert [[row for row, _, _ in of.nearest] for of in found.even] == [
        [0, 1, 2, 3],
        [3, 2, 1, 0],
        [1, 2, 3],
    ]
    assert [(query.number, query.first_right) for query in found.worst] == [(2, 3)]
    assert found.confused == []
    assert page.look(search, queries, index).chosen is None


# --------------------------------------------------------------------------------------- the map


def test_a_map_of_few_groups_shows_all_and_of_many_some_in_colour():
    few = feature_map.choose(np.repeat([0, 1], 5), ["a", "b"])
    np.testing.assert_array_equal(few.rows, np.arange(10))
    assert few.names == ["a", "b"]
    assert few.groups.tolist() == [0] * 5 + [1] * 5
    classes = np.repeat(np.arange(50), 100)
    many = feature_map.choose(classes, [str(i) for i in range(50)])
    assert len(many.rows) == len(set(many.rows.tolist())) == feature_map.POINTS
    assert many.names == [
        str(classes[rows[0]]) for i in range(8) for rows in [many.rows[many.groups == i]]
    ]
    assert np.bincount(many.groups[many.groups >= 0]).tolist() == [60] * 8


def test_clusters_stay_together_and_the_map_is_the_same_each_time():
    rng = np.random.default_rng(1)
    rows = np.repeat(np.eye(3, 16), 20, axis=0) + rng.normal(0, 0.01, (60, 16))
    places = feature_map.place(rows.astype(np.float32))
    np.testing.assert_array_equal(places, feature_map.place(rows.astype(np.float32)))
    assert places.min() >= 0
    assert places.max() <= 1
    centres = places.reshape(3, 20, 2).mean(1)
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
    np.testing.assert_array_equal(nearest, np.repeat([0, 1, 2], 20))


# -------------------------------------------------------------------------------------- the page


class _Parser(html.parser.HTMLParser):
    """Tags that are open, and all attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "circle", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "circle":
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render(tmp_path_factory.mktemp("set"))


def render(folder):
    """The page of two models on twelve pictures and twelve texts, all names of which are evil."""
    for i in range(12):
        rgb = np.full((40, 30, 3), 20 * i, np.uint8)
        (folder / f"{i // 3}_{i}.jpg").write_bytes(ops.encode_jpeg(rgb, 90))
    pictures = picture_sets.read_set(folder)
    words = [f"{EVIL} {i // 3}" for i in range(12)]
    search = search_in(pictures.classes, EVIL, pictures, words, names=words[::3])
    rows = np.random.default_rng(0).normal(size=(12, 6))
    sets = {name: features_of(rows + i) for i, name in enumerate("ab")}
    of = {name: page.look(search, features, features) for name, features in sets.items()}
    texts = search._replace(
        queries=None, query_words=[f"{EVIL} text"] * 12, classes=None, groups=None
    )
    of_texts = {"a": page.look(texts, rows.astype(np.float32), sets["a"])}
    (folder / "3_11.jpg").write_bytes(b"gone")  # read once more for the page alone
    more = {"protocols": {EVIL: {"sha256": EVIL, "k": [10, 20]}}, "left_out": {EVIL: EVIL}}
    models = [
        result(name, {EVIL: {EVIL: 0.5}}, {EVIL: {EVIL: (0.1, 0.9)}}, **more) for name in "ab"
    ]
    values = {"models": models, "versions": {"jax": EVIL}}
    return page.render(values, [page.Shown(search, of), page.Shown(texts, of_texts)])


def test_names_cannot_break_the_page(rendered):
    assert "<script" not in rendered
    assert "{{ 7 * 7 }}" in rendered
    parser = _Parser()
    parser.feed(rendered)
    assert parser.open == []
    assert "onload" not in dict(parser.attributes)
    assert not parser.tags & {"script", "link", "iframe"}


def test_the_page_is_self_contained_and_shows_its_pictures_with_words(rendered):
    pictures = re.findall(r'<img src="data:image/jpeg;base64,[^"]*" alt="([^"]*)"', rendered)
    assert len(pictures) == rendered.count("<img") > 100
    assert {html.unescape(words) for words in pictures} == {f"{EVIL} {i}" for i in range(4)}
    assert not re.search(r"https?://|src=(?!\"data:)|url\(", rendered)
    for word in (
        "0.500",
        "0.100–0.900",
        "Map: a",
        "Queries: b",
        "Worst queries: a",
        "10, 20",
        "12 texts",
    ):
        assert word in rendered
    assert "no picture there" in rendered  # of one that cannot be read any more


def test_a_map_of_too_few_pictures_is_left_out(tmp_path):
    for i in range(4):
        data = ops.encode_jpeg(np.zeros((8, 8, 3), np.uint8), 90)
        (tmp_path / f"{i // 2}_{i}.jpg").write_bytes(data)
    pictures = picture_sets.read_set(tmp_path)
    search, features = search_in(pictures.classes, pictures=pictures), features_of(np.eye(4))
    look = page.look(search, features, features)
    values = {"models": [result("m", {}, protocols={})], "versions": {}}
    text = page.render(values, [page.Shown(search, {"m": look})])
    assert "Map: " not in text
    assert "Queries: m" in text


def test_a_map_is_coloured_by_domain_where_there_are_some():
    rows = np.random.default_rng(0).normal(size=(20, 4))
    groups, names = np.repeat([0, 1], 10), ["faces", "sketch"]
    search = search_in(np.arange(20) // 2, groups=groups, names=names)
    look = page.look(search, features_of(rows), features_of(rows))
    assert look.chosen.names == names
    assert look.chosen.groups.tolist() == groups.tolist()
