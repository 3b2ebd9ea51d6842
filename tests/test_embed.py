"""`mofi_jax.embed`: pictures in whatever they lie in, damage, kill and resume, two processes."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mofi_jax import embed, inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.data.pictures import containers
from mofi_jax.distributed import hosts
from mofi_jax.inference import embeddings, piecework
from tests import datasets, processes

FILES = ("embeddings.npy", "pictures.parquet", "undecodable.parquet")


def jpeg(number: int) -> bytes:
    return ops.encode_jpeg(datasets.drawing(number % 7, number), 95)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One folder with all kinds of containers in it, names that are traps, and damage."""
    root = tmp_path_factory.mktemp("collection") / "my [pictures] *"
    deep = root / "a b" / "ü"
    deep.mkdir(parents=True)
    for i in range(5):
        (deep / f"{i} [x].JPG").write_bytes(jpeg(i))
    (root / "0f3c").write_bytes(jpeg(5))  # a picture without a suffix
    (root / "notes").write_text("no picture")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.jpg").write_bytes(jpeg(6))
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    (root / "empty.jpg").write_bytes(b"")
    (root / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "loop").symlink_to(root)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for i in range(6):
            add(tar, f"{i:09d}.jpg", jpeg(10 + i))
            add(tar, f"{i:09d}.txt", b"words")
        add(tar, "000000000.jpg", jpeg(20))  # a second one of that name
    table = {"image": [{"bytes": jpeg(30 + i), "path": f"p{i}.jpg"} for i in range(4)]}
    table["image"].append({"bytes": None, "path": "none.jpg"})
    pq.write_table(pa.table(table), root / "train-00000-of-00001.parquet", row_group_size=2)
    numbers = pa.table({"image": [{"bytes": [1, 2]}]})
    pq.write_table(numbers, root / "numbers.parquet")
    pq.write_table(pa.table({"url": ["u"]}), root / "00000.parquet")  # beside the tar
    (root / "damaged.tar").write_bytes(b"no tar" * 300)
    datasets.write(root / "shards", examples=9, shards=2)
    return root


@pytest.fixture(scope="module")
def finished(pictures, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "my [E] *"
    (out.parent / "lines.txt").write_text("a red circle\n\na blue square\n")
    lines = str(out.parent / "lines.txt")
    run(trained, pictures, out, entities="3", texts=lines)
    return out


def run(trained, images, out, **options):
    options = {"batch_size": "1"} | options
    embed.main(str(trained / "run"), str(images), str(out), **options)


def rows(out, name="pictures.parquet"):
    return pq.ParquetFile(out / name).read().to_pylist()


def digests(out):
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES]


def test_pictures_of_all_containers_are_embedded_and_read_back(pictures, trained, finished):
    found = rows(finished)
    vectors = np.load(finished / "embeddings.npy", mmap_mode="r")
    assert vectors.shape == (len(found), 12)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    reader = containers.Reader(pictures)
    data = []
    for row in found:
        place = containers.Place(*(row[n] for n in ("key", "container", "offset", "length", "row")))
        data.append(reader.read(place)[1])
        assert hashlib.sha256(data[-1]).hexdigest() == row["sha256"]
        assert len(data[-1]) == row["length"]
        assert (row["width"], row["height"]) == (24, 24)
    model = inference.load(trained / "run")
    np.testing.assert_allclose(vectors, model.embed_images(data), atol=1e-5)
    named = [[entity._asdict() for entity in of] for of in model.name_entities(data, 3)]
    for row, entities in zip(found, named, strict=True):
        assert [e["qid"] for e in row["entities"]] == [e["qid"] for e in entities]
    keys = [row["key"] for row in found]
    assert keys[:7] == [f"00000.tar/{i:09d}.jpg" for i in (*range(6), 0)]
    assert keys[7:13] == ["0f3c", *(f"a b/ü/{i} [x].JPG" for i in range(5))]
    assert keys[13] == "shards/i2e/1.0.0/i2e-train.array_record-00000-of-00002/000000"
    assert keys[-4:] == [f"train-00000-of-00001.parquet/p{i}.jpg" for i in range(4)]
    assert len(keys) == 26


def test_what_cannot_be_decoded_is_named_and_counted(finished):
    reasons = {row["key"]: row["reason"] for row in rows(finished, "undecodable.parquet")}
    assert reasons == {
        "broken.png": "not_a_picture",
        "damaged.tar": "container_damaged",
        "empty.jpg": "empty",
        "nowhere.jpg": "missing",
        "train-00000-of-00001.parquet/none.jpg": "missing",
    }
    result = json.loads((finished / "result.json").read_text())
    assert (result["pictures"], result["undecodable"], result["dimension"]) == (26, 5, 12)
    assert sum(result["reasons"].values()) == 5
    assert result["passed_over"][".txt"] == 1
    assert result["passed_over"][".parquet"] == 3  # a table, numbers, and the shards' vocabulary
    assert sorted(os.listdir(finished)) == sorted((*FILES, "result.json", "texts.npy"))


def test_texts(trained, finished):
    vectors = np.load(finished / "texts.npy")
    expected = inference.load(trained / "run").embed_texts(["a red circle", "", "a blue square"])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["tar", "parquet", "picture"])
def test_a_single_file(pictures, trained, tmp_path, kind):
    name = {"tar": "00000.tar", "picture": "a b/ü/0 [x].JPG"}.get(
        kind, "train-00000-of-00001.parquet"
    )
    run(trained, pictures / name, tmp_path / "E")
    found = rows(tmp_path / "E")
    assert {row["container"] for row in found} == {os.path.basename(name)}
    assert len(found) == {"tar": 7, "parquet": 4, "picture": 1}[kind]


def test_a_run_that_stops_is_gone_on_with_to_the_same_bytes(
    pictures, trained, finished, tmp_path, monkeypatch
):
    """It fails in every piece once, and between the last one and the result."""
    monkeypatch.setattr(embeddings, "_PIECE", 8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(trained, pictures, whole)
    write, assemble, write_json = (
        embeddings.Pieces.write,
        embeddings.Pieces.assemble,
        embed.files.write_json,
    )
    written = []

    def once(self, piece, *args):
        write(self, piece, *args)
        written.append(piece)
        raise KeyboardInterrupt

    monkeypatch.setattr(embeddings.Pieces, "write", once)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(trained, pictures, parts)
    monkeypatch.setattr(embeddings.Pieces, "write", write)
    monkeypatch.setattr(embed.files, "write_json", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        run(trained, pictures, parts)
    monkeypatch.setattr(embed.files, "write_json", write_json)
    again = []
    monkeypatch.setattr(
        embeddings.Pieces, "assemble", lambda self: again.append(self.missing()) or assemble(self)
    )
    run(trained, pictures, parts)
    assert again == [[]]
    assert len(written) >= 2
    assert digests(parts) == digests(whole)
    # Finished: nothing is done, and the pieces are gone.
    before = (parts / "result.json").stat().st_mtime_ns
    run(trained, pictures, parts)
    assert (parts / "result.json").stat().st_mtime_ns == before
    assert not (parts / "parts").exists()


@pytest.mark.slow
def test_killed_at_any_moment(pictures, trained, tmp_path):
    options = {"model": trained / "run", "images": pictures, "batch_size": 1}

    def start(out):
        flags = [f"--{name}={value}" for name, value in (options | {"out": out}).items()]
        return subprocess.Popen(
            [sys.executable, "-m", "mofi_jax.embed", *flags], cwd=processes.REPOSITORY
        )

    assert start(tmp_path / "whole").wait() == 0
    killed = 0
    for seconds in (*np.linspace(1, 8, 12), None):
        process = start(tmp_path / "parts")
        if seconds is not None:
            time.sleep(seconds)
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code == 0
    assert killed > 2
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_bad_input(pictures, trained, finished, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/x.txt").write_text("")
    with pytest.raises(BadInput, match=r"holds no pictures \(but 1 \.txt\)"):
        run(trained, tmp_path / "nothing", tmp_path / "E")
    assert not (tmp_path / "E").exists()
    with pytest.raises(BadInput, match="There is nothing at"):
        run(trained, tmp_path / "gone", tmp_path / "E")
    with pytest.raises(BadInput, match="entities=3, not 2"):
        run(trained, pictures, finished, entities="2")
    with pytest.raises(BadInput, match="--entities=-1 cannot be used"):
        run(trained, pictures, tmp_path / "E", entities="-1")
    with pytest.raises(BadInput, match=r"--texts=.*cannot be read"):
        run(trained, pictures, tmp_path / "E", texts=str(tmp_path / "gone.txt"))
    with pytest.raises(BadInput, match="8"):
        run(trained, pictures, tmp_path / "E", entities="8")
    (tmp_path / "own").mkdir()
    np.save(tmp_path / "own/embeddings.npy", np.zeros((1, 12), np.float32))
    with pytest.raises(BadInput, match="has not finished"):
        run(trained, pictures, tmp_path / "own")
    for i in range(3):
        (tmp_path / f"nothing/{i}.jpg").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"None of the 3 pictures .*\(3 not_a_picture\)"):
        run(trained, tmp_path / "nothing", tmp_path / "broken")


def test_a_mistake_can_be_corrected_in_the_same_folder(pictures, trained, tmp_path):
    """Nothing was embedded with it: no other folder is needed for other flags or pictures."""
    (tmp_path / "lines.txt").write_text("a red circle")
    with pytest.raises(BadInput, match="8"):
        run(trained, pictures, tmp_path / "E", entities="8", texts=str(tmp_path / "lines.txt"))
    run(trained, pictures, tmp_path / "E", entities="3")
    run(trained, pictures, tmp_path / "whole", entities="3")
    assert digests(tmp_path / "E") == digests(tmp_path / "whole")
    assert not (tmp_path / "E/texts.npy").exists()  # of the mistaken command
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jpg").write_bytes(b"broken")
    with pytest.raises(BadInput, match="None of the 1 pictures"):
        run(trained, tmp_path / "mine", tmp_path / "mended")
    assert os.listdir(tmp_path / "mended") == ["undecodable.parquet"]
    (tmp_path / "mine/a.jpg").write_bytes(jpeg(0))
    run(trained, tmp_path / "mine", tmp_path / "mended")
    assert len(rows(tmp_path / "mended")) == 1


def test_a_model_that_was_trained_further_is_told(pictures, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings.Pieces, "assemble", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(trained, pictures, tmp_path / "E")
    probe = tmp_path / "E/parts/probe.npy"
    np.save(probe, -np.load(probe))
    with pytest.raises(BadInput, match="is not the model that"):
        run(trained, pictures, tmp_path / "E")


def test_hosts_share_the_pieces(pictures, trained, finished, tmp_path, monkeypatch):
    """Two hosts by turns, as far as one process can be both."""
    monkeypatch.setattr(embeddings, "_PIECE", 8)
    run(trained, pictures, tmp_path / "one")
    did = {}
    inner = piecework.Work.run
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts, "agree", lambda find: find())
        monkeypatch.setattr(hosts, "all_or_none", lambda do: do())
        monkeypatch.setattr(embeddings.Pieces, "missing", lambda self: [*range(len(self))])
        monkeypatch.setattr(
            piecework.Work,
            "run",
            lambda self, own, i=index: did.update({i: own}) or inner(self, own),
        )
        if index:
            monkeypatch.setattr(embed, "_finish", lambda *_: None)
            run(trained, pictures, tmp_path / "two")
            monkeypatch.undo()
            monkeypatch.setattr(embeddings, "_PIECE", 8)
    run(trained, pictures, tmp_path / "two")
    assert did == {0: [0, 2], 1: [1, 3]}
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.slow
def test_two_processes(pictures, trained, tmp_path):
    run(trained, pictures, tmp_path / "one")
    port = processes.free_port()
    flags = [f"--model={trained / 'run'}", f"--images={pictures}", f"--out={tmp_path / 'two'}"]
    flags += ["--batch_size=16", f"--coordinator=localhost:{port}", "--processes=2"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mofi_jax.embed", *flags, f"--process={i}"],
            cwd=processes.REPOSITORY,
        )
        for i in range(2)
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    one, two = (np.load(tmp_path / name / "embeddings.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
