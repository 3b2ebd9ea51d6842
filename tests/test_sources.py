"""Sources: tars of any shape and state, pictures and captions good and bad, pointers."""

import gzip
import hashlib
import io
import json
import tarfile
import tempfile

import cv2
import hypothesis
import ml_collections
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

from data_prep import engine, samples, source_files, sources, tars
from mofi_jax import errors


def picture(width=40, height=40, kind="png", mode="RGB", **options):
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def tar_bytes(members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def make_config(*patterns, **changes):
    names = [f"s{number}" for number in range(len(patterns))]
    return ml_collections.ConfigDict(
        {
            "sources": tuple(f"{n}={p}" for n, p in zip(names, patterns, strict=True)),
            "keep_columns": ("punsafe", "NSFW"),
            "rows_per_shard": 10,
            "min_side": 16,
            "max_aspect": 4.0,
            "max_pixels": 1_000_000,
            "max_caption_chars": 1_000,
        }
        | changes
    )


def run(tmp_path, members, **changes):
    """Runs the stage on one tar; returns pairs by key, reasons by key, counts."""
    folder = tmp_path / "pairs_in"
    folder.mkdir(exist_ok=True)
    (folder / "00000.tar").write_bytes(tar_bytes(members))
    (manifest,) = sources.run(make_config(folder, **changes), engine.Engine(tmp_path / "w"))
    return *read(tmp_path / "w"), manifest["counts"]


def read(workdir):
    pairs, rejects = {}, {}
    for path in sorted(workdir.glob("pairs/*.parquet")):
        pairs |= {row["key"]: row for row in pq.read_table(path).to_pylist()}
    for path in sorted(workdir.glob("rejects/pairs-*.parquet")):
        rejects |= {row["key"]: row["reason"] for row in pq.read_table(path).to_pylist()}
    return pairs, rejects


def test_a_pair_and_its_pointer(tmp_path):
    data = picture(48, 32, "jpeg")
    pairs, rejects, counts = run(
        tmp_path, [("a.jpg", data), ("a.txt", "a  red\n apple \u00e9".encode()), ("a.json", b"{}")]
    )
    row = pairs["a"]
    assert (row["text"], row["width"], row["height"]) == ("a red apple \u00e9", 48, 32)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    with open(row["path"], "rb") as file:
        file.seek(row["offset"])
        assert file.read(row["length"]) == data
    assert rejects == {}
    assert counts == {
        "members": 3,
        "pairs": 1,
        "rejected": 0,
        "duplicate_keys": 0,
        "captions_cut": 0,
        "tars_cut_short": 0,
        "pairs_missing": 0,
        "not_downloaded": 0,
    }


def test_the_caption_of_json_is_taken_where_there_is_no_txt(tmp_path):
    data = picture()
    pairs, rejects, _ = run(
        tmp_path,
        [
            *[(f"{key}.png", data) for key in "abcdef"],
            ("a.json", json.dumps({"caption": "from json"}).encode()),
            ("b.json", json.dumps({"caption": "from json"}).encode()),
            ("b.txt", b"from txt"),
            ("c.json", b'{"caption": null}'),
            ("d.json", b'{"caption": '),
            ("e.json", b'{"caption": "half \\ud800"}'),
            ("f.json", b"[1, 2]"),
        ],
    )
    assert {key: row["text"] for key, row in pairs.items()} == {"a": "from json", "b": "from txt"}
    assert rejects == {
        "c": "no_text",
        "d": "broken_json",
        "e": "caption_not_utf8",
        "f": "no_text",
    }


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("jpg", picture(kind="jpeg", mode="CMYK")),
        ("jpeg", picture(kind="jpeg", mode="L")),
        ("PNG", picture(mode="RGBA")),
        ("webp", picture(kind="webp")),
        ("gif", picture(kind="gif", mode="P")),
        ("jpg", picture(kind="png")),  # the name lies, as it often does on the web
    ],
)
def test_odd_pictures_are_pairs(tmp_path, suffix, data):
    pairs, rejects, _ = run(tmp_path, [(f"a.{suffix}", data), ("a.txt", b"x")])
    assert rejects == {}
    assert (pairs["a"]["width"], pairs["a"]["height"]) == (40, 40)


def _wide_jpeg():
    return cv2.imencode(".jpg", np.zeros((16, 30_000, 3), np.uint8))[1].tobytes()


def _bomb():
    """The header of a PNG of 30,000 x 30,000 pixels; to decode it would take 2.7 GB."""
    data = bytearray(picture())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    # The checksum of the header has to be right for the size to be believed.
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


JPEG = picture(64, 64, "jpeg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_picture"),
        (b"<html>404</html>", "not_a_picture"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (picture()[:-100], "truncated"),
        (picture(1, 1), "too_small"),
        (picture(1, 1, "jpeg"), "too_small"),
        (picture(15, 40), "too_small"),
        (_wide_jpeg(), "too_wide"),
        (picture(20, 81), "too_wide"),
        (_bomb(), "too_many_pixels"),
        (picture(1100, 1000, "jpeg"), "too_many_pixels"),
    ],
)
def test_pictures_that_cannot_be_used_are_told(tmp_path, data, reason):
    pairs, rejects, counts = run(
        tmp_path, [("bad.jpg", data), ("bad.txt", b"x"), ("ok.png", picture()), ("ok.txt", b"x")]
    )
    assert rejects == {"bad": reason}
    assert list(pairs) == ["ok"]
    assert (counts["pairs"], counts["rejected"]) == (1, 1)


def test_a_corrupt_jpeg_is_told(tmp_path):
    data = bytearray(picture(64, 64, "png"))
    data[len(data) // 2] ^= 0xFF
    _, rejects, _ = run(tmp_path, [("bad.png", bytes(data)), ("bad.txt", b"x")])
    assert rejects["bad"] in ("corrupt", "truncated")


def test_captions_that_cannot_be_used_are_told(tmp_path):
    captions = {
        "latin1": "caf\u00e9".encode("latin-1"),
        "empty": b"",
        "blank": b" \n\t ",
        "control": b"\x00\x07",
        "bom": b"\xef\xbb\xbf",
    }
    members = [(f"{key}.png", picture()) for key in (*captions, "alone")]
    members += [(f"{key}.txt", text) for key, text in captions.items()]
    pairs, rejects, _ = run(tmp_path, [*members, ("words.txt", b"no picture")])
    assert pairs == {}
    assert rejects == {
        "latin1": "caption_not_utf8",
        "empty": "empty_caption",
        "blank": "empty_caption",
        "control": "empty_caption",
        "bom": "empty_caption",
        "alone": "no_text",
        "words": "no_picture",
    }


def test_long_captions_are_cut_at_a_word_and_counted(tmp_path):
    long = ("lorem " * 2_000).encode()
    members = [("a.png", picture()), ("a.txt", long), ("b.png", picture()), ("b.txt", b"short")]
    pairs, rejects, counts = run(tmp_path, members)
    assert pairs["a"]["text"] == ("lorem " * 166).strip()
    assert rejects == {}
    assert counts["captions_cut"] == 1


@hypothesis.given(st.text(), st.integers(1, 40))
def test_cut_captions_end_at_words(text, limit):
    text = samples.clean_caption(text)
    cut = samples.cut_caption(text, limit)
    assert len(cut) <= limit
    assert text.startswith(cut)
    assert (cut == text) == (len(text) <= limit)
    if cut and " " in text[:limit] and cut != text:
        assert text[len(cut)] == " "
    assert not any(ord(character) < 32 for character in text)


def test_a_second_picture_or_text_of_a_key_is_told(tmp_path):
    members = [("a.png", picture()), ("a.txt", b"one"), ("a.jpg", JPEG), ("a.txt", b"two")]
    pairs, rejects, counts = run(tmp_path, members)
    assert pairs["a"]["text"] == "one"
    assert rejects == {"a": "duplicate_key"}
    assert (counts["pairs"], counts["rejected"], counts["duplicate_keys"]) == (1, 1, 1)


def write_tars(folder, shards):
    """Each shard is a list of (key, text); the picture's side tells its shard."""
    folder.mkdir()
    for number, pairs in enumerate(shards):
        members = []
        for key, text in pairs:
            members += [(f"{key}.png", picture(30 + number)), (f"{key}.txt", text.encode())]
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(members))


def test_of_a_key_in_several_tars_the_first_is_kept_and_every_sample_counted_once(tmp_path, caplog):
    write_tars(
        tmp_path / "in",
        [
            [("a", "one"), ("b", "one"), ("b", "again")],
            [("c", "two"), ("a", "two"), ("empty", "")],
            [("a", "three"), ("c", "three"), ("d", "three")],
        ],
    )
    manifests = sources.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    rows = [row for shard in tables_of(tmp_path / "w", "pairs/*") for row in shard]
    kept = [("a", "one"), ("b", "one"), ("c", "two"), ("d", "three")]
    assert [(row["key"], row["text"]) for row in rows] == kept
    rejects = [
        [(row["key"], row["reason"]) for row in shard]
        for shard in tables_of(tmp_path / "w", "rejects/pairs-*")
    ]
    assert rejects == [
        [("b", "duplicate_key")],
        [("empty", "empty_caption"), ("a", "duplicate_key")],
        [("a", "duplicate_key"), ("c", "duplicate_key")],
    ]
    counts = engine.total_counts(manifests)
    assert (counts["pairs"], counts["rejected"], counts["duplicate_keys"]) == (4, 5, 4)
    assert counts["pairs"] + counts["rejected"] == 9
    assert "4 of the samples bear the key of another" in caplog.text


def tables_of(workdir, pattern):
    return [pq.read_table(path).to_pylist() for path in sorted(workdir.glob(f"{pattern}.parquet"))]


def test_a_repeated_key_that_goes_away_brings_the_other_back(tmp_path):
    write_tars(tmp_path / "in", [[("a", "one")], [("a", "two"), ("b", "two")]])
    for _ in range(2):
        sources.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    assert read(tmp_path / "w")[1] == {"a": "duplicate_key"}
    (tmp_path / "in/00000.tar").write_bytes(tar_bytes([("z.png", picture()), ("z.txt", b"z")]))
    sources.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {"z": "z", "a": "two", "b": "two"}
    assert rejects == {}
    assert not list((tmp_path / "w/unique").glob("*.parquet"))


def test_several_sources_are_mixed_under_their_names(tmp_path):
    write_tars(tmp_path / "x", [[("a", "x")]])
    write_tars(tmp_path / "y", [[("a", "y")]])
    for folder in ("x", "y"):
        (tmp_path / folder / "00001.tar.gz").write_bytes(
            gzip.compress(tar_bytes([("b.png", picture()), ("b.txt", b"packed")]))
        )
    config = make_config(tmp_path / "x", tmp_path / "y" / "*.tar*")
    sources.run(config, engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert {key: row["source"] for key, row in pairs.items()} == {
        "s0/a": "s0",
        "s0/b": "s0",
        "s1/a": "s1",
        "s1/b": "s1",
    }
    assert [pairs[key]["text"] for key in ("s0/a", "s1/a")] == ["x", "y"]
    assert pairs["s1/b"]["path"] == "unpacked/s1-00001.tar"
    assert rejects == {}


def test_a_damaged_tar_is_left_out_and_the_others_are_pairs(tmp_path):
    write_tars(tmp_path / "in", [[("a", "x")], [("b", "x")], [("c", "x")]])
    (tmp_path / "in/00001.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "in/00003.tar.gz").write_bytes(b"<html>404 not found</html>")
    work = engine.Engine(tmp_path / "w", failure_budget=1.0)
    for _ in range(2):
        assert engine.total_counts(sources.run(make_config(tmp_path / "in"), work))["pairs"] == 2
        assert list(read(tmp_path / "w")[0]) == ["a", "c"]
    assert work.quarantined == ["unpacked/00003.tar", "indexed/00001"] * 2


def test_captions_in_arabic_keep_every_letter_and_lose_what_cannot_be_seen(tmp_path):
    text = "\u062a\u0641\u0651\u0627\u062d\u0629 \u062d\u0645\u0631\u0627\u0621"
    marked = f"\u200f\u202b{text}\u202c\n"
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # the joiner is spelling
    decomposed = "cafe\u0301"
    members = []
    for key, words in (("a", marked), ("b", persian), ("c", decomposed), ("d", "\u200f \u2067")):
        members += [(f"{key}.png", picture()), (f"{key}.txt", words.encode())]
    pairs, rejects, _ = run(tmp_path, members)
    assert {k: row["text"] for k, row in pairs.items()} == {
        "a": text,
        "b": persian,
        "c": decomposed,
    }
    assert rejects == {"d": "empty_caption"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((), "give a tuple of NAME=PATTERN"),
        ("x=a.tar", "give a tuple of NAME=PATTERN"),
        (("a.tar",), "is not NAME=PATTERN"),
        (("a b=x.tar",), "is not NAME=PATTERN"),
        (("a=",), "is not NAME=PATTERN"),
        (("a=x.tar", "a=y.tar"), "two sources are called a"),
    ],
)
def test_sources_that_are_written_wrongly_are_told(entries, words):
    with pytest.raises(errors.BadInput, match=words):
        sources.find(entries)


def test_two_packed_files_of_one_name_are_told(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar.gz").touch()
    with pytest.raises(errors.BadInput, match=r"would be unpacked to 0\.tar: rename"):
        sources.find([f"x={tmp_path}/*/0.tar.gz"])


def test_sources_in_short(tmp_path):
    assert source_files.shorthand("data/cc3m/*.tar") == ("cc3m=data/cc3m/*.tar",)
    assert source_files.shorthand("a/x+y@b/") == ("x=a/x", "y=b/")
    assert source_files.shorthand("tfds:i2t:train[:5]@/d") == ("i2t=tfds:i2t:train[:5]@/d",)
    assert source_files.shorthand("t@tfds:i2t@/d+/") == ("t=tfds:i2t@/d", "pairs=/")
    odd = tmp_path / "a+b@c"
    odd.mkdir()
    assert source_files.shorthand(str(odd)) == (f"a_b_c={odd}",)


def test_gzipped_tars_are_unpacked_once_into_the_work_directory(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = picture()
    whole = tar_bytes([("a.png", data), ("a.txt", b"x")])
    (folder / "00007.tar.gz").write_bytes(gzip.compress(whole))
    for _ in range(2):
        sources.run(make_config(folder), engine.Engine(tmp_path / "w"))
    pairs, _ = read(tmp_path / "w")
    assert pairs["a"]["path"] == "unpacked/00007.tar"
    assert (tmp_path / "w/unpacked/00007.tar").read_bytes() == whole
    columns = ([pairs["a"][name]] for name in ("path", "offset", "length"))
    assert list(sources.read_pictures(tmp_path / "w", *columns)) == [(0, data)]
    # Beside its unpacked self the packed one is not read again.
    (folder / "00007.tar").write_bytes(whole)
    assert [found.path[-9:] for found in sources.find([f"s={folder}"])] == ["00007.tar"]


def test_nothing_to_read_is_told(tmp_path):
    with pytest.raises(errors.BadInput, match=r"missing\.tar does not exist: name a folder"):
        sources.run(make_config(tmp_path / "missing.tar"), engine.Engine(tmp_path / "w"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.BadInput, match="empty holds nothing that is known: name"):
        sources.run(make_config(tmp_path / "empty"), engine.Engine(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_file_that_is_no_tar_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(errors.BadInput, match=r"a\.tar is no tar .*: remove it or fetch"):
        sources.run(make_config(tmp_path / "a.tar"), engine.Engine(tmp_path / "w"))
    (tmp_path / "b.tar.gz").write_bytes(b"<html>404 not found</html>")
    with pytest.raises(errors.BadInput, match=r"b\.tar\.gz is damaged .*: fetch it again"):
        sources.run(make_config(tmp_path / "b.tar.gz"), engine.Engine(tmp_path / "w"))


def test_a_gzipped_file_that_holds_no_tar_is_told_by_its_own_name(tmp_path):
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"words " * 200))
    with pytest.raises(errors.BadInput, match=r"/c\.tar\.gz is no tar"):
        sources.run(make_config(tmp_path / "c.tar.gz"), engine.Engine(tmp_path / "w"))


def test_several_gzip_streams_are_one_tar(tmp_path):
    whole = tar_bytes([("a.png", picture()), ("a.txt", b"x")])
    streams = gzip.compress(whole[:700]) + gzip.compress(whole[700:]) + b"\0" * 100
    (tmp_path / "a.tar.gz").write_bytes(streams)
    (manifest,) = sources.run(make_config(tmp_path / "a.tar.gz"), engine.Engine(tmp_path / "w"))
    assert manifest["counts"]["pairs"] == 1
    assert manifest["counts"]["tars_cut_short"] == 0


def test_a_tar_damaged_in_the_middle_is_told(tmp_path):
    data = bytearray(tar_bytes([("a.png", picture()), ("a.txt", b"x"), ("b.txt", b"y")]))
    at = data.index(b"a.txt")
    data[at : at + 200] = b"\x01" * 200
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(errors.BadInput, match=rf"a\.tar is damaged at byte {at}: fetch it"):
        sources.run(make_config(tmp_path / "a.tar"), engine.Engine(tmp_path / "w"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_was_cut_short_gives_what_comes_before_the_cut(tmp_path, packed):
    members = []
    for number in range(8):
        members += [(f"{number}.png", picture(30 + number)), (f"{number}.txt", b"x")]
    whole = tar_bytes(members)
    data = gzip.compress(whole, 0)[: len(whole) // 2] if packed else whole[: len(whole) // 2]
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(data)
    (manifest,) = sources.run(make_config(path), engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert manifest["counts"]["tars_cut_short"] == 1
    assert list(pairs) == [str(number) for number in range(len(pairs))]
    assert 2 <= len(pairs) <= 4
    assert set(rejects.values()) <= {"tar_cut_short", "no_text"}


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=130)
contents = st.binary(max_size=1500)


@hypothesis.given(st.lists(st.tuples(names, contents), max_size=6), st.data())
@hypothesis.settings(deadline=None)
def test_members_are_found_where_they_lie_and_a_cut_loses_only_what_follows(members, data):
    whole = tar_bytes(members)
    with tempfile.NamedTemporaryFile() as file:
        file.write(whole)
        file.flush()
        found, cut, complete = tars.list_members(file.name)
        assert complete
        assert cut is None
        assert [whole[m.offset : m.offset + m.length] for m in found] == [c for _, c in members]
        ends = [member.offset + member.length for member in found]

        if not members:
            return
        # Anywhere after the first member's data.
        at = data.draw(st.integers(ends[0], len(whole)))
        file.truncate(at)
        kept, cut, _ = tars.list_members(file.name)
        assert kept == [member for member, end in zip(found, ends, strict=True) if end <= at]
        assert cut is None or cut == found[len(kept)]


def test_pictures_come_in_the_order_of_the_disk(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(100)))
    paths, offsets, lengths = ["b", "a", "b", "a"], [50, 7, 3, 0], [2, 1, 2, 3]
    found = list(sources.read_pictures(tmp_path, paths, offsets, lengths))
    assert found == [(3, bytes([0, 1, 2])), (1, bytes([7])), (2, bytes([3, 4])), (0, b"23")]
    with pytest.raises(errors.BadInput, match="b is not as long as when its pictures were"):
        list(sources.read_pictures(tmp_path, ["b"], [99], [2]))
    with pytest.raises(errors.BadInput, match="c is gone since its pictures were listed"):
        list(sources.read_pictures(tmp_path, ["c"], [0], [2]))


def test_two_workers_write_the_same_bytes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(3):
        members = []
        for number in range(4):
            key = f"{shard:05d}{number:04d}"
            members += [(f"{key}.png", picture(30 + number)), (f"{key}.txt", key.encode())]
        (folder / f"{shard:05d}.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    digests = []
    for workers in (1, 2):
        manifests = sources.run(
            make_config(folder), engine.Engine(tmp_path / f"w{workers}", workers)
        )
        digests.append([manifest["outputs"] for manifest in manifests])
    assert digests[0] == digests[1]
