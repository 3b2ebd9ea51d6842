"""JSON files that others wrote, or damaged: an object, or one sentence that names the file."""

import json
from typing import Any

from etils import epath

from mofi_jax.errors import BadInput


def read_object(path: epath.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      path: the file.
      remedy: what to do where it is not there or not one, as in "copy it again".

    Raises:
      BadInput: no such file, not JSON in UTF-8, or no object.
    """
    try:
        values = json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}): {remedy}.") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} does not hold a JSON object: {remedy}.")
    return values
