"""The removal list: what it names stays away from every later build, version and publication."""

import cv2
import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import engine, remove_keys
from data_prep.card import stage as card_stage
from data_prep.dataset import publish, remove, shards, versions, vocabulary
from data_prep.filters import removed
from data_prep.filters import stage as filters_stage
from data_prep.selection import choose
from mofi_jax.common import errors
from mofi_jax.data import records
from tests import label_tables, workdirs

# "0008" is the picture of "0000", "0012" nearly so.
COPIES = ["0000", "0008", "0012"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A work directory with labels by text, and its configuration, which publishes."""
    picture = workdirs.picture

    def copied(pair, suffix):
        if pair.key not in COPIES:
            return picture(pair, suffix)
        data = picture(workdirs.pairs(1)[0], suffix)
        if pair.key == "0012":
            rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            data = cv2.imencode(f".{suffix}", np.clip(rgb, 0, 254) + 1)[1].tobytes()
        return data

    monkeypatch.setattr(workdirs, "picture", copied)
    workdir, _ = workdirs.write(tmp_path)
    config = workdirs.config(
        labels="text", sources=(f"colours={tmp_path / 'tars'}",), publish=str(tmp_path / "out")
    )
    return workdir, config


def build(workdir, config):
    work = engine.Engine(workdir)
    if config.dataset == "i2e":
        for stage in (choose, filters_stage, vocabulary):
            stage.run(config, work)
    else:
        filters_stage.drop_pictures(config, work)
    shards.run(config, work, config.dataset)
    if config.dataset == "i2e":
        card_stage.run(config, work)
    publish.run(config, work, config.dataset)


def keys_of(version):
    info, found = versions.read_info(version), []
    for number, length in enumerate(info.shard_lengths):
        for record in versions.read_shard(info.shard(version, number), length):
            found.append(records.parse(record)["key"])
    return found


def key_file(folder, *lines):
    path = folder / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_removal_lasts_over_rebuilds_and_publications(world, tmp_path, caplog):
    workdir, config = world
    build(workdir, config)
    old, out = workdir / "i2e/1.0.0", tmp_path / "out/i2e/1.0.0"
    before = keys_of(old)
    assert {*COPIES} < {*before}
    assert keys_of(out) == before
    stays = {*before} - {*COPIES}
    result = remove.remove(old, key_file(tmp_path, "0000", "nobody"))
    assert (result["removed"], result["copies"], result["unknown"]) == (3, 2, ["nobody"])
    assert {*keys_of(workdir / "i2e/1.0.1")} == stays
    assert not (workdir / "report/index.html").exists()
    noted = (workdir / "removed/removed.txt").read_bytes()
    assert remove.remove(old, key_file(tmp_path, "0000", "nobody")) == result
    assert (workdir / "removed/removed.txt").read_bytes() == noted

    for seed in (0, 1):
        config.seed = seed
        caplog.clear()
        build(workdir, config)
        assert f"{workdir / 'i2e/1.0.1'} was made from an earlier build" in caplog.text
        assert {*keys_of(old)} == {*keys_of(out)} == stays
        assert {path.name for path in out.iterdir()} - {"SHA256SUMS"} == {
            path.name for path in old.iterdir()
        }
        rejects = label_tables.read(workdir, "rejects/dropped-i2e*")
        assert {(r["key"], r["reason"]) for r in rejects} == {(key, "removed") for key in COPIES}
        for name in ("index.html", "report.json"):
            text = (workdir / "report" / name).read_text()
            assert not any(f'"{key}"' in text for key in COPIES)
    # What the list says already is no news.
    again = remove.remove(old, key_file(tmp_path, "0000"), workdir / "i2e/1.0.2")
    assert (again["removed"], again["already_removed"], again["unknown"]) == (0, 1, [])


@pytest.mark.parametrize("named", ["key", "sha256", "phash", "version"])
def test_lists_of_the_configuration_for_raw_pairs(world, tmp_path, named, caplog):
    workdir, config = world
    config.dataset = "i2t"
    rows = {r["key"]: r for r in label_tables.read(workdir, "pairs/*.parquet")}
    first = rows["0000"]
    line = {
        "key": "0000",
        "sha256": f"sha256:{first['sha256'].upper()}",
        "phash": f"phash:{first['phash'] % 2**64:016x}",
    }
    gone = {"key": COPIES[:1], "sha256": COPIES[:2]}.get(named, COPIES)
    if named == "version":
        # A list that a removal elsewhere wrote: its hashes are of the pictures in the records.
        build(workdir, config)
        elsewhere = tmp_path / "elsewhere/1.0.0"
        (workdir / "i2t/1.0.0").rename(elsewhere.parent.mkdir() or elsewhere)
        remove.remove(elsewhere, key_file(tmp_path, "0000"))
        config.removed = (str(tmp_path / "elsewhere/1.0.1/removed_keys.txt"),)
    else:
        config.removed = (str(key_file(tmp_path, line[named], "nobody")),)
    build(workdir, config)
    assert {*rows} - {*keys_of(workdir / "i2t/1.0.0")} == {*gone}
    if named != "version":
        asked = 2 if named == "key" else 1
        assert f"1 of {asked} keys on the removal lists are of no pair here" in caplog.text
    # Off again, and it is back: the list alone decides.
    config.removed = ()
    build(workdir, config)
    assert len(keys_of(workdir / "i2t/1.0.0")) == len(rows)
    assert not list((workdir / "takedowns").glob("*.parquet"))


def test_a_hash_names_the_records_of_a_work_directory(world, tmp_path):
    workdir, config = world
    build(workdir, config)
    rows = label_tables.read(workdir, "pairs/*.parquet")
    digest = next(row["sha256"] for row in rows if row["key"] == "0000")
    result = remove.remove(workdir / "i2e/1.0.0", key_file(tmp_path, f"sha256:{digest}"))
    assert (result["removed"], result["unknown"]) == (2, [])
    (tmp_path / "other").mkdir()
    (workdir / "i2e/1.0.0").rename(tmp_path / "other/1.0.0")
    with pytest.raises(errors.BadInput, match="lies in none: name their keys"):
        remove.remove(tmp_path / "other/1.0.0", key_file(tmp_path, f"sha256:{digest}"))
    with pytest.raises(errors.BadInput, match="max_hamming=7 cannot be used"):
        remove_keys.main(str(tmp_path), str(tmp_path), max_hamming="7")


@pytest.mark.parametrize("line", ["sha256:12", "phash:xyz", "sha256:"])
def test_what_begins_like_a_hash_is_one(tmp_path, line):
    with pytest.raises(
        errors.BadInput, match=r"config.removed=.*, line 2: .* is no (sha256|phash)"
    ):
        filters_stage.check(
            ml_collections.ConfigDict(
                workdirs.config(removed=(str(key_file(tmp_path, "a", line)),))
            )
        )


@given(
    st.frozensets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
    st.frozensets(st.integers(-(2**63), 2**63 - 1)),
)
def test_any_key_can_be_named(tmp_path_factory, keys, hashes):
    keys |= {"sha256:x", "phash", '"quoted"', "\ufeffbom", "two\nlines", " a "}
    wanted = removed.Removed(keys, frozenset({"ab" * 32}), hashes)
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(wanted.text(), encoding="utf-8", newline="")
    assert removed.read([path], "list") == wanted
