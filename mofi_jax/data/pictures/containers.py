"""Finds the pictures below a path, whatever they lie in and are called, and reads one by its place.

Pictures lie in folders of any depth, in uncompressed tars (img2dataset's among them), in parquet
and Arrow files with a column of ``struct<bytes, path>`` as the Hugging Face hub and
`Dataset.save_to_disk` have it (or of bytes as img2dataset's), and in ArrayRecord shards
of `tf.train.Example`, ours and those of TFDS; all of them may lie in one folder.  What cannot be
used is told with a reason and costs nothing else: a tar that was cut short gives what lies before
the cut.  No name is a pattern.
"""

import collections
import os
import posixpath
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.data.pictures import arrow_files, examples, parquets, tar_headers, tree

# Packed as a whole: no picture in them has a place.
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
# Of files without a suffix their first bytes tell: JPEG, PNG, GIF, WebP, TIFF.
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL)
_MOST = 1 << 30  # bytes read of a picture; more is none
_LISTED_AHEAD = 16  # containers
_OPEN = 8  # containers that stay open: threads work on one or two at a time


class Place(NamedTuple):
    """Where a picture lies."""

    key: (
        str  # path of the file, or container and name in it, for people; "" where only `read` knows
    )
    container: str  # path from the collection's folder; of a loose picture its own
    offset: int | None = None  # its bytes in a tar
    length: int | None = None
    row: int | None = None  # its number in parquet or in an ArrayRecord shard
    reason: str | None = None  # why it cannot be read, if so


def folder_of(root: epath.PathLike) -> epath.Path:
    """The folder that paths of containers are counted from; of a single file that it lies in."""
    root = epath.Path(root)
    return root.parent if root.is_file() else root


def find(root: epath.PathLike, passed_over: collections.Counter[str]) -> Iterator[Place]:
    """Places of all pictures of a folder or file, in the order of names and within containers.

    Args:
      passed_over: counts here the files that are no pictures, by suffix.

    Raises BadInput: nothing there, or a folder that cannot be read.
    """
    root = epath.Path(root)
    if not root.exists():
        raise BadInput(f"There is nothing at {root}: give a folder, tar, parquet or shard.")
    folder = folder_of(root)
    names = [root.name] if root.is_file() else tree.walk(os.fspath(root))
    for name, found in _listed(folder, names):
        if found is None:
            lower = name.lower()
            suffix = next((s for s in ARCHIVES if lower.endswith(s)), posixpath.splitext(lower)[1])
            passed_over[_text(suffix)] += 1
        else:
            yield from found


def _listed(folder: epath.Path, names: Iterable[str]) -> Iterator[tuple[str, list[Place] | None]]:
    """Names with what lies in them; threads look into containers ahead, as file servers are far."""
    ahead: collections.deque[tuple[str, futures.Future | None]] = collections.deque()

    def first() -> tuple[str, list[Place] | None]:
        name, job = ahead.popleft()
        return name, job.result() if job else _places(folder, name)

    with futures.ThreadPoolExecutor(_LISTED_AHEAD) as pool:
        for name in names:
            ahead.append((name, pool.submit(_places, folder, name) if _reader_of(name) else None))
            while ahead and (ahead[0][1] is None or len(ahead) > _LISTED_AHEAD):
                yield first()
        while ahead:
            yield first()


def _places(folder: epath.Path, name: str) -> list[Place] | None:
    """Of one file; None for one that holds no pictures."""
    path, read = os.path.join(folder, name), _reader_of(name)
    suffix = posixpath.splitext(name)[1].lower()
    loose = suffix in tree.PICTURES or (not suffix and not read and _looks_like_a_picture(path))
    if not loose and read is None:
        return None
    if _text(name) != name:
        return [Place(_text(name), _text(name), reason="name_not_utf8")]
    if loose:
        return [Place(name, name)]
    try:
        return read(path, name)
    except (BadInput, OSError) as error:
        logging.warning("%s is left out: %s", path, error)
        return [Place(name, name, reason="container_damaged")]


def _reader_of(name: str) -> Callable[[str, str], list[Place] | None] | None:
    """What reads a container of this name; None for what is none."""
    if ".array_record" in posixpath.basename(name):
        return _in_shard
    suffix = posixpath.splitext(name)[1].lower()
    readers = {".tar": _in_tar, ".parquet": _in_parquet}
    if arrow_files.is_data(posixpath.basename(name)):
        return _in_parquet
    return readers.get(suffix)


def _in_tar(path: str, name: str) -> list[Place]:
    listing = tar_headers.list_members(path)
    if listing is None:
        raise BadInput(f"{path} is no uncompressed tar.")
    if listing.damaged or not listing.complete:
        logging.warning("%s is damaged or cut short: what can be found in it is used", path)
    found = []
    for member in listing.members:
        base = posixpath.basename(member.name)
        if base.lower().endswith(tree.PICTURES) and not base.startswith("."):
            key = f"{name}/{_text(member.name)}"
            found.append(Place(key, name, member.offset, member.length, reason=member.reason))
    return found


def _in_parquet(path: str, name: str) -> list[Place] | None:
    file = parquets.open_file(epath.Path(path))
    if not parquets.picture_columns(file.schema_arrow):
        return None  # a table beside pictures
    rows = parquets.Rows([epath.Path(path)])
    number = file.metadata.num_rows
    paths = rows.column(f"{rows.picture}.path") if rows.has_paths else [None] * number
    return [Place(f"{name}/{own or i}", name, row=i) for i, own in enumerate(paths)]


def _in_shard(path: str, name: str) -> list[Place]:
    reader = records.open_shard(path)
    if not reader.ok():
        raise BadInput(f"{path} is cut short or damaged.")
    return [Place("", name, row=row) for row in range(reader.num_records())]


class Unreadable(ValueError):
    """A picture that is not where it was found; the message is one short word for counters."""


class NoPicture(Unreadable):
    """A row that is there and holds none."""


class Reader:
    """Reads pictures of a collection; for any number of threads."""

    def __init__(self, folder: epath.PathLike):
        self._folder = os.fspath(folder)
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}  # containers, that opened last at the end

    def read(self, place: Place) -> tuple[str, bytes]:
        """Key and file of a picture.

        Raises:
          NoPicture: its row has no bytes.
          Unreadable: it is gone, or damaged.
          OSError: storage fails, which may go better the next time.
        """
        try:
            if place.row is not None:
                return self._row(place)
            if place.offset is None:
                path = os.path.join(self._folder, place.container)
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise Unreadable("not_a_file")
                with open(path, "rb") as file:
                    return place.key, file.read(_MOST)
            file = self._opened(place.container, lambda path: open(path, "rb"))  # noqa: SIM115
            return place.key, os.pread(file.fileno(), min(place.length, _MOST), place.offset)
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise Unreadable("missing") from error

    def _row(self, place: Place) -> tuple[str, bytes]:
        if not place.container.lower().endswith((".parquet", arrow_files.SUFFIX)):
            reader = self._opened(place.container, _open_shard)
            try:
                [record] = reader.read(place.row, place.row + 1)
                record = examples.fields(record)
            except Exception as error:  # of ArrayRecord or protobuf
                raise Unreadable("record_damaged") from error
            name, data = (examples.first(record, of) for of in (examples.NAMES, examples.PICTURES))
            name = name.decode(errors="replace") if isinstance(name, bytes) else name
            if not isinstance(data, bytes):
                raise NoPicture("missing")
            return f"{place.container}/{place.row if name is None else name}", data
        rows = self._opened(place.container, lambda path: parquets.Rows([epath.Path(path)]))
        try:
            data = rows.bytes_or_none(place.row)
        except BadInput as error:
            raise Unreadable("record_damaged") from error
        if data is None:
            raise NoPicture("missing")
        return place.key, data

    def _opened(self, name: str, open_container: Any) -> Any:
        with self._lock:
            container = self._open.pop(name, None)
            if container is None:
                container = open_container(os.path.join(self._folder, name))
            self._open[name] = container
            if len(self._open) > _OPEN:
                del self._open[next(iter(self._open))]  # closed when no thread reads from it
        return container


def _open_shard(path: str) -> Any:
    # Imported under the reader's lock: two threads that import TFDS at once can deadlock.
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

    return records.open_shard(path)


def _looks_like_a_picture(path: str) -> bool:
    try:
        if not os.path.isfile(path):  # a pipe would wait for someone to write
            return False
        with open(path, "rb") as file:
            return _MAGIC.match(file.read(16)) is not None
    except OSError:
        return False


def _text(name: str) -> str:
    """The name in UTF-8, which a name on a disk need not be."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
