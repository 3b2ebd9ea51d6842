"""What a million and a billion pairs cost, for `million_pairs`: with stages that read pictures."""

import dataclasses
import io
import pathlib
import tarfile
import tempfile

import cv2
import numpy as np

from benchmarks import figures, synthetic
from configs import i2e
from data_prep import build_i2e, engine


@dataclasses.dataclass(frozen=True)
class Given:
    """What the extrapolation supposes.

    Attributes:
      cores: CPU cores, all of which work.
      accelerators: how many run the CLIP model.
      pictures_per_second: that one of them embeds.
    """

    cores: int
    accelerators: int
    pictures_per_second: float


# Those whose time grows with the pairs; the names are what the table says.
_PICTURES = {
    "indexed": "indexed (decode, hash)",
    "embeddings": "embeddings (decode)",
    "shards-i2e": "shards-i2e (write)",
}


# No other stage may have a larger share: these do what the pairs are there for.
_DEAR, _MOST_SHARE = {"captions", *_PICTURES.values()}, 0.02
_WORKERS = 2


def show(report: figures.Report, quick: bool, rows: dict[str, float], given: Given) -> None:
    """Prints worker-seconds per million pairs, and hours and share of a billion.

    Args:
      report: gets the largest share of a stage that moves rows.
      quick: few pictures.
      rows: worker-seconds per million pairs of the stages that read none.
      given: see `Given`.
    """
    costs = _picture_seconds(200 if quick else 3_000) | rows
    total = sum(costs.values())
    hours = f"h / 10^9 on {given.cores} cores"
    print(f"\n{'stage':<24}{'s / 10^6':>10}{hours:>26}{'share':>8}")
    for stage, cost in [*costs.items(), ("all", total)]:
        spent = cost * 1e3 / 3600 / given.cores
        print(f"{stage:<24}{cost:>10.2f}{spent:>26.3f}{cost / total:>8.1%}")
    spent = 1e9 / given.pictures_per_second / given.accelerators / 3600
    print(
        f"CLIP's tower: {spent:.1f} h / 10^9 on {given.accelerators} accelerators, if each embeds"
        f" {given.pictures_per_second:g} pictures a second\n",
        flush=True,
    )
    name = max(costs.keys() - _DEAR, key=costs.get)
    bar = f"cost model: the largest stage that moves rows ({name})"
    asked = None if quick else f"<= {_MOST_SHARE}"
    report.add(bar, costs[name] / total, "of all", figures.CPU, asked)


def _picture_seconds(pairs: int) -> dict[str, float]:
    """Worker-seconds of each stage a million pairs.

    The pictures are 640 x 480 JPEGs of 88 kB. The CLIP model is a tiny one: what a real tower costs
    is what the accelerator makes of it.
    """
    entities = list(synthetic.names(200))
    captions = synthetic.captions(pairs, entities)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "in").mkdir()
        with tarfile.open(folder / "in/00000.tar", "w") as tar:
            for number, (picture, caption) in enumerate(zip(_photos(pairs), captions, strict=True)):
                for suffix, content in (("jpg", picture), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        rows = synthetic.write_rows(folder / "rows.jsonl", 100, 2)
        synthetic.write_clip(folder / "clip", captions[:100], 224, 112)
        config = i2e.get_config(f"folder={folder / 'in'},kb={rows}")
        config.update(
            clip=str(folder / "clip"),
            workers=_WORKERS,
            min_images=1,
            min_probability=0.0,
            max_images=None,
        )
        result = build_i2e.build(config, str(folder / "W"))
        found = engine.stage_seconds(folder / "W")
    records = {"shards-i2e": result["stages"]["shards"]["records"]}
    return {
        text: found[stage]["seconds"] / records.get(stage, pairs) * 1e6
        for stage, text in _PICTURES.items()
    }


def _photos(count: int):
    """Soft shapes with the grain of a sensor, no two alike."""
    draw = np.random.default_rng(0)
    bases = []
    for _ in range(20):
        layers = [draw.normal(0, 40 / (i + 1), (3 * 4**i, 4 * 4**i, 3)) for i in range(4)]
        layers = [cv2.resize(each, (640, 480), interpolation=cv2.INTER_CUBIC) for each in layers]
        picture = 128 + sum(layers) + draw.normal(0, 4, (480, 640, 3))
        bases.append(np.clip(picture, 0, 255).astype(np.uint8))
    for number in range(count):
        picture = bases[number % len(bases)].copy()
        patch = draw.integers(0, 255, (6, 8, 3)).astype(np.uint8)
        picture[::2] = picture[::2] // 2 + cv2.resize(patch, (640, 240)) // 2
        yield cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
