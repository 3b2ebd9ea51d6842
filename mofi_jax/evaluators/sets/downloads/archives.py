"""What a person has downloaded, as one list of files: folders, zips and tars, tars in tars too."""

import bisect
import contextlib
import gzip
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import folders

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(OSError, RuntimeError),  # of bz2; a zip with a password, or compressed by another method
)
_Entry = tuple[str, Callable[[], bytes]]


class Download:
    """The files below a folder or in an archive; one in an archive lies in a folder of its name.

    Nothing is unpacked to disk.  Archives that are compressed as a whole are read from their start
    every time: unpack large ones.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.names = sorted({name for name, _ in self._entries()})
        # Backwards, so that all names with one ending lie together.
        self._backwards = sorted(name[::-1] for name in self.names)

    def ending(self, end: str) -> list[str]:
        """The files that are called `end` or lie under that path in some folder."""
        wanted = f"/{end}"[::-1]
        first = bisect.bisect_left(self._backwards, wanted[:-1])
        found = []
        for name in self._backwards[first:]:
            if not name.startswith(wanted[:-1]):
                break
            if name == wanted[:-1] or name.startswith(wanted):
                found.append(name[::-1])
        return found

    def find(self, end: str) -> str:
        """The one file that ends in the path `end`; BadInput where there is none, or two."""
        found = self.ending(end)
        if len(found) == 1:
            return found[0]
        if not found:
            raise BadInput(f"{self.path} has no {end}: download it too, or all of it again.")
        raise BadInput(
            f"{self.path} has {end} {len(found)} times ({found[0]}, {found[1]}): leave only one."
        )

    def bytes(self, end: str) -> bytes:
        """The content of `find`."""
        [(_, data)] = self.read([self.find(end)])
        return data

    def text(self, end: str) -> str:
        """The same of a text in UTF-8."""
        try:
            return self.bytes(end).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(f"{end} in {self.path} is no text in UTF-8: fetch it again.") from error

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Some of `names` with their contents, in the order in which they are stored."""
        wanted = set(names)
        for name, content in self._entries():
            if not wanted:
                return
            if name in wanted:
                wanted.remove(name)
                with self._damage_told():
                    data = content()
                yield name, data

    def _entries(self) -> Iterator[_Entry]:
        with self._damage_told():
            if self.path.is_dir():
                yield from _of_folder(self.path)
            else:
                with self.path.open("rb") as file:
                    yield from _of_archive(self.path.name, file)

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise BadInput(
                f"{self.path} or an archive in it cannot be read ({error}): unpack it and name the "
                "folder, or fetch it again."
            ) from error


def _of_folder(root: epath.Path) -> Iterator[_Entry]:
    for folder, inside, files in os.walk(root, followlinks=True):
        inside.sort()
        for file in sorted(files):
            path = epath.Path(folder) / file
            name = path.relative_to(root).as_posix()
            if not path.is_file():
                raise BadInput(f"{path} is a link to nothing: put the file in its place.")
            if not _is_archive(name):
                yield name, path.read_bytes
                continue
            with path.open("rb") as opened:
                yield from _inside(name, opened)


def _of_archive(name: str, file: Any) -> Iterator[_Entry]:
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield from _member(info.filename, lambda info=info: archive.open(info))
        return
    with tarfile.open(fileobj=file, mode="r:*", tarinfo=folders.Member) as archive:
        for member in archive:
            if member.isfile():
                yield from _member(
                    posixpath.normpath(member.name),
                    lambda member=member: archive.extractfile(member),
                )


def _member(name: str, opened: Callable[[], Any]) -> Iterator[_Entry]:
    if _is_archive(name):
        with opened() as file:
            yield from _inside(name, file)
        return

    def content() -> bytes:
        with opened() as file:
            return file.read()

    yield name, content


def _inside(name: str, file: Any) -> Iterator[_Entry]:
    for inner, content in _of_archive(name, file):
        yield f"{name}/{inner}", content


def _is_archive(name: str) -> bool:
    return name.lower().endswith((*_TARS, ".zip"))
