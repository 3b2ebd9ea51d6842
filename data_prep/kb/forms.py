"""The names of an entity: from spellings with weights to normal forms that say how they came."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import NamedTuple

from data_prep.kb import names

_ASCII_WORDS = re.compile(r"[a-z0-9]+")
# Directional marks and overrides, stray byte order marks; joiners (U+200C, U+200D) are spelling.
_INVISIBLE = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BRACKET = re.compile(r"(.*\S)\s*\([^()]*\)\s*", re.DOTALL)  # "John Smith (actor)"

# How a name came to be, as `cand_form.npy` says it: as the source has it; its words joined; its
# diacritics gone; a person's name without middle names, title or rank (`data_prep.kb.people`).
EXACT, JOINED, FOLDED, SHORTENED = range(4)
_FOLDED_FACTOR = 0.5

ANY = 0  # languages: bit i is the i-th of `config.languages`; of a name with none any may use it
MOST_LANGUAGES = 16


class Spelling(NamedTuple):
    """A name as the source writes it, its weight, the bits of its languages."""

    text: str
    weight: float
    languages: int = ANY


# A normal form of an entity's names, its weight, its case, how it came, the bits of its languages.
# No NamedTuple: making them would take a tenth of the parsing.
Name = tuple[str, float, int, int, int]


def clean(text: str) -> str:
    """A name or description in one line: HTML's entities as what they stand for, control characters
    to spaces, bidi marks dropped.

    Raises:
      TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(text)
    if "&" in text:
        text = html.unescape(text)
    if not text.isprintable():
        text = _CONTROL.sub(" ", _INVISIBLE.sub("", text))
    return text.strip()


def without_bracket(name: str) -> str:
    """A name without the bracket at its end that tells it from others of the same name."""
    if name.endswith(")") and (match := _BRACKET.fullmatch(name)):
        return match[1]
    return name


def names_of(label: str, spellings: Iterable[Spelling], factor: float) -> tuple[list[Name], int]:
    """The normal forms of an entity's names.

    A label with a bracket at its end is a name without it, too; a name of several words is one with
    its words joined, one with diacritics is one without. Of equal forms count the largest weight,
    the smallest case, the first of `EXACT`, `FOLDED`, `JOINED`, and the languages of all.

    Args:
      label: the label; the first spelling.
      spellings: all names, a form perhaps twice.
      factor: the weight of a label without its bracket against the label.

    Returns:
      The names, no form twice, and how many spellings have no letter or digit at all.
    """
    spellings = list(spellings)
    if (bare := without_bracket(label)) != label:
        _, weight, languages = spellings[0]
        spellings.append(Spelling(bare, weight * factor, languages))
    exact: dict[str, tuple[float, int, int]] = {}
    empty = 0
    for text, weight, languages in spellings:
        if form := normal_of(text):
            _add(exact, form, weight, case_of(text), languages)
        else:
            empty += 1
    folded: dict[str, tuple[float, int, int]] = {}
    for form, (weight, *rest) in exact.items():
        if not form.isascii() and (bare := names.fold_diacritics(form)) not in exact:
            _add(folded, bare, weight * _FOLDED_FACTOR, *rest)
    joined: dict[str, tuple[float, int, int]] = {}
    for found in (exact, folded):
        for form, rest in found.items():
            squeezed = form.replace(" ", "")
            if squeezed not in exact and squeezed not in folded:
                _add(joined, squeezed, *rest)
    every = ((exact, EXACT), (folded, FOLDED), (joined, JOINED))
    return [
        (form, weight, case, how, languages)
        for found, how in every
        for form, (weight, case, languages) in found.items()
    ], empty


def normal_of(spelling: str) -> str:
    """`names.normalize`; a name in ASCII, as most are, without the places of its words."""
    if spelling.isascii():
        return " ".join(_ASCII_WORDS.findall(spelling.lower()))
    return names.normalize(spelling)


def _add(found: dict, form: str, weight: float, case: int, languages: int) -> None:
    if form in found:
        before = found[form]
        weight, case = max(weight, before[0]), min(case, before[1])
        languages = languages | before[2] if languages and before[2] else ANY
    found[form] = (weight, case, languages)


def case_of(name: str) -> int:
    """How a name is written.

    Returns:
      0: a word of it is in lower case throughout ("red panda"), or it has no letter that knows
      case ("東京", "747"). 1: capitalised ("Apple"). 2: all capitals, at least two ("IT", "U.S.").
    """
    if name.isupper():
        return 2 if sum(map(str.isupper, name)) >= 2 else 1
    if name.istitle():
        return 1
    if name.islower() or any(word.islower() for word in name.split()):
        return 0
    return 1 if name.lower() != name.upper() else 0
