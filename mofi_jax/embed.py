"""Embeds pictures: all of a folder, a tar, parquet or shards.

    mofi embed --model M --images D --out E
    mofi embed --model M --images D --out E --entities 3 --texts LINES.txt

D is a folder of any depth, with pictures, uncompressed tars (img2dataset's among them), Hugging
Face parquet or our I2E shards in it, or one such file.  E receives

    embeddings.npy        float32 [n, d], L2-normalised: np.load(..., mmap_mode="r")
    pictures.parquet      a row for each: key, container and place in it, width, height, sha256,
                          and with --entities the nearest of the model's class table
    undecodable.parquet   pictures that cannot be decoded, and why
    texts.npy             with --texts: float32 [lines, d]
    result.json           {"model", "images", "pictures", "undecodable", "reasons", "passed_over",
                          "dimension", "seconds", "embedded", "versions", ...}

Killed at any moment, the same command embeds the rest and ends in the same bytes.  All devices are
used; on several hosts, start it on all of them with the flags of `mofi_jax.train`, with D and E on
a file system that all of them see: each takes its share.  `mofi_jax.search` finds pictures in E.
"""

from mofi_jax.common import console

if __name__ == "__main__":
    console.begin("embedding: loading jax")

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from mofi_jax import inference
from mofi_jax.common import cli, errors, files, versions
from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import containers
from mofi_jax.distributed import hosts
from mofi_jax.inference import embeddings, piecework
from mofi_jax.interop import from_hub
from mofi_jax.training import run_lock

_START_TIMEOUT = 300  # seconds to wait for the other hosts
_PROBE = "probe.npy"
_TEXTS = "texts.npy"


def main(
    model: str,
    images: str,
    out: str,
    step: str = "",
    entities: str = "0",
    texts: str = "",
    batch_size: str = "64",
    distributed: bool = False,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> None:
    """Embeds the pictures of `images` by `model` into the folder `out`.

    Args:
      model: a training run, or a Hugging Face CLIP folder.
      images: the pictures: a folder of any depth, or one file that holds them.
      out: the folder of the embeddings; the same command with it goes on.
      step: of a training run, a saved step or best (config.checkpoint.keep_best); else the last.
      entities: how many of the nearest entities are named for each picture.
      texts: a text file whose lines are embedded too.
      batch_size: pictures on each device at a time.
      distributed: on a TPU slice or under SLURM, one process on each host.
      coordinator, processes, process: HOST:PORT of process 0, how many there are, and which one
        this is, counted from 0; left out where jax finds them by itself.
    """
    number, of_device = cli.whole("--entities", entities), cli.whole("--batch_size", batch_size, 1)
    folder = files.output_folder(out, "--out", literal=True)
    root = files.absolute(files.local_input(from_hub.data(images), "the pictures"))
    model = from_hub.model(model)
    files.input_folder(model, "--model")
    jax.config.update("jax_enable_preemption_service", False)
    hosts.start(distributed, coordinator, processes, process, _START_TIMEOUT)
    lines = _read_lines(texts)
    settings = {
        "model": str(files.absolute(model)),
        "step": step,
        "images": str(root),
        "entities": number,
    }
    start = time.monotonic()
    with run_lock.held(folder, "--out"), _storage(folder):
        batch = of_device * jax.local_device_count()
        done = hosts.agree(lambda: _prepare(folder, root, settings, batch))
        if done and not lines:
            logging.info("%s is finished already", out)
            return

        # --------------------------------------------------------------------------------- model
        pieces = None if done else embeddings.Pieces(folder)
        # Few pictures are no reason to compute a whole batch of zeros.
        batch = batch if done else min(batch, pieces.pictures)
        console.now("opening the model, and trying it")
        loaded = inference.load(model, step=step, batch_size=batch)
        if lines:
            hosts.agree(lambda: _embed_texts(loaded, lines, folder))
        if done:
            return
        if number:  # a model that cannot is told before hours have passed
            none = np.zeros((1, loaded.towers.config.embed_dim), np.float32)
            loaded.towers.nearest_entities(loaded.params, none, number)
        hosts.agree(lambda: _check_probe(loaded, folder, model))

        # -------------------------------------------------------------------------------- pieces
        console.close()
        missing = hosts.agree(pieces.missing)
        own = missing[jax.process_index() :: jax.process_count()]
        reader = containers.Reader(containers.folder_of(root))
        hosts.all_or_none(lambda: piecework.Work(loaded, reader, pieces, number).run(own))

        # -------------------------------------------------------------------------------- result
        facts = {
            "embedded": sum(map(pieces.size, missing)),  # by this run
            "seconds": round(time.monotonic() - start, 1),
            "versions": versions.of("jax", "numpy", "opencv-python-headless", "pillow"),
            "device": jax.devices()[0].device_kind,
        }
        hosts.agree(lambda: _finish(pieces, folder, settings | facts))


def _read_lines(texts: str) -> list[str]:
    if not texts:
        return []
    try:
        lines = files.local_input(texts, "the texts").read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"--texts={texts} cannot be read ({error}): name a text file in UTF-8."
        ) from error
    if not lines:
        raise BadInput(f"--texts={texts} is empty: write a text on each line, or leave it out.")
    return lines


def _prepare(folder: epath.Path, root: epath.Path, settings: dict[str, Any], batch: int) -> bool:
    """Lists the pictures, unless that was done; whether everything is."""
    finished = (folder / embeddings.RESULT).exists()
    if finished or embeddings.is_listed(folder):
        pieces = None if finished else embeddings.Pieces(folder)
        old = embeddings.read_result(folder) if finished else pieces.facts
        wrong = [name for name, value in settings.items() if old.get(name) != value]
        if wrong and (finished or len(pieces.missing()) < len(pieces)):
            raise BadInput(
                f"--out={folder} holds embeddings with {wrong[0]}={old.get(wrong[0])}, not "
                f"{settings[wrong[0]]}: give the same command as before, or name another folder."
            )
        if finished or wrong:
            # A run may have been killed right before it; or a mistaken command has embedded
            # nothing, and this is the corrected one.
            embeddings.finish(folder)
        if not wrong:
            return finished
        (folder / _TEXTS).unlink(missing_ok=True)
    if (folder / embeddings.VECTORS).exists():
        raise BadInput(
            f"--out={folder} holds an {embeddings.VECTORS} that this command has not finished: "
            "name another folder."
        )
    passed_over: collections.Counter[str] = collections.Counter()
    places = tqdm.tqdm(
        containers.find(root, passed_over),
        **{"desc": "list", "unit": "img", "leave": False, "delay": 2, "disable": None},
    )
    facts = settings | {"passed_over": passed_over}
    number = embeddings.write_listing(folder, places, batch, facts)
    packed = sum(count for suffix, count in passed_over.items() if suffix in containers.ARCHIVES)
    if packed:
        logging.warning("%d archives are passed over: unpack them to have their pictures", packed)
    if not number:
        embeddings.finish(folder)
        others = ", ".join(f"{count} {of or 'without suffix'}" for of, count in passed_over.items())
        raise BadInput(
            f"--images={root} holds no pictures{f' (but {others})' if others else ''}: give a "
            "folder, tar, parquet or shard of them, unpacked."
        )
    logging.info("%d pictures in %s", number, root)
    return False


def _embed_texts(loaded: inference.Model, lines: list[str], folder: epath.Path) -> None:
    with embeddings.appears(folder, _TEXTS) as path, open(path, "wb") as file:
        np.save(file, loaded.embed_texts(lines))


def _check_probe(loaded: inference.Model, folder: epath.Path, model: str) -> None:
    """Raises BadInput where a killed run had other weights under the same name."""
    size = loaded.towers.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    probe = loaded.towers.embed_images(loaded.params, pixels)
    path = folder / embeddings.PARTS / _PROBE
    if not path.exists():
        with embeddings.appears(path.parent, _PROBE) as new, open(new, "wb") as file:
            np.save(file, probe)
        return
    old = np.load(path)
    # Other devices round in other ways, by far less.
    if old.shape != probe.shape or not np.allclose(old, probe, atol=0.02):
        raise BadInput(
            f"--model={model} is not the model that {folder} was begun with (it has been trained "
            "further, or replaced): name another folder, or give --step."
        )


def _finish(pieces: embeddings.Pieces, folder: epath.Path, facts: dict[str, Any]) -> None:
    counts = pieces.assemble()
    result = facts | counts | {"passed_over": pieces.facts["passed_over"]}
    reasons = ", ".join(f"{count} {name}" for name, count in counts["reasons"].items())
    if not counts["pictures"]:
        embeddings.discard(folder)
        raise BadInput(
            f"None of the {counts['undecodable']} pictures of --images={facts['images']} can be "
            f"decoded ({reasons}): {folder / embeddings.UNDECODABLE} names them."
        )
    files.write_json(folder / embeddings.RESULT, result)
    embeddings.finish(folder)
    rate = facts["embedded"] / max(facts["seconds"], 1e-9)
    print(
        f"{counts['pictures']:,} pictures embedded, {counts['dimension']} numbers each, "
        f"{rate:,.1f} a second: {folder / embeddings.VECTORS}"
    )
    if reasons:
        print(f"{counts['undecodable']:,} left out ({reasons}): {folder / embeddings.UNDECODABLE}")


@contextlib.contextmanager
def _storage(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = errors.storage_problem(error, folder)
        if problem is None:
            raise
        raise BadInput(
            f"--out={folder} cannot be written ({problem}): make room or correct its permissions; "
            "the same command goes on."
        ) from error


if __name__ == "__main__":
    cli.run(main)
