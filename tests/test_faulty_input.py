"""All that can be wrong with the input of data preparation: nothing is lost, all is told."""

import json
import os
import pathlib
import subprocess
import sys
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import i2e as i2e_config
from data_prep import build_i2e
from tests.inputs import picture, tar_bytes

ROOT = pathlib.Path(__file__).parents[1]
ARABIC = "صورة قطة في الحديقة"  # a picture of a cat in the garden
ENTITIES = [
    {"qid": "Q146", "label": "cat", "aliases": ["قطة"], "description": "small animal"},
    {"qid": "Q144", "label": "dog"},  # no description
]


def bomb() -> bytes:
    """A PNG of some hundred bytes whose header promises 50,000 by 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    side = (50_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def faulty(tmp_path):
    """Two tars, the second cut short, a parquet that is none, and a small knowledge base."""
    tars, parquet = tmp_path / "tars", tmp_path / "parquet"
    tars.mkdir()
    parquet.mkdir()
    jpeg = picture(64, 48, "jpeg")
    good = [(f"{i:03d}", picture(64, 48 + i, "jpeg"), "a cat and a dog") for i in range(6)]
    odd = [("arabic", jpeg, ARABIC), ("bomb", bomb(), "a cat"), ("broken", jpeg[:-600], "a dog")]
    members = [
        (f"{key}.{kind}", data)
        for key, image, text in [*good, *odd]
        for kind, data in (("jpg", image), ("txt", text.encode()))
    ]
    (tars / "00000.tar").write_bytes(tar_bytes(members))
    second = tar_bytes([("z1.jpg", jpeg), ("z1.txt", b"a dog"), ("z2.jpg", picture(200, 200))])
    (tars / "00001.tar").write_bytes(second[:-30_000])
    table = {"key": ["w"], "image": [{"bytes": jpeg, "path": "w.jpg"}], "text": ["a cat"]}
    pq.write_table(pa.table(table), parquet / "w.parquet")
    (parquet / "x.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    rows = "".join(json.dumps(row) + "\n" for row in ENTITIES)
    (tmp_path / "kb.jsonl").write_text(rows)
    return tmp_path


def make_config(faulty, **changes):
    arguments = (
        f"folder=t@{faulty / 'tars'}+p@{faulty / 'parquet'},kb={faulty / 'kb.jsonl'},labels=text"
    )
    config = i2e_config.get_config(arguments)
    values = {"min_images": 1, "vocab_size": 300, "failure_budget": 0.5, "workers": 1}
    config.update(values | changes)
    return config


def test_every_sample_is_a_pair_or_a_reject_and_every_shard_made_or_in_quarantine(faulty):
    work = faulty / "W"
    result = build_i2e.build(make_config(faulty), str(work))
    pairs = [row for path in sorted(work.glob("pairs/*")) for row in read(path)]
    assert {row["key"] for row in pairs} == {
        *(f"t/{i:03d}" for i in range(6)),
        *("t/arabic", "t/z1", "p/w"),
    }
    rejects = {
        row["key"]: row["reason"] for path in sorted(work.glob("rejects/*")) for row in read(path)
    }
    assert rejects["t/bomb"] == "too_many_pixels"
    assert rejects["t/broken"] == "truncated"
    assert rejects["t/z2"] == "tar_cut_short"
    assert rejects["x.parquet"] == "quarantined"
    assert result["quarantined"] == {"scanned/p-x": 1}
    [note] = (work / "quarantine").glob("*.json")
    error = json.loads(note.read_text())["error"]
    assert "x.parquet cannot be read as parquet" in error
    assert error.endswith("fetch it again or remove it.")

    # The Arabic caption is intact and linked; an entity without description is an entity.
    labels = {row["key"]: row["entities"] for p in work.glob("labels_final/*") for row in read(p)}
    assert labels["t/arabic"] == [0]
    assert sorted(labels["t/000"]) == [0, 1]
    texts = {row["key"]: row["text"] for row in pairs}
    assert texts["t/arabic"] == ARABIC
    assert result["stages"]["shards"]["records"] == 9


def read(path):
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else []


def test_without_a_budget_the_command_ends_in_one_sentence(faulty):
    arguments = f"folder={faulty / 'parquet'},kb={faulty / 'kb.jsonl'},labels=text"
    line = [sys.executable, "-m", "data_prep.build_i2e", f"--workdir={faulty / 'W'}"]
    line += [f"--config={ROOT}/configs/i2e.py:{arguments}", "--config.failure_budget=0.0"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    assert "x.parquet cannot be read as parquet" in told
    assert "Traceback" not in told


def test_a_full_disk_stops_the_command_and_the_same_command_goes_on(faulty):
    """A limit on the size of files stands for the full disk."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1));"
        "sys.path.insert(0, '.'); from data_prep import build_i2e; from mofi_jax.common import cli;"
        "cli.run(build_i2e.main)"
    )
    arguments = f"folder={faulty / 'tars'},kb={faulty / 'kb.jsonl'},labels=text"
    flags = [f"--workdir={faulty / 'W'}", f"--config={ROOT}/configs/i2e.py:{arguments}"]
    flags += ["--config.min_images=1", "--config.vocab_size=300", "--config.workers=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    told = done.stderr.strip().splitlines()[-1]
    assert "takes no more data" in told
    assert "make room" in told
    finished = {p: os.stat(p).st_mtime_ns for p in (faulty / "W").glob("pairs/*.parquet")}
    assert finished

    line = [sys.executable, "-m", "data_prep.build_i2e", *flags]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    assert {path: os.stat(path).st_mtime_ns for path in finished} == finished
    assert json.loads((faulty / "W/result.json").read_text())["stages"]["shards"]["records"] == 8
