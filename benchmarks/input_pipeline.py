"""Speed of the training input: pictures a second, against bare decoding and against PyTorch.

    python -m benchmarks.input_pipeline [--quick] [--pictures PATH] [--threads 2]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was asked
for does not hold.  Every version makes 224-pixel pictures of the same JPEGs, whose short side is
256 pixels; they run turn by turn, so that a busy machine slows all: ratios are medians over these
turns.

* bare: OpenCV alone decodes and resizes the pictures, which lie in memory, in as many threads; no
  records, no flips, no texts, no batches.  Once whole pictures, once crops drawn as ours are, which
  leave less to shrink: what is then missing to 1 is all that is not decoding and resizing.
* torch: ``torch.utils.data.DataLoader`` over files, Pillow transforms in their usual form (random
  resized crop, flip, to a tensor, normalised), two worker processes.
* ours: the stream that training draws from: I2E shards, crop, flip, one of the texts drawn and
  made into tokens, labels, batches of uint8.  Once decoded in threads of the process, once in two
  workers that share as many threads.

The bucket: our stream again, with every read of a shard (`ArrayRecordReader.read`, one read of the
file whatever its length) delayed by 30 ms before it begins, at most 128 of them at once.  Bandwidth
and what a mount does beyond one request a read are not simulated.  Records are small there, so
that waiting is measured and not decoding: with pictures of full size decoding is soon the limit.

PATH is a folder or a tar of ``{class}_{name}.jpg``, by default the bundled sample.  Pictures that
are smaller than 256 pixels are laid together, 20 to a mosaic.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any
from unittest import mock

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from benchmarks import figures, synthetic
from data_prep.dataset import files as dataset_files
from mofi_jax.data import ops, pipeline, records
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.training import checkpoint, state

SIZE, SHORT_SIDE, TILE, QUALITY = 224, 256, 64, 90
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)  # the defaults of ops.random_resized_crop
BATCH, WARM_UP = 64, 4
WORKERS = (0, 2)
BLOCK = 128  # the default of configs/mofi.py
LATENCY, IN_FLIGHT, BUCKET_THREADS = 0.03, 128, 2
ENTITIES = 1_000
# Grain's shuffle walks through powers of four: drawing from less takes longer (0.1 ms from 256).
RECORDS = 4_096
SAMPLE = pathlib.Path(__file__).parent.parent / "data_prep/sample/seen.tar"


# ------------------------------------------------------------------------------- the same pictures


def pictures(path: pathlib.Path, count: int) -> list[bytes]:
    """JPEGs of ``SHORT_SIDE`` made of the pictures at `path`, the same every time."""
    source = picture_sets.read_set(path)
    rng = np.random.default_rng(0)
    made = []
    decoded = [ops.decode_rgb(source.read(i)) for i in range(min(count, len(source)))]
    for i in range(count):
        picture = decoded[i % len(decoded)]
        if min(picture.shape[:2]) < SHORT_SIDE:
            chosen = rng.integers(0, len(decoded), 20)
            tiles = [cv2.resize(decoded[j], (TILE, TILE)) for j in chosen]
            picture = np.concatenate(
                [np.concatenate(tiles[r : r + 5], 1) for r in range(0, 20, 5)], 0
            )
        shrink = functools.partial(ops.apply, f"resize_short({SHORT_SIDE})")
        made.append(ops.encode_jpeg(shrink(picture), QUALITY))
    return made


def write_set(folder: pathlib.Path, jpegs: list[bytes]) -> None:
    """The pictures, in ``RECORDS`` records, as a data set ``i2e`` with captions and labels."""
    version = folder / "i2e" / records.VERSION
    version.mkdir(parents=True)
    names = list(itertools.islice(synthetic.names(ENTITIES), ENTITIES))
    captions = synthetic.captions(RECORDS, names)
    rng = np.random.default_rng(0)
    num_bytes = 0
    shards = np.array_split(np.arange(RECORDS), 4)
    for shard, rows in enumerate(shards):
        path = version / records.shard_name("i2e", "train", shard, len(shards))
        writer = array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
        for i in rows:
            labels = rng.integers(0, ENTITIES, rng.integers(1, 3))
            record = records.serialize(
                {
                    "key": f"{i:06d}",
                    "image": jpegs[i % len(jpegs)],
                    "text": captions[i],
                    "entity_ids": labels,
                    "entity_scores": np.full(len(labels), 0.3, np.float32),
                    "source": "benchmark",
                    "width": 0,
                    "height": 0,
                }
            )
            num_bytes += len(record)
            writer.write(record)
        writer.close()
    dataset_files.write_metadata(
        version, name="i2e", shard_lengths=[len(rows) for rows in shards], num_bytes=num_bytes
    )
    dataset_files.train_bpe(captions, 8_000, version / records.TOKENIZER_FILE)
    vocabulary = records.Entities(
        qids=[f"Q{i:06d}" for i in range(ENTITIES)],
        names=names,
        descriptions=["something that was invented"] * ENTITIES,
        counts=np.full(ENTITIES, 10, np.int64),
    )
    records.write_entities(version / records.ENTITIES_FILE, vocabulary)


# ------------------------------------------------------------------------------------ the versions


def bare(jpegs: list[bytes], threads: int, *, crop: bool) -> Iterator[int]:
    """Yields the number of pictures made, ``BATCH`` at a time, for ever."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(jpegs))
    boxes = rng.random((len(jpegs), 4))

    def make(i: int) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(jpegs[i], np.uint8), cv2.IMREAD_COLOR_RGB)
        if crop:  # as ops.random_resized_crop draws it
            height, width = image.shape[:2]
            area = height * width * (SCALE[0] + boxes[i, 0] * (SCALE[1] - SCALE[0]))
            aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** boxes[i, 1]
            w = min(width, round((area * aspect) ** 0.5))
            h = min(height, round((area / aspect) ** 0.5))
            top, left = int(boxes[i, 2] * (height - h)), int(boxes[i, 3] * (width - w))
            image = image[top : top + h, left : left + w]
        shrink = cv2.INTER_AREA if image.shape[1] > SIZE else cv2.INTER_CUBIC
        return cv2.resize(image, (SIZE, SIZE), interpolation=shrink)

    def make_some(start: int) -> int:
        rows = order[np.arange(start, start + BATCH // 2) % len(order)]
        return len([make(int(i)) for i in rows])

    # Half a batch at a time: what a thread costs to feed is not part of decoding.
    starts = itertools.count(0, BATCH // 2)
    with futures.ThreadPoolExecutor(threads) as pool:
        queue = [pool.submit(make_some, next(starts)) for _ in range(2 * threads)]
        while True:
            yield queue.pop(0).result() + queue.pop(0).result()
            queue += [pool.submit(make_some, next(starts)) for _ in range(2)]


@dataclasses.dataclass
class PillowTransforms:
    """A PyTorch data set over files, as one writes it; torch is not needed to define it."""

    files: list[str]

    def __len__(self) -> int:
        return 1_000_000  # so that no run comes to the end of an epoch

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self.files[index % len(self.files)]) as picture:
            picture = picture.convert("RGB")
        left, top, w, h = _torchvision_box(picture.width, picture.height)
        picture = picture.resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
        )
        if torch.rand(1) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        image = image.to(torch.float32).div(255)
        mean, std = (
            torch.tensor(x).view(-1, 1, 1) for x in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
        )
        return image.sub_(mean).div_(std)


def _torchvision_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width, height, drawn until it fits, as torchvision's RandomResizedCrop does."""
    import torch

    for _ in range(10):
        area = width * height * float(torch.empty(1).uniform_(*SCALE))
        log_ratio = torch.log(torch.tensor(RATIO))
        aspect = float(torch.exp(torch.empty(1).uniform_(*log_ratio.tolist())))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(0, width - w + 1, (1,)))
            return left, int(torch.randint(0, height - h + 1, (1,))), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def torch_loader(files: list[str], workers: int) -> Iterator[int]:
    import torch.utils.data

    # The order of a plain range: shuffling a million indices would be counted as start-up.
    loader = torch.utils.data.DataLoader(
        PillowTransforms(files), batch_size=BATCH, num_workers=workers
    )
    for batch in loader:
        yield len(batch)


def ours(
    folder: pathlib.Path,
    threads: int,
    *,
    workers: int = 0,
    start: int = 0,
    block: int = BLOCK,
    image_ops: str = f"decode|random_resized_crop({SIZE})|flip",
) -> Iterator[dict[str, np.ndarray]]:
    """The stream of `mofi_jax.train`; the threads are those of all workers."""
    source = records.open_source(folder, "i2e")
    builder = pipeline.ExampleBuilder(
        image_ops=image_ops,
        text_sources={"alt_text": 0.5, "name_and_description": 0.5, "name": 0.0},
        tokenizer_path=str(source.directory / records.TOKENIZER_FILE),
        context_length=77,
        entities=records.read_entities(source.directory / records.ENTITIES_FILE),
        max_labels=4,
    )
    return pipeline.training_stream(
        [pipeline.Part("i2e", source)],
        builder,
        seed=0,
        start=start,
        batch_size=BATCH,
        threads=max(1, threads // max(1, workers)),
        workers=workers,
        block=block,
    )


class BucketReader:
    """A shard's reader whose every read waits as one request to a bucket does."""

    in_flight = threading.Semaphore(IN_FLIGHT)

    def __init__(self, reader: Any, requests: list[int]):
        self._reader, self._requests = reader, requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, first: int, stop: int) -> list[bytes]:
        with self.in_flight:
            self._requests.append(stop - first)
            time.sleep(LATENCY)
            return self._reader.read(first, stop)


# ---------------------------------------------------------------------------------------- figures


def rate(begin: Callable[[], Iterator[Any]], batches: int) -> float:
    """Pictures a second once it runs: the start is over when the first batches have come.

    All versions work ahead by about two batches and are slower than the loop that draws from them,
    so what is ready at the start of the measurement equals what is ready at its end.
    """
    stream = begin()
    for _ in range(WARM_UP):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    return batches * BATCH / seconds


def speed(
    report: figures.Report, folder: pathlib.Path, jpegs: list[bytes], threads: int, quick: bool
) -> None:
    files = []
    (folder / "files").mkdir()
    for i, data in enumerate(jpegs):
        files.append(str(folder / f"files/{i:06d}.jpg"))
        pathlib.Path(files[-1]).write_bytes(data)
    # As many bytes as ours go through, so that no cache holds them for either.
    source = records.open_source(folder, "i2e")
    jpegs = [record["image"] for record in source]
    versions: dict[str, Callable[[], Iterator[Any]]] = {
        "bare": lambda: bare(jpegs, threads, crop=False),
        "bare, with crops": lambda: bare(jpegs, threads, crop=True),
        **{
            f"ours, {workers} workers": lambda workers=workers: ours(
                folder, threads, workers=workers
            )
            for workers in WORKERS
        },
        "torch": lambda: torch_loader(files, workers=2),
    }
    rates: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(3 if quick else 9):
        for name, begin in versions.items():
            rates[name].append(rate(begin, 8 if quick else 24))
    device = f"cpu x{os.cpu_count()}"
    kilobytes = statistics.mean(map(len, jpegs)) / 1e3
    report.add("JPEGs of short side 256", kilobytes, "kB", device)
    for name in versions:
        report.add(f"224-pixel pictures, {name}", statistics.median(rates[name]), "img/s", device)

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))

    for workers in WORKERS:
        name, how = f"ours, {workers} workers", f"{threads} threads, {workers} workers"
        bar = f"speed over bare decode and resize, {how}"
        report.add(bar, ratio(name, "bare"), "x", device, ">= 0.85")
        bar = f"speed over bare decode, crop and resize, {how}"
        report.add(bar, ratio(name, "bare, with crops"), "x", device)
        bar = f"speed over torch DataLoader, Pillow, 2 workers, {how}"
        report.add(bar, ratio(name, "torch"), "x", device, ">= 1.3")


def bucket(report: figures.Report, folder: pathlib.Path, jpegs: list[bytes], quick: bool) -> None:
    shrink = functools.partial(ops.apply, "decode|resize_short(64)")
    write_set(folder, [ops.encode_jpeg(shrink(data), QUALITY) for data in jpegs])
    begin = functools.partial(
        ours, folder, BUCKET_THREADS, image_ops="decode|resize_short(64)|center_crop(64)"
    )
    open_shard = records.open_shard
    rates, device = [], f"cpu x{os.cpu_count()}, {LATENCY * 1e3:g} ms a read simulated"
    for name, block, batches in (("single records", 1, 8), (f"blocks of {BLOCK}", BLOCK, 160)):
        requests: list[int] = []
        with mock.patch.object(
            records, "open_shard", lambda path, log=requests: BucketReader(open_shard(path), log)
        ):
            found = rate(functools.partial(begin, block=block), batches // (4 if quick else 1))
        rates.append(found)
        report.add(f"bucket, {BUCKET_THREADS} threads, {name}", found, "img/s", device)
        asked = 1_000 * len(requests) / sum(requests)
        report.add(f"bucket, {name}: requests for 1,000 pictures", asked, "", device)
    name = f"bucket: speed of blocks of {BLOCK} over single records"
    report.add(name, rates[1] / rates[0], "x", device, ">= 20")


def resume(report: figures.Report, folder: pathlib.Path, threads: int) -> None:
    """The position goes through a real checkpoint; other threads draw the rest."""
    stream = ours(folder, threads)
    for _ in range(5):
        next(stream)
    expected = next(stream)
    stream.close()
    tiny = state.TrainState(jnp.zeros((), jnp.int32), {"x": jnp.zeros(2)}, {"x": jnp.zeros(2)})
    workdir = folder / "run"
    saver = checkpoint.Checkpointer(workdir, keep=1)
    saver.save(5, tiny, checkpoint.Position(5 * BATCH, {"seed": 0}, {}, {}))
    saver.close()
    began = time.perf_counter()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tiny)
    checkpoint.restore(workdir, 5, structs)
    position = checkpoint.read_position(workdir, 5)
    stream = ours(folder, threads + 1, start=position.examples)
    found = next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    wrong = sum(int((found[name] != expected[name]).sum()) for name in expected)
    report.add("values of the next batch that differ after restore", wrong, "", figures.CPU, "<= 0")
    size = sum(p.stat().st_size for p in (workdir / "checkpoints/5/position").rglob("*"))
    report.add("state of the input in a checkpoint", size / 1e3, "kB", figures.CPU, "<= 10")
    report.add("restore and first batch", seconds, "s", figures.CPU)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns: under a minute")
    parser.add_argument("--pictures", type=pathlib.Path, default=SAMPLE, metavar="PATH")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    report = figures.Report()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        jpegs = pictures(args.pictures, 256 if args.quick else 1_024)
        write_set(folder, jpegs)
        speed(report, folder, jpegs, args.threads, args.quick)
        resume(report, folder, args.threads)
        bucket(report, folder / "bucket", jpegs, args.quick)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
