"""Safety rules: heads, columns, domains and hashes, each with its reason."""

import sys

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from data_prep import engine
from data_prep.engine import manifests
from data_prep.filters import safety
from data_prep.filters import stage as filters_stage
from mofi_jax.common import errors
from tests import label_tables, workdirs

HASH = "ab" * 32


def make_config(**rules):
    config = workdirs.config(min_images=1)
    with config.unlocked():
        config.filters.safety.update(rules)
    return config


def write(workdir, rows, embeddings=None):
    """pairs/ and labels/ of one shard from rows {key, url, extras, sha256}, all labelled."""
    (workdir / "pairs").mkdir(parents=True)
    schema = pa.schema([(name, pa.string()) for name in ("key", "url", "extras", "sha256")])
    schema = schema.append(pa.field("phash", pa.int64()))
    default = {"url": None, "extras": None, "sha256": "00" * 32}
    rows = [{**default, "phash": number, **row} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), workdir / "pairs/00000.parquet")
    label_tables.write(workdir, [[(row["key"], [1]) for row in rows]])
    if embeddings is not None:
        (workdir / "embeddings").mkdir()
        # The stage that embeds leaves out pairs without candidate.
        table = pa.table({"key": [row["key"] for row in rows][: len(embeddings)]})
        pq.write_table(table, workdir / "embeddings/00000.parquet")
        np.save(workdir / "embeddings/00000.npy", np.asarray(embeddings, np.float16))


def run(workdir, config, workers=1):
    """(reasons by key, counts)"""
    written = filters_stage.run(config, engine.Engine(workdir, workers))
    rejects = label_tables.read(workdir, "rejects/dropped-i2e*")
    kept = {row["key"] for row in label_tables.read(workdir, "labels_final/*.parquet")}
    assert not kept & {row["key"] for row in rejects}
    return {row["key"]: row["reason"] for row in rejects}, engine.total_counts(written)


def test_all_rules_at_once_each_with_its_reason(tmp_path):
    (tmp_path / "domains").write_text("# bad ones\nBad.example\n\n*.münchen.example  # a city\n")
    (tmp_path / "hashes").write_text(f"{HASH.upper()}\n")
    np.savez(tmp_path / "head.npz", weight=np.array([[4.0], [0.0]]), bias=np.array([0.0]))
    rows = [
        {
            "key": "fine",
            "url": "https://notbad.example/bad.example.jpg",
            "extras": '{"punsafe": 0.5}',
        },
        {"key": "host", "url": "HTTP://BAD.example:80/x.jpg"},
        {"key": "sub", "url": "https://img.cdn.bad.example./x.jpg?u=a"},
        {"key": "idn", "url": "https://a.MÜNCHEN.example/x"},
        {"key": "puny", "url": "https://xn--mnchen-3ya.example/x"},
        {"key": "bare", "url": "bad.example/x.jpg"},
        {"key": "none", "url": None},
        {"key": "hash", "url": "https://bad.example/", "sha256": HASH},
        {"key": "number", "extras": '{"punsafe": 0.51}'},
        {"key": "string", "extras": '{"NSFW": "nsfw", "punsafe": "0.1"}'},
        {"key": "text", "extras": '{"punsafe": "0.9"}'},
        {"key": "score"},
        {"key": "edge"},
        {"key": "unembedded"},
    ]
    embeddings = np.full((len(rows) - 1, 2), -1.0)
    embeddings[-2:, 0] = [0.7, 0.0]
    write(tmp_path / "W", rows, embeddings)
    config = make_config(
        head=str(tmp_path / "head.npz"),
        threshold=0.5,
        columns={"punsafe": 0.5, "NSFW": ["NSFW", "UNSURE"]},
        blocked_domains=str(tmp_path / "domains"),
        blocked_hashes=str(tmp_path / "hashes"),
    )
    reasons, counts = run(tmp_path / "W", config)
    assert reasons == {
        **dict.fromkeys(("host", "sub", "idn", "puny", "bare"), "blocked_domain"),
        "hash": "blocked_hash",
        "number": "unsafe_column:punsafe",
        "string": "unsafe_column:NSFW",
        "text": "unsafe_column:punsafe",
        "score": "unsafe_score",
    }
    assert counts["blocked_domain"] == 5
    assert counts["dropped"] == 10
    [manifest] = manifests.read(tmp_path / "W", "unsafe")
    counts = manifest["counts"]
    assert counts["without_host"] == 7
    assert counts["without_column:punsafe"] == 10
    again, _ = run(tmp_path / "W", config, workers=2)
    assert again == reasons
    # A changed list is read again.
    (tmp_path / "domains").write_text("other.example\n")
    reasons, _ = run(tmp_path / "W", config)
    assert "host" not in reasons


def test_a_head_by_name_is_called_with_float32(tmp_path, monkeypatch):
    (tmp_path / "my_head.py").write_text(
        "def scores(x):\n    assert x.dtype == 'float32'\n    return x[:, 0]\n"
        "def counts(x):\n    return x[:, 0] * 5\n"
        "def one(x):\n    return x[:1, 0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_head", raising=False)
    write(tmp_path / "W", [{"key": "a"}, {"key": "b"}], [[0.9, 0], [0.2, 0]])
    reasons, _ = run(tmp_path / "W", make_config(head="my_head:scores", threshold=0.6))
    assert reasons == {"a": "unsafe_score"}
    for name in ("counts", "one"):
        with pytest.raises(errors.BadInput, match="gives no scores"):
            run(tmp_path / "W", make_config(head=f"my_head:{name}", threshold=0.6))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)])
def test_linear_heads_score_by_the_sigmoid(tmp_path, shape):
    weight = np.array([1.0, -2.0, 0.5], np.float32)
    path = str(tmp_path / "head.safetensors")
    safetensors.numpy.save_file(
        {"weight": weight.reshape(shape), "bias": np.array([0.25], np.float32)}, path
    )
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32) * 50
    with np.errstate(over="raise"):
        scores = safety.load_head(path)(x)
    np.testing.assert_allclose(
        scores, 1 / (1 + np.exp(-(x.astype(float) @ weight + 0.25))), atol=1e-6
    )
    np.testing.assert_array_equal(safety.load_head(path)(x[2:4]), scores[2:4])
    with pytest.raises(errors.BadInput, match="for embeddings of 3 numbers, those"):
        safety.load_head(path)(x[:, :2])


# ---------------------------------------------------------------------------------------- functions


@given(st.text(max_size=40))
def test_any_url_has_a_host_or_none(url):
    host = safety.host_of(url)
    assert host == host.lower()
    assert host.isascii()
    safety.is_blocked(host, frozenset({"a.b"}))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:pw@A.Example:8080/x#y", "a.example"),
        ("//a.example/x", "a.example"),
        ("a.example/x?u=http://b.example", "a.example"),
        ("https://1.2.3.4/", "1.2.3.4"),
        ("https://[::1]/", "::1"),
        ("https://[::1/", ""),
        ("data:image/png;base64,AAAA", "data"),
        ("", ""),
        *(("https://" + host, "") for host in ("a." * 50_000, "é" * 50_000, "%2E" * 50_000 + "a")),
    ],
    ids=lambda text: text[:40],
)
def test_hosts(url, host):
    assert safety.host_of(url) == host


def test_a_domain_blocks_itself_and_its_subdomains_alone():
    domains = frozenset({"b.example"})
    blocked = (
        "b.example",
        "a.b.example",
        "x.a.b.example",
        "ab.example",
        "example",
        "b.example.org",
    )
    assert [safety.is_blocked(host, domains) for host in blocked] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("value", "rule", "verdict"),
    [
        *((0.6, 0.5, True), (0.5, 0.5, False), ("0.6", 0.5, True), (True, 0, True), (3, 10, False)),
        *((None, 0.5, None), ("high", 0.5, None), (float("nan"), 0.5, None), ([1], 0.5, None)),
        *(("nsfw ", ["NSFW"], True), ("SAFE", ["NSFW"], False), (None, ["NSFW"], None)),
        *((True, ["true"], True), (1.0, ["1"], None)),
    ],
)
def test_columns(value, rule, verdict):
    assert safety.is_rejected(value, rule) is verdict


# ---------------------------------------------------------------------------------------- bad input


def refused(match, config):
    with pytest.raises(errors.BadInput, match=match):
        filters_stage.check(config)


def test_bad_lists_are_named_with_the_line(tmp_path):
    path = tmp_path / "list"
    for text in ("good.example\nhttp://bad.example/\n", "a\nb c.example\n", "a\nexa..mple\n"):
        path.write_text(text)
        refused("line 2 of .* is no domain", make_config(blocked_domains=str(path)))
    path.write_text(f"{HASH}\n{HASH[1:]}\n")
    refused("line 2 of .* is no sha256", make_config(blocked_hashes=str(path)))
    refused("blocked_hashes=nowhere cannot be read", make_config(blocked_hashes="nowhere"))
    path.write_bytes(b"\xff\xfe")
    refused("not UTF-8", make_config(blocked_domains=str(path)))


def test_bad_heads_are_named(tmp_path):
    path = tmp_path / "head.npz"
    head = make_config(head=str(path))
    refused("cannot be read", head)
    path.write_bytes(b"PK no zip")
    refused("cannot be read", head)
    for arrays, match in (
        ({"weight": np.zeros(3)}, "it needs the arrays weight and bias"),
        ({"weight": np.zeros((3, 2)), "bias": np.zeros(1)}, "one output"),
        ({"weight": np.zeros(3), "bias": np.zeros(2)}, "one output"),
        ({"weight": np.array([np.nan]), "bias": np.zeros(1)}, "not finite"),
    ):
        np.savez(path, **arrays)
        refused(match, head)
    np.savez(path, weight=np.zeros(3), bias=np.float32(0))
    filters_stage.check(head)
    refused("threshold=2", make_config(head=str(path), threshold=2.0))
    refused("cannot be loaded", make_config(head="no_such_module:f"))
    refused("cannot be loaded", make_config(head="json:no_such_function"))
    refused("cannot be loaded", make_config(head="justaname"))
    by_text = make_config(head=str(path))
    by_text.labels = "text"
    refused("filters.safety.head=.* labels=clip", by_text)
    write(tmp_path / "W", [{"key": "a"}], [[1.0, 0.0]])
    with pytest.raises(errors.BadInput, match="for embeddings of 3 numbers"):
        run(tmp_path / "W", head)


def test_bad_columns_are_named(tmp_path):
    for rule in (True, [], "NSFW", [1], float("nan")):
        columns = ml_collections.ConfigDict({"punsafe": rule})
        refused("columns.punsafe=", make_config(columns=columns))
    refused("add the column to config.keep_columns", make_config(columns={"other": 0.5}))
    write(tmp_path / "W", [{"key": "a", "extras": '{"similarity": 0.3}'}])
    with pytest.raises(errors.BadInput, match="no pair has a value of this kind"):
        run(tmp_path / "W", make_config(columns={"punsafe": 0.5}))
