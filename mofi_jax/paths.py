"""What a command may write to, asked before the work: a flag's text becomes a path or one sentence.

Knows nothing of what is written there.
"""

import glob
import os
import tempfile

from etils import epath

from mofi_jax.errors import BadInput


def output_folder(text: epath.PathLike, flag: str) -> epath.Path:
    """The folder that a flag names, which need not exist; nothing is written.

    Args:
      text: the flag's value; ``~`` is the home folder.
      flag: as in "--workdir", for the error message.

    Raises:
      BadInput: a remote path, a file, a name that libraries would take for a pattern, or a place
        that cannot be written.
    """
    path = _local(text, flag)
    # Orbax and etils list folders by patterns with the folder's own name unescaped.
    whole = os.path.abspath(path)
    if glob.has_magic(whole):
        raise BadInput(
            f"{flag}={text} has one of the characters * ? [ in its path ({whole}), which libraries "
            "that write there take for a pattern: name a folder without them."
        )
    if path.exists() and not path.is_dir():
        raise BadInput(f"{flag}={text} is a file: name a folder.")
    _check_writable(path, text, flag)
    return path


def output_file(text: epath.PathLike, flag: str) -> epath.Path:
    """The file that a flag names, which need not exist; nothing is written.

    Raises:
      BadInput: a remote path, a folder, or a place that cannot be written.
    """
    path = _local(text, flag)
    if path.is_dir():
        raise BadInput(f"{flag}={text} is a folder: name a file.")
    _check_writable(path.parent, text, flag)
    return path


def _local(text: epath.PathLike, flag: str) -> epath.Path:
    if "://" in os.fspath(text):
        raise BadInput(
            f"{flag}={text} is a remote path: mount the bucket (gcsfuse), or name a local one."
        )
    return epath.Path(os.path.expanduser(text))


def _check_writable(folder: epath.Path, text: epath.PathLike, flag: str) -> None:
    """Tries a file without a name in the folder, or where the folder would be made.

    Asking for permissions is not enough: root has them on a file system that is read-only.
    """
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
