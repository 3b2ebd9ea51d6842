"""Parquet with pictures in it: columns, row groups, pointers, damage."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.formats import parquets
from mofi_jax.common import errors
from tests.inputs import make_config, picture, read, tables_of


def structs(count, first=0):
    return [
        {"bytes": picture(20 + first + i, kind="jpeg"), "path": f"{first + i}.jpg"}
        for i in range(count)
    ]


def write(path, columns, rows_per_group=4, **options):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group, **options)


def run(folder, workdir, **changes):
    manifests = pairs_stage.run(make_config(folder, **changes), engine.Engine(workdir))
    return *read(workdir), engine.total_counts(manifests)


def test_pairs_and_their_pointers(tmp_path):
    path = tmp_path / "in/train-00000-of-00001.parquet"
    images, texts = structs(25), [f"caption {i}" for i in range(25)]
    write(
        path, {"image": images, "text": texts, "NSFW": list(range(25)), "url": texts, "id": texts}
    )
    pairs, rejects, counts = run(tmp_path / "in", tmp_path / "w")
    assert rejects == {}
    assert (counts["members"], counts["pairs"]) == (25, 25)
    # Row groups of 4 stay whole: pieces of at least 10 rows have 12.
    assert [len(shard) for shard in tables_of(tmp_path / "w", "pairs/*")] == [12, 12, 1]
    row = pairs["train-00000-of-00001/00000013"]
    size = len(images[13]["bytes"])
    assert row["path"] == "unpacked/s0-train-00000-of-00001-00001.pictures"
    assert (row["offset"], row["length"]) == (len(images[12]["bytes"]), size)
    assert (row["text"], row["url"], row["extras"]) == ("caption 13", "caption 13", '{"NSFW": 13}')
    order = [7, 24, 0, 13, 12, 7]
    rows = [pairs[f"train-00000-of-00001/{i:08d}"] for i in order]
    pointers = [[row[name] for row in rows] for name in ("path", "offset", "length")]
    found = dict(pairs_stage.read_pictures(tmp_path / "w", *pointers))
    assert [found[i] for i in range(6)] == [images[i]["bytes"] for i in order]


@pytest.mark.parametrize(
    "columns",
    [
        {"jpg": [s["bytes"] for s in structs(2)], "caption": ["a", "b"], "key": ["k0", "k1"]},
        {"Image": structs(2), "TEXT": ["a", "b"], "__key__": ["k0", "k1"]},
        {
            "seen": structs(2),
            "alt_text": pa.array(["a", "b"], pa.large_string()),
            "uid": ["k0", "k1"],
        },
        {
            "other": structs(2),
            "img": pa.array([s["bytes"] for s in structs(2)], pa.large_binary()),
            "title": ["a", "b"],
            "key": ["k0", "k1"],
        },
    ],
    ids=["img2dataset", "upper case", "the only one", "by name"],
)
def test_columns_are_known_by_name_and_type(tmp_path, columns):
    write(tmp_path / "in/x.parquet", columns)
    pairs, _, _ = run(tmp_path / "in", tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {"k0": "a", "k1": "b"}
    columns = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    found = pairs_stage.read_pictures(tmp_path / "w", *columns)
    assert [data for _, data in found] == [s["bytes"] for s in structs(2)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"url": ["http://a"], "text": ["x"]}, r"no column of pictures .*to which img2dataset"),
        ({"a": structs(1), "b": structs(1), "text": ["x"]}, "no column of pictures"),
        ({"image": structs(1), "label": [3]}, r"no column of captions .*label \(int64\)"),
        ({"image": structs(1), "text": [[["x", "y"]]]}, "no column of captions"),
        ({"image": [b"x"], "text": ["x" * 3_000_000]}, r"3,000,\d+ bytes in 1 rows"),
        ({"image": [b"x" * 3_000_000], "text": ["x"]}, r"3,000,\d+ bytes in 1 rows"),
        ({"image": structs(1), "image.bytes": [b"x"], "text": ["x"]}, "2 columns of the name 'im"),
    ],
)
def test_columns_that_are_not_known_or_not_credible_are_told(tmp_path, monkeypatch, columns, words):
    monkeypatch.setattr(parquets, "_LARGE", 1 << 20)
    write(tmp_path / "in/x.parquet", columns, compression="zstd")
    with pytest.raises(errors.BadInput, match=words):
        run(tmp_path / "in", tmp_path / "w")


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array(["a", "b"], pa.string_view()),
        pa.array([b"a", b"b"]),
        pa.array([b"a", b"b"], pa.binary_view()),
        pa.array([["a"], [None, "", "b"]]),
        pa.array([["a", "c"], ["b", "c"]], pa.large_list(pa.large_string())),
        pa.array([[b"a"], [b"b"]], pa.list_(pa.binary(), 1)),
    ],
    ids=lambda texts: str(texts.type),
)
def test_captions_in_every_type(tmp_path, texts):
    write(tmp_path / "in/x.parquet", {"image": structs(2), "text": texts, "key": [7, 2**40]})
    pairs, _, _ = run(tmp_path / "in", tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {"7": "a", str(2**40): "b"}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_pictures_in_every_type(tmp_path, kind):
    images = [row["bytes"] for row in structs(3)]
    plain = pa.array(images, kind)
    inside = pa.StructArray.from_arrays([plain, pa.array(["x"] * 3)], ["bytes", "path"])
    texts = ["a", "b", "c"]
    packed = pa.array(images).dictionary_encode()
    for name, column in (("plain", plain), ("inside", inside), ("packed", packed)):
        write(tmp_path / f"in/{name}.parquet", {"image": column, "text": texts})
    pairs, _, _ = run(tmp_path / "in", tmp_path / "w")
    columns = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    found = dict(pairs_stage.read_pictures(tmp_path / "w", *columns))
    assert [found[i] for i in range(9)] == images * 3


def test_values_that_cannot_be_read_cost_themselves_alone(tmp_path):
    offsets = pa.array([0, 3, 8, 13], pa.int32()).buffers()[1]
    buffers = [None, offsets, pa.py_buffer(b"\xff\xfe!a cata dog")]
    broken = pa.Array.from_buffers(pa.string(), 3, buffers)  # no UTF-8 in the first row
    far = pa.array([2**62, 1, None], pa.timestamp("us"))
    deep = pa.array([1, 2, 3])
    for _ in range(90):
        deep = pa.StructArray.from_arrays([deep], ["x"])
    write(
        tmp_path / "in/a.parquet",
        {"image": structs(3), "text": broken, "key": far, "url": broken, "NSFW": deep},
    )
    numbers = [[float("nan")], [0.5], None]
    texts = ["x" * (1 << 20) + "x", "y", "z"]
    write(
        tmp_path / "in/b.parquet",
        {"image": structs(3), "text": texts, "key": broken, "NSFW": numbers, "other": broken},
    )
    pairs, rejects, _ = run(tmp_path / "in", tmp_path / "w")
    assert rejects == {"a/00000000": "caption_not_utf8", "b/00000000": "too_many_bytes"}
    nested = '{"NSFW": ' + '{"x": ' * 90 + "%s" + "}" * 91
    assert {key: (row["text"], row["url"], row["extras"]) for key, row in pairs.items()} == {
        "1970-01-01 00:00:00.000001": ("a cat", "a cat", nested % 2),
        "a/00000002": ("a dog", "a dog", nested % 3),
        "a cat": ("y", None, '{"NSFW": [0.5]}'),
        "a dog": ("z", None, None),
    }


WIDE = {
    "bytes": pa.binary(1 << 21),
    "lists": pa.list_(pa.float32(), 1 << 19),
    "in a struct": pa.struct([("a", pa.list_(pa.list_(pa.null(), 1 << 9), 1 << 9))]),
    "of an extension": pa.fixed_shape_tensor(pa.int8(), [1 << 11, 1 << 10]),
}


@pytest.mark.parametrize("kind", WIDE.values(), ids=WIDE)
def test_a_null_of_a_type_that_fills_the_memory_is_not_read(tmp_path, kind):
    """Neither from pairs nor beside a tar: a kilobyte can hold gigabytes of them."""
    schema = pa.schema([("image", pa.binary()), ("text", pa.string()), ("NSFW", kind)])
    empty = pa.table([[], [], pa.array([], kind)], schema=schema)
    pq.write_table(empty, tmp_path / "t.parquet")
    assert parquets.scan(tmp_path / "t.parquet", 4)["columns"] == ["image", "text"]
    pq.write_table(empty.rename_columns(["image", "key", "NSFW"]), tmp_path / "0.parquet")
    with parquets.open_file(tmp_path / "0.parquet") as file:
        assert parquets.narrow_columns(file).names == ["image", "key"]


def test_rows_that_cannot_be_used_are_told(tmp_path):
    images = [*structs(3), None, {"bytes": None, "path": "x.jpg"}, {"bytes": b"<html>", "path": ""}]
    write(tmp_path / "in/x.parquet", {"image": images, "text": ["a", None, " ", "d", "e", "f"]})
    pairs, rejects, counts = run(tmp_path / "in", tmp_path / "w")
    assert list(pairs) == ["x/00000000"]
    reasons = ["no_text", "empty_caption", "picture_missing", "picture_missing", "not_a_picture"]
    assert rejects == {f"x/0000000{i}": reason for i, reason in enumerate(reasons, 1)}
    assert counts["pairs"] + counts["rejected"] == counts["members"] == 6


def test_a_file_that_is_not_parquet_is_told_or_left_out(tmp_path):
    write(tmp_path / "in/a.parquet", {"image": structs(2), "text": ["a", "b"]})
    data = (tmp_path / "in/a.parquet").read_bytes()
    (tmp_path / "in/b.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.BadInput, match=r"b\.parquet cannot be read as parquet .*fetch it"):
        run(tmp_path / "in", tmp_path / "w")
    work = engine.Engine(tmp_path / "w", failure_budget=0.5)
    manifests = pairs_stage.run(make_config(tmp_path / "in"), work)
    assert engine.total_counts(manifests)["pairs"] == 2
    assert work.quarantined == {"scanned/s0-b": 1}


def test_damage_inside_is_told(tmp_path):
    path = tmp_path / "in/a.parquet"
    write(path, {"image": structs(8), "text": ["x"] * 8}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:2_000] = b"\xff" * 1_900
    path.write_bytes(data)
    with pytest.raises(errors.BadInput, match=r"a\.parquet cannot be read as parquet"):
        run(tmp_path / "in", tmp_path / "w")


def test_parquet_without_rows(tmp_path, caplog):
    empty = pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    (tmp_path / "in").mkdir()
    pq.write_table(empty, tmp_path / "in/a.parquet")
    write(tmp_path / "in/b.parquet", {"image": structs(1), "text": ["x"]})
    pairs, _, _ = run(tmp_path / "in", tmp_path / "w")
    assert list(pairs) == ["b/00000000"]
    assert "a.parquet holds no row" in caplog.text
