"""SHA-256 sums of all files in a folder, so that damage is noticed before anything is computed.

The sums lie in the folder itself, as ``sha256sum --check SHA256SUMS`` reads them.  Hidden files,
which file systems and people leave behind, do not count.
"""

import concurrent.futures
import hashlib
import pathlib

from etils import epath

from mofi_jax.common import files

FILE = "SHA256SUMS"

# Storage is faster when asked for several files at once, and hashing leaves Python's lock alone.
_THREADS = 8


def write(folder: epath.PathLike) -> None:
    """Sums the folder's files; the sums appear whole or not at all."""
    files.write_text(epath.Path(folder) / FILE, _text(_sums(folder)))


def damage(folder: epath.PathLike) -> str | None:
    """The first file that is not what was summed, in words; None if all are.

    Raises:
      FileNotFoundError: the folder has no sums.
    """
    text = pathlib.Path(folder, FILE).read_bytes().decode(errors="replace")
    try:
        found = _sums(folder)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if text == _text(found):
        return None
    summed = {
        name: digest for digest, _, name in (line.partition("  ") for line in text.split("\n"))
    }
    for name in sorted((summed.keys() | found.keys()) - {""}):
        if name not in found:
            return f"{name} is missing"
        if name not in summed:
            return f"{name} is not in {FILE}"
        if summed[name] != found[name]:
            return f"{name} is not what was saved"
    return f"{FILE} is not what was saved"


def _sums(folder: epath.PathLike) -> dict[str, str]:
    """Names below the folder, sorted, with the digests of what they hold now."""
    files = sorted(
        path
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".") and path != pathlib.Path(folder, FILE)
    )

    def digest(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # piece by piece

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(digest, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    return dict(zip(names, digests, strict=True))


def _text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())
