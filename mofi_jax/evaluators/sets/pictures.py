"""Picture sets in every layout that is read, and tables that say what class numbers stand for."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import metadata
from mofi_jax.data.pictures import tree
from mofi_jax.evaluators.sets import folders, listing, parquets, shards
from mofi_jax.interop import from_hub

_THREADS = 8
_SAVED = "state.json"  # beside what `datasets` saved, which has an info file as well


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures with a class each; use `read_set`."""

    path: epath.Path  # as the set was named
    names: tuple[str, ...]  # unique
    classes: Int[np.ndarray, " n"]  # int64
    read: listing.Reader  # the file of picture i; safe to call from several threads
    labels: dict[int, str] = dataclasses.field(default_factory=dict)  # where the layout has them
    sources: tuple[epath.Path, ...] = ()  # where it was put together, the sets that it is of
    # What of the path it was named by: "part", the split; "revision", the commit on the hub.
    origin: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    known: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other sets, of which several may be called by one path."""
        return str(self.path), self.sources, self.names

    def sha256(self) -> str:
        """Hash of names and contents, the same for a folder and for a tar of the same pictures."""
        if "sha256" not in self.known:
            with futures.ThreadPoolExecutor(_THREADS) as pool:
                read = pool.map(lambda i: hashlib.sha256(self.read(i)).digest(), range(len(self)))
                self.keep_digests(read)
        return self.known["sha256"]

    def keep_digests(self, digests: Iterable[bytes]) -> None:
        """Takes the SHA-256 of each file from who has read them: `sha256` then reads none."""
        total = hashlib.sha256()
        for name, digest in zip(self.names, digests, strict=True):
            # A name on disk need not be UTF-8: these are its bytes.
            total.update(f"{digest.hex()}  {name}\n".encode(errors="surrogateescape"))
        self.known["sha256"] = total.hexdigest()


def read_set(path: epath.PathLike, wanted: Sequence[str] = tree.TO_MEASURE) -> PictureSet:
    """Lists a picture set, whose layout is told by what is there:

    * a folder or uncompressed tar of pictures named ``{class}_{name}.jpg``, or with a folder for
      each class (`folders.read`), in the order of classes and names;
    * Hugging Face parquet, or Arrow as of `Dataset.save_to_disk`: a file, a folder, or FOLDER/SPLIT
      (`parquets.files_of`);
    * our own shards, entities as classes: the folder of their version, or FOLDER/SPLIT;
    * ``tfds:NAME:SPLIT[@DATA_DIR]``: what TFDS has prepared as ArrayRecord (`shards.find`); these
      three in the order in which they are stored.

    Of a set that has splits, by the names of its files or folders, one is taken and told: the first
    of the `wanted`.  No path is a pattern, and nothing but ``hf:OWNER/NAME`` is downloaded
    (`interop.from_hub`).

    Raises BadInput: missing or unreadable set, one without pictures or in none of these layouts.
    """
    name = os.fspath(path)
    named = path = files.local_input(from_hub.data(path), "the picture set")
    if str(path).startswith(shards.PREFIX):
        found = shards.read(*shards.find(str(path)))
    elif (path / metadata.INFO_FILE).is_file() and not (path / _SAVED).is_file():
        found = shards.read(path, "train")
    elif (path.parent / metadata.INFO_FILE).is_file() and not path.exists():
        found = shards.read(path.parent, path.name)
    elif (data := parquets.files_of(path, wanted))[1]:
        path, found = data[0], parquets.read(data[1])
    elif path.is_dir():
        path = folders.of_split(path, wanted)
        found = folders.read(path)
    elif path.exists():
        found = folders.read(path)
    else:
        raise BadInput(
            f"There is no picture set at {path}: give a folder or .tar of {{class}}_{{name}}.jpg "
            "or with a folder for each class, parquet, shards, or tfds:NAME:SPLIT."
        )
    [(picture, times)] = collections.Counter(found.names).most_common(1) or [("", 0)]
    if times != 1:
        raise BadInput(f"{path} holds {picture} {times} times: each picture needs its own name.")
    origin = {} if path == named else {"part": os.path.relpath(path, named)}
    if from_hub.is_address(name):
        origin["revision"] = from_hub.revisions()[name]
    return PictureSet(
        *(path, tuple(found.names), found.classes, found.read, found.labels), origin=origin
    )


@dataclasses.dataclass(frozen=True)
class Class:
    """What the number of a class stands for; `qid` is empty where no knowledge base is named."""

    qid: str
    label: str


def read_classes(path: epath.PathLike, pictures: PictureSet | None = None) -> dict[int, Class]:
    """Reads what each class number of a picture set stands for.

    Without a path (""), what its layout says.  Of files two formats: JSON lines with ``class``
    (number), ``label`` (text; else the first of ``lemmas``, WordNet's words for a thing) and ``id``
    (qid, optional), other keys being ignored; or, in a file
    named ``.json``, one object {"number": "label"} as GPR1200 publishes it
    (GPR1200_categoryNumber_to_text.json).

    Raises:
      BadInput: missing file, a line that is not as described, two lines of a class, or a file
        that lacks a class of `pictures`.
    """
    if not str(path):
        if pictures is None or not pictures.labels:
            of = f" of {pictures.path}" if pictures else ""
            raise BadInput(f"The classes{of} have no names of their own: set `classes`.")
        return {number: Class("", label) for number, label in pictures.labels.items()}
    path = files.local_input(path, "the class table")
    if not path.is_file():
        raise BadInput(f"There is no class table at {path}: correct `classes` or leave it out.")
    classes: dict[int, Class] = {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = ({"class": number, "label": label} for number, label in json.loads(text).items())
        else:
            rows = (json.loads(line) for line in text.split("\n") if line.strip())
        for row in rows:
            number = int(row["class"])
            label = row["label"] if "label" in row else row["lemmas"][0]
            if label is None or number in classes:
                raise ValueError("a class without a label" if label is None else "a second entry")
            classes[number] = Class(str(row.get("id", "")), str(label))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadInput(
            f"Entry {len(classes) + 1} of the class table {path} cannot be read ({error!r}): write "
            'lines such as {"class": 0, "label": "airplane", "id": "Q197"}.'
        ) from None
    missing = sorted(set(pictures.classes.tolist()) - set(classes)) if pictures else []
    if missing:
        raise BadInput(
            f"Class {missing[0]} of {pictures.path} is not in the class table {path} "
            f"({len(missing)} missing): add it or give the table that belongs to the pictures."
        )
    return classes
