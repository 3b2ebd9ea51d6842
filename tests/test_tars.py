"""Tars of any shape and state, and what lies beside them."""

import gzip
import io
import json
import tarfile
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

PAIR = (("png", picture()), ("txt", b"words"))


def test_the_caption_of_json_is_taken_where_there_is_no_txt(tmp_path):
    data = picture()
    pairs, rejects, _ = run(
        tmp_path,
        [
            *[(f"{key}.png", data) for key in "abcdefg"],
            ("g.json", b'{"caption": ["", "first", "second"]}'),
            ("a.json", json.dumps({"caption": "from json"}).encode()),
            ("b.json", json.dumps({"caption": "from json"}).encode()),
            ("b.txt", b"from txt"),
            ("c.json", b'{"caption": null}'),
            ("d.json", b'{"caption": '),
            ("e.json", b'{"caption": "half \\ud800"}'),
            ("f.json", b"[1, 2]"),
        ],
    )
    texts = {key: row["text"] for key, row in pairs.items()}
    assert texts == {"a": "from json", "b": "from txt", "g": "first"}
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


def test_a_file_that_is_no_tar_costs_itself_alone(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar_bytes([("a.png", picture()), ("a.txt", b"x")]))
    (folder / "1.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (folder / "2.tar.gz").write_bytes(b"<html>404 not found</html>")
    (folder / "3.tar.gz").write_bytes(gzip.compress(b"words " * 200))
    (folder / "4.tar").touch()
    manifests = pairs_stage.run(make_config(folder), engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert list(pairs) == ["a"]
    assert rejects == dict.fromkeys(("1.tar", "2.tar.gz", "3.tar.gz", "4.tar"), "not_a_tar")
    counts = engine.total_counts(manifests)
    assert (counts["tars_unreadable"], counts["tars_cut_short"]) == (4, 0)
    assert "1.tar is no tar (rejected as not_a_tar): remove it or fetch it again" in caplog.text


def test_several_gzip_streams_are_one_tar(tmp_path):
    whole = tar_bytes([("a.png", picture()), ("a.txt", b"x")])
    streams = gzip.compress(whole[:700]) + gzip.compress(whole[700:]) + b"\0" * 100
    (tmp_path / "a.tar.gz").write_bytes(streams)
    (manifest,) = pairs_stage.run(make_config(tmp_path / "a.tar.gz"), engine.Engine(tmp_path / "w"))
    assert manifest["counts"]["pairs"] == 1
    assert manifest["counts"]["tars_cut_short"] == 0


def test_damage_in_the_middle_costs_what_it_covers(tmp_path, caplog):
    members = [(f"{key}.{kind}", data) for key in "abc" for kind, data in PAIR]
    data = bytearray(tar_bytes(members))
    at = data.index(b"b.png")
    data[at : at + 200] = b"\x01" * 200
    (tmp_path / "0.tar").write_bytes(data)
    (manifest,) = pairs_stage.run(make_config(tmp_path / "0.tar"), engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert list(pairs) == ["a", "c"]
    assert rejects == {f"0.tar@{at}": "tar_damaged", "b": "no_picture"}
    assert manifest["counts"]["tars_damaged"] == 1
    assert manifest["counts"]["tars_cut_short"] == 0
    assert "0.tar is damaged: used but for what is damaged" in caplog.text


@pytest.mark.parametrize(("damage", "left"), [("checksum", 3), ("middle", 1)])
def test_a_damaged_gzip_gives_what_comes_before_the_damage(tmp_path, caplog, damage, left):
    folder = img2dataset(tmp_path / "in", table=False)
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").unlink()
    if damage == "checksum":
        packed = gzip.compress(whole)[:-8] + b"\xff" * 8
    else:
        packed = gzip.compress(whole[: whole.index(b"000000002.jpg") + 700]) + b"no gzip" * 99
    (folder / "00000.tgz").write_bytes(packed)
    pairs, rejects, counts = run_folder(folder, tmp_path / "w")
    assert len(pairs) == left
    assert set(rejects.values()) <= {"tar_cut_short"}
    assert (counts["tars_cut_short"], counts["pairs_missing"]) == (1, 3 - left)
    assert "00000.tgz is damaged (Error -3 while decompressing" in caplog.text
    assert "00000.tar is cut short: used up to the cut" in caplog.text


def test_a_gzip_bomb_is_unpacked_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_ALWAYS_FINE", 1 << 16)
    whole = tar_bytes([("a.png", picture()), ("a.txt", b"x"), ("b.txt", bytes(40 << 20))])
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(whole))
    (manifest,) = pairs_stage.run(make_config(tmp_path / "0.tar.gz"), engine.Engine(tmp_path / "w"))
    assert manifest["counts"]["tars_cut_short"] == 1
    assert read(tmp_path / "w")[1] == {"b": "tar_cut_short"}
    assert (tmp_path / "w/unpacked/0.tar").stat().st_size < 25 << 20


def test_texts_of_megabytes_are_not_read(tmp_path):
    long = bytes((1 << 20) + 1)
    members = [("a.png", picture()), ("a.txt", long), ("b.png", picture()), ("b.json", long)]
    deep = b"[" * 500_000
    pairs, rejects, _ = run(tmp_path, [*members, ("c.png", picture()), ("c.json", deep)])
    assert pairs == {}
    assert rejects == {"a": "too_many_bytes", "b": "too_many_bytes", "c": "broken_json"}


def test_what_macos_leaves_beside_files_is_no_pair(tmp_path):
    names = ("x/a", "x/._a", "__MACOSX/x/a", "x/.hidden")
    members = [(f"{key}.{kind}", data) for key in names for kind, data in PAIR]
    pairs, rejects, _ = run(tmp_path, members)
    assert list(pairs) == ["x/a", "x/.hidden"]
    assert rejects == {}


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
        found, damaged, complete = tars.list_members(file.name)
        assert complete
        assert not damaged
        assert [whole[m.offset : m.offset + m.length] for m in found] == [c for _, c in members]
        ends = [member.offset + member.length for member in found]

        if not members:
            return
        # Anywhere after the first member's data.
        at = data.draw(st.integers(ends[0], len(whole)))
        file.truncate(at)
        kept, damaged, _ = tars.list_members(file.name)
        assert not damaged
        cut = [member for member in kept if member.reason]
        whole = [member for member, end in zip(found, ends, strict=True) if end <= at]
        assert kept[: len(kept) - len(cut)] == whole
        assert cut in ([], [m._replace(reason="tar_cut_short") for m in found[len(whole) :][:1]])


def img2dataset(folder, *, table=True, stats=True, successes=3, files=False):
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
    if files:
        (folder / "00000").mkdir()
        for name, content in members:
            (folder / "00000" / name).write_bytes(content)
    else:
        (folder / "00000.tar").write_bytes(tar_bytes(members))
    if table:
        pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    if stats:
        numbers = {"count": 5, "successes": successes, "failed_to_download": 1}
        text = json.dumps({**numbers, "failed_to_resize": 1, "duration": 3.5})
        (folder / "00000_stats.json").write_text(text)
    return folder


def run_folder(folder, workdir, **changes):
    manifests = pairs_stage.run(make_config(folder, **changes), engine.Engine(workdir))
    return *read(workdir), engine.total_counts(manifests)


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


@pytest.mark.parametrize("table", [False, True])
def test_folders_of_files_are_what_tars_of_them_would_be(tmp_path, table):
    packed = run_folder(img2dataset(tmp_path / "tars", table=table), tmp_path / "w")
    folder = img2dataset(tmp_path / "files", table=table, files=True)
    pairs, rejects, counts = run_folder(folder, tmp_path / "w2")
    for pair, row in zip(packed[0].values(), pairs.values(), strict=True):
        assert row == pair | {"path": f"{folder}/00000/{row['key']}.jpg", "offset": 0}
    assert (rejects, counts) == packed[1:]
    columns = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    found = dict(pairs_stage.read_pictures(tmp_path / "w2", *columns))
    assert found == {i: picture(w, kind="jpeg") for i, w in enumerate((40, 42, 44))}
    assert run_folder(folder / "00000", tmp_path / "w3")[1:] == (rejects, counts)


def test_what_lies_in_a_folder_of_files_is_seen(tmp_path):
    folder = img2dataset(tmp_path / "in", files=True)
    run_folder(folder, tmp_path / "w")
    (tmp_path / "secret.jpg").write_bytes(picture())
    (folder / "00000/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "00000/link.txt").write_text("words")
    (folder / "00000/alone.txt").write_text("words")
    # This one's download was killed: nothing describes it yet.
    (folder / "00001").mkdir()
    (folder / "00001/new.jpg").write_bytes(picture())
    (folder / "00001/new.txt").write_text("words")
    pairs, rejects, counts = run_folder(folder, tmp_path / "w")
    assert list(pairs) == ["000000000", "000000002", "000000004", "new"]
    assert rejects == {"link": "not_a_file", "alone": "no_picture"}
    assert counts["not_downloaded"] == 2


def test_a_large_tar_in_pieces_is_the_tar_in_one(tmp_path, monkeypatch):
    """Also where what belongs together lies apart, and with damage, links, sidecars and repeats."""
    folder = img2dataset(tmp_path / "in")
    keys = [f"{number:03d}" for number in range(23)]
    members = [(f"{key}.png", picture(32 + i)) for i, key in enumerate(keys)]
    members += [(f"{key}.txt", b"words") for key in keys[:-1]]
    members += [("000.txt", b"again"), ("b\udce9.png", picture()), ("x.cls", b"1")]
    with tarfile.open(folder / "00000.tar", "a") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = tarfile.LNKTYPE, "003.png"
        tar.addfile(info)
        damaged = tar.getmember("009.txt").offset
    with open(folder / "00000.tar", "r+b") as file:
        file.seek(damaged)
        file.write(b"x" * 512)
    whole = run_folder(folder, tmp_path / "w")
    assert len(whole[1]) > 5
    monkeypatch.setattr(tars, "_BYTES_OF_PAIR", 1)
    in_pieces = run_folder(folder, tmp_path / "w2")
    assert len(list((tmp_path / "w2/indexed").glob("s0-00000-0000?.parquet"))) == 3
    assert in_pieces == whole


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(1024)])
def test_a_large_file_that_holds_nothing_is_told_once(tmp_path, monkeypatch, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/00000.tar").write_bytes(content)
    whole = run_folder(tmp_path / "in", tmp_path / "w")
    monkeypatch.setattr(tars, "_BYTES_OF_PAIR", -1)
    assert run_folder(tmp_path / "in", tmp_path / "w2") == whole


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


def test_a_table_that_cannot_be_read_is_told(tmp_path):
    folder = img2dataset(tmp_path / "in")
    (folder / "00000.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(errors.BadInput, match=r"00000\.parquet cannot be read .*: fetch it again"):
        run_folder(folder, tmp_path / "w")


@pytest.mark.parametrize(
    "data",
    [
        *(b"{", b"[1]", b"[" * 100_000, b'{"successes": 1e400}', b'{"successes": NaN}'),
        *(b'{"successes": -5}', b'{"successes": 3, "failed_to_resize": "x"}', b"\xff\xfe{"),
        b'{"successes": ' + b"9" * 4000 + b"}",
    ],
    ids=lambda data: data[:20].decode("latin-1"),
)
def test_statistics_that_make_no_sense_are_ignored(tmp_path, caplog, data):
    folder = img2dataset(tmp_path / "in", table=False)
    (folder / "00000_stats.json").write_bytes(data)
    pairs, _, counts = run_folder(folder, tmp_path / "w")
    assert (len(pairs), counts["pairs_missing"], counts["not_downloaded"]) == (3, 0, 0)
    assert "00000_stats.json is not img2dataset's statistics: ignored" in caplog.text


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_keys_that_were_read_as_numbers_are_found_by_their_number(tmp_path, kind):
    folder = img2dataset(tmp_path / "in", stats=False)
    keys = pa.array([0, 2, None], kind)
    pq.write_table(
        pa.table({"key": keys, "url": ["zero", "two", "none"]}), folder / "00000.parquet"
    )
    pairs, _, _ = run_folder(folder, tmp_path / "w")
    assert [row["url"] for row in pairs.values()] == ["zero", "two", None]


def test_bad_cells_of_the_table_cost_themselves(tmp_path):
    folder = img2dataset(tmp_path / "in", stats=False)
    raw = pa.array([b"000000000", b"a\xff", b"000000002", b"000000004"])
    offsets, values = raw.buffers()[1:]
    table = {
        "key": pa.StringArray.from_buffers(4, offsets, values),
        "url": pa.array([{"x": 1}, None, {"x": 2}, None]),
        "punsafe": pa.array([2**62, 1, 1, 2**62], pa.timestamp("us")),
        "NSFW": pa.array([["a", "b"], [], ["c"], None]),
        "status": ["success", "failed_to_resize", "success", "success"],
    }
    pq.write_table(pa.table(table), folder / "00000.parquet")
    context = {"keep_columns": ("punsafe",), "context_columns": ("NSFW",)}
    pairs, rejects, counts = run_folder(folder, tmp_path / "w", **context)
    assert [row["url"] for row in pairs.values()] == [None] * 3
    assert pairs["000000000"]["extras"] == '{"NSFW": ["a", "b"]}'
    assert pairs["000000004"]["extras"] is None
    assert rejects == {}
    assert counts["not_downloaded_failed_to_resize"] == 1


def test_statuses_that_nobody_knows_are_one(tmp_path):
    folder = img2dataset(tmp_path / "in", stats=False)
    status = [*(f"\x1b[3{i}m\n" for i in range(50)), None, "failed_to_download"]
    table = {"key": [f"{i}" for i in range(len(status))], "status": status}
    pq.write_table(pa.table(table), folder / "00000.parquet")
    _, _, counts = run_folder(folder, tmp_path / "w")
    told = {name: count for name, count in counts.items() if name.startswith("not_downloaded_")}
    assert told == {"not_downloaded_failed_to_download": 1, "not_downloaded_other": 51}


def test_a_table_that_is_no_sidecar_is_told(tmp_path):
    folder = img2dataset(tmp_path / "in")
    for table in ({"id": [1]}, {"key": [["a"]]}):
        pq.write_table(pa.table(table), folder / "00000.parquet")
        with pytest.raises(errors.BadInput, match="has no column `key` of strings or whole"):
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
