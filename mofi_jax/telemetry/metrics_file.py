"""Rows of numbers on disk, one JSON object a line; in a bucket, where no file grows, in parts.

A local run has one ``metrics.jsonl``.  In a bucket ``metrics-NUMBER.jsonl`` is uploaded anew with
the rows of the last minute until it is large, and then the next one is begun.
"""

import json
import re
import threading
from typing import Any

from etils import epath

from mofi_jax.common import files

METRICS_FILE = "metrics.jsonl"

# With the time of an upload, a killed run loses at most a minute of rows.
_UPLOAD_SECONDS = 50.0
_PART_BYTES = 2**18


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run by step, without those that are cut short or damaged."""
    rows = [row for path in _paths(workdir) for row in _rows(path)]
    return sorted(rows, key=lambda row: row["step"])


def _paths(workdir: epath.PathLike) -> list[epath.Path]:
    folder = epath.Path(workdir)
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if re.fullmatch(r"metrics(-\d+)?\.jsonl", path.name)]


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    rows = []
    for text in path.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class MetricsFile:
    """Appends rows.

    Rows of steps after `resume_step`, which the run writes again, are dropped; so are damaged ones.
    """

    def __init__(self, workdir: epath.PathLike, *, resume_step: int):
        self._folder = epath.Path(workdir)
        paths = _paths(workdir)
        # Backwards, so that a process killed here leaves the rows of a shorter run.
        for path in reversed(paths):
            kept = [row for row in _rows(path) if row["step"] <= resume_step]
            if kept:
                files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            else:
                path.unlink()
        self._file = None
        if not files.is_remote(workdir):
            # Open as long as the run.
            self._file = open(self._folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        numbers = [re.findall(r"\d+", path.name) for path in paths]
        self._part = 1 + max((int(number) for [number] in filter(None, numbers)), default=-1)
        self._lines: list[str] = []  # of the part
        self._uploaded = 0  # of them
        self._timer: threading.Timer | None = None
        self._uploading = threading.Lock()

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; in a bucket, within a minute and without waiting for it."""
        line = json.dumps(row) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if self._timer is None:
            self._timer = threading.Timer(_UPLOAD_SECONDS, self.upload)
            self._timer.daemon = True
            self._timer.start()

    def upload(self) -> None:
        """Returns once the rows appended so far are in the bucket; does nothing on a disk."""
        with self._uploading:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None  # before the rows are counted: a later one starts another
            count = len(self._lines)
            if count == self._uploaded:
                return
            text = "".join(self._lines[:count])
            files.write_text(self._folder / f"metrics-{self._part:06d}.jsonl", text)
            self._uploaded = count
            if len(text) > _PART_BYTES:
                del self._lines[:count]
                self._uploaded = 0
                self._part += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
