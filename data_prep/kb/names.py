"""Names and words: the normal form in which names are stored, looked up and found in texts.

Letters, digits and combining marks make words; everything else separates them. It knows nothing of
any knowledge base.
"""

import functools
import re
import unicodedata
from typing import NamedTuple


class Token(NamedTuple):
    """A word of a text: its normal form, and the characters start:end of the text it stands for."""

    form: str
    start: int
    end: int


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Runs of letters and digits, with the combining marks that follow them; no underscore.

    Marks are category M without variation selectors and enclosing marks (the keycap of emoji).
    """
    marks, start = [], None
    for code in range(0x300, 0xE0000):  # the marks beyond are variation selectors
        mark = unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F
        if mark and start is None:
            start = code
        elif not mark and start is not None:
            marks.append(f"{chr(start)}-{chr(code - 1)}")
            start = None
    return re.compile(rf"[^\W_](?:[^\W_]|[{''.join(marks)}])*")


_ASCII_WORD = re.compile(r"[^\W_]+")


def tokenize(text: str) -> list[Token]:
    """Splits a text into words; everything that is no letter, mark or digit separates them.

    A word's form is NFKC and case-folded. One that unfolds into several ("½": "1", "2") keeps them
    in one token, separated by spaces.
    """
    if text.isascii():
        return [Token(m[0].lower(), *m.span()) for m in _ASCII_WORD.finditer(text)]
    tokens = []
    for match in _word_pattern().finditer(text):
        if form := _fold(match[0]):
            tokens.append(Token(form, *match.span()))
    return tokens


def _fold(word: str) -> str:
    # Case-folding can leave what NFKC would change again, and the other way round.
    for _ in range(4):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
        folded = " ".join(_word_pattern().findall(folded))
        if folded == word:
            break
        word = folded
    return word


def normalize(text: str) -> str:
    """The form under which names are stored and looked up: the forms of the words, one space apart.

    NFKC, case-folded, punctuation and symbols to spaces, spaces squeezed; idempotent.
    """
    return " ".join(token.form for token in tokenize(text))


_IRREGULAR = {
    "children": "child",
    "feet": "foot",
    "geese": "goose",
    "men": "man",
    "mice": "mouse",
    "oxen": "ox",
    "people": "person",
    "teeth": "tooth",
    "women": "woman",
}


def singulars(form: str) -> list[str]:
    """What the last word of a normalised English name may be the plural of, best guess first."""
    head, space, last = form.rpartition(" ")
    found = []
    if last in _IRREGULAR:
        found.append(_IRREGULAR[last])
    elif len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is")):
        if last.endswith("ies") and len(last) > 4:
            found.append(last[:-3] + "y")
        if last.endswith("ves"):
            found += [last[:-3] + "f", last[:-3] + "fe"]
        if last.endswith(("ches", "shes", "xes", "zes", "sses", "oes")):
            found.append(last[:-2])
        found.append(last[:-1])
    return [head + space + word for word in found]


_ASCII_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PARTS = re.compile(r"\d+|\D+")


def split_word(word: str, start: int = 0) -> list[Token]:
    """Splits a word at changes of case and at digits: "AlarmClock2" is "alarm", "clock", "2"."""
    parts = (_ASCII_PARTS if word.isascii() else _PARTS).findall(word)
    tokens = []
    for part in parts:
        if form := normalize(part):
            tokens.append(Token(form, start, start + len(part)))
        start += len(part)
    return tokens


_PUNCTUATION = re.compile(r"[,;:|/()\[\]]")


def split_at_punctuation(text: str, tokens: list[Token]) -> list[list[Token]]:
    """Cuts the words of a text into runs without comma, colon, slash, bar or bracket in between."""
    if not _PUNCTUATION.search(text):
        return [tokens] if tokens else []
    runs: list[list[Token]] = []
    for token in tokens:
        if not runs or _PUNCTUATION.search(text, runs[-1][-1].end, token.start):
            runs.append([])
        runs[-1].append(token)
    return runs
