"""Data as people have it: what img2dataset, `datasets` and torchvision's ImageFolder lay out."""

import collections
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import class_folders, engine
from data_prep.filters import eval_sets
from data_prep.pairs import stage as pairs_stage
from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import containers, tree
from mofi_jax.evaluators.sets import captions, split
from mofi_jax.evaluators.sets import pictures as picture_sets
from tests.inputs import make_config, picture, read, tar_bytes

COUNT = 3


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def shown(number):
    return picture(30 + number)


def columns(count=COUNT, start=0):
    """As the library `datasets` has them."""
    images = [{"bytes": shown(start + i), "path": f"{i}.png"} for i in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [f"text {start + i}" for i in range(count)]
    return {"image": pa.array(images, kind), "caption": texts}


def parquet(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


def arrow(path, table, **options):
    """As `Dataset.save_to_disk`, the features in the schema."""
    table = pa.table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)


def saved(folder, table):
    arrow(folder / "data-00000-of-00001.arrow", table)
    put(folder / "state.json", "{}")
    put(folder / "dataset_info.json", "{}")


def labelled(numbers, names=("cat", "dog")):
    feature = {"label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table(columns(len(numbers)) | {"label": pa.array(numbers, pa.int64())})
    info = json.dumps({"info": {"features": feature}})
    return table.drop(["caption"]).replace_schema_metadata({"huggingface": info})


def img2dataset(folder, kind="files", stats=True, suffix="png"):
    """Two shards of pairs, one of whose pictures was not to be had."""
    for shard in range(2):
        name, rows, pairs = f"{shard:05d}", [], {}
        for i in range(COUNT):
            key, status = f"{shard:05d}{i:04d}", "failed_to_download" if i == 1 else "success"
            row = {"key": key, "caption": f"text {i}", "url": f"http://{i}", "status": status}
            rows.append(row)
            if status == "success":
                pairs |= {f"{key}.{suffix}": picture(40, 30 + i, suffix), f"{key}.txt": f"text {i}"}
                pairs[f"{key}.json"] = json.dumps(row)
        table = {field: [row[field] for row in rows] for field in rows[0]}
        if kind == "parquet":
            table["jpg"] = [pairs.get(f"{row['key']}.{suffix}") for row in rows]
        if kind != "bare":
            parquet(folder / f"{name}.parquet", table)
        if stats:
            put(folder / f"{name}_stats.json", json.dumps({"count": COUNT, "successes": COUNT - 1}))
        if kind in ("files", "bare"):
            for path, data in pairs.items():
                put(folder / name / path, data)
        if kind == "webdataset":
            encoded = [(n, d if isinstance(d, bytes) else d.encode()) for n, d in pairs.items()]
            put(folder / f"{name}.tar", tar_bytes(encoded))
        if kind == "tfrecord":
            put(folder / f"{name}.tfrecord", b"?")


def run(workdir, *patterns, **changes):
    manifests = pairs_stage.run(make_config(*patterns, **changes), engine.Engine(workdir))
    return *read(workdir), engine.total_counts(manifests)


# -------------------------------------------------------------------------------------------- pairs


def test_whatever_img2dataset_wrote_gives_the_same_pairs(tmp_path):
    kinds = {"files": {}, "webdataset": {}, "parquet": {}, "bare": {"stats": False}}
    for kind, options in kinds.items():
        img2dataset(tmp_path / "in" / kind, kind, **options)
    img2dataset(tmp_path / "in/deep/er", suffix="webp")
    for name in ("files/._00000.tar", "__MACOSX/0.tar", ".hidden/1.tar", "files/_tmp/0.feather"):
        put(tmp_path / "in" / name, b"no tar")
    put(tmp_path / "in/webdataset/00002.tar.part", b"half of it")
    pairs, rejects, counts = run(tmp_path / "w", tmp_path / "in")
    keys = [f"{shard:05d}{i:04d}" for shard in range(2) for i in (0, 2)]
    # Where nothing says that 00000/ is a shard, it is a folder like any other.
    expected = [f"bare/{key[:5]}/{key}" for key in keys]
    expected += [f"{at}/{key}" for at in ("deep/er", *kinds) if at != "bare" for key in keys]
    assert sorted(pairs) == sorted(expected)
    assert {row["text"] for row in pairs.values()} == {"text 0", "text 2"}
    assert rejects == {}
    assert counts["not_downloaded"] == 2 * 4  # of four that have their tables
    assert counts["pairs_missing"] == 0
    # Alone, none needs to be told from the others.
    for kind in ("files", "parquet"):
        assert list(run(tmp_path / kind, tmp_path / "in" / kind)[0]) == keys


def test_captions_beside_pictures_in_folders_of_any_depth(tmp_path):
    data = tmp_path / "in"
    for path in ("a.png", "sub/a.png", "sub/deeper/b.jpg", "sub/deeper/alone.png"):
        put(data / path, picture(kind="jpeg" if path.endswith("jpg") else "png"))
    for path in ("a.txt", "sub/a.TXT"):
        put(data / path, "in a file")
    put(data / "sub/deeper/b.json", '{"caption": "in its json"}')
    put(data / "sub/deeper/._b.json", "what macOS says")
    put(data / "sub/deeper/empty.png", b"")
    put(data / "sub/deeper/empty.txt", "an empty picture")
    put(data / "sub/deeper/part.png", picture()[:200])
    put(data / "sub/deeper/part.txt", "half a picture")
    (data / "sub/deeper/up").symlink_to(data)
    (data / "loop").symlink_to(data / "loop")
    put(tmp_path / "secret.txt", "not for others")
    put(data / "sub/c.png", picture())
    (data / "sub/c.txt").symlink_to(tmp_path / "secret.txt")
    pairs, rejects, _ = run(tmp_path / "w", data)
    texts = {key: row["text"] for key, row in pairs.items()}
    assert texts == {"a": "in a file", "sub/a": "in a file", "sub/deeper/b": "in its json"}
    assert rejects == {
        "sub/c": "not_a_file",
        "sub/deeper/alone": "no_text",
        "sub/deeper/empty": "empty_picture",
        "sub/deeper/part": "truncated",
    }


def test_in_the_cache_of_the_hub_files_are_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / f"snapshots/{'0' * 40}/data"
    snapshot.mkdir(parents=True)
    for name, data in (("a.png", picture()), ("a.txt", b"words")):
        (snapshot / name).symlink_to(put(blobs / name.replace(".", ""), data))
    assert list(run(tmp_path / "w", snapshot)[0]) == ["a"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_image_folders_with_metadata(tmp_path, kind):
    data = tmp_path / "in"
    for of_split, number in (("train", 0), ("test", 2)):
        rows = []
        for i in range(number, number + 2):
            put(data / of_split / f"{i}.png", shown(i))
            rows.append({"file_name": f"{i}.png", "text": f"text {i}"})
        metadata = data / of_split / f"metadata.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), metadata)
        elif kind == "jsonl":
            metadata.write_text("\n".join(map(json.dumps, rows)))
        else:
            lines = io.StringIO()
            writer = csv.DictWriter(lines, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
            metadata.write_text(lines.getvalue())
    pairs, _, _ = run(tmp_path / "w", data)
    assert [row["text"] for row in pairs.values()] == ["text 0", "text 1"]
    # The other split is what is measured on.
    pictures = picture_sets.read_set(data)
    assert (pictures.path, pictures.names) == (data / "test", ("2.png", "3.png"))
    found = captions.read_captions(data / f"test/metadata.{kind}", pictures)
    assert found.texts == ("text 2", "text 3")
    np.testing.assert_array_equal(found.picture_things, found.text_things)


def test_folders_of_the_hub_and_what_was_saved_to_disk(tmp_path, caplog):
    hub = tmp_path / "hub"
    for i in range(2):
        parquet(hub / f"data/train-{i:05d}-of-00002.parquet", columns(start=i * COUNT))
    parquet(hub / "data/test-00000-of-00001.parquet", columns())
    parquet(hub / "de/train/0000.parquet", columns())
    put(hub / "README.md", "---\n")
    put(hub / "assets/logo.png", picture())
    keys = [
        f"{name}/{i:08d}"
        for name in ("data/train-00000-of-00002", "data/train-00001-of-00002")
        for i in range(COUNT)
    ]
    keys += [f"de/train/0000/{i:08d}" for i in range(COUNT)]
    assert list(run(tmp_path / "w", hub)[0]) == keys
    assert "1 of 4 files are left out as the split test" in caplog.text
    assert len(run(tmp_path / "w2", hub / "data/test*")[0]) == COUNT

    disk = tmp_path / "disk"
    saved(disk / "train", columns())
    saved(disk / "validation", columns())
    arrow(disk / "train/cache-0123456789abcdef.arrow", columns())
    put(disk / "dataset_dict.json", '{"splits": ["train", "validation"]}')
    pairs, _, _ = run(tmp_path / "w3", disk, rows_per_shard=2)
    assert [row["text"] for row in pairs.values()] == [f"text {i}" for i in range(COUNT)]
    where = [[row[name] for row in pairs.values()] for name in ("path", "offset", "length")]
    fetched = dict(pairs_stage.read_pictures(tmp_path / "w3", *where))
    assert [fetched[i] for i in range(COUNT)] == [shown(i) for i in range(COUNT)]


def test_arrow_files_that_cannot_be_used_are_told(tmp_path):
    path = tmp_path / "in/data.arrow"
    for options in ({"compression": "zstd"}, {}):
        ipc = pa.ipc.IpcWriteOptions(**options)
        arrow(path, columns() | {"more": ["x" * 10_000] * COUNT}, options=ipc)
        if not options:
            path.write_bytes(path.read_bytes()[:-3_000])
        why = "it is packed: write it without" if options else "."
        with pytest.raises(BadInput, match=rf"data\.arrow cannot be read as Arrow \({why}"):
            run(tmp_path / "w", tmp_path / "in")
    path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"data\.arrow cannot be read as Arrow"):
        run(tmp_path / "w", tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("00000.tfrecord", r"00000\.tfrecord is TFRecord, .* --output_format webdataset\."),
        ("a/pictures.zip", r"a/pictures\.zip is packed as a whole: unpack it\."),
        ("0.tar.part", r"is a download that is not complete: fetch it again\."),
        ("cat/1.jpg", r"cat/1\.jpg is a picture without a caption: .*mofi class-folders"),
        ("cache-1.arrow", "holds nothing that is known: name a folder"),
    ],
)
def test_what_is_not_read_is_told_with_what_to_do(tmp_path, name, words):
    put(tmp_path / name, b"x")
    if "tfrecord" in name:
        parquet(tmp_path / "00000.parquet", {"key": ["0"]})
    with pytest.raises(BadInput, match=words):
        pairs_stage.find([f"s={tmp_path}"])


# ------------------------------------------------------------------------ evaluation and embeddings


def test_splits_by_the_words_of_a_path():
    paths = {
        "data/train-00000-of-00004.parquet": "train",
        "en/val/0000.parquet": "validation",
        "cc3m-Training-0001.tar": "train",
        "train/test.csv": "test",
        "latest/contrast.tar": None,
    }
    assert {path: tree.split_of(path) for path in paths} == paths
    assert tree.of_split(paths, tree.TO_MEASURE) == ["train/test.csv"]
    assert tree.of_split(["a", "b"], tree.TO_LEARN) == ["a", "b"]


def test_image_folders_with_splits(tmp_path):
    for name in (
        "train/cat/1",
        "train/dog/2",
        "train/dog/deep/3",
        "val/cat/1",
        "val/dog/4",
        "test/9",
    ):
        put(tmp_path / f"in/{name}.png", shown(int(name[-1])))
    pictures = picture_sets.read_set(tmp_path / "in")  # nobody knows the classes of test/
    assert (pictures.path, pictures.names) == (tmp_path / "in/val", ("cat/1.png", "dog/4.png"))
    assert pictures.origin == {"part": "val"}  # results say it
    class_folders.main(str(tmp_path / "in"), str(tmp_path / "pairs"))
    assert json.loads((tmp_path / "pairs/result.json").read_text()) == {"classes": 2, "pictures": 3}
    (tmp_path / "around/it").mkdir(parents=True)
    (tmp_path / "in").rename(tmp_path / "around/it/in")
    assert len(picture_sets.read_set(tmp_path / "around")) == 2
    # Classes that are called like splits beside others are classes.
    for name in ("train", "bus", "car"):
        put(tmp_path / f"vehicles/{name}/0.png", shown(1))
    assert list(picture_sets.read_set(tmp_path / "vehicles").labels.values()) == [
        *("bus", "car", "train")
    ]


def test_rows_with_labels_wherever_they_lie(tmp_path):
    saved(tmp_path / "disk/train", labelled([0, 1, 1]))
    saved(tmp_path / "disk/test", labelled([1, 0]))
    pq.write_table(labelled([1, 0, 1]), put(tmp_path / "hub/data/train.parquet", b""))
    for path, classes in (("disk", [1, 0]), ("disk/train", [0, 1, 1]), ("hub", [1, 0, 1])):
        pictures = picture_sets.read_set(tmp_path / path)
        np.testing.assert_array_equal(pictures.classes, classes)
        assert pictures.labels == {0: "cat", 1: "dog"}
        assert pictures.read(1) == shown(1)
    both = split.read_split(tmp_path / "disk", tmp_path / "disk")
    assert (len(both.train), len(both.test)) == (3, 2)
    for number, path in enumerate(("disk", "hub")):
        class_folders.main(str(tmp_path / path), str(tmp_path / f"pairs{number}"))
        result = json.loads((tmp_path / f"pairs{number}/result.json").read_text())
        assert result == {"classes": 2, "pictures": 3}
    changes = {
        "labels": "given",
        "given": {"ids": "class", "titles": None, "weights": None, "where": ()},
    }
    pairs, _, _ = run(tmp_path / "w", tmp_path / "pairs0", **changes)
    assert [row["text"] for row in pairs.values()] == ["cat", "dog", "dog"]


def test_metadata_tells_the_classes(tmp_path):
    for i in range(2):
        put(tmp_path / f"{i}.png", shown(i))
    rows = [{"file_name": f"{i}.png", "label": name} for i, name in enumerate(("b", "a"))]
    table = put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    pictures = picture_sets.read_set(tmp_path)
    assert (pictures.classes.tolist(), pictures.labels) == ([1, 0], {0: "a", 1: "b"})
    for row, words in (
        ('{"file_name": "../x.png"}', "names ../x.png, which is not in"),
        ('{"file_name": "0.png"}', "Row 3 of .* has no label: give it one"),
        ('{"file": "0.png"}', r"Row 3 of .* cannot be read \(KeyError\('file_name'\)\): write"),
    ):
        table.write_text("\n".join([*map(json.dumps, rows), row]))
        with pytest.raises(BadInput, match=words):
            picture_sets.read_set(tmp_path)


def test_metadata_of_any_text_and_of_none(tmp_path):
    put(tmp_path / "0.png", shown(0))
    table = put(tmp_path / "metadata.csv", 'file_name,text\n0.png,"a\u2028b, or\nc"\n')
    pictures = picture_sets.read_set(tmp_path)
    assert captions.read_captions(table, pictures).texts == ("a\u2028b, or\nc",)
    table.write_text("file_name,text\n0.png,a\u2028b\n")
    assert captions.read_captions(table, pictures).texts == ("a\u2028b",)
    table.write_text("")
    with pytest.raises(BadInput, match="has no rows"):
        picture_sets.read_set(tmp_path)


def test_pairs_are_no_classes(tmp_path):
    img2dataset(tmp_path)
    with pytest.raises(BadInput, match="holds pairs that img2dataset wrote"):
        picture_sets.read_set(tmp_path)


def test_embedding_finds_the_pictures_of_all_of_them(tmp_path):
    for kind in ("files", "webdataset", "parquet"):
        img2dataset(tmp_path / kind, kind)
    saved(tmp_path / "disk", columns())
    arrow(tmp_path / "disk/cache-0.arrow", columns())
    found = list(containers.find(tmp_path, collections.Counter()))
    reader, read_, gone = containers.Reader(tmp_path), collections.Counter(), 0
    for place in found:
        try:
            assert reader.read(place)[1].startswith(b"\x89PNG")
        except containers.Unreadable:
            gone += 1  # what could not be downloaded has its row
        else:
            read_[place.key.partition("/")[0]] += 1
    assert read_ == {"files": 4, "webdataset": 4, "parquet": 4, "disk": 3}
    assert gone == 2


def test_pictures_of_evaluation_sets_are_known_in_rows_too(tmp_path):
    saved(tmp_path / "disk", columns())
    arrow(tmp_path / "disk/cache-0.arrow", columns())
    img2dataset(tmp_path / "parquet", "parquet")
    found = eval_sets.find({"a": str(tmp_path)})["a"]
    assert [name.rpartition("/")[2] for name, _ in eval_sets.read(found)] == [
        *("0.png", "1.png", "2.png"),
        *("0", "2", "0", "2"),
    ]
    put(tmp_path / "broken.parquet", b"PAR1")
    with pytest.raises(BadInput, match=r"broken\.parquet cannot be read \(container_damaged\)"):
        list(eval_sets.read(eval_sets.find({"a": str(tmp_path / "broken.parquet")})["a"]))


def test_damaged_rows_of_evaluation_sets_are_told(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": columns(8)["image"]})
    pq.write_table(table, path, compression="zstd", row_group_size=4)
    data = bytearray(path.read_bytes())
    data[4:24] = b"\xff" * 20  # of the pictures themselves; the paths behind them are whole
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.parquet cannot be read \(.*_damaged\): fetch it"):
        list(eval_sets.read([str(path)]))


def test_an_avif_picture_is_measured_and_kept_out(tmp_path):
    put(tmp_path / "set/1_a.AVIF", b"?")
    tar = put(tmp_path / "set.tar", tar_bytes([("1_a.avif", b"?")]))
    for path in (tmp_path / "set", tar):
        [(name, _)] = eval_sets.read(eval_sets.find({"a": str(path)})["a"])
        assert name.lower().endswith("1_a.avif")
        assert len(picture_sets.read_set(path).names) == 1
