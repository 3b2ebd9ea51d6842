"""SHA-256 sums of all files in a folder, so that damage is noticed before anything is computed.

The sums lie in the folder itself, as ``sha256sum --check SHA256SUMS`` reads them.  Hidden files,
which file systems and people leave behind, do not count.
"""

import concurrent.futures
import hashlib

from etils import epath

from mofi_jax.common import files

FILE = "SHA256SUMS"

# Storage is faster when asked for several files at once, and hashing leaves Python's lock alone.
_THREADS = 8


def write(folder: epath.PathLike) -> None:
    """Sums the folder's files; the sums appear complete or not at all."""
    files.write_text(epath.Path(folder) / FILE, _text(_sums(folder)))


def damage(folder: epath.PathLike) -> str | None:
    """The first file that is not what was summed, in words; None if all are."""
    text = (epath.Path(folder) / FILE).read_bytes().decode(errors="replace")
    try:
        current = _sums(folder)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if text == _text(current):
        return None
    saved = {line.partition("  ")[2]: line.partition("  ")[0] for line in text.split("\n")}
    for name in sorted((saved.keys() | current.keys()) - {""}):
        if name not in current:
            return f"{name} is missing"
        if name not in saved:
            return f"{name} is not in {FILE}"
        if saved[name] != current[name]:
            return f"{name} is not what was saved"
    return f"{FILE} is not what was saved"


def _sums(folder: epath.PathLike) -> dict[str, str]:
    """Digests of the folder's files by name, sorted."""

    def digest(name: str) -> str:
        with (epath.Path(folder) / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # piece by piece

    names = [
        name
        for name in files.list_files(folder)
        if name != FILE and not name.rpartition("/")[2].startswith(".")
    ]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())
