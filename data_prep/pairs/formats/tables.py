"""Tables of captions beside a folder of pictures: CSV, TSV and JSON Lines, one row for each pair.

A CSV has a header; `.tsv` is CSV with tabs and without quotes, as captions on the web hold quotes
of their own; a `.csv` may be separated by commas, tabs or semicolons. A column names the picture's
file, relative to the folder of the table. Such a name may not lead out of that folder (`../`): a
table from elsewhere shall not pick files it was not given. An absolute path is taken as it is.

The pictures are no inputs in the sense of `data_prep.engine`: a table says the same after one of
its pictures is replaced, so that pairs made before keep what they say of the old one.
"""

import csv
import itertools
import json
import os
import re
import stat
import typing
from collections.abc import Iterable, Iterator, Sequence

from data_prep.pairs import pictures, samples
from data_prep.pairs.samples import Rejected, Sample
from mofi_jax.common import errors

SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    *("file_name", "filename", "filepath", "file_path", "image_path", "img_path", "image_file"),
    *("image", "img", "picture", "path", "file"),
)
# A longer line is no line of a table: a picture, say, that was given the wrong name.
_MAX_LINE = 1 << 20
_SNIFFED_LINES = 100  # of JSON, among which all columns occur
_NUMBER = re.compile(r"-?\d{1,15}(\.\d+)?([eE][-+]?\d{1,2})?")


class Row(typing.NamedTuple):
    """A row of a table: its cells by column, or why it cannot be read; where the next begins."""

    cells: dict[str, typing.Any]
    reason: str | None
    end: int


def scan(path: str, rows: int) -> dict:
    """Looks through a table once: its columns, and where each piece of `rows` rows begins.

    Returns:
      `delimiter` ("" for JSON), `quotes` (whether cells may be quoted), `header`, `image` and
      `text` (columns), `ranges`: for each piece its first row, its first byte and the byte after
      its last.

    Raises:
      BadInput: a table without the columns needed, or a file that is no table.
    """
    with open(path, "rb") as file:
        plan, start = _columns(path, file)
        begins = [(0, start)]
        number, end = 0, start
        for row in _rows(path, file, plan, start, None):
            number, end = number + 1, row.end
            if number % rows == 0:
                begins.append((number, end))
    if begins[-1][0] == number:  # nothing follows the last full piece
        begins.pop()
    ends = [*begins, (number, end)]
    pieces = [[first, at, stop] for (first, at), (_, stop) in itertools.pairwise(ends)]
    return {**plan, "ranges": pieces}


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of one piece of a table.

    Args:
      inputs: the table.
      part: what `scan` returned, with `range` instead of `ranges`, and `folder`, from which paths
        start, and `stem`, with which the keys begin where no column holds them.
      keep: not needed: rows are read whole.
      counts: `members` is counted up.
    """
    first, start, stop = part["range"]
    with open(inputs[0], "rb") as file:
        for number, row in enumerate(_rows(inputs[0], file, part, start, stop), first):
            counts["members"] += 1
            key = row.cells.get(samples.pick(row.cells, samples.KEY_COLUMNS))
            key = str(key) if key not in (None, "") else f"{part['stem']}/{number:08d}"
            try:
                yield _sample(key, row, part)
            except Rejected as rejected:
                yield Sample(key, reason=str(rejected))


def _sample(key: str, row: Row, part: dict) -> Sample:
    if row.reason:
        raise Rejected(row.reason)
    text = row.cells.get(part["text"])
    if text is not None and not isinstance(text, str):
        raise Rejected("no_text")
    path, length = _locate(row.cells.get(part["image"]), part["folder"])
    with open(path, "rb") as file:
        data = file.read()
    url = row.cells.get(samples.pick(row.cells, samples.URL_COLUMNS))
    url = url if isinstance(url, str) and url else None
    extras = {name: _value(value) for name, value in row.cells.items()}
    return Sample(key, text, data, path, 0, length, url, extras)


def _locate(name: typing.Any, folder: str) -> tuple[str, int]:
    """The path of a picture that is there, and its size in bytes.

    Raises:
      Rejected: "no_picture", "picture_is_a_url", "picture_outside", "picture_missing" or
        "too_many_bytes".
    """
    if not isinstance(name, str) or not name.strip():
        raise Rejected("no_picture")
    if "://" in name:
        raise Rejected("picture_is_a_url")
    path = os.path.normpath(os.path.join(folder, name))
    if not os.path.isabs(name) and not path.startswith(os.path.join(folder, "")):
        raise Rejected("picture_outside")
    try:
        status = os.stat(path)
        readable = stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK)
        path.encode()  # a name in another encoding could not be written down
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise Rejected("picture_missing")
    if status.st_size > pictures.MAX_BYTES:
        raise Rejected("too_many_bytes")
    return path, status.st_size


def _value(value: typing.Any) -> typing.Any:
    """Numbers of a CSV as numbers, so that they mean the same as those of a parquet."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return json.loads(value) if not re.match(r"-?0\d", value) else value
    return value


# --------------------------------------------------------------------------------------- the format


def _columns(path: str, file: typing.BinaryIO) -> tuple[dict, int]:
    """What `scan` says of the columns, and the byte at which the rows begin."""
    if path.endswith(".jsonl"):
        found: dict[str, None] = {}
        for number, row in enumerate(_rows(path, file, {"delimiter": ""}, 0, None)):
            found |= dict.fromkeys(row.cells)
            if number == _SNIFFED_LINES:
                break
        return {"delimiter": "", **_detect(path, list(found))}, 0
    line = file.readline(_MAX_LINE)
    delimiters = "\t" if path.endswith(".tsv") else ",\t;"
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        text = ""
    quotes = not path.endswith(".tsv")
    headers = [(next(_cells([text], mark, quotes), []), mark) for mark in delimiters]
    header, mark = max(headers, key=lambda pair: len(pair[0]))
    plan = {"delimiter": mark, "quotes": quotes, "header": header, **_detect(path, header)}
    return plan, len(line)


def _detect(path: str, names: Sequence[str]) -> dict[str, str]:
    """The columns of picture and caption, as `image` and `text`.

    Raises:
      BadInput: one of them is not there.
    """
    found = {
        "image": samples.pick(names, PATH_COLUMNS),
        "text": samples.pick(names, samples.TEXT_COLUMNS),
    }
    words = {"image": ("picture", PATH_COLUMNS), "text": ("caption", samples.TEXT_COLUMNS)}
    for kind, (what, wanted) in words.items():
        if found[kind] is None:
            listed = ", ".join(names[:30]) or "none"
            raise errors.BadInput(
                f"sources: {path} has no column of the {what} that is known by its name (columns"
                f" found: {listed}): rename it to one of {', '.join(wanted)}."
            )
    return found


def _rows(
    path: str, file: typing.BinaryIO, plan: dict, start: int, stop: int | None
) -> Iterator[Row]:
    """The rows between two bytes; empty lines are none."""
    file.seek(start)
    lines = _Lines(path, file, start, stop)
    if plan["delimiter"]:
        header = plan["header"]
        try:
            for cells in _cells(lines, plan["delimiter"], plan["quotes"]):
                if not cells:
                    continue
                broken = None if len(cells) == len(header) else "broken_row"
                yield Row({} if broken else dict(zip(header, cells, strict=True)), broken, lines.at)
        except csv.Error as error:
            raise errors.BadInput(
                f"sources: {path} cannot be read before byte {lines.at} ({error}): look for a quote"
                " that is not closed, or write the table as .jsonl."
            ) from error
        return
    for line in lines:
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        if isinstance(cells, dict):
            yield Row(cells, None, lines.at)
        else:
            yield Row({}, "broken_json", lines.at)


def _cells(lines: Iterable[str], delimiter: str, quotes: bool) -> Iterator[list[str]]:
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting)


class _Lines:
    """The lines of a file as text, and in `at` the byte after the last one handed out.

    Bytes that are no UTF-8 become lone surrogates, by which their row is told apart later.
    """

    def __init__(self, path: str, file: typing.BinaryIO, start: int, stop: int | None):
        self._path, self._file, self._stop = path, file, stop
        self.at = start

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._stop is not None and self.at >= self._stop:
            raise StopIteration
        line = self._file.readline(_MAX_LINE)
        if not line:
            raise StopIteration
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            raise errors.BadInput(
                f"sources: {self._path} has a line of more than {_MAX_LINE:,} bytes at byte"
                f" {self.at}: it is no table of captions, or its lines have no ends."
            )
        text = line.decode("utf-8-sig" if self.at == 0 else "utf-8", "surrogateescape")
        self.at += len(line)
        return text
