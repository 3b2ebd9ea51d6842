"""One entity of a knowledge base: its columns, its names with their weights, the generic JSONL.

It knows neither files nor Wikidata: a reader turns a line into a `Row` or raises

    ValueError(reason)   the line is damaged or no entity: it goes to rejects.parquet
    Dropped(reason)      a sound entity that the rules leave out: it is counted
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_prep.kb import forms, kinds

_ID = re.compile(r"\S{1,200}")
_MOST_RANK = 2**31  # so that a prior of float32 is never 0


class Dropped(Exception):
    """An entity that a rule of the configuration leaves out: why; its id and what lies above it."""

    def __init__(self, reason: str, qid: str = "", above: Sequence[str] = ()):
        super().__init__(reason)
        self.qid, self.above = qid, above


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
    above: list[str]  # what its kind follows from: hypernyms, of taxa the parents
    names: list[forms.Spelling]  # the label's first; a spelling perhaps twice


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

    @functools.cached_property
    def bits(self) -> tuple[int, ...]:
        """The bit of each language in the masks of names; `forms.ANY` for "mul"."""
        return tuple(
            forms.ANY if code == "mul" else 1 << i for i, code in enumerate(self.languages)
        )

    def weight(self, sitelinks: int) -> float:
        """The weight of the label of an entity with so many sitelinks."""
        return float(sitelinks + 1) ** self.alpha


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
    label = forms.clean(label) if isinstance(label, str) else ""
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
    aliases, description = [forms.clean(alias) for alias in aliases], forms.clean(description)
    if ranks:
        weights = [1.0 / rank for rank in ranks]
    else:
        weight = rules.weight(sitelinks)
        weights = [weight, *[weight * rules.alias_factor] * len(aliases)]
    spellings = [forms.Spelling(*pair) for pair in zip([label, *aliases], weights, strict=True)]
    if title:
        weight = weights[0] * rules.alias_factor
        spellings.append(forms.Spelling(forms.without_bracket(title), weight))
    kind_from = kinds.GIVEN if kind else None
    columns = (description, hypernyms, types, sitelinks, image, title, kind, kind_from)
    return Row(qid, label, aliases, *columns, hypernyms, spellings)


def _all_numbers(values: Sequence) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
