"""The stages that run CLIP: what they read, what is left out, and what does not change them."""

import concurrent.futures
import os
import pathlib
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import synthetic
from data_prep import engine
from data_prep.engine import jobs
from data_prep.pairs import stage as pairs_stage
from data_prep.selection import choose, embed
from mofi_jax import inference
from mofi_jax.common import errors
from tests import workdirs


@pytest.fixture
def world(tmp_path, monkeypatch):
    workdir, pairs = workdirs.write(tmp_path)
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda folder, batch_size: model)
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "model.json").write_text("{}")
    return workdir, {pair.key: pair for pair in pairs}, model, str(clip)


def _digests(workdir, *stages):
    files = [path for stage in stages for path in sorted((workdir / stage).glob("*.[np]*"))]
    return {str(path.relative_to(workdir)): engine.sha256(path) for path in files}


def _embedded(workdir):
    paths = sorted((workdir / "embeddings").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def test_small_pieces_and_blocks_give_the_same_bytes(world, monkeypatch):
    workdir, _, model, clip = world
    embed.run(workdirs.config(clip=clip), engine.Engine(workdir))
    expected = _digests(workdir, "texts", "embeddings")
    assert len(expected) == 8
    shutil.rmtree(workdir / "texts")
    shutil.rmtree(workdir / "embeddings")
    monkeypatch.setattr(pairs_stage, "_PIECE_BYTES", 3000)  # a picture is 1 to 14 kB
    embed.run(workdirs.config(clip=clip), engine.Engine(workdir))
    assert _digests(workdir, "texts", "embeddings") == expected
    assert model.pictures == 2 * len(_embedded(workdir))


@given(st.lists(st.integers(0, 5), max_size=9), st.integers(1, 7))
def test_batches_keep_order_and_size(lengths, size):
    rows = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]) if lengths else []
    found = list(embed._rebatch(((group, 10 * group) for group in rows), size))
    np.testing.assert_array_equal([r for part, _ in found for r in part], np.arange(sum(lengths)))
    assert all((pixels == 10 * part).all() for part, pixels in found)
    assert [len(part) for part, _ in found[:-1]] == [size] * (len(found) - 1)
    assert all(0 < len(part) <= size for part, _ in found)


class _Threads:
    """Runs two jobs at once in this process."""

    def run(self, todo, accelerator):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            yield from zip(todo, pool.map(jobs.attempt, todo), strict=True)


def test_while_a_shard_goes_through_the_model_the_next_one_is_decoded(world):
    workdir, _, model, clip = world
    decode, stream = model.towers.decode, model.towers.embed_image_batches
    decoded, ahead, busy = [], threading.Event(), threading.Lock()

    def note(data):
        decoded.append(data)
        if len(decoded) > 20:  # more than a shard has
            ahead.set()
        return decode(data)

    def wait(params, batches):
        assert busy.acquire(blocking=False), "a shard at a time"
        for vectors in stream(params, batches):
            assert ahead.wait(60)
            yield vectors
        busy.release()

    model.towers.decode, model.towers.embed_image_batches = note, wait
    embed.run(workdirs.config(clip=clip), engine.Engine(workdir, executor=_Threads()))
    assert model.pictures == len(decoded) == 55


def test_a_picture_that_broke_since_is_left_out(world):
    workdir, _pairs, _, clip = world
    rows = pq.read_table(workdir / "pairs/colours-00001-00000.parquet").to_pylist()
    linked = {
        row["key"]
        for row in pq.read_table(workdir / "links/colours-00001-00000.parquet").to_pylist()
        if row["candidates"]
    }
    broken = [row for row in rows if row["key"] in linked][2:4]
    for row in broken:
        with open(workdir / row["path"], "r+b") as file:
            file.seek(row["offset"])
            file.write(bytes(row["length"] // 2))
    work = engine.Engine(workdir)
    manifests = choose.run(workdirs.config(clip=clip), work)
    scored, keys = _embedded(workdir), {row["key"] for row in broken}
    assert not keys & set(scored)
    assert len(scored) == 53  # of 55 that name something
    embeddings = np.load(workdir / "embeddings/colours-00001-00000.npy")
    assert (
        len(embeddings)
        == pq.read_metadata(workdir / "embeddings/colours-00001-00000.parquet").num_rows
    )
    assert np.all(np.linalg.norm(embeddings, axis=1) > 0.99)
    assert engine.total_counts(manifests)["picture_unreadable"] == 2
    rejects = pq.read_table(workdir / "rejects/labels-colours-00001-00000.parquet").to_pylist()
    assert {r["key"] for r in rejects if r["reason"] == "picture_unreadable"} == keys
    # The others keep their labels.
    labels = pq.read_table(workdir / "labels/colours-00001-00000.parquet").to_pylist()
    assert sum(bool(row["entities"]) for row in labels) > 10


def test_a_shard_of_which_no_picture_can_be_read(world):
    workdir, _, _, clip = world
    for row in pq.read_table(workdir / "pairs/colours-00000-00000.parquet").to_pylist():
        with open(workdir / row["path"], "r+b") as file:
            file.seek(row["offset"])
            file.write(bytes(row["length"]))
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    reasons = pq.read_table(workdir / "labels/colours-00000-00000.parquet")["reason"].to_pylist()
    assert set(reasons) == {"picture_unreadable", "no_mention"}


def test_a_picture_file_that_is_gone_is_told(world):
    workdir, _, _, clip = world
    path = pq.read_table(workdir / "pairs/colours-00002-00000.parquet")["path"][0].as_py()
    os.unlink(workdir / path)
    with pytest.raises(errors.BadInput, match=r"is gone since its pictures were listed: restore"):
        embed.run(workdirs.config(clip=clip), engine.Engine(workdir))


def _change(folder, stage, change):
    """Rewrites the tables of a stage with other rows."""
    for path in sorted((folder / stage).glob("*.parquet")):
        table = pq.read_table(path)
        rows = change(table.to_pylist())
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_other_candidates_embed_only_pictures_that_had_none(world, tmp_path):
    workdir, _, model, clip = world

    def without(every):
        def change(rows):
            return [
                row | {"candidates": []} if int(row["key"]) % every == 0 else row for row in rows
            ]

        return change

    config, work = workdirs.config(clip=clip), engine.Engine(workdir)
    shutil.copytree(workdir / "links", tmp_path / "links")
    _change(workdir, "links", without(every=3))
    embed.run(config, work)
    had, seen = set(_embedded(workdir)), model.pictures
    assert seen == len(had)
    shutil.rmtree(workdir / "links")
    shutil.copytree(tmp_path / "links", workdir / "links")
    _change(workdir, "links", without(every=4))
    embed.run(config, work)
    has, expected = set(_embedded(workdir)), _digests(workdir, "embeddings")
    assert model.pictures - seen == len(has - had) > 5
    assert had - has
    # Of one shard nothing is new, and its captions have changed.
    _change(workdir, "pairs", lambda rows: [row | {"text": "else"} for row in rows])
    seen = model.pictures
    embed.run(config, work)
    assert (model.pictures, _digests(workdir, "embeddings")) == (seen, expected)
    shutil.rmtree(workdir / "embeddings")
    embed.run(config, work)
    assert _digests(workdir, "embeddings") == expected
    # Another model says other things of them all.
    seen = model.pictures
    pathlib.Path(clip, "model.json").write_text("{ }")
    embed.run(config, work)
    assert model.pictures - seen == len(has)


def test_a_shard_that_is_added_has_its_own_pictures_embedded_alone(world, tmp_path):
    workdir, _, model, clip = world
    config, work = workdirs.config(clip=clip), engine.Engine(workdir)
    name = "colours-00001-00000.parquet"
    for stage in ("pairs", "links"):
        os.rename(workdir / stage / name, tmp_path / stage)
    embed.run(config, work)
    seen, before = model.pictures, _digests(workdir, "embeddings")
    made = [os.stat(path).st_mtime_ns for path in map(workdir.joinpath, before)]
    for stage in ("pairs", "links"):
        os.rename(tmp_path / stage, workdir / stage / name)
    embed.run(config, work)
    own = pq.read_metadata(workdir / "embeddings" / name).num_rows
    assert (len(before), model.pictures - seen) == (4, own)
    assert [os.stat(path).st_mtime_ns for path in map(workdir.joinpath, before)] == made


@pytest.mark.parametrize("blocks", [1, 3])
def test_entities_that_are_new_have_their_texts_embedded_alone(world, monkeypatch, blocks):
    workdir, _, model, clip = world
    monkeypatch.setattr(embed, "_BUCKETS", blocks)
    monkeypatch.setattr(embed, "_TEXTS", 1)
    config, work = workdirs.config(clip=clip), engine.Engine(workdir)
    embed.run(config, work)
    assert (model.texts, model.pictures) == (6, 55)
    # The new one comes first: all others are another row than before.
    new = {"qid": "Q0", "label": "grey", "description": "the colour grey"}
    _change(workdir, "kb", lambda rows: [new, *rows])

    def shifted(rows):
        for row in rows:
            for candidate in row["candidates"]:
                candidate["entity"] = (candidate["entity"] + 1) % 5
        return rows

    _change(workdir, "links", shifted)
    embed.run(config, work)
    assert (model.texts, model.pictures) == (7, 55)
    expected = _digests(workdir, "texts")
    shutil.rmtree(workdir / "texts")
    embed.run(config, work)
    assert _digests(workdir, "texts") == expected


def test_nothing_is_left_of_embeddings_that_no_candidate_asks_for(world):
    workdir, _, _, clip = world
    config, work = workdirs.config(clip=clip), engine.Engine(workdir)
    embed.run(config, work)
    _change(workdir, "links", lambda rows: [row | {"candidates": []} for row in rows])
    embed.run(config, work)
    left = _digests(workdir, "texts", "embeddings")
    shutil.rmtree(workdir / "embeddings")
    embed.run(config, work)
    assert _digests(workdir, "texts", "embeddings") == left


def test_a_moved_model_is_the_same_model(world, tmp_path):
    workdir, _, model, clip = world
    embed.run(workdirs.config(clip=clip), engine.Engine(workdir))
    seen, expected = model.pictures, _digests(workdir, "texts", "embeddings")
    os.rename(clip, tmp_path / "elsewhere")
    embed.run(workdirs.config(clip=str(tmp_path / "elsewhere")), engine.Engine(workdir))
    assert model.pictures == seen
    assert _digests(workdir, "texts", "embeddings") == expected


def _write_run(folder, steps):
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        for item in ("params/d", "optimizer"):
            (folder / "checkpoints" / str(step) / item).mkdir(parents=True)
            (folder / "checkpoints" / str(step) / item / "0").write_text(f"{item} {step}")
    for name in ("model.json", "tokenizer.json", "config.json", "metrics.jsonl"):
        (folder / name).write_text("{}")


def test_a_run_is_its_latest_parameters(tmp_path):
    _write_run(tmp_path, steps=(5, 10, 9))
    (tmp_path / "checkpoints/20.orbax-checkpoint-tmp").mkdir()  # being written
    names = [os.path.relpath(path, tmp_path) for path in embed.model_files(os.fspath(tmp_path))]
    assert names == ["checkpoints/10/params/d/0", "model.json", "tokenizer.json"]


def test_of_other_folders_all_weights_and_settings_count(tmp_path):
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("{}")
    names = {pathlib.Path(path).name for path in embed.model_files(os.fspath(tmp_path))}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP model in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("clip")
    texts = ["red, the colour red", "green thing on background"]
    synthetic.write_clip(folder / "model", texts)
    return str(folder / "model")


def test_a_model_is_loaded_once_until_another_takes_its_place(tmp_path, clip_folder):
    folder = os.fspath(shutil.copytree(clip_folder, tmp_path / "clip"))
    model = embed.load_model(folder, 8)
    assert embed.load_model(folder, 8) is model
    os.utime(tmp_path / "clip/model.safetensors")
    assert embed.load_model(folder, 8) is not model


def test_eight_devices_score_as_one_does(tmp_path, monkeypatch, mesh_of, clip_folder):
    workdir, _ = workdirs.write(tmp_path, count=30, tars=2)
    found = []
    for name in ("1x1x1", "8x1x1"):
        model = inference.load(clip_folder, mesh=mesh_of[name], batch_size=12)
        assert len(model.towers.mesh.devices.flat) == int(name[0])
        monkeypatch.setattr(embed, "load_model", lambda folder, size, model=model: model)
        embed.run(workdirs.config(clip=clip_folder, batch_size=12), engine.Engine(workdir))
        embeddings = [np.load(path) for path in sorted((workdir / "embeddings").glob("*.npy"))]
        found.append((_embedded(workdir), np.concatenate(embeddings)))
        shutil.rmtree(workdir / "embeddings")
    (one, embeddings_one), (eight, embeddings_eight) = found
    assert embeddings_one.dtype == np.float16
    # An embedding on the border between two float16 may fall to either side.
    np.testing.assert_allclose(
        embeddings_one.astype(np.float32), embeddings_eight.astype(np.float32), atol=5e-4
    )
    assert np.mean(embeddings_one == embeddings_eight) > 0.95
    assert list(one) == list(eight)


def test_results_come_a_batch_late_but_all_of_them(mesh_of, clip_folder):
    model = inference.load(clip_folder, mesh=mesh_of["8x1x1"], batch_size=12)
    images = np.random.default_rng(0).integers(0, 256, (29, 16, 16, 3), np.uint8)
    sizes = (12, 5, 12)
    batches = np.split(images, np.cumsum(sizes)[:-1])
    found = list(model.towers.embed_image_batches(model.params, batches))
    assert [len(part) for part in found] == list(sizes)
    expected = model.towers.embed_images(model.params, images)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
    assert list(model.towers.embed_image_batches(model.params, [])) == []
