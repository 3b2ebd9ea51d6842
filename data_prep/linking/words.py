"""Words as they are used in captions: what a text says about a name before anything is looked up.

NOTHING    function words, calendar, numbers, single letters and what captions of the web say of
           every picture ("photo", "wallpaper"): they hardly ever mean an entity
ORDINARY   every word is an English word, and one is more than a noun ("reading", "with you")
NOUNS      every word is an English noun; names that a dictionary has are among them ("paris")
OTHER      some word is in no dictionary ("obama", "ikea"): what has such a name is meant
"""

import calendar
import functools
import os
import re
import runpy

from data_prep.kb import names
from data_prep.linking import boilerplate

NOTHING, ORDINARY, NOUNS, OTHER = range(4)
LOWER, CAPITALISED, CAPITALS = range(3)  # of surfaces, as of names in the knowledge base

_CALENDAR = frozenset(
    name.lower()
    for names_of in (calendar.month_name, calendar.day_name)
    for name in names_of
    if name
)
_LOWER_WORD = re.compile(r"(?<![^\W_])[a-z]{2,}(?![^\W_])")
WORD = re.compile(rf"[^\W\d_]+(?:[{names.APOSTROPHES}]S\b)?")
CAPITALISED_WORD = re.compile(
    r"(?<![^\W_])(?=[^\W\d_]*[^\W\dA-Z_])[A-Z\u00c0-\u00de][^\W\d_]+(?![^\W_])"
)


@functools.cache
def function_words() -> frozenset[str]:
    """Words such as "it", "us" and "may", which captions hardly ever mean as names."""
    from spacy.lang.en.stop_words import STOP_WORDS

    return frozenset(STOP_WORDS)


@functools.cache
def function_words_anywhere() -> frozenset[str]:
    """Those of all languages that spaCy knows: names of a base are among them ("de", "Kim")."""
    from spacy import lang

    # Run as they lie there: as modules they would load every language with them.
    [folder] = lang.__path__
    files = [f"{folder}/{code}/stop_words.py" for code in sorted(os.listdir(folder))]
    found = [runpy.run_path(file)["STOP_WORDS"] for file in files if os.path.exists(file)]
    return frozenset().union(*found)


@functools.cache
def _nothing() -> frozenset[str]:
    from spacy.lang.en import lex_attrs

    numbers = {*lex_attrs._num_words, *lex_attrs._ordinal_words}
    return function_words() | _CALENDAR | numbers | boilerplate.WORDS


@functools.lru_cache(maxsize=1 << 16)
def use(form: str) -> int:
    """How a normalised name is used: `NOTHING`, `ORDINARY`, `NOUNS` or `OTHER`."""
    nothing = _nothing()
    if form in nothing or form.replace(" ", "").isdigit():
        return NOTHING
    if len(form) == 1 and form.upper() != form.lower():
        return NOTHING
    words = form.split()
    if all(word in nothing for word in words):
        return NOTHING if len(words) == 1 else ORDINARY
    nouns, others = names.dictionary()
    if not all(
        word in nothing
        or word in others
        or word.isdigit()
        or word in nouns
        or any(single in nouns for single in names.singulars(word))
        for word in words
    ):
        return OTHER
    if len(words) > 1:
        return ORDINARY if any(word in nothing for word in words) else NOUNS
    return ORDINARY if form in others else NOUNS


@functools.lru_cache(maxsize=1 << 16)
def case(surface: str) -> int:
    """How a surface is written: `LOWER`, `CAPITALISED` (some letter is a capital), `CAPITALS`."""
    if surface.isupper() and len(surface) > 1:
        return CAPITALS
    return CAPITALISED if any(map(str.isupper, surface)) else LOWER


ONE_CASE, TITLE, MINDS_CASE = range(3)  # what capitals of a text say: nothing, little, much


def capitals(text: str) -> int:
    """What a text's capitals say, as a code.

    `MINDS_CASE`: ordinary words are in lower case. `TITLE`: only function words are, or may be, as
    in "Fox in the Snow". `ONE_CASE`: all words are written alike.
    """
    if text.islower() or text.isupper():
        return ONE_CASE
    lower = _LOWER_WORD.findall(text)
    if not lower or text == text.lower():
        return ONE_CASE
    functions = function_words()
    return MINDS_CASE if any(word not in functions for word in lower) else TITLE


_BEGINS = re.compile(r"(?:\A|[.!?:;|\n–—-])[\W_]*\Z")


def begins_sentence(text: str, start: int) -> bool:
    """Whether what stands at `start` would have a capital anyway."""
    return (
        _BEGINS.search(text[max(start - 8, 0) : start] if start > 8 else text[:start]) is not None
    )


@functools.lru_cache(maxsize=1 << 16)
def is_titled(surface: str) -> bool:
    """Whether all its words have capitals, but for function words."""
    return any(map(str.isupper, surface)) and all(
        word in function_words() for word in _LOWER_WORD.findall(surface)
    )


_JOINTS = re.compile(r"[a-z][A-Z]|[^\W\d_]\d|\d[^\W\d_]")


def is_tag(text: str, start: int, end: int) -> bool:
    """Whether words are joined there on purpose: a hashtag, a file's name, CamelCase."""
    if text[start - 1 : start] in _MARKS or text[end : end + 1] == "_":
        return True
    surface = text[start:end]
    return not names.is_plain(surface) and _JOINTS.search(surface) is not None


_MARKS = ("#", "@", "_")
