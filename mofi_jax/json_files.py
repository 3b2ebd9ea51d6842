"""JSON files that others wrote, or damaged: an object, or one sentence that names the file."""

import json
from typing import Any

from etils import epath

from mofi_jax.errors import BadInput


def read(path: epath.PathLike, remedy: str) -> Any:
    """The JSON value in a file.

    Args:
      path: the file.
      remedy: what to do where it cannot be read, as in "copy it again".

    Raises:
      BadInput: no such file, or not JSON in UTF-8.
    """
    try:
        return json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path} cannot be read ({reason}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}): {remedy}.") from error


def read_object(path: epath.PathLike, remedy: str) -> dict[str, Any]:
    """As `read`, of an object; anything else is BadInput too."""
    values = read(path, remedy)
    if not isinstance(values, dict):
        raise BadInput(f"{path} does not hold a JSON object: {remedy}.")
    return values
