"""Tables of captions beside a folder of pictures: CSV, TSV and JSON Lines, one row for each pair.

Parquet may be such a table too (`formats.parquets`).

A CSV has a header; `.tsv` is CSV with tabs and without quotes, as captions on the web hold quotes
of their own; a `.csv` may be separated by commas, tabs or semicolons. Of a list of captions the
first that says something is taken. A column names the picture's
file, from the folder of the table on. Neither `../` nor an absolute path nor a link may lead out of
that folder: a table from elsewhere shall not pick files it was not given. Where the table itself is
a link, as in the caches of the Hugging Face hub, pictures may also lie beside what it leads to.

The pictures are no inputs in the sense of `data_prep.engine`: a table says the same after one of
its pictures is replaced, so that pairs made before keep what they say of the old one.
"""

import codecs
import csv
import itertools
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence

from data_prep.pairs import pictures, samples
from data_prep.pairs.samples import Rejected, Sample
from mofi_jax.common import errors

SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    *(
        "file_name",
        "image_file_name",
        "filename",
        "filepath",
        "file_path",
        "image_path",
        "img_path",
        "image_file",
    ),
    *("image", "img", "picture", "path", "file"),
)
_MAX_LINE = samples.MAX_TEXT
# A quote that is left open would swallow all rows up to the next one.
_MAX_LINES_OF_ROW = 100
_SNIFFED_LINES = 100  # of JSON, among which all columns occur
_NUMBER = re.compile(r"-?\d{1,15}(\.\d+)?([eE][-+]?\d{1,2})?")


class Row(typing.NamedTuple):
    """A row of a table: its cells by column, or why it cannot be read; where the next begins."""

    cells: dict[str, typing.Any]
    reason: str | None
    end: int


def scan(path: str, rows: int, texts: Sequence[str | None] = samples.TEXT_COLUMNS) -> dict:
    """Looks through a table once: its columns, and where each piece of `rows` rows begins.

    Args:
      path: the file.
      rows: of a piece.
      texts: what the column of captions may be called, the likeliest first; None: there need not
        be one.

    Returns:
      `delimiter` ("" for JSON), `quotes` (whether cells may be quoted), `header`, `image` and
      `text` (columns), `ranges`: for each piece its first row, its first byte and the byte after
      its last.

    Raises:
      BadInput: a table without the columns needed, or a file that is no table.
    """
    with open(path, "rb") as file:
        plan, start = _columns(path, file, texts)
        begins = [(0, start)]
        number, end = 0, start
        for row in _rows(file, plan, start, None):
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
      part: what `scan` returned, with `range` instead of `ranges`, and `table`, from whose folder
        paths start, and `stem`, with which the keys begin where no column holds them.
      keep: not needed: rows are read whole.
      counts: `members` is counted up.
    """
    first, start, stop = part["range"]
    beside = folders_of(part["table"])
    with open(inputs[0], "rb") as file:
        for number, row in enumerate(_rows(file, part, start, stop), first):
            counts["members"] += 1
            key, url = samples.key_and_url(row.cells, f"{part['stem']}/{number:08d}")
            try:
                yield _sample(key, url, row, part, beside)
            except Rejected as rejected:
                yield Sample(key, reason=str(rejected))


def _sample(
    key: str, url: str | None, row: Row, part: dict, beside: tuple[str, tuple[str, ...]]
) -> Sample:
    if row.reason:
        raise Rejected(row.reason)
    text = samples.first_text(row.cells.get(part["text"]))
    if text is not None and not isinstance(text, str):
        raise Rejected("no_text")
    path, data = fetch(row.cells.get(part["image"]), *beside)
    extras = {name: _value(value) for name, value in row.cells.items()}
    return Sample(key, text, data, path, 0, len(data), url, extras)


def folders_of(table: str) -> tuple[str, tuple[str, ...]]:
    """The folder from which a table's paths start, and what their real paths begin with."""
    folder = os.path.dirname(table)
    beside = (os.path.realpath(folder), os.path.dirname(os.path.realpath(table)))
    return folder, tuple(os.path.join(root, "") for root in beside)


def fetch(name: typing.Any, folder: str, roots: tuple[str, ...]) -> tuple[str, bytes]:
    """The path of a picture that a table names, and its bytes.

    Raises:
      Rejected: "no_picture", "picture_is_a_url", "picture_outside", "picture_missing" or
        "too_many_bytes".
    """
    if not isinstance(name, str) or not name.strip():
        raise Rejected("no_picture")
    if "://" in name:
        raise Rejected("picture_is_a_url")
    try:
        path = os.path.normpath(os.path.join(folder, name))
        if "\\" in name and not os.path.exists(path):  # written on Windows
            path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
        real = os.path.realpath(path)
        path.encode()  # a name in another encoding could not be written down
    except (OSError, ValueError):
        raise Rejected("picture_missing") from None
    if not real.startswith(roots):
        raise Rejected("picture_outside")
    if not (os.path.isfile(real) and os.access(real, os.R_OK)):
        raise Rejected("picture_missing")
    if os.path.getsize(real) > pictures.MAX_BYTES:
        raise Rejected("too_many_bytes")
    with open(path, "rb") as file:
        return path, file.read()


def _value(value: typing.Any) -> typing.Any:
    """Numbers of a CSV as numbers, so that they mean the same as those of a parquet."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return json.loads(value) if not re.match(r"-?0\d", value) else value
    return value


# --------------------------------------------------------------------------------------- the format


def _columns(path: str, file: typing.BinaryIO, texts: Sequence[str]) -> tuple[dict, int]:
    """What `scan` says of the columns, and the byte at which the rows begin."""
    line = file.readline(_MAX_LINE)
    file.seek(0)
    _check_first(path, line)
    if path.endswith(".jsonl"):
        found: dict[str, None] = {}
        for number, row in enumerate(_rows(file, {"delimiter": ""}, 0, None)):
            found |= dict.fromkeys(row.cells)
            if number == _SNIFFED_LINES:
                break
        return {"delimiter": "", **_detect(path, list(found), texts)}, 0
    delimiters = "\t" if path.endswith(".tsv") else ",\t;"
    text = line.decode("utf-8-sig", "backslashreplace").rstrip("\r\n")
    quotes = not path.endswith(".tsv")
    header, mark = max(
        ((_header(text, mark, quotes), mark) for mark in delimiters), key=lambda pair: len(pair[0])
    )
    plan = {"delimiter": mark, "quotes": quotes, "header": header}
    return plan | _detect(path, header, texts), len(line)


def _check_first(path: str, line: bytes) -> None:
    """Raises BadInput where the first line tells that a file is no such table."""
    problem = None
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        problem = "is no UTF-8 but UTF-16 or no text at all: save it as UTF-8"
    elif len(line) == _MAX_LINE and not line.endswith(b"\n"):
        problem = (
            f"begins with a line of more than {_MAX_LINE:,} bytes: it is no table of captions, or"
            " its lines have no ends"
        )
    elif path.endswith(".jsonl") and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        problem = "is a JSON array: write one object a line, as jq -c '.[]' does"
    if problem:
        raise errors.BadInput(f"sources: {path} {problem}.")


def _header(line: str, delimiter: str, quotes: bool) -> list[str]:
    try:
        return next(_cells([line], delimiter, quotes), [])
    except csv.Error:
        return []


def _detect(path: str, names: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    """The columns of picture and caption, as `image` and `text`.

    Raises:
      BadInput: one of them is not there.
    """
    found = {
        "image": samples.pick(names, PATH_COLUMNS),
        "text": samples.pick(names, texts),
    }
    words = {"image": ("picture", PATH_COLUMNS), "text": ("caption", texts)}
    for kind, (what, wanted) in words.items():
        if found[kind] is None and None not in wanted:
            listed = ", ".join(samples.spell_key(name)[:100] for name in names[:30]) or "none"
            how = f"rename it to one of {', '.join(wanted)}"
            how += ", or name it in config.caption_column" * (kind == "text")
            if kind == "image" and samples.pick(names, samples.URL_COLUMNS):
                how = (
                    "where it lists addresses, name the folder to which img2dataset downloaded them"
                )
            raise errors.BadInput(
                f"sources: {path} has no column of the {what} that is known by its name (columns"
                f" found: {listed}): {how}."
            )
        if (count := names.count(found[kind])) > 1:
            raise errors.BadInput(
                f"sources: {path} has {count} columns of the name {found[kind]!r}: rename all but"
                " one."
            )
    return found


def _rows(file: typing.BinaryIO, plan: dict, start: int, stop: int | None) -> Iterator[Row]:
    """The rows between two bytes; empty lines are none."""
    lines = _Lines(file, start, stop)
    header, mark = plan.get("header"), plan["delimiter"]
    rows = _cells(lines, mark, plan["quotes"]) if mark else map(_object, lines)
    while True:
        lines.begin_row()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except (csv.Error, Rejected) as problem:
            lines.back_to_second()
            yield Row({}, str(problem) if isinstance(problem, Rejected) else "broken_row", lines.at)
            continue
        if header and cells and len(cells) != len(header):
            yield Row({}, "broken_row", lines.at)
        elif header and cells:
            yield Row(dict(zip(header, cells, strict=True)), None, lines.at)
        elif not header and cells is not None:
            yield Row(cells, None, lines.at)


def _object(line: str) -> dict | None:
    """A row of JSON; None for an empty line."""
    if not line.strip():
        return None
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError):
        cells = None
    if not isinstance(cells, dict):
        raise Rejected("broken_json")
    return cells


def _cells(lines: Iterable[str], delimiter: str, quotes: bool) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_LINE)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    # Strict: `"24 inch` is a quote left open, which the next quote must not close.
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)


class _Lines:
    """The lines of a file as text, and in `at` the byte after the last one handed out.

    Bytes that are no UTF-8 become lone surrogates, by which their row is told apart later. A line
    that is too long, and one more than a row may have, are Rejected in place of the row.
    """

    def __init__(self, file: typing.BinaryIO, start: int, stop: int | None):
        self._file, self._stop = file, stop
        self._ends: list[int] = []  # of the lines of this row
        self.at = file.seek(start)

    def begin_row(self) -> None:
        self._ends = []

    def back_to_second(self) -> None:
        """To where the row's second line begins: only the first is known to be broken."""
        self.at = self._file.seek(self._ends[0])

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._stop is not None and self.at >= self._stop:
            raise StopIteration
        line = chunk = self._file.readline(_MAX_LINE)
        if not line:
            raise StopIteration
        start = self.at
        self.at += len(line)
        is_whole = len(line) < _MAX_LINE or line.endswith(b"\n")
        while not is_whole and chunk and not chunk.endswith(b"\n"):
            chunk = self._file.readline(_MAX_LINE)
            self.at += len(chunk)
        self._ends.append(self.at)
        if not is_whole:
            raise Rejected("too_many_bytes")
        if len(self._ends) > _MAX_LINES_OF_ROW:
            raise Rejected("broken_row")
        return line.decode("utf-8-sig" if start == 0 else "utf-8", "surrogateescape")
