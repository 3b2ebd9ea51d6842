"""``metadata.csv`` (``.jsonl``, ``.parquet``) of an ImageFolder: what is said of its pictures.

A row has ``file_name``, from the table's folder on, and maybe a label and texts, as the library
`datasets` has them.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import parquets

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE = "file_name"
TEXTS = ("captions", "caption", "text", "texts", "sentences")


def find(folder: epath.Path) -> epath.Path | None:
    """The table of a folder, if it has one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a table; BadInput for one that is none, or a row without ``file_name``."""
    rows: list[dict[str, Any]] = []
    try:
        if path.suffix == ".parquet":
            found = parquets.open_file(path).read().to_pylist()
        elif path.suffix == ".csv":
            text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
            found = csv.DictReader(text, strict=True)
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            found = (json.loads(line) for line in lines if line.strip())
        for row in found:
            if not isinstance(row[FILE], str) or not row[FILE]:
                raise ValueError(f"no {FILE}")
            rows.append(row)
    except (ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
        raise BadInput(
            f"Row {len(rows) + 1} of {path} cannot be read ({error!r}): write UTF-8 with a column "
            f"{FILE}, as the library `datasets` has it."
        ) from None
    return rows


def value(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What a row has under the first of the names; None where it has none."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)
