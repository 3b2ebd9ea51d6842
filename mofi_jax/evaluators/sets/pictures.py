"""Picture sets in GPR1200 naming, and the tables that say what their class numbers stand for."""

import dataclasses
import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from concurrent import futures

import numpy as np
from etils import epath
from jaxtyping import Int

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

# A class number is one that fits int64, in ASCII digits.
_PICTURE = re.compile(r"([0-9]{1,18})_.+\.(jpe?g|png|webp)", re.IGNORECASE)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures named ``{class}_{name}.jpg`` in a folder or an uncompressed tar; use `read_set`."""

    path: epath.Path
    names: tuple[str, ...]  # of files, ordered by (class number, name)
    classes: Int[np.ndarray, " n"]  # int64, the number before the first underscore
    spans: tuple[tuple[int, int] | None, ...]  # offset and length in the tar; None in a folder

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The file of picture i; safe to call from several threads."""
        span = self.spans[i]
        if span is None:
            return (self.path / self.names[i]).read_bytes()
        with self.path.open("rb") as file:
            file.seek(span[0])
            return file.read(span[1])

    def sha256(self) -> str:
        """Hash of names and contents, the same for a folder and for a tar of the same pictures."""
        total = hashlib.sha256()
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda i: hashlib.sha256(self.read(i)).hexdigest(), range(len(self)))
            for name, digest in zip(self.names, digests, strict=True):
                total.update(f"{digest}  {name}\n".encode())
        return total.hexdigest()


def read_set(path: epath.PathLike) -> PictureSet:
    """Lists a picture set in GPR1200 naming: a folder, or a tar whose folders are ignored.

    GPR1200 leaves the order within a class to the directory listing; here it is by (int, name), so
    that numbers and neighbours repeat.  Files that are no pictures are skipped.

    Raises BadInput: missing or unreadable path, no pictures, or a picture named otherwise.
    """
    path = files.local_input(path, "the picture set")
    if not path.exists():
        raise BadInput(
            f"There is no picture set at {path}: give a folder or a .tar of {{class}}_{{name}}.jpg."
        )
    pictures = [
        (name, span)
        for name, span in _entries(path)
        # macOS leaves resource forks named ._picture.jpg in the tars it makes.
        if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
    ]
    if not pictures:
        raise BadInput(
            f"{path} holds no pictures of its own: give a folder or .tar with the files of all "
            "classes in it, each named {class number}_{name}.jpg."
        )
    wrong = sorted(name for name, _ in pictures if not _PICTURE.fullmatch(name))
    if wrong:
        raise BadInput(
            f"{wrong[0]} in {path} is not named {{class number}}_{{name}}.jpg: rename it or take "
            f"it out ({len(wrong)} such files)."
        )
    pictures.sort(key=lambda picture: (int(picture[0].partition("_")[0]), picture[0]))
    names, spans = zip(*pictures, strict=True)
    for name, following in itertools.pairwise(names):
        if name == following:
            raise BadInput(f"{path} holds {name} twice: each picture needs its own name.")
    classes = np.array([int(name.partition("_")[0]) for name in names], np.int64)
    return PictureSet(path, names, classes, spans)


def _entries(path: epath.Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The files in a folder or tar, with their places in the tar."""
    if path.is_dir():
        yield from ((file.name, None) for file in path.iterdir())
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name.rpartition("/")[2], (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"{path} cannot be read as an uncompressed .tar ({error}): unpack it and give the "
            "folder, or fetch it again."
        ) from None


@dataclasses.dataclass(frozen=True)
class Class:
    """What the number of a class stands for; `qid` is empty where no knowledge base is named."""

    qid: str
    label: str


def read_classes(path: epath.PathLike, pictures: PictureSet | None = None) -> dict[int, Class]:
    """Reads what each class number of a picture set stands for.

    Two formats: JSON lines with ``class`` (number), ``label`` (text) and ``id`` (qid, optional),
    other keys being ignored; or, in a file named ``.json``, one object {"number": "label"} as
    GPR1200 publishes it (GPR1200_categoryNumber_to_text.json).

    Raises:
      BadInput: missing file, a line that is not as described, or one that lacks a class of
        `pictures`.
    """
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
            classes[int(row["class"])] = Class(str(row.get("id", "")), str(row["label"]))
    except (
        ValueError,
        KeyError,
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
