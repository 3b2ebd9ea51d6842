"""What lies below a folder, and which split of a data set it is by its name."""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence

from absl import logging

from mofi_jax.common.errors import BadInput

# Whole words of a path, as the library `datasets` knows them.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# How names of pictures end, in small letters; `data.decoding` says what can be decoded.
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".avif", ".gif", ".bmp", ".tif", ".tiff"),
)
# In the order in which pictures to measure on are looked for, and to learn from.
TO_MEASURE, TO_LEARN = ("test", "validation", "train"), ("train",)
_SPLIT = re.compile(rf"(?<![^/._\- 0-9])({'|'.join(_WORDS)})(?![^/._\- 0-9])", re.IGNORECASE)


def is_hidden(name: str) -> bool:
    """Whether a name is not for people: `.git`, and macOS's `._NAME` and `__MACOSX`."""
    return name.startswith((".", "__MACOSX"))


def entries(folder: str) -> list[os.DirEntry]:
    """What lies in a folder, by name; BadInput for one that cannot be read."""
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BadInput(
            f"The folder {folder} cannot be read ({error.strerror}): correct its permissions."
        ) from error


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def within(path: str, above: frozenset[str]) -> frozenset[str] | None:
    """The real paths of a folder and those above it; None, and told, where one is both."""
    real = os.path.realpath(path)
    if real in above:
        logging.warning("%s links to a folder that it lies in: not followed", path)
        return None
    return above | {real}


def walk(root: str) -> Iterator[str]:
    """Files below a folder by their paths from it; links are followed, hidden names are not."""

    def visit(folder: str, inside: str, above: frozenset[str]) -> Iterator[str]:
        for entry in entries(folder):
            name = posixpath.join(inside, entry.name)
            if is_hidden(entry.name):
                continue
            if not is_folder(entry):
                yield name
            elif (beyond := within(entry.path, above)) is not None:
                yield from visit(entry.path, name, beyond)

    return visit(root, "", frozenset([os.path.realpath(root)]))


def split_of(path: str) -> str | None:
    """ "train", "validation" or "test", by the last word of a path that means one of them.

    `data/train-00000-of-00004.parquet`, `en/val/0000.parquet` and `cc3m-train-0001.tar` say it.
    """
    words = _SPLIT.findall(path)
    return _WORDS[words[-1].lower()] if words else None


def is_split(name: str) -> bool:
    """Whether a folder is called as splits are."""
    return name.lower() in _WORDS


def of_split(paths: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Those of the first of the `wanted` splits that there is; all where no name says one."""
    by_split: dict[str | None, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_of(path), []).append(path)
    if by_split.keys() <= {None}:
        return by_split.get(None, [])
    return next((by_split[split] for split in wanted if split in by_split), [])
