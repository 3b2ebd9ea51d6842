"""Tars of any shape and state, and what lies beside them."""

import gzip
import json
import tempfile

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_prep import engine
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.formats import tars
from mofi_jax.common import errors
from tests.inputs import make_config, picture, read, run, tar_bytes


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


def test_a_second_picture_or_text_of_a_key_is_told(tmp_path):
    members = [
        ("a.png", picture()),
        ("a.txt", b"one"),
        ("a.jpg", picture(kind="jpeg")),
        ("a.txt", b"two"),
    ]
    pairs, rejects, counts = run(tmp_path, members)
    assert pairs["a"]["text"] == "one"
    assert rejects == {"a": "duplicate_key"}
    assert (counts["pairs"], counts["rejected"], counts["duplicate_keys"]) == (1, 1, 1)


def test_gzipped_tars_are_unpacked_once_into_the_work_directory(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = picture()
    whole = tar_bytes([("a.png", data), ("a.txt", b"x")])
    (folder / "00007.tar.gz").write_bytes(gzip.compress(whole))
    for _ in range(2):
        pairs_stage.run(make_config(folder), engine.Engine(tmp_path / "w"))
    pairs, _ = read(tmp_path / "w")
    assert pairs["a"]["path"] == "unpacked/00007.tar"
    assert (tmp_path / "w/unpacked/00007.tar").read_bytes() == whole
    columns = ([pairs["a"][name]] for name in ("path", "offset", "length"))
    assert list(pairs_stage.read_pictures(tmp_path / "w", *columns)) == [(0, data)]
    # Beside its unpacked self the packed one is not read again.
    (folder / "00007.tar").write_bytes(whole)
    assert [found.path[-9:] for found in pairs_stage.find([f"s={folder}"])] == ["00007.tar"]


def test_a_file_that_is_no_tar_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(errors.BadInput, match=r"a\.tar is no tar .*: remove it or fetch"):
        pairs_stage.run(make_config(tmp_path / "a.tar"), engine.Engine(tmp_path / "w"))
    (tmp_path / "b.tar.gz").write_bytes(b"<html>404 not found</html>")
    with pytest.raises(errors.BadInput, match=r"b\.tar\.gz is damaged .*: fetch it again"):
        pairs_stage.run(make_config(tmp_path / "b.tar.gz"), engine.Engine(tmp_path / "w"))


def test_a_gzipped_file_that_holds_no_tar_is_told_by_its_own_name(tmp_path):
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"words " * 200))
    with pytest.raises(errors.BadInput, match=r"/c\.tar\.gz is no tar"):
        pairs_stage.run(make_config(tmp_path / "c.tar.gz"), engine.Engine(tmp_path / "w"))


def test_several_gzip_streams_are_one_tar(tmp_path):
    whole = tar_bytes([("a.png", picture()), ("a.txt", b"x")])
    streams = gzip.compress(whole[:700]) + gzip.compress(whole[700:]) + b"\0" * 100
    (tmp_path / "a.tar.gz").write_bytes(streams)
    (manifest,) = pairs_stage.run(make_config(tmp_path / "a.tar.gz"), engine.Engine(tmp_path / "w"))
    assert manifest["counts"]["pairs"] == 1
    assert manifest["counts"]["tars_cut_short"] == 0


def test_a_tar_damaged_in_the_middle_is_told(tmp_path):
    data = bytearray(tar_bytes([("a.png", picture()), ("a.txt", b"x"), ("b.txt", b"y")]))
    at = data.index(b"a.txt")
    data[at : at + 200] = b"\x01" * 200
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(errors.BadInput, match=rf"a\.tar is damaged at byte {at}: fetch it"):
        pairs_stage.run(make_config(tmp_path / "a.tar"), engine.Engine(tmp_path / "w"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_was_cut_short_gives_what_comes_before_the_cut(tmp_path, packed):
    members = []
    for number in range(8):
        members += [(f"{number}.png", picture(30 + number)), (f"{number}.txt", b"x")]
    whole = tar_bytes(members)
    data = gzip.compress(whole, 0)[: len(whole) // 2] if packed else whole[: len(whole) // 2]
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(data)
    (manifest,) = pairs_stage.run(make_config(path), engine.Engine(tmp_path / "w"))
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


def img2dataset(folder, *, table=True, stats=True, successes=3):
    """A shard as img2dataset leaves it: three pairs, two downloads that failed."""
    folder.mkdir(exist_ok=True)
    rows = []
    members = []
    for number, status in enumerate(
        ["success", "failed_to_download", "success", "failed_to_resize", "success"]
    ):
        row = {
            "key": f"{number:09d}",
            "caption": f"caption {number}",
            "url": f"http://host/{number}.jpg",
            "status": status,
            "punsafe": number / 10,
            "NSFW": None if number == 4 else "UNLIKELY",
            "other": "dropped",
        }
        rows.append(row)
        if status == "success":
            members += [
                (f"{row['key']}.jpg", picture(40 + number, kind="jpeg")),
                (f"{row['key']}.txt", row["caption"].encode()),
                (f"{row['key']}.json", json.dumps(row).encode()),
            ]
    (folder / "00000.tar").write_bytes(tar_bytes(members))
    if table:
        pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    if stats:
        numbers = {"count": 5, "successes": successes, "failed_to_download": 1}
        text = json.dumps({**numbers, "failed_to_resize": 1, "duration": 3.5})
        (folder / "00000_stats.json").write_text(text)
    return folder


def run_folder(folder, workdir):
    (manifest,) = pairs_stage.run(make_config(folder), engine.Engine(workdir))
    return *read(workdir), manifest["counts"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_what_is_said_beside_the_tar_or_in_it(tmp_path, table, packed):
    folder = img2dataset(tmp_path / "in", table=table)
    if packed:
        tar = folder / "00000.tar"
        (folder / "00000.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    pairs, rejects, counts = run_folder(folder, tmp_path / "w")
    assert list(pairs) == ["000000000", "000000002", "000000004"]
    assert pairs["000000002"]["url"] == "http://host/2.jpg"
    assert pairs["000000002"]["extras"] == '{"NSFW": "UNLIKELY", "punsafe": 0.2}'
    assert pairs["000000004"]["extras"] == '{"punsafe": 0.4}'
    assert rejects == {}
    assert counts["not_downloaded"] == 2
    assert counts["not_downloaded_failed_to_download"] == 1
    assert counts["not_downloaded_failed_to_resize"] == 1
    assert counts["pairs_missing"] == 0


def test_without_sidecars_nothing_is_known_of_downloads(tmp_path):
    folder = img2dataset(tmp_path / "in", table=False, stats=False)
    pairs, _, counts = run_folder(folder, tmp_path / "w")
    assert len(pairs) == 3
    assert counts["not_downloaded"] == 0


def test_a_tar_that_holds_less_than_was_written_is_told(tmp_path, caplog):
    folder = img2dataset(tmp_path / "in", successes=7)
    _, _, counts = run_folder(folder, tmp_path / "w")
    assert counts["pairs_missing"] == 4
    assert "00000.tar holds 4 pairs fewer than its _stats.json says" in caplog.text


def test_a_changed_sidecar_is_read_again(tmp_path):
    folder = img2dataset(tmp_path / "in", table=False)
    run_folder(folder, tmp_path / "w")
    table = pa.table({"key": ["000000000"], "url": ["http://elsewhere"]})
    pq.write_table(table, folder / "00000.parquet")
    pairs, _, _ = run_folder(folder, tmp_path / "w")
    assert pairs["000000000"]["url"] == "http://elsewhere"
    assert pairs["000000002"]["url"] is None


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("00000.parquet", b"PAR1 no more", r"00000\.parquet cannot be read .*: fetch it again"),
        ("00000_stats.json", b"{", "is not img2dataset's statistics: remove it"),
        ("00000_stats.json", b"[]", "is not img2dataset's statistics: remove it"),
    ],
)
def test_sidecars_that_cannot_be_read_are_told(tmp_path, name, data, words):
    folder = img2dataset(tmp_path / "in")
    (folder / name).write_bytes(data)
    with pytest.raises(errors.BadInput, match=words):
        run_folder(folder, tmp_path / "w")


def test_a_table_that_is_no_sidecar_is_told(tmp_path):
    folder = img2dataset(tmp_path / "in")
    pq.write_table(pa.table({"id": [1]}), folder / "00000.parquet")
    with pytest.raises(errors.BadInput, match="has no column `key`"):
        run_folder(folder, tmp_path / "w")


def test_names_in_another_encoding_are_spelt_out(tmp_path):
    raw = tar_bytes([("caf_.png", picture()), ("caf_.txt", b"x")])
    (tmp_path / "in").mkdir()
    # The checksum of a header is the sum of its bytes.
    data = bytearray(raw)
    for at in (raw.index(b"caf_.png"), raw.index(b"caf_.txt")):
        data[at + 3] = 0xE9
        header = data[at : at + 512]
        header[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    (tmp_path / "in/0.tar").write_bytes(data)
    pairs, _, _ = run_folder(tmp_path / "in", tmp_path / "w")
    assert list(pairs) == ["caf\\udce9"]
