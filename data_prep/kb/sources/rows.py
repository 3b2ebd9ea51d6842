"""One entity of a knowledge base: its columns, its names with their weights, the generic JSONL.

It knows neither files nor Wikidata: a reader turns a line into a `Row` or raises

    ValueError(reason)   the line is damaged or no entity: it goes to rejects.parquet
    Dropped(reason)      a sound entity that the rules leave out: it is counted
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_prep.kb import kinds, names

_ASCII_WORDS = re.compile(r"[a-z0-9]+")
# Directional marks and overrides, stray byte order marks; joiners (U+200C, U+200D) are spelling.
_INVISIBLE = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ID = re.compile(r"\S{1,200}")
_MOST_RANK = 2**31  # so that a prior of float32 is never 0
_BRACKET = re.compile(r"(.*\S)\s*\([^()]*\)\s*", re.DOTALL)  # "John Smith (actor)"


class Dropped(Exception):
    """An entity that a rule of the configuration leaves out; the message is the reason."""


class Row(NamedTuple):
    """An entity as a line of the source gives it."""

    qid: str
    label: str
    aliases: list[str]
    description: str
    hypernyms: list[str]
    types: list[str]
    sitelinks: int
    image: str | None
    title: str | None
    kind: str | None
    kind_from: str | None
    names: list[tuple[str, float]]  # spellings and their weights, a spelling perhaps twice


def clean(text: str) -> str:
    """A name or description in one line: control characters to spaces, bidi marks dropped.

    Raises:
      TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(text)
    if not text.isprintable():
        text = _CONTROL.sub(" ", _INVISIBLE.sub("", text))
    return text.strip()


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is kept and how names are weighed; see configs/kb.py.

    Attributes:
      languages: codes, the preferred first.
      drop_types: QID of a type -> why its instances are dropped.
      need_link_or_image: drop what has neither sitelink nor picture.
      alpha: the exponent of sitelinks + 1.
      alias_factor: the weight of an alias against the label.
    """

    languages: tuple[str, ...]
    drop_types: Mapping[str, str]
    need_link_or_image: bool
    alpha: float
    alias_factor: float

    @classmethod
    def from_settings(cls, settings: Mapping) -> Rules:
        types = {qid: reason for reason, qid in settings["drop_types"].items() if qid}
        return cls(
            tuple(settings["languages"]),
            types,
            settings["need_link_or_image"],
            settings["alpha"],
            settings["alias_factor"],
        )

    def weigh(self, label: str, aliases: Sequence[str], sitelinks: int) -> list[tuple[str, float]]:
        """The names of an entity with weights from its sitelinks."""
        weight = float(sitelinks + 1) ** self.alpha
        weighed = [(label, weight)]
        weighed += [(alias, weight * self.alias_factor) for alias in aliases]
        return weighed


# A normal form of an entity's names, its weight, its case, and whether it was made from a name of
# several words by joining them. No NamedTuple: making them would take a tenth of the parsing.
Name = tuple[str, float, int, bool]


def names_of(row: Row, alias_factor: float) -> tuple[list[Name], int]:
    """The normal forms of an entity's names; of equal ones the largest weight and smallest case.

    A label with a bracket at its end is a name without it, too; a name of several words is one
    with its words joined.

    Returns:
      The names, no form twice, and how many spellings have no letter or digit at all.
    """
    spellings = row.names
    if row.label.endswith(")") and (match := _BRACKET.fullmatch(row.label)):
        spellings = [*spellings, (match[1], spellings[0][1] * alias_factor)]
    own: dict[str, tuple[float, int]] = {}
    empty = 0
    for spelling, weight in spellings:
        form = _form(spelling)
        if form:
            _add(own, form, weight, case_of(spelling))
        else:
            empty += 1
    joined: dict[str, tuple[float, int]] = {}
    for form, (weight, case) in own.items():
        if " " in form and (squeezed := form.replace(" ", "")) not in own:
            _add(joined, squeezed, weight, case)
    found = [(form, weight, case, False) for form, (weight, case) in own.items()]
    found += [(form, weight, case, True) for form, (weight, case) in joined.items()]
    return found, empty


def _form(spelling: str) -> str:
    """`names.normalize`; a name in ASCII, as most are, without the places of its words."""
    if spelling.isascii():
        return " ".join(_ASCII_WORDS.findall(spelling.lower()))
    return names.normalize(spelling)


def _add(found: dict[str, tuple[float, int]], form: str, weight: float, case: int) -> None:
    if form in found:
        weight, case = max(weight, found[form][0]), min(case, found[form][1])
    found[form] = (weight, case)


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


def parse(line: bytes, rules: Rules) -> Row:
    """An entity of the generic JSONL; see `data_prep.kb.build` for its keys."""
    import orjson

    try:
        row = orjson.loads(line)
    except ValueError:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("not_utf8") from None
        raise ValueError("broken_json") from None
    if not isinstance(row, dict):
        raise ValueError("no_object")
    qid = row.get("qid") or row.get("id")
    label = row.get("label")
    if not isinstance(qid, str) or not _ID.fullmatch(qid) or not qid.isprintable():
        raise ValueError("no_id")
    label = clean(label) if isinstance(label, str) else ""
    if not label:
        raise ValueError("no_label")
    aliases, hypernyms = row.get("aliases") or [], row.get("hypernyms") or []
    types, ranks = row.get("types") or [], row.get("sense_rank") or []
    description, sitelinks = row.get("description") or "", row.get("sitelinks") or 0
    image, title = row.get("image") or None, row.get("title") or None
    kind, lexname = row.get("kind") or None, row.get("lexname") or ""
    texts = [description, image or "", title or "", kind or "", lexname]
    for strings in (aliases, hypernyms, types, texts):
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise ValueError("wrong_type")
    if not isinstance(ranks, list) or not _all_numbers([sitelinks, *ranks]):
        raise ValueError("wrong_type")
    if ranks and (
        len(ranks) != 1 + len(aliases) or not all(1 <= rank <= _MOST_RANK for rank in ranks)
    ):
        raise ValueError("wrong_sense_rank")
    kind = kind or kinds.LEXNAMES.get(lexname)
    if kind and kind not in kinds.KINDS:
        raise ValueError("wrong_kind")
    if sitelinks < 0 or sitelinks >= 2**31 or sitelinks != int(sitelinks):
        raise ValueError("wrong_sitelinks")
    sitelinks = int(sitelinks)
    aliases, description = [clean(alias) for alias in aliases], clean(description)
    if ranks:
        weighed = [(s, 1.0 / rank) for s, rank in zip([label, *aliases], ranks, strict=True)]
    else:
        weighed = rules.weigh(label, aliases, sitelinks)
    kind_from = kinds.GIVEN if kind else None
    columns = (description, hypernyms, types, sitelinks, image, title, kind, kind_from)
    return Row(qid, label, aliases, *columns, weighed)


def _all_numbers(values: Sequence) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
