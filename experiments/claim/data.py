"""The data sets of the experiment, made by `data_prep.build_i2e` out of pairs and their truth.

    raw        i2t: all pairs, no labels
    clip       i2e: labels that the model trained on `raw` with the first seed chose
    text       i2e: the likeliest meaning of each mention in the caption
    true       i2e: the pictures of `clip` with what they truly show
    shuffled   i2e: the pictures of `clip`, each with the labels of another

and, as NAME@SHARE, the same after so many of the captions have been made another thing's.
"""

import contextlib
import fcntl
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from data_prep.quality import truth as ground_truth
from mofi_jax.common import cli, files, processes
from mofi_jax.common.console import interrupts
from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import pictures as picture_sets

SEED = 0  # of noise and shuffling


class Pair(NamedTuple):
    """A picture with its caption, and what it truly shows."""

    key: str
    image: bytes
    text: str
    entity: str
    wrong: bool


def read_pairs(folder: str, truth: str, classes: str | None) -> list[Pair]:
    """The pairs of img2dataset's tars in `folder`, in the order of their keys, with their truth.

    Raises BadInput: no tars, or pairs that the truth does not know.
    """
    known = ground_truth.read(truth, classes)
    pairs = []
    for name in sorted(files.list_files(folder)):
        if not name.endswith((".tar", ".tar.gz")):
            continue
        path = epath.Path(folder) / name
        with tarfile.open(path) as tar:
            parts: dict[str, dict[str, bytes]] = {}
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                parts.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
        for key, part in parts.items():
            [image] = (part[name] for name in ("jpg", "png", "webp") if name in part)
            if key not in known:
                raise BadInput(f"The truth {truth} has no line for {key} of {path}: give the own.")
            of = known[key]
            pairs.append(Pair(key, image, part["txt"].decode(), of.entity, of.wrong_caption))
    if not pairs:
        raise BadInput(f"{folder} has no .tar or .tar.gz of pairs: give img2dataset's tars.")
    return sorted(pairs)


def with_noise(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """The same with `share` of the captions being another thing's.

    A caption that was wrong gets that of another picture of its thing where there is one, then the
    first pairs of a fixed random order get the caption of a random pair of another thing: what is
    wrong at a share is wrong at every higher one.
    """
    rng = np.random.default_rng(SEED)
    right: dict[str, list[str]] = {}
    for pair in pairs:
        if not pair.wrong:
            right.setdefault(pair.entity, []).append(pair.text)
    mended = [
        pair._replace(text=rng.choice(right[pair.entity]), wrong=False)
        if pair.wrong and pair.entity in right
        else pair
        for pair in pairs
    ]
    order, donors = rng.permutation(len(pairs)), rng.permutation(len(pairs))
    noisy = list(mended)
    for place, at in enumerate(order[: round(share * len(pairs))].tolist()):
        candidates = np.roll(donors, -place)
        donor = next(i for i in candidates if mended[i].entity != pairs[at].entity)
        noisy[at] = mended[at]._replace(text=mended[donor].text, wrong=True)
    return noisy


class DataSets:
    """Makes the data sets in `folder` when they are asked for; several processes may ask."""

    def __init__(self, folder: epath.Path, config: Any):
        self.folder, self.config = folder, config

    def get(self, name: str, scorer: Callable[[], epath.Path]) -> tuple[str, str]:
        """Folder and name of a data set.

        Args:
          name: LABELS or LABELS@SHARE.
          scorer: gives the folder of the model that chooses the labels.
        """
        labels, _, share = name.partition("@")
        group = self.folder / (f"noise-{share}" if share else "as_is")
        workdir = group / (labels if labels != "raw" else "clip")
        kind = "i2t" if labels == "raw" else "i2e"
        with locked(group / "lock"):
            if (workdir / kind / "1.0.0" / "dataset_info.json").exists():
                return str(workdir), kind
            source = group / "pairs.parquet"
            if not source.exists():
                self._write_pairs(source, float(share) if share else None)
        if labels == "raw":
            self._build(group, workdir, source, "dataset=i2t")
        elif labels in ("clip", "text"):
            flags = (f"--config.clip={scorer()}",) if labels == "clip" else ()
            self._build(group, workdir, source, f"labels={labels}", *flags)
        else:
            labelled, _ = self.get(name.replace(labels, "clip"), scorer)
            with locked(group / "lock"):
                source = relabel(epath.Path(labelled), source, workdir, labels == "shuffled")
            self._build(group, workdir, source, "labels=given", "--config.given.ids=entities")
        return str(workdir), kind

    def quality(self, dataset: tuple[str, str]) -> dict[str, float]:
        """Pictures of a data set, and of the labels the share that is right."""
        import tensorflow_datasets as tfds

        folder, kind = dataset
        records = tfds.data_source(kind, data_dir=folder, split="train")
        if kind == "i2t":
            return {"pictures": len(records)}
        truth = ground_truth.read(self.config.truth, self.config.classes)
        found = labels_of(epath.Path(folder))
        right = [entity in truth[key].right for key, own in found.items() for entity in own]
        return {"pictures": len(records), "precision": round(float(np.mean(right)), 4)}

    def _write_pairs(self, path: epath.Path, share: float | None) -> None:
        of = self.config
        pairs = read_pairs(of.pairs, of.truth, of.classes)
        if share is not None:
            pairs = with_noise(pairs, share)
        write_table(path, [(p.key, p.image, p.text, [p.entity]) for p in pairs])

    def _build(
        self, group: epath.Path, workdir: epath.Path, source: epath.Path, argument: str, *flags: str
    ) -> None:
        """Runs the command; like every run of it, one that was cut goes on."""
        of = self.config
        config = f"i2e:folder={source},kb={of.knowledge_base},{argument}"
        options = [f"--config.{key}={value}" for key, value in of.i2e.items()]
        mofi = (sys.executable, "-m", "mofi_jax", "labels")
        with locked(group / "lock"):
            status = processes.wait_for(
                [*mofi, "--config", config, "--workdir", os.fspath(workdir), *options, *flags]
            )
        if status == interrupts.EXIT_CODE:
            cli.stopped()
        if status:
            raise BadInput(f"mofi labels for {workdir} has failed: see its lines above.")


def write_table(path: epath.Path, rows: Sequence[tuple[str, bytes, str, list[str]]]) -> None:
    """Rows (key, image, text, entities) as parquet, in one move."""
    keys, images, texts, entities = zip(*rows, strict=True)
    columns = {"key": keys, "image": images, "text": texts, "entities": entities}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), unfinished)
    unfinished.rename(path)


def relabel(
    labelled: epath.Path, pairs: epath.Path, workdir: epath.Path, shuffled: bool
) -> epath.Path:
    """A table of the pairs that have labels in `labelled`/i2e: shuffled ones, or the true ones."""
    labels = labels_of(labelled)
    keys = sorted(labels)
    moved = np.random.default_rng(SEED).permutation(len(keys))
    other = {key: labels[keys[at]] for key, at in zip(keys, moved, strict=True)}
    rows = [row for row in pq.read_table(pairs).to_pylist() if row["key"] in labels]
    path = workdir / "pairs.parquet"
    write_table(
        path,
        [
            (r["key"], r["image"], r["text"], other[r["key"]] if shuffled else r["entities"])
            for r in rows
        ],
    )
    return path


def labels_of(labelled: epath.Path) -> dict[str, list[str]]:
    """The entities of each picture of `labelled`/i2e, by key."""
    import tensorflow_datasets as tfds

    vocabulary = pq.read_table(labelled / "i2e" / "1.0.0" / "entities.parquet")["qid"].to_pylist()
    records = tfds.data_source("i2e", data_dir=str(labelled), split="train")
    return {r["key"].decode(): [vocabulary[i] for i in r["entity_ids"]] for r in records}


def halves(images: str, folder: epath.Path) -> dict[str, str]:
    """Every other picture of each class to learn from, the others to be told: k-NN's two sets."""
    pictures, names = picture_sets.read_set(images), ("train", "images")
    with locked(folder.with_name("halves.lock")):
        of_class: dict[int, int] = {}
        for i, number in enumerate(pictures.classes.tolist()):
            of_class[number] = place = of_class.get(number, -1) + 1
            half = folder / names[place % 2]
            half.mkdir(parents=True, exist_ok=True)
            (half / f"{number}_{i}.jpg").write_bytes(pictures.read(i))
    return {half: str(folder / half) for half in names}


@contextlib.contextmanager
def locked(path: epath.Path) -> Iterator[None]:
    """Waits until no other process is inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
