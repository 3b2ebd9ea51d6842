"""Pictures and tars for the tests of the sources, and a run of the stage that reads them."""

import io
import tarfile

import ml_collections
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from configs import kb as kb_config
from data_prep import engine
from data_prep.pairs import stage as pairs_stage


def kb_rules(**changes):
    """The default rules of knowledge bases, for one process."""
    config = kb_config.get_config()
    config.update({"workers": 1, **changes})
    return config


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
            "caption_column": None,
            "keep_columns": ("punsafe", "NSFW"),
            "context_columns": (),
            "dataset": "i2e",
            "labels": "clip",
            "given": {"ids": None, "titles": None, "weights": None, "where": ()},
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
    (manifest,) = pairs_stage.run(make_config(folder, **changes), engine.Engine(tmp_path / "w"))
    return *read(tmp_path / "w"), manifest["counts"]


def read(workdir):
    pairs, rejects = {}, {}
    for path in sorted(workdir.glob("pairs/*.parquet")):
        pairs |= {row["key"]: row for row in pq.read_table(path).to_pylist()}
    for path in sorted(workdir.glob("rejects/pairs-*.parquet")):
        rejects |= {row["key"]: row["reason"] for row in pq.read_table(path).to_pylist()}
    return pairs, rejects


def tables_of(workdir, pattern):
    return [pq.read_table(path).to_pylist() for path in sorted(workdir.glob(f"{pattern}.parquet"))]
