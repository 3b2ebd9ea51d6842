"""The layouts of query sets and of captions: what they hold, and what is refused in a sentence."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import captions, pictures, query_index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Six pictures of three classes, 8 x 6 pixels whose red is the column, times 30."""
    folder = tmp_path_factory.mktemp("index")
    for name in ("0_a", "0_b", "1_a", "1_b", "2_a", "2_b"):
        pixels = np.zeros((6, 8, 3), np.uint8)
        pixels[..., 0] = np.arange(8) * 30
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return pictures.read_set(folder)


def write_lines(path, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_queries_with_setups_junk_and_boxes(index, tmp_path):
    lines = [
        {
            **{"image": "0_a.png", "box": [1.6, -2, 5.4, 4.5]},
            "positives": {"easy": ["0_b.png"], "hard": ["1_a.png", "1_b.png"]},
            "junk": {"easy": ["0_a.png", "1_a.png"]},
        },
        {
            **{"image": "1_a.png", "positives": {"easy": [], "hard": ["2_a.png"]}},
            **{"split": "test", "junk": ["2_b.png"]},  # of every setup
        },
    ]
    queries = query_index.read_queries(write_lines(tmp_path / "q.jsonl", lines), index)
    assert queries.names == ("0_a.png", "1_a.png")
    assert (len(queries), queries.texts, queries.classes) == (2, False, None)
    assert queries.splits == ("", "test")
    expected = {"easy": [[1], [-1]], "hard": [[2, 3], [4, -1]]}
    assert {setup: rows.tolist() for setup, rows in queries.positives.items()} == expected
    assert queries.junk["easy"].tolist() == [[0, 2], [5, -1]]
    assert queries.junk["hard"].tolist() == [[-1], [5]]
    cut = query_index.query_pictures(queries, index)
    assert (len(cut), cut.path, cut.names) == (2, tmp_path / "q.jsonl", queries.names)
    assert cut.classes.tolist() == [0, 1]
    # Rounded to columns 2 to 5 and rows 0 to 4, as Pillow's crop does.
    pixels = np.asarray(Image.open(io.BytesIO(cut.read(0))))
    assert pixels.shape == (4, 3, 3)
    assert pixels[0, :, 0].tolist() == [60, 90, 120]
    assert cut.read(1) == index.read(2)
    assert cut.sha256() != index.sha256()


def test_queries_by_class_or_in_words(index, tmp_path):
    lines = ['{"text": "a\u2028b", "positives": ["0_b.png"]}', "", {"text": "", "positives": []}]
    queries = query_index.read_queries(write_lines(tmp_path / "q.jsonl", lines), index)
    assert queries.texts
    assert queries.names == ("a\u2028b", "")
    assert queries.positives[""].tolist() == [[1], [-1]]
    lines = [{"image": "0_a.png", "classes": [0, 2], "junk": ["0_a.png"], "domain": "sop"}]
    lines += [{"image": "1_a.png", "classes": []}]
    queries = query_index.read_queries(write_lines(tmp_path / "c.jsonl", lines), index)
    assert queries.classes.tolist() == [[0, 2], [-1, -1]]
    assert queries.positives == {}
    assert queries.junk[""].tolist() == [[0], [-1]]
    assert queries.domains == ("sop", "")


GOOD = {"image": "0_a.png", "positives": ["0_b.png"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{"], "Line 2 of the queries .* cannot be read"),
        ([GOOD, [1]], "Line 2 of the queries .* cannot be read"),
        ([{**GOOD, "positive": []}], r"Line 1 .*unknown key 'positive'"),
        ([{**GOOD, "text": "x"}], "needs image or text"),
        ([{"image": "0_a.png"}], "needs positives or classes"),
        ([{**GOOD, "positives": "0_b.png"}], "lists of names"),
        ([{**GOOD, "box": [0, 1, 2]}], "four numbers"),
        ([{**GOOD, "box": [0, 1, 2, float("nan")]}], "four numbers"),
        ([{**GOOD, "box": [0, 1, 2, float("inf")]}], "four numbers"),
        ([{"image": "0_a.png", "classes": "12"}], "Line 1 .*list of numbers"),
        ([{"image": "0_a.png", "classes": [10**30]}], "Line 1 of the queries .* cannot be read"),
        (['{"image": "0_a.png", "classes": [1e999]}'], "Line 1 of the queries .* cannot be read"),
        ([GOOD, {"text": "x", "positives": []}], "Line 2 of .* is of another form"),
        ([GOOD, {**GOOD, "positives": {"easy": []}}], "Line 2 of .* is of another form"),
        ([GOOD, {**GOOD, "positives": ["x.png"]}], "Line 2 of .* names x.png, which is not in"),
        ([{**GOOD, "junk": {"easy": []}}], "setup 'easy', which has no positives"),
        ([{**GOOD, "junk": ["y.png"]}], "Line 1 of .* names y.png, which is not in"),
        ([{**GOOD, "positives": []}], "has anything to find"),
        ([], "hold no query"),
    ],
)
def test_queries_that_cannot_be_used(index, tmp_path, lines, message):
    with pytest.raises(BadInput, match=message):
        query_index.read_queries(write_lines(tmp_path / "q.jsonl", lines), index)


def test_query_pictures_that_are_not_there(index, tmp_path):
    with pytest.raises(BadInput, match="There are no queries at"):
        query_index.read_queries(tmp_path / "nowhere", index)
    path = write_lines(tmp_path / "q.jsonl", [GOOD, {**GOOD, "image": "z.png"}])
    queries = query_index.read_queries(path, index)
    with pytest.raises(BadInput, match=r"Line 2 of .* names z.png, which is not in"):
        query_index.query_pictures(queries, index)
    path = write_lines(tmp_path / "b.jsonl", [{**GOOD, "box": [8, 0, 12, 4]}])
    cut = query_index.query_pictures(query_index.read_queries(path, index), index)
    with pytest.raises(BadInput, match=r"The box .* of 0_a.png in .* holds nothing"):
        cut.read(0)


def test_captions_of_pictures_and_of_classes(index, tmp_path):
    lines = [{"image": name, "captions": [f"{name} {i}" for i in range(6)]} for name in index.names]
    read = captions.read_captions(write_lines(tmp_path / "c.jsonl", lines[::-1]), index)
    assert len(read.texts) == 30  # the sixth captions are left out
    belongs = read.text_things[:, None] == read.picture_things
    for text, row in zip(read.texts, belongs, strict=True):
        assert [name for name, own in zip(index.names, row, strict=True) if own] == [text[:7]]
    lines = [{"class": c, "captions": [str(c)] * (c + 1)} for c in range(3)]
    read = captions.read_captions(write_lines(tmp_path / "k.jsonl", lines), index)
    assert read.texts == ("0", "1", "1", "2", "2", "2")
    assert read.text_things.tolist() == [0, 1, 1, 2, 2, 2]
    assert read.picture_things.tolist() == [0, 0, 1, 1, 2, 2]


def test_captions_that_cannot_be_used(index, tmp_path):
    lines = [{"class": c, "captions": ["x"]} for c in range(3)]
    for wrong, message in (
        ([*lines, lines[0]], "Line 4 .*second line"),
        ([*lines, {"image": "0_a.png", "captions": ["x"]}], "Line 4 .*second line"),
        ([{"class": 0, "captions": "x"}], "no list of texts"),
        ([{"class": 0, "captions": []}], "no list of texts"),
        ([{"captions": ["x"]}], "Line 1 .* cannot be read"),
        (['{"class": 1e999, "captions": ["x"]}'], "Line 1 .* cannot be read"),
        (lines[:2], r"^2 is not in the captions .*\(1 missing\)"),
        ([*lines, {"class": 9, "captions": ["x"]}], "^9 is not in the picture set"),
        ([], r"^0_a.png is not in the captions .*\(6 missing\)"),
    ):
        with pytest.raises(BadInput, match=message):
            captions.read_captions(write_lines(tmp_path / "c.jsonl", wrong), index)
    with pytest.raises(BadInput, match="There are no captions at"):
        captions.read_captions(tmp_path / "nowhere", index)
