"""Tables beside pictures: formats, broken rows, names of files that are not to be trusted."""

import csv
import gzip
import io
import json
import os
import pathlib
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from data_prep import engine
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.formats import tables
from mofi_jax.common import errors
from tests.inputs import make_config, picture, read


@pytest.fixture
def folder(tmp_path):
    """Three pictures in a folder of their own."""
    (tmp_path / "in/photos").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"in/photos/{number}.png").write_bytes(picture(30 + number))
    return tmp_path / "in"


def run(folder, workdir, **changes):
    manifests = pairs_stage.run(make_config(folder, **changes), engine.Engine(workdir))
    return *read(workdir), engine.total_counts(manifests)


ROWS = [
    {"file_name": f"photos/{number}.png", "text": text, "url": f"http://h/{number}", "NSFW": nsfw}
    for number, (text, nsfw) in enumerate(
        [("one, with a comma", ""), ('a "quoted" word', "0.25"), ("caf\u00e9", "UNLIKELY")]
    )
]


def written(kind):
    if kind.startswith("jsonl"):
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    out = io.StringIO()
    delimiter = {"csv": ",", "tabs": "\t", "semicolons": ";", "tsv": "\t"}[kind]
    if kind == "tsv":  # as web captions come: quotes are letters like others
        lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
        out.write("".join("\t".join(line) + "\r\n" for line in lines))
    else:
        writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return b"\xef\xbb\xbf" + out.getvalue().encode()


@pytest.mark.parametrize("kind", ["csv", "tabs", "semicolons", "tsv", "jsonl", "jsonl.gz"])
def test_formats(folder, tmp_path, kind):
    name = {"tabs": "t.csv", "semicolons": "t.csv"}.get(kind, f"t.{kind}")
    data = written(kind)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    pairs, rejects, counts = run(folder, tmp_path / "w")
    assert rejects == {}
    assert list(pairs) == [f"t/0000000{number}" for number in range(3)]
    assert [row["text"] for row in pairs.values()] == [row["text"] for row in ROWS]
    assert [row["width"] for row in pairs.values()] == [30, 31, 32]
    extras = [row["extras"] for row in pairs.values()]
    number = '"0.25"' if kind.startswith("jsonl") else "0.25"
    if not kind.startswith("jsonl"):
        assert extras == [None, f'{{"NSFW": {number}}}', '{"NSFW": "UNLIKELY"}']
    assert pairs["t/00000001"]["url"] == "http://h/1"
    assert (counts["members"], counts["pairs"]) == (3, 3)
    columns = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    found = dict(pairs_stage.read_pictures(tmp_path / "w", *columns))
    assert [found[i] for i in range(3)] == [picture(30), picture(31), picture(32)]


def test_rows_that_cannot_be_used_are_told(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    names = {
        "photos/../photos/0.png": None,
        str(folder / "photos/1.png"): None,
        "photos\\2.png": None,  # as Windows writes it
        str(tmp_path / "secret.png"): "picture_outside",
        "link.png": "picture_outside",
        "linked/secret.png": "picture_outside",
        "..\\secret.png": "picture_outside",
        "/dev/zero": "picture_outside",
        "loop.png": "picture_missing",
        "../secret.png": "picture_outside",
        "photos/../../secret.png": "picture_outside",
        "photos/9.png": "picture_missing",
        "photos": "picture_missing",
        "pipe.png": "picture_missing",
        "a" * 5_000: "picture_missing",
        "nul\0.png": "picture_missing",
        "half \ud800": "picture_missing",
        "": "no_picture",
        5: "no_picture",
        "http://host/0.png": "picture_is_a_url",
        "empty.png": "empty_picture",
        "t.jsonl": "not_a_picture",
    }
    lines = [json.dumps({"key": str(i), "image": n, "caption": "x"}) for i, n in enumerate(names)]
    more = {"broken_json": '{"image": "', "no_text": '{"image": "photos/0.png"}'}
    more["empty_caption"] = '{"image": "photos/0.png", "caption": " "}'
    lines += [*more.values(), "", "[1, 2]"]
    lines += ['{"image": "photos/0.png", "caption": [" ", "a", "b"]}']
    lines += ['{"image": "photos/0.png", "caption": [" ", 5]}']
    (folder / "t.jsonl").write_text("\n".join(lines))
    pairs, rejects, counts = run(folder, tmp_path / "w")
    assert list(pairs) == ["0", "1", "2", "t/00000026"]
    assert pairs["t/00000026"]["text"] == "a"
    expected = {str(i): reason for i, reason in enumerate(names.values()) if reason}
    rows = range(len(names), len(names) + 3)
    expected |= {f"t/{row:08d}": reason for row, reason in zip(rows, more, strict=True)}
    expected |= {"t/00000025": "broken_json", "t/00000027": "no_text"}
    assert rejects == expected
    assert counts["pairs"] + counts["rejected"] == counts["members"] == 28


def test_rows_of_a_csv_with_too_many_or_too_few_cells_and_other_encodings(folder, tmp_path):
    lines = [
        b"image,caption",
        b"photos/0.png,one",
        b"photos/0.png,one, two",
        b"photos/0.png",
        b"",
        b"photos/1.png,caf\xe9",
        b'photos/2.png,"two\nlines"',
    ]
    (folder / "t.csv").write_bytes(b"\n".join(lines))
    pairs, rejects, _ = run(folder, tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {
        "t/00000000": "one",
        "t/00000004": "two lines",
    }
    assert rejects == {
        "t/00000001": "broken_row",
        "t/00000002": "broken_row",
        "t/00000003": "caption_not_utf8",
    }


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"id,words\n1,x\n", r"t\.csv has no column of the picture .*found: id, words\)"),
        ("t.csv", b"image,words\n1,x\n", "no column of the caption .*found: image, words"),
        ("t.csv", b"", r"columns found: none\): rename it to one of file_name"),
        ("t.jsonl", b"\n\n", "columns found: none"),
        ("t.jsonl", b"a" * (1 << 20) + b"b", "begins with a line of more than 1,048,576 bytes"),
        ("t.jsonl", b' [{"image": "x"}]', "is a JSON array: write one object a line"),
        ("t.csv", "image,text\n".encode("utf-16"), "is no UTF-8 but UTF-16 .*: save it as UTF-8"),
        ("t.csv", "image,text\n".encode("utf-16-le"), "is no UTF-8 but UTF-16"),
        ("t.csv", b"image,text,text\n", "2 columns of the name 'text'"),
        (
            "t.csv",
            b"\x1b[31mred\x1b]0;\x07,b\n",
            r"columns found: \\x1b\[31mred\\x1b\]0;\\x07, b\)",
        ),
        ("t.csv", b'"image,text\n', "columns found: none"),
    ],
)
def test_tables_that_cannot_be_read_are_told(folder, tmp_path, name, data, words):
    (folder / name).write_bytes(data)
    with pytest.raises(errors.BadInput, match=words):
        run(folder, tmp_path / "w")


def test_pictures_beside_what_a_table_leads_to(folder, tmp_path):
    """As in the caches of the Hugging Face hub: names are links to contents in one folder."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (folder / "0123").write_text("image,text\n0.png,a kite\n")
    (folder / "4567").write_bytes(picture())
    (snapshot / "t.csv").symlink_to(folder / "0123")
    (snapshot / "0.png").symlink_to(folder / "4567")
    pairs, _, _ = run(snapshot, tmp_path / "w")
    assert [row["text"] for row in pairs.values()] == ["a kite"]


@pytest.mark.parametrize("rows_per_shard", [2, 1_000])
def test_a_row_that_is_broken_or_too_long_costs_itself(folder, tmp_path, rows_per_shard):
    rows = [
        b'photos/0.png,"left open',
        b"photos/0.png,one",
        b'photos/1.png,"a "quoted" word"',
        b"photos/1.png," + b"x" * 200_000,
        b"photos/1.png," + b"x" * (3 << 20),
        b"photos/1.png,old\rlines",
        b"photos/1.png,nul\0",
        b'photos/1.png,"two\nlines"',
        b'photos/1.png,"' + b"\n" * 150 + b'"',
        b"photos/2.png,last",
        b'photos/2.png,"left open at the end',
    ]
    (folder / "t.csv").write_bytes(b"\n".join([b"image,text", *rows]))
    pairs, rejects, _ = run(folder, tmp_path / "w", rows_per_shard=rows_per_shard)
    assert {key: row["text"] for key, row in pairs.items()} == {
        "t/00000001": "one",
        "t/00000003": "x" * 1_000,
        "t/00000006": "nul",
        "t/00000007": "two lines",
        "t/00000010": "last",
    }
    broken = dict.fromkeys([0, 2, 5, 8, 9, 11], "broken_row")
    assert rejects == {
        f"t/{i:08d}": reason for i, reason in {**broken, 4: "too_many_bytes"}.items()
    }


def test_a_table_in_pieces_is_the_table_in_one(folder, tmp_path):
    rows = [f'"photos/{i % 3}.png","caption {i}{chr(10) * (i % 2)}"' for i in range(25)]
    (folder / "t.csv").write_text("\n".join(["file_name,caption", *rows]))
    found = []
    for rows_per_shard in (4, 25, 100):
        workdir = tmp_path / f"w{rows_per_shard}"
        pairs, _, _ = run(folder, workdir, rows_per_shard=rows_per_shard)
        found.append(pairs)
        assert len(list(workdir.glob("pairs/*.parquet"))) == -(-25 // rows_per_shard)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 25


def test_tables_of_one_name_in_several_folders_have_keys_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.png").write_bytes(picture())
        (tmp_path / "in" / name / "metadata.csv").write_text(f"file_name,text\n0.png,{name}\n")
    pairs, rejects, _ = run(tmp_path / "in/**/*.csv", tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {
        "a/metadata/00000000": "a",
        "b/metadata/00000000": "b",
    }
    assert rejects == {}


def test_two_workers_write_the_same_bytes(folder, tmp_path):
    rows = [json.dumps({"image": f"photos/{i % 3}.png", "text": f"x {i}"}) for i in range(12)]
    (folder / "t.jsonl").write_text("\n".join(rows))
    written = []
    for workers in (1, 2):
        work = engine.Engine(tmp_path / f"w{workers}", workers)
        manifests = pairs_stage.run(make_config(folder, rows_per_shard=5), work)
        written.append([manifest["outputs"] for manifest in manifests])
        work.close()
    assert written[0] == written[1]
    assert len(written[0]) == 3


cells = st.text(st.characters(codec="utf-8"), max_size=30)


@hypothesis.given(st.lists(st.tuples(cells, cells), max_size=12), st.integers(1, 5), st.booleans())
@hypothesis.settings(deadline=None)
def test_whatever_csv_writes_is_read_back_in_pieces(rows, size, crlf):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n" if crlf else "\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["image", "text"])
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "t.csv"
        path.write_bytes(out.getvalue().encode())
        plan = tables.scan(str(path), size)
        found = []
        with open(path, "rb") as file:
            for first, start, stop in plan["ranges"]:
                assert first == len(found)
                found += list(tables._rows(file, plan, start, stop))
    # What lies between two quotes may have several lines, but only of one kind.
    assert [(r.cells["image"], r.cells["text"]) for r in found] == rows
