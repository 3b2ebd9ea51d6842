"""Pictures of evaluation sets found again, and copies within the data."""

import hashlib
import io
import os
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import engine
from data_prep.filters import copies, decontaminate, eval_sets, nearest
from data_prep.filters import stage as filters_stage
from data_prep.pairs import pictures
from data_prep.selection import embed
from mofi_jax.common import errors
from mofi_jax.data import ops
from tests import label_tables, workdirs

INT64 = st.integers(-(2**63), 2**63 - 1)

# ------------------------------------------------------------------------------------------ banding


@st.composite
def hashes_with_neighbours(draw):
    """Two lists of hashes, many of the second few bits away from one of the first."""
    left = draw(st.lists(INT64, min_size=1, max_size=20))
    right = draw(st.lists(INT64, max_size=10))
    for _ in range(draw(st.integers(0, 20))):
        bits = draw(st.sets(st.integers(0, 63), max_size=9))
        flipped = np.uint64(sum(1 << bit for bit in bits))
        start = np.int64(draw(st.sampled_from(left))).view(np.uint64)
        right.append(int((start ^ flipped).view(np.int64)))
    return np.array(left, np.int64), np.array(right, np.int64)


@settings(max_examples=200, deadline=None)
@given(hashes_with_neighbours(), st.integers(0, 8))
def test_banding_misses_nothing_and_invents_nothing(hashes, max_distance):
    queries, known = hashes
    found = {}
    for query, position, distance in decontaminate.HashIndex(known, max_distance).near(queries):
        found |= dict(zip(zip(query, position, strict=True), distance, strict=True))
    distances = pictures.hamming(queries[:, None], known[None])
    brute = {(i, j): distances[i, j] for i, j in np.argwhere(distances <= max_distance)}
    assert found == brute


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_equal_ranges_come_in_pieces_without_loss(queries, values):
    queries, values = np.array(queries, np.int64), np.sort(np.array(values, np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontaminate, "_CANDIDATES", 7)
        pieces = list(decontaminate.equal_ranges(queries, values))
    found = [(i, j) for piece in pieces for i, j in zip(*piece, strict=True)]
    assert found == [
        (i, j) for i in range(len(queries)) for j in np.flatnonzero(values == queries[i])
    ]
    assert all(len(i) <= max(7, len(values)) for i, _ in pieces)


# --------------------------------------------------------------------------------------- real sets


def photo(seed, size=96):
    """A smooth picture with structure, as photos have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def encode(rgb, suffix=".jpg", quality=95):
    return cv2.imencode(suffix, rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def write_pairs(workdir, shards):
    """pairs/ of (key, picture bytes), with the columns that the filters read."""
    (workdir / "pairs").mkdir(parents=True)
    for number, rows in enumerate(shards):
        table = {
            "key": pa.array([key for key, _ in rows], pa.string()),
            "sha256": pa.array([hashlib.sha256(data).hexdigest() for _, data in rows], pa.string()),
            "phash": pa.array(
                [pictures.perceptual_hash(ops.decode_rgb(data)) for _, data in rows], pa.int64()
            ),
        }
        pq.write_table(pa.table(table), workdir / f"pairs/{number:05d}.parquet")


@pytest.fixture
def sets(tmp_path):
    """A folder set with sub-folders and a bad file, and a tar set; they share a picture."""
    folder = tmp_path / "eval/landmarks/a"
    folder.mkdir(parents=True)
    for seed in range(3):
        (folder / f"{seed}.JPEG").write_bytes(encode(photo(seed)))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_bytes(b"no picture either")
    with tarfile.open(tmp_path / "eval/other.tar", "w") as tar:
        for seed in (2, 3):
            info = tarfile.TarInfo(f"x/{seed}.jpg")
            data = encode(photo(seed))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {
        "landmarks": str(tmp_path / "eval/landmarks"),
        "other": str(tmp_path / "eval/other.tar"),
    }


def text_config(**changes):
    config = workdirs.config(labels="text", min_images=1)
    config.filters.update(changes)
    return config


@pytest.mark.parametrize("workers", [1, 2])
def test_same_files_and_scaled_copies_are_found_and_counted(tmp_path, sets, workers):
    small = cv2.resize(photo(1), (64, 64), interpolation=cv2.INTER_AREA)
    shards = [
        [
            ("same", encode(photo(0))),
            ("scaled", encode(small, quality=70)),
            ("new", encode(photo(9))),
        ],
        [
            ("both", encode(photo(2))),
            ("unlabelled", encode(photo(3))),
            ("png", encode(photo(3), ".png")),
        ],
    ]
    workdir = tmp_path / "W"
    write_pairs(workdir, shards)
    label_tables.write(
        workdir,
        [[(key, [] if key == "unlabelled" else [1]) for key, _ in shard] for shard in shards],
    )
    config = text_config(eval_sets=sets)
    manifests = filters_stage.run(config, engine.Engine(workdir, workers))
    assert [row["key"] for row in label_tables.read(workdir, "labels_final/*.parquet")] == ["new"]
    counts = engine.total_counts(manifests)
    assert counts["candidates"] == 5
    assert counts["dropped"] == 4
    assert counts["labelled"] == 1
    # By set and layer; a picture of two sets counts for both, and once in rejects/.
    assert counts["eval_duplicate:landmarks:sha256"] == 2
    assert counts["eval_duplicate:landmarks:phash"] == 1
    assert counts["eval_duplicate:other:sha256"] == 1
    assert counts["eval_duplicate:other:phash"] == 1
    rejects = {
        row["key"]: row["reason"] for row in label_tables.read(workdir, "rejects/dropped-i2e*")
    }
    assert rejects == {
        "same": "eval_duplicate:landmarks",
        "scaled": "eval_duplicate:landmarks",
        "both": "eval_duplicate:landmarks",
        "png": "eval_duplicate:other",
    }
    matches = {row["key"]: row for row in label_tables.read(workdir, "eval_matches/*.parquet")}
    assert matches["scaled"]["name"] == "a/1.JPEG"
    assert matches["scaled"]["distance"] <= 4
    assert matches["unlabelled"]["layer"] == "sha256"
    hashes = label_tables.read(workdir, "eval_hashes/landmarks-*.parquet")
    assert [row["phash"] is None for row in hashes] == [False, False, False, True]

    # Off again: nothing of it is left behind.
    filters_stage.run(text_config(), engine.Engine(workdir, workers))
    assert len(label_tables.read(workdir, "labels_final/*.parquet")) == 5
    for stage in ("eval_hashes", "eval_matches", "dropped-i2e"):
        assert not list((workdir / stage).glob("*.parquet"))
    assert not list(workdir.glob("rejects/dropped*"))


def test_raw_pairs_are_filtered_without_labels(tmp_path, sets):
    workdir = tmp_path / "W"
    write_pairs(workdir, [[("same", encode(photo(0))), ("new", encode(photo(9)))]])
    config = text_config(eval_sets=sets)
    config.dataset = "i2t"
    [manifest] = filters_stage.drop_pictures(config, engine.Engine(workdir))
    assert manifest["counts"]["candidates"] == 2
    assert [row["key"] for row in label_tables.read(workdir, "dropped-i2t/*.parquet")] == ["same"]


def test_max_hamming_is_the_limit(tmp_path, sets):
    workdir = tmp_path / "W"
    write_pairs(workdir, [[(f"{bits}", encode(photo(9))) for bits in range(8)]])
    path = workdir / "pairs/00000.parquet"
    start = np.int64(pictures.perceptual_hash(ops.decode_rgb(encode(photo(0)))))
    hashes = [int(start ^ np.int64(sum(1 << 9 * i for i in range(bits)))) for bits in range(8)]
    pq.write_table(pq.read_table(path).set_column(2, "phash", pa.array(hashes)), path)
    label_tables.write(workdir, [[(f"{bits}", [1]) for bits in range(8)]])
    for limit in (0, 4, 6):
        filters_stage.run(text_config(eval_sets=sets, max_hamming=limit), engine.Engine(workdir))
        kept = [row["key"] for row in label_tables.read(workdir, "labels_final/*.parquet")]
        assert kept == [f"{bits}" for bits in range(limit + 1, 8)]


# ------------------------------------------------------------------------------------------ cosines


def test_cosines_find_what_hashes_do_not(tmp_path, sets, monkeypatch):
    monkeypatch.setattr(nearest, "_BLOCK", 4)
    monkeypatch.setattr(nearest, "_EVAL_BLOCK", 2)
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda *_: model)
    workdir = tmp_path / "W"
    mirrored = photo(1)[:, ::-1]  # other bits, the same mean colour
    shards = [
        [("same", encode(photo(0))), ("mirrored", encode(np.ascontiguousarray(mirrored)))],
        [(f"new{i}", encode(photo(100 + i) // 4)) for i in range(5)],
        [],
    ]
    write_pairs(workdir, shards)
    label_tables.write(workdir, [[(key, [1]) for key, _ in shard] for shard in shards])
    (workdir / "model").mkdir()
    (workdir / "model/fingerprint.txt").write_text("")
    (workdir / "embeddings").mkdir()
    for number, shard in enumerate(shards):
        pixels = [model.towers.decode(data) for _, data in shard]
        found = (
            model.towers.embed_images(model.params, np.stack(pixels)) if shard else np.zeros((0, 0))
        )
        np.save(workdir / f"embeddings/{number:05d}.npy", found.astype(np.float16))
        table = pa.table({"key": pa.array([key for key, _ in shard], pa.string())})
        pq.write_table(table, workdir / f"embeddings/{number:05d}.parquet")

    def run(limit, **changes):
        monkeypatch.setattr(nearest, "fit_limit", lambda *_: limit)
        config = text_config(eval_sets=sets, **changes)
        config.labels, config.clip = "clip", "somewhere"
        return engine.total_counts(filters_stage.run(config, engine.Engine(workdir)))

    counts = run(1e-4)
    assert counts["eval_duplicate:landmarks:cosine"] == 1
    assert counts["eval_duplicate:landmarks:sha256"] == 1
    [match] = label_tables.read(workdir, "eval_cosines/00000.parquet")
    assert (match["key"], match["layer"], match["name"]) == ("mirrored", "cosine", "a/1.JPEG")
    assert 0 <= match["distance"] <= 1e-4
    # The blocked products find exactly what all cosines at once do.
    counts = run(0.1, eval_false_positives=0.002)
    stored = np.concatenate([np.load(workdir / f"embeddings/{n:05d}.npy") for n in (0, 1)])
    keys = [
        row["key"]
        for n in (0, 1)
        for row in label_tables.read(workdir, f"embeddings/{n:05d}.parquet")
    ]
    expected, near = set(), {}
    for name in ("landmarks", "other"):
        evaluation = np.load(workdir / f"eval_embeddings/{name}-00000.npy").astype(np.float32)
        lengths = np.linalg.norm(stored.astype(np.float32), axis=1)[:, None]
        lengths = lengths * np.maximum(np.linalg.norm(evaluation, axis=1), 1e-6)
        cosines = stored.astype(np.float32) @ evaluation.T / lengths
        expected |= {
            (key, name) for key, row in zip(keys, cosines, strict=True) if row.max() >= 0.9
        }
        near |= {(key, name): 1 - row.max() for key, row in zip(keys, cosines, strict=True)}
    found = {
        (row["key"], row["set"])
        for pattern in ("eval_matches/*.parquet", "eval_cosines/*.parquet")
        for row in label_tables.read(workdir, pattern)
    }
    assert found == expected
    for row in label_tables.read(workdir, "eval_nearest/*.parquet"):
        assert row["distance"] == pytest.approx(near[row["key"], row["set"]], abs=1e-6)
    run(None, eval_false_positives=0.0)
    assert not list(workdir.glob("eval_cosines/*.parquet"))
    assert not list(workdir.glob("eval_embeddings/*.npy"))


def test_a_weak_model_loses_the_share_that_was_asked_for_and_finds_copies(tmp_path, monkeypatch):
    """All cosines are above 0.99, so that no fixed one tells a copy from another picture."""
    rng = np.random.default_rng(0)

    def embedded(count):
        return np.concatenate([np.full((count, 1), 9.0), rng.normal(0, 0.2, (count, 8))], axis=1)

    evaluation = embedded(300)
    copies_ = evaluation[:20] + rng.normal(0, 0.002, (20, 9))
    pictures_ = np.concatenate([embedded(20_000), copies_])
    for folder in ("eval_hashes", "eval_embeddings", "embeddings", "eval_matches"):
        (tmp_path / folder).mkdir()
    names = pa.table({"set": ["birds"] * 300, "name": [f"{i}.jpg" for i in range(300)]})
    hashes, embeddings = tmp_path / "eval_hashes/b.parquet", tmp_path / "eval_embeddings/b.npy"
    pq.write_table(names, hashes)
    np.save(embeddings, evaluation.astype(np.float16))
    for shard, rows in enumerate(np.array_split(np.arange(len(pictures_)), 2)):
        keys = pa.table({"key": [f"{row}" for row in rows]})
        pq.write_table(keys, tmp_path / f"embeddings/{shard}.parquet")
        np.save(tmp_path / f"embeddings/{shard}.npy", pictures_[rows].astype(np.float16))
        known = pa.table({"key": pa.array([], pa.string()), "set": pa.array([], pa.string())})
        pq.write_table(known, tmp_path / f"eval_matches/{shard}.parquet")

    def run(share):
        nearest.run(engine.Engine(tmp_path), ["0", "1"], [hashes], [embeddings], share)
        rows = label_tables.read(tmp_path, "eval_cosines/*.parquet")
        assert all(row["distance"] < 0.01 for row in rows)
        found = {int(row["key"]): row["name"] for row in rows}
        assert {row: found.get(row) for row in range(20_000, 20_020)} == {
            20_000 + i: f"{i}.jpg" for i in range(20)
        }
        return len(found) - 20

    assert 100 < run(0.01) < 400  # of 20,000
    assert run(0.0001) < 10


def test_of_few_or_equal_distances_no_limit_is_made():
    assert nearest.fit_limit(np.arange(-99, 0), np.ones(99), 0.001) is None
    assert nearest.fit_limit(np.array([-5]), np.array([1000]), 0.001) is None
    # Exactly Weibull: the limit is its quantile.
    p = (np.arange(100_000) + 0.5) / 100_000
    distances = 0.02 * (-np.log1p(-p)) ** (1 / 4)
    bins = np.floor(np.log(distances) / nearest._BIN)
    limit = nearest.fit_limit(bins, np.ones(len(bins)), 0.001)
    assert limit == pytest.approx(0.02 * (-np.log1p(-0.001)) ** (1 / 4), rel=0.02)


# ------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_pictures_the_smallest_candidate_stays(tmp_path, workers):
    a, b, c = (encode(photo(seed)) for seed in range(3))
    workdir = tmp_path / "W"
    shards = [[("k9", a), ("k3", b)], [], [("k1", a), ("k5", a), ("k2", c)], [("k0", b), ("k4", b)]]
    write_pairs(workdir, shards)
    # k0 has no label: it is no candidate, and k3 stays in its place.
    labels = [[(key, [] if key == "k0" else [1]) for key, _ in shard] for shard in shards]
    label_tables.write(workdir, labels)
    counts = engine.total_counts(
        filters_stage.run(text_config(duplicates="exact"), engine.Engine(workdir, workers))
    )
    assert [row["key"] for row in label_tables.read(workdir, "labels_final/*.parquet")] == [
        "k3",
        "k1",
        "k2",
    ]
    assert counts["duplicate"] == 3
    rejects = {
        (row["key"], row["reason"]) for row in label_tables.read(workdir, "rejects/dropped-i2e*")
    }
    assert rejects == {("k9", "duplicate"), ("k5", "duplicate"), ("k4", "duplicate")}


def test_a_copy_of_what_goes_for_another_reason_stays(tmp_path):
    workdir = tmp_path / "W"
    write_pairs(workdir, [[("k1", encode(photo(0))), ("k2", encode(photo(0)))]])
    (workdir / "unsafe").mkdir()
    gone = pa.table({"key": ["k1"], "reason": ["blocked_domain"]})
    pq.write_table(gone, workdir / "unsafe/00000.parquet")
    copies.run(engine.Engine(workdir), ["00000"], False, ["unsafe"])
    assert label_tables.read(workdir, "copies/*.parquet") == []


# ---------------------------------------------------------------------------------------- bad input


def test_bad_sets_are_named(tmp_path, sets):
    def refused(match, **eval_sets_):
        with pytest.raises(errors.BadInput, match=match):
            filters_stage.check(text_config(eval_sets=eval_sets_))

    refused("eval_sets.x='nowhere' does not exist", x="nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds no pictures", x=str(tmp_path / "empty"))
    refused("name the set in letters", **{"a:b": sets["other"]})
    workdir = tmp_path / "W"
    write_pairs(workdir, [[("a", encode(photo(0)))]])
    label_tables.write(workdir, [[("a", [1])]])

    def fails(match, path):
        with pytest.raises(errors.BadInput, match=match):
            filters_stage.run(text_config(eval_sets={"x": str(path)}), engine.Engine(workdir))

    with open(sets["other"], "rb") as file:
        data = file.read()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 3])
    fails("cut.tar cannot be read as a tar", tmp_path / "cut.tar")
    # Leaving it out would let its pictures through.
    work = engine.Engine(workdir, failure_budget=1.0)
    with pytest.raises(errors.BadInput, match=r"cut.tar cannot be read as a tar"):
        filters_stage.run(text_config(eval_sets={"x": str(tmp_path / "cut.tar")}), work)
    (tmp_path / "no.tar").write_bytes(b"no tar at all")
    fails("no.tar cannot be read as a tar", tmp_path / "no.tar")
    with tarfile.open(tmp_path / "texts.tar.gz", "w:gz") as tar:
        tar.add(__file__, "test.py")
    fails("eval_sets.x holds no pictures", tmp_path / "texts.tar.gz")


def test_undecodable_pictures_embed_as_zeros(tmp_path, sets, monkeypatch):
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda *_: model)
    (tmp_path / "W/model").mkdir(parents=True)
    (tmp_path / "W/model/fingerprint.txt").write_text("")
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "x.jpg").write_bytes(b"no")
    config = text_config(eval_sets=sets | {"bad": str(only_bad)})
    config.batch_size = 2
    config.clip = "somewhere"
    parts = eval_sets.run(config, engine.Engine(tmp_path / "W"), embed=True)
    assert parts == ("bad-00000", "landmarks-00000", "other-00000")
    norms = np.linalg.norm(np.load(tmp_path / "W/eval_embeddings/landmarks-00000.npy"), axis=1)
    np.testing.assert_allclose(norms, [1, 1, 1, 0], atol=1e-3)
    assert np.load(tmp_path / "W/eval_embeddings/bad-00000.npy").shape == (1, 0)
    assert os.path.exists(tmp_path / "W/eval_hashes/bad-00000.parquet")
