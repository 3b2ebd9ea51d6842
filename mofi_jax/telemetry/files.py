"""Files written whole or not at all."""

import json
import os
import tempfile
from typing import Any

from etils import epath


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file whole or not at all."""
    path = epath.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
