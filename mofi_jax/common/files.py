"""Paths that flags name, JSON that others wrote, and files that appear complete or not at all.

Some paths may lie in a bucket (``gs://BUCKET/FOLDER``), which has neither folders nor renames nor
appends: an object appears once it is uploaded, and replaces the one of its name.
"""

import atexit
import contextlib
import glob
import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from mofi_jax.common.errors import BadInput


def is_remote(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same path from the root; one in a bucket is already."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def output_folder(
    text: epath.PathLike, flag: str, *, bucket: bool = False, literal: bool = False
) -> epath.Path:
    """The folder that a flag names, which need not exist; nothing stays written.

    Args:
      flag: as in "--workdir", for the error message.
      bucket: whether it may lie in one.
      literal: whether no library that writes there takes names for patterns.

    Raises BadInput: a remote path, a file, a pattern to libraries, or where none can write.
    """
    path = input_folder(text, flag) if bucket else _local(text, flag)
    # Orbax and etils list folders by patterns with the folder's own name unescaped.
    whole = os.fspath(absolute(path))
    if not literal and glob.has_magic(whole):
        raise BadInput(
            f"{flag}={text} has one of the characters * ? [ in its path ({whole}), which libraries "
            "that write there take for a pattern: name a folder without them."
        )
    if not is_remote(path) and path.exists() and not path.is_dir():
        raise BadInput(f"{flag}={text} is a file: name a folder.")
    _check_writable(path, text, flag)
    return path


def replaced_folder(text: epath.PathLike, flag: str) -> epath.Path:
    """As `output_folder`, of a folder that is written beside its place and then moved into it.

    A link to a folder stays, and what it leads to is replaced.  BadInput also for a folder that
    cannot be moved away.
    """
    path = epath.Path(os.path.realpath(output_folder(text, flag)))
    holds_current = os.path.commonpath([path, os.getcwd()]) == os.fspath(path)
    if os.path.ismount(path) or holds_current:
        raise BadInput(
            f"{flag}={text} is mounted or the current folder, and would be replaced as a whole: "
            "name a new folder in it."
        )
    _check_writable(path.parent, text, flag)
    return path


def output_file(text: epath.PathLike, flag: str) -> epath.Path:
    """The file that a flag names, which need not exist; BadInput where it cannot be written."""
    path = _local(text, flag)
    if path.is_dir():
        raise BadInput(f"{flag}={text} is a folder: name a file.")
    _check_writable(path.parent, text, flag)
    return path


def local_input(text: epath.PathLike, what: str) -> epath.Path:
    """The path of something to read; BadInput for a remote one."""
    if is_remote(text):
        raise BadInput(
            f"{os.fspath(text)} is a remote path: copy {what} to a local disk, or mount the bucket "
            "(gcsfuse)."
        )
    return epath.Path(text)


def input_folder(text: epath.PathLike, flag: str) -> epath.Path:
    """The folder that a flag names, to be read; BadInput for a bucket that cannot be asked."""
    if is_remote(text):
        if not os.fspath(text).startswith("gs://"):
            raise BadInput(f"{flag}={text} is a remote path: name a local one, or gs://BUCKET/....")
        if importlib.util.find_spec("gcsfs") is None:
            raise BadInput(f"{flag}={text} needs a client of buckets: pip install gcsfs.")
        # Other hosts and TensorStore write what a cached listing would lack.
        fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
        with _bucket_errors(text, flag, "read"):
            epath.Path(text).exists()
    return epath.Path(text)


@contextlib.contextmanager
def _bucket_errors(text: epath.PathLike, flag: str, verb: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of gcsfs, google-auth or aiohttp
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"{flag}={text} cannot be {verb} ({reason}): check the bucket's name, and what these "
            "credentials may do with its objects."
        ) from error


def _local(text: epath.PathLike, flag: str) -> epath.Path:
    if is_remote(text):
        raise BadInput(
            f"{flag}={text} is a remote path: mount the bucket (gcsfuse), or name a local one."
        )
    return epath.Path(text)


def _check_writable(folder: epath.Path, text: epath.PathLike, flag: str) -> None:
    """Tries a file without a name in the folder, or where the folder would be made.

    Asking for permissions is not enough: root has them on a file system that is read-only.
    """
    if is_remote(folder):
        with _bucket_errors(text, flag, "written"):
            probe = folder / f".{uuid.uuid4().hex}"
            probe.write_text("written to see whether it can be")
            probe.unlink()
        return
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise BadInput(
            f"{flag}={text} cannot be written ({error.strerror.lower()}: {above}): name another "
            "place."
        ) from error


def list_files(folder: epath.PathLike) -> list[str]:
    """Names of all files below a folder, sorted, as ``sub/file``."""
    root = os.fspath(absolute(folder))
    found = fsspec.filesystem("gs" if is_remote(root) else "file").find(root)
    return sorted(path.removeprefix(root.removeprefix("gs://") + "/") for path in found)


def read_json(path: epath.PathLike, remedy: str) -> Any:
    """The JSON value in a file.

    Raises BadInput: no such file, or not JSON in UTF-8; ends in ``remedy``, as in "copy it again".
    """
    try:
        return json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path} cannot be read ({reason}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}): {remedy}.") from error


def read_json_object(path: epath.PathLike, remedy: str) -> dict[str, Any]:
    """As `read_json`, of an object; anything else is BadInput too."""
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise BadInput(f"{path} does not hold a JSON object: {remedy}.")
    return values


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file; it appears complete or not at all.

    What is no Unicode, such as half a surrogate pair or the bytes of an old file name, is escaped.
    """
    path, data = epath.Path(path), text.encode(errors="backslashreplace")
    if is_remote(path):
        path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """As `write_text`, of a JSON value."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def stage(folder: epath.PathLike) -> epath.Path:
    """Where libraries without buckets write: a temporary folder, or a local folder itself."""
    if not is_remote(folder):
        return epath.Path(folder)
    temporary = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return epath.Path(temporary)


def upload(staged: epath.Path, folder: epath.Path) -> None:
    """Copies what libraries have written to `stage` into its folder."""
    for name in list_files(staged) if staged != folder else ():
        (staged / name).copy(folder / name, overwrite=True)
