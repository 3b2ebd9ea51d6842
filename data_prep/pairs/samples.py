"""What all kinds of sources give, whatever their format: samples, and the rules for their words.

A sample is one image-text pair as it was found, not yet looked at: the picture's bytes, where they
lie, the caption as it was written, and what else the source says about it. `data_prep.pairs.stage`
checks samples and makes pairs of them.
"""

import contextlib
import html
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence

from data_prep import engine

# Columns by their usual names, the likeliest first; letter case does not matter.
TEXT_COLUMNS = (
    *("text", "caption", "alt_text", "alttext", "alt", "title", "sentence", "prompt"),
    *("txt", "captions", "sentences", "image_caption", "description"),
)
KEY_COLUMNS = ("key", "__key__", "uid")
URL_COLUMNS = ("url", "image_url")
FAILED = ("failed_to_download", "failed_to_resize")  # `status` by img2dataset
MAX_TEXT = 1 << 20  # bytes of a caption or its .json, a thousand times what people write

# Directional marks, embeddings, overrides and isolates, soft hyphens, spaces of no width and stray
# byte order marks: invisible, no part of any word, and in the way of every comparison. Joiners
# (U+200C, U+200D) are spelling.
_MARKS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
_INVISIBLE = re.compile(f"[\u00ad\u200b\u2060{_MARKS}]")
# What a line of a text file cannot hold, or would not show; blanks at its ends get lost.
_NOT_IN_KEYS = re.compile(rf"[\x00-\x1f\x7f-\x9f\u2028\u2029{_MARKS}\ud800-\udfff]|^\s|\s\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Rejected(Exception):
    """A sample that cannot be used, with the reason in one word."""


class Sample(typing.NamedTuple):
    """One image-text pair as found.

    Attributes:
      key: its name in the source; unique where all is well.
      text: the caption, as bytes where nobody has decoded it yet; None: there is none.
      picture: the picture's bytes.
      path, offset, length: where the picture lies, see `data_prep.pairs.stage.read_pictures`; None:
        where it cannot be fetched from again, so that it has to be unpacked.
      url: where it came from, or None.
      extras: all else that is known of it, by column.
      reason: why it cannot be used, in one word, where that is known already.
    """

    key: str
    text: str | bytes | None = None
    picture: bytes = b""
    path: str | None = ""
    offset: int = 0
    length: int = 0
    url: str | None = None
    extras: Mapping[str, typing.Any] = {}
    reason: str | None = None


def pick(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the `wanted` that is among `names` in any letter case, as written there."""
    found = {name.lower(): name for name in reversed(list(names))}
    return next((found[name] for name in wanted if name in found), None)


def at(row: Mapping[str, typing.Any], path: str) -> typing.Any:
    """What a row holds in the column `path` or, where there is none, at `a.b`: in its objects.

    In a list of objects it is looked up in each of them.
    """
    if path in row or "." not in path:
        return row.get(path)
    found: typing.Any = row
    for name in path.split("."):
        if isinstance(found, list):
            found = [one.get(name) if isinstance(one, Mapping) else None for one in found]
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def columns_of(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    """The columns among `names` in which `at` finds what lies at the paths."""
    names = {*names}
    return {path if path in names else path.partition(".")[0] for path in paths} & names


def cell(column, row: int) -> typing.Any:
    """A value of an Arrow array as Python's; None where it is none, as the year 200,000."""
    try:
        return column[row].as_py()
    except (ValueError, OverflowError, RecursionError):
        return None


def key_and_url(row: Mapping[str, typing.Any], default: str) -> tuple[str, str | None]:
    """What a row says of its key, else `default`, and of where the picture came from."""
    found = (row.get(pick(row, columns)) for columns in (KEY_COLUMNS, URL_COLUMNS))
    key, url = (text_of(value) for value in found)
    return default if key in (None, "") else str(key), url if url and isinstance(url, str) else None


def text_of(value: typing.Any) -> typing.Any:
    """Bytes as text, those of other encodings spelt out; anything else as it is."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def first_text(value: typing.Any) -> typing.Any:
    """Of a list of captions the first that says something; anything else as it is."""
    if isinstance(value, list):
        some = (text for text in value if isinstance(text, str | bytes) and text.strip())
        return next(some, None)
    return value


def extras_json(values: Mapping[str, typing.Any], keep: Sequence[str]) -> str | None:
    """What lies `at` the paths `keep` as a JSON object by path, sorted; None where nothing does."""
    kept = []
    for name in sorted(set(keep)):
        value = at(values, name)
        if value is None or value == "" or isinstance(value, bytes):
            continue
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # NaN, also inside a list
            options = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False}
            kept.append(f"{json.dumps(name)}: {json.dumps(value, default=str, **options)}")
    return encodable("{" + ", ".join(kept) + "}") if kept else None


def spell_key(key: str) -> str:
    """A key as one visible line: a line break is `\\n`, a blank at an end `\\x20`, and so on.

    Lists of keys are files with a key in each line, and keys are shown on terminals.
    """

    def spell(found: re.Match) -> str:
        return found[0].encode("unicode_escape").decode().replace(" ", r"\x20")

    return _NOT_IN_KEYS.sub(spell, key)


def encodable(name: str) -> str:
    """The same text, where it is Unicode; bytes of other encodings are spelt out (`\\udce9`)."""
    return name.encode("utf-8", "backslashreplace").decode()


def caption(text: str | bytes | None, limit: int) -> tuple[str, bool]:
    """The caption in one line, and whether it had to be cut to `limit` characters.

    Raises:
      Rejected: "no_text", "caption_not_utf8" or "empty_caption".
    """
    if text is None:
        raise Rejected("no_text")
    if isinstance(text, bytes):
        try:
            # A replacement character would be a word that nobody wrote.
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Rejected("caption_not_utf8") from None
    # JSON may spell half a surrogate pair, which no UTF-8 file can hold.
    if _SURROGATE.search(text):
        raise Rejected("caption_not_utf8")
    text = clean_caption(_unescape(text))
    if not text:
        raise Rejected("empty_caption")
    return cut_caption(text, limit), len(text) > limit


def _unescape(text: str) -> str:
    """HTML's `&amp;` and the like as what they mean; twice, as they are often escaped twice."""
    try:
        return html.unescape(html.unescape(text))
    except ValueError:  # a number of thousands of digits
        return text


def clean_caption(text: str) -> str:
    """One line: white space and control characters squeezed to single spaces, bidi marks dropped.

    Letters are left as they are written: composing or folding them is for those who compare.
    """
    return " ".join(_CONTROL.sub(" ", _INVISIBLE.sub("", text)).split())


def cut_caption(text: str, limit: int) -> str:
    """At most `limit` characters, cut at the end of a word where there is one."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1].rpartition(" ")[0]
    return (head or text[:limit]).rstrip()


class Unpacked:
    """A file of pictures one after the other, made when the first one comes."""

    def __init__(self, outputs: engine.Outputs, name: str):
        self._outputs, self._name = outputs, name
        self._file = None

    def add(self, picture: bytes) -> tuple[str, int, int]:
        """Appends a picture; returns its pointer."""
        if self._file is None:
            self._file = open(self._outputs.path(self._name), "wb")  # noqa: SIM115  see close
        offset = self._file.tell()
        self._file.write(picture)
        return self._name, offset, len(picture)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
