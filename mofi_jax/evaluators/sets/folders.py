"""Pictures in a folder or an uncompressed tar: by the class number in their names, or by folder.

Links are followed, and one that leads nowhere is told: left out, the set would be another.
"""

import dataclasses
import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import tree
from mofi_jax.evaluators.sets import listing, tables

# A class number is one that fits int64, in ASCII digits.
_NUMBER = re.compile("[0-9]{1,18}")
_NUMBERED = re.compile(r"([0-9]{1,18})_.+")


@dataclasses.dataclass(frozen=True)
class _Content:
    """What lies in a folder or tar: paths from it, with slashes."""

    pictures: dict[str, tuple[int, int] | None]  # offset and length in the tar; None in a folder
    empty: list[str]  # folders without a file, but for hidden ones such as .DS_Store


def read(path: epath.Path) -> listing.Listing:
    """Lists the pictures of a folder or tar.

    In one folder, each is named ``{class}_{name}.jpg``; GPR1200 leaves the order within a class to
    the directory listing, here it is by (int, name), so that numbers and neighbours repeat.  In
    several folders, each is a class, whatever its pictures are called; classes are numbered in the
    order of their names, and pictures come by (class, name).  Folders around all of them count for
    nothing, and files that are no pictures are passed over.  A folder's ``metadata.csv`` or
    ``metadata.jsonl`` tells its pictures and maybe their labels, without which each is a class of
    its own, for what is measured by captions.

    Raises:
      BadInput: nothing to read or no pictures, a picture that fits neither layout, two of one name,
        an empty class, a link to nothing.
    """
    if path.is_dir() and (table := tables.find(path)):
        return _by_table(path, table)
    if path.is_dir():
        _check_classes(path)
    content = _walk(path) if path.is_dir() else _members(path)
    if not content.pictures:
        raise BadInput(
            f"{path} holds no pictures: give a folder or .tar of them, each named "
            "{class number}_{name}.jpg, or in a folder for each class."
        )
    folders = {posixpath.dirname(name) for name in content.pictures}
    if len(folders) == 1:
        return _by_number(path, content)
    return _by_folder(path, content, posixpath.commonpath(folders))


def of_split(path: epath.Path, wanted: Sequence[str]) -> epath.Path:
    """Of a folder of splits (``train/CLASS``) the first of the `wanted`; of any other itself.

    It is one if all its folders are called as splits are, or two, and it has no pictures right in
    it; folders around such a one count for nothing.  Splits without folders in them, as ImageNet's
    test pictures, whose classes nobody knows, do not count.
    """
    inner = {}
    for entry in tree.entries(os.fspath(path)):
        if tree.is_folder(entry) and not tree.is_hidden(entry.name):
            inner[entry.name] = entry.path
        elif _is_picture(entry.name):
            return path
    named = [name for name in inner if tree.is_split(name)]
    if len(inner) == 1 and not named:
        [below] = inner
        found = of_split(path / below, wanted)
        return path if found == path / below else found
    if not named or len(named) < min(2, len(inner)):
        return path
    with_classes = [
        name
        for name in named
        if any(tree.is_folder(entry) for entry in tree.entries(inner[name]))
        or tables.find(path / name)
    ]
    chosen = tree.of_split(with_classes, wanted)
    if len(chosen) != 1:
        return path
    if len(inner) > 1:
        logging.info("of %s this is taken: %s (of %s)", path, chosen[0], ", ".join(inner))
    return path / chosen[0]


def _by_number(path: epath.Path, content: _Content) -> listing.Listing:
    found = {posixpath.basename(name): name for name in content.pictures}
    wrong = sorted(name for name in found if not _NUMBERED.fullmatch(name))
    if wrong:
        raise BadInput(
            f"{wrong[0]} in {path} is not named {{class number}}_{{name}}.jpg, the number of at "
            f"most 18 digits: rename it or take it out ({len(wrong)} such files), or put the "
            "pictures into a folder for each class."
        )
    names = sorted(found, key=lambda name: (int(name.partition("_")[0]), name))
    classes = np.array([int(name.partition("_")[0]) for name in names], np.int64)
    return listing.Listing(names, classes, {}, _reader(path, content, [found[n] for n in names]))


def _by_folder(path: epath.Path, content: _Content, above: str) -> listing.Listing:
    found = {posixpath.relpath(name, above or "."): name for name in content.pictures}
    loose = sorted(name for name in found if "/" not in name)
    if loose:
        raise BadInput(
            f"{path} holds pictures both in class folders and beside them ({loose[0]}, {len(loose)}"
            " such files): move these into the folder of their class, or out of the set."
        )
    inside = [name for name in content.empty if not above or name.startswith(f"{above}/")]
    if inside:
        raise BadInput(
            f"Class {inside[0]} of {path} holds no pictures ({len(inside)} such folders): fill it, "
            "or take it out, since scores are comparable only on the complete set."
        )
    names = sorted(found, key=lambda name: (posixpath.dirname(name), name))
    folders, classes = np.unique([posixpath.dirname(name) for name in names], return_inverse=True)
    labels = {number: str(folder) for number, folder in enumerate(folders)}
    reader = _reader(path, content, [found[name] for name in names])
    return listing.Listing(names, classes.astype(np.int64), labels, reader)


def _check_classes(path: epath.Path) -> None:
    """Raises BadInput for a folder of what img2dataset wrote, whose folders are no classes."""
    if any(entry.name.endswith("_stats.json") for entry in tree.entries(os.fspath(path))):
        raise BadInput(
            f"{path} holds pairs that img2dataset wrote, of which nothing says what shows the same:"
            " give a set with classes."
        )


def _by_table(path: epath.Path, table: epath.Path) -> listing.Listing:
    rows = tables.read(table)
    names = [posixpath.normpath(row[tables.FILE]) for row in rows]
    for name in names:
        # A table from elsewhere shall not name files it was not given.
        if name.startswith(("/", "../")) or not (path / name).is_file():
            raise BadInput(
                f"{table} names {name}, which is not in {path}: put it there, or take out its row."
            )
    if not rows:
        raise BadInput(f"{table} has no rows: name a folder of pictures with some.")
    labels = [tables.value(row, listing.LABELS) for row in rows]
    content = _Content(dict.fromkeys(names), [])
    reader = _reader(path, content, names)
    if all(label is None for label in labels):
        return listing.Listing(names, np.arange(len(names), dtype=np.int64), {}, reader)
    if None in labels:
        raise BadInput(
            f"Row {labels.index(None) + 1} of {table} has no label: give it one, or take it out."
        )
    texts, classes = np.unique([str(label) for label in labels], return_inverse=True)
    named = {i: str(text) for i, text in enumerate(texts)}
    if all(_NUMBER.fullmatch(text) for text in texts):
        classes, named = np.array([int(label) for label in labels]), {}
    return listing.Listing(names, classes.astype(np.int64), named, reader)


def _reader(path: epath.Path, content: _Content, names: list[str]) -> listing.Reader:
    spans = [content.pictures[name] for name in names]

    def read_picture(i: int) -> bytes:
        span = spans[i]
        if span is None:
            return (path / names[i]).read_bytes()
        with path.open("rb") as file:
            file.seek(span[0])
            return file.read(span[1])

    return read_picture


def _is_picture(name: str) -> bool:
    # macOS leaves resource forks named ._picture.jpg in the archives it makes.
    return name.lower().endswith(tree.PICTURES) and not posixpath.basename(name).startswith(".")


def _walk(path: epath.Path) -> _Content:
    pictures, empty = {}, []

    def visit(folder: str, inside: str, above: frozenset[str]) -> Iterator[str]:
        found = False
        for entry in tree.entries(folder):
            name = posixpath.join(inside, entry.name)
            if entry.is_dir() and not tree.is_hidden(entry.name):
                real = os.path.realpath(entry.path)
                if real in above:
                    raise BadInput(
                        f"{name} in {path} is a link to a folder that it lies in: remove the link."
                    )
                found = True
                yield from visit(entry.path, name, above | {real})
            elif _is_picture(name) and not entry.is_dir():
                if not entry.is_file():
                    raise _nowhere(path, name)
                yield name
                found = True
            elif not tree.is_hidden(entry.name):
                found = True
        if not found:
            empty.append(inside)

    for name in visit(os.fspath(path), "", frozenset([os.path.realpath(path)])):
        pictures[name] = None
    return _Content(pictures, empty)


class Member(tarfile.TarInfo):
    """For `tarfile.open`, which takes a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Member":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


def _members(path: epath.Path) -> _Content:
    spans, links, folders, filled = {}, {}, [], set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if not posixpath.basename(name).startswith("."):
                    filled.update(itertools.accumulate(name.split("/")[:-1], posixpath.join))
                if member.isdir():
                    folders.append(name)
                elif member.issym():
                    links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
                elif member.islnk():
                    links[name] = member.linkname
                elif name in spans and _is_picture(name):
                    raise BadInput(f"{path} holds {name} twice: each picture needs its own name.")
                elif member.issparse():  # its bytes do not lie in one piece
                    raise tarfile.TarError(f"{name} is stored as a sparse file")
                elif member.isreg():
                    spans[name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"{path} cannot be read as an uncompressed .tar ({error}): unpack it and give the "
            "folder, or fetch it again."
        ) from None
    pictures = {name: span for name, span in spans.items() if _is_picture(name)}
    for name in filter(_is_picture, links):
        target = name
        for _ in range(40):  # links to links; as many as a kernel follows
            target = posixpath.normpath(links.get(target, target))
        if target not in spans:
            raise _nowhere(path, name)
        pictures[name] = spans[target]
    return _Content(pictures, [name for name in folders if name not in filled])


def _nowhere(path: epath.Path, name: str) -> BadInput:
    return BadInput(
        f"{name} in {path} is a link to nothing: put the picture in its place (a tar takes them "
        "along with --dereference)."
    )
