"""The search index over embeddings, and `mofi_jax.search` with its page."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mofi_jax import embed, inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.inference import index
from mofi_jax.search import __main__ as search
from tests import datasets

ROOT = Path(__file__).parents[1]


def clustered(size, dim, seed=0):
    """As embeddings are: clusters, a spectrum that falls, and a common mean."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((size // 50, dim), np.float32)
    rows = centres[rng.integers(0, len(centres), size)]
    rows = (rows + 0.7 * rng.standard_normal((size, dim), np.float32) + 0.5).astype(np.float32)
    rows *= np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder, vectors):
    folder.mkdir(exist_ok=True)
    np.save(folder / "embeddings.npy", vectors)
    keys = pa.table({"key": [f"{i}.jpg" for i in range(len(vectors))]})
    pq.write_table(keys, folder / "pictures.parquet", row_group_size=1000)
    (folder / "result.json").write_text(json.dumps({"images": str(folder)}))
    return folder


def nearest(vectors, queries, k):
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write(tmp_path_factory.mktemp("large") / "E", clustered(70_000, 96))


def test_candidates_by_bits_are_nearly_all_of_the_nearest(large):
    of = index.Index.open(large)
    rng = np.random.default_rng(1)
    queries = np.array(of.vectors[rng.integers(0, len(of), 50)])
    queries += 0.5 * rng.standard_normal(queries.shape, np.float32) * queries.std(0)
    expected, cosines = nearest(of.vectors, queries, 10)
    rows, found = of.search(queries, 10)
    pairs = zip(rows.tolist(), expected.tolist(), strict=True)
    recall = np.mean([len({*a} & {*b}) for a, b in pairs]) / 10
    assert recall >= 0.99
    assert (np.diff(found, axis=1) <= 0).all()
    np.testing.assert_allclose(found[:, 0], cosines[:, 0], atol=1e-5)
    rows, found = of.search(queries, 10, exact=True)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(found, cosines, atol=1e-5)
    assert of.describe(69_999)["key"] == "69999.jpg"
    assert of.describe(1000)["key"] == "1000.jpg"


def test_the_index_is_kept_and_made_anew_for_other_vectors(large, tmp_path, caplog):
    folder = tmp_path / "E [1]"
    shutil.copytree(large, folder, ignore=shutil.ignore_patterns("index.npy"))
    query = clustered(70_000, 96)[:1]
    first = index.Index.open(folder).search(query, 5)
    written = (folder / "index.npy").stat().st_mtime_ns
    again = index.Index.open(folder).search(query, 5)
    np.testing.assert_array_equal(first, again)
    assert (folder / "index.npy").stat().st_mtime_ns == written
    (folder / "index.npy").write_bytes(b"damaged")
    np.testing.assert_array_equal(index.Index.open(folder).search(query, 5), first)
    other = clustered(70_000, 96, seed=5)
    write(folder, other)
    rows, _ = index.Index.open(folder).search(other[7:8], 1)
    assert rows.tolist() == [[7]]


_GRAPH = """
import sys
import numpy as np
from mofi_jax.inference import index
of = index.Index.open(sys.argv[1], kind="usearch")
queries = np.array(of.vectors[::7000])
for turn in range(2):
    rows, cosines = of.search(queries, 5)
    expected, _ = of.search(queries, 5, exact=True)
    assert np.mean(rows == expected) > 0.9
    assert (rows[:, 0] == np.arange(0, len(of), 7000)).all()
    of = index.Index.open(sys.argv[1], kind="usearch")
"""


@pytest.mark.slow
def test_a_graph(large, tmp_path):
    """In a process of its own: onnxruntime, imported after usearch 2.26, crashes."""
    if importlib.util.find_spec("usearch") is None:
        pytest.skip("usearch is not installed")
    folder = tmp_path / "E"
    shutil.copytree(large, folder)
    write(folder, np.load(folder / "embeddings.npy")[:66_000])
    done = subprocess.run(
        [sys.executable, "-c", _GRAPH, str(folder)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "index.usearch").stat().st_size > 66_000 * 96 * 2
    with pytest.raises(BadInput, match="no kind of index"):
        index.Index.open(folder, kind="tree")


@pytest.mark.parametrize("vectors", ["copies", "few", "one", "none"])
def test_degenerate_collections(tmp_path, vectors):
    size = {"copies": 70_000, "few": 3, "one": 1, "none": 0}[vectors]
    rows = clustered(150, 16)[:1].repeat(size, axis=0)
    of = index.Index.open(write(tmp_path / "E", rows))
    found, cosines = of.search(clustered(150, 16)[:2], 5)
    assert found.shape == cosines.shape == (2, min(5, size))
    if size:
        np.testing.assert_allclose(cosines[0], 1, atol=1e-5)
        assert all(len({*row}) == min(5, size) for row in found.tolist())


def test_folders_that_are_no_embeddings(large, tmp_path):
    with pytest.raises(BadInput, match=r"result\.json cannot be read"):
        index.Index.open(tmp_path)
    folder = tmp_path / "E"
    shutil.copytree(large, folder)
    data = (folder / "embeddings.npy").read_bytes()
    (folder / "embeddings.npy").write_bytes(data[:-1000])
    with pytest.raises(BadInput, match="cannot be read"):
        index.Index.open(folder)
    write(folder, clustered(150, 16))
    np.save(folder / "embeddings.npy", np.zeros((151, 16), np.float32))
    with pytest.raises(BadInput, match="copy both again"):
        index.Index.open(folder)
    np.save(folder / "embeddings.npy", np.zeros((150, 16), np.float32))
    with pytest.raises(BadInput, match="k=0 nearest"):
        index.Index.open(large).search(np.ones((1, 96)), 0)
    with pytest.raises(BadInput, match="not finite"):
        index.Index.open(large).search(np.full((1, 96), np.nan), 3)
    with pytest.raises(BadInput, match="do not fit vectors of 16 numbers"):
        index.Index.open(folder).search(np.zeros((1, 8)), 3)


# ------------------------------------------------------------------------------------------ page


@pytest.fixture(scope="module")
def embedded(trained, tmp_path_factory):
    """Seven pictures, one of them with a name that would be markup."""
    root = tmp_path_factory.mktemp("search")
    (root / "p [1]").mkdir()
    for i in range(7):
        name = "<b>&\x1b[31m.jpg" if i == 3 else f"{i}.jpg"
        picture = ops.encode_jpeg(datasets.drawing(i, 100 + i), 95)
        (root / "p [1]" / name).write_bytes(picture)
    embed.main(str(trained / "run"), str(root / "p [1]"), str(root / "E"), entities="1")
    return root


def test_the_page_shows_what_is_near(embedded, tmp_path, capsys):
    out = tmp_path / "my [page].html"
    pictures = [str(embedded / "p [1]" / f"{i}.jpg") for i in (5, 0)]
    search.main(str(embedded / "E"), str(out), image=pictures, text=["a red <i>circle</i>"], k="4")
    html = out.read_text()
    assert html.count("<figure>") == 12
    assert "Pictures like 5.jpg" in html
    assert "“a red &lt;i&gt;circle&lt;/i&gt;”" in html
    assert "<b>&\x1b" not in html
    assert html.count('<img src="data:image/jpeg') == 14  # what is found, and two queries
    assert not re.search(r"<script|https?://|src=\"(?!data:)", html)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    lines = printed.split("\n")
    assert lines[0] == pictures[0]
    assert re.fullmatch(r" +1 +1\.000  5\.jpg  \w+ \w+", lines[1])
    assert re.fullmatch(r" +1 +1\.000  0\.jpg  \w+ \w+", lines[6])
    # More than there are; the same page again.
    search.main(str(embedded / "E"), str(out), text=["x"], k="24", exact=True)
    assert out.read_text().count("<figure>") == 7


def test_pictures_that_are_gone_and_moved(embedded, tmp_path):
    for name in ("E", "p [1]"):
        shutil.copytree(embedded / name, tmp_path / name)
    result = json.loads((tmp_path / "E/result.json").read_text())
    result["images"] = str(tmp_path / "elsewhere")
    (tmp_path / "E/result.json").write_text(json.dumps(result))
    out = tmp_path / "page.html"
    search.main(str(tmp_path / "E"), str(out), text=["x"])
    assert out.read_text().count("no picture there") == 7
    search.main(str(tmp_path / "E"), str(out), text=["x"], images=str(tmp_path / "p [1]"))
    assert "no picture there" not in out.read_text()


def test_bad_input(embedded, tmp_path, monkeypatch):
    of, out = str(embedded / "E"), str(tmp_path / "page.html")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for options, sentence in (
        ({}, "nothing to search by"),
        ({"text": ["x"], "k": "0"}, "--k=0 cannot be used"),
        ({"text": ["x"], "k": "100000"}, "more than a page shows"),
        ({"image": [str(tmp_path / "gone.jpg")]}, r"--image=.*gone\.jpg cannot be read"),
        (
            {"image": [str(tmp_path / "broken.jpg")]},
            r"broken\.jpg cannot be read \(not_a_picture\)",
        ),
        ({"text": ["x"], "model": str(tmp_path)}, "neither a training run"),
    ):
        with pytest.raises(BadInput, match=sentence):
            search.main(of, out, **options)
    with pytest.raises(BadInput, match=r"result\.json cannot be read"):
        search.main(str(tmp_path), out, text=["x"])
    # Another model: of other weights, and of another size.
    for change in (lambda v: -v, lambda v: np.pad(v, ((0, 0), (0, 3)))):
        inner = inference.Model.embed_images
        with monkeypatch.context() as patch:
            patch.setattr(
                inference.Model, "embed_images", lambda self, x, f=change, i=inner: f(i(self, x))
            )
            with pytest.raises(BadInput, match="is not the model that made"):
                search.main(of, out, text=["x"])
    assert not os.path.exists(out)


@pytest.mark.slow
def test_both_commands(trained, embedded, tmp_path):
    """As people type them."""

    def run(command, *flags):
        return subprocess.run(
            [sys.executable, "-m", f"mofi_jax.{command}", *flags],
            **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
        )

    folder = str(tmp_path / "E")
    done = run(
        *("embed", "--model", str(trained / "run"), "--images", str(embedded / "p [1]")),
        *("--out", folder),
    )
    assert done.returncode == 0, done.stderr
    assert "7 pictures embedded, 12 numbers each" in done.stdout
    page = str(tmp_path / "page.html")
    flags = ("--embeddings", folder, "--text", "a red car", "a boat", "--out", page, "--k", "3")
    done = run("search", *flags)
    assert done.returncode == 0, done.stderr
    assert Path(page).read_text().count("<figure>") == 6
    done = run("search", "--embeddings", folder, "--out", page)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: There is nothing to search by")
