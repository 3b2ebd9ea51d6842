"""An entity of Wikidata's JSON dump, line by line.

The dump is one JSON array with an entity a line: `[`, lines that end in a comma, `]`. Of an entity
we keep the label (the first chosen language that has one), the labels of the other chosen languages
and all their aliases as aliases, the description, the values of P31 (types), P279 (hypernyms) and
P18 (picture), the number of sitelinks and the title in the English Wikipedia.

Of the statements of a property those of the best rank count, as in Wikidata's own "truthy" exports:
the preferred ones, else the normal ones, never the deprecated ones; "somevalue" and "novalue" are
no values. An empty map may be written `[]`.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Sequence

from data_prep.kb import forms
from data_prep.kb.sources import rows as kb_rows

if typing.TYPE_CHECKING:
    import simdjson

_CLAIMS = frozenset(("P18", "P31", "P171", "P279"))
_QID = re.compile(r"Q[1-9][0-9]{0,17}")


@functools.cache
def _parser() -> simdjson.Parser:
    import simdjson

    return simdjson.Parser()


def parse(line: bytes, rules: kb_rows.Rules) -> kb_rows.Row:
    """An entity of the dump; `line` without the comma at its end.

    All of the line is checked (at gigabytes a second), only what is kept becomes Python objects.
    Rules apply in this order: property, no_label, unlinked (neither sitelink nor picture), types.

    Raises:
      ValueError: the line is damaged or not in the dump's format; the message is the reason.
      kb_rows.Dropped: a rule leaves it out.
    """
    # The parser is used again once nothing refers to what it parsed, `item` below included.
    try:
        item = _parser().parse(line)
    except (ValueError, RuntimeError) as error:
        # RuntimeError: numbers beyond 64 bits and too deep nesting, and what would be our fault.
        if isinstance(error, RuntimeError) and "_ERROR: " not in str(error):
            raise
        raise ValueError("broken_json") from None
    try:
        return _row(item, rules)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError("wrong_type") from None


def _row(item: simdjson.Object, rules: kb_rows.Rules) -> kb_rows.Row:
    kind = forms.clean(item["type"])
    if kind != "item":
        raise kb_rows.Dropped("property" if kind == "property" else "no_item")
    qid = item["id"]
    if not _QID.fullmatch(qid):
        raise ValueError("no_id")

    claims, links = _map(item, "claims"), _map(item, "sitelinks")
    # Asking a map of simdjson for a key that it lacks takes longer than listing a few dozen keys.
    claims = {key: claims[key] for key in _CLAIMS.intersection(claims.keys())}
    hypernyms = [_id(value) for value in _values(claims.get("P279"))]
    above = hypernyms + [_id(value) for value in _values(claims.get("P171"))]
    found = _texts(item, "labels", rules.languages)
    spellings = [(text, bit) for text, bit in zip(found, rules.bits, strict=True) if text]
    if not spellings:
        raise kb_rows.Dropped("no_label", qid, above)
    image = _values(claims.get("P18"))
    if rules.need_link_or_image and not len(links) and not image:
        raise kb_rows.Dropped("unlinked", qid, above)
    types = [_id(value) for value in _values(claims.get("P31"))]
    for kind in types:
        if kind in rules.drop_types:
            raise kb_rows.Dropped(rules.drop_types[kind], qid, above)

    aliases = _map(item, "aliases")
    wikis = frozenset(links.keys())
    for code, bit in zip(rules.languages, rules.bits, strict=True):
        spellings += [(forms.clean(alias["value"]), bit) for alias in aliases.get(code) or ()]
    label, *others = dict.fromkeys(text for text, _ in spellings)
    for code, bit in zip(rules.languages, rules.bits, strict=True):
        if (wiki := f"{code.replace('-', '_')}wiki") in wikis:
            spellings.append((forms.without_bracket(forms.clean(links[wiki]["title"])), bit))
    weight = rules.weight(len(links))
    names = [
        forms.Spelling(text, weight * (rules.alias_factor if i else 1), bit)
        for i, (text, bit) in enumerate(spellings)
    ]
    descriptions = [text for text in _texts(item, "descriptions", rules.languages) if text]
    return kb_rows.Row(
        qid,
        label,
        [other for other in others if other],
        descriptions[0] if descriptions else "",
        hypernyms,
        types,
        len(links),
        forms.clean(image[0]) if image else None,
        forms.clean(links["enwiki"]["title"]) if "enwiki" in wikis else None,
        None,
        None,
        above,
        names,
    )


def _map(item: simdjson.Object, key: str) -> simdjson.Object | dict:
    """A map of the item, perhaps empty."""
    value = item.get(key)
    if value is None or not len(value):  # an empty list, too
        return {}
    if not hasattr(value, "keys"):
        raise TypeError(key)
    return value


def _texts(item: simdjson.Object, key: str, languages: Sequence[str]) -> list[str]:
    """The texts of a map "language -> text" in the chosen languages; empty where it has none."""
    texts = _map(item, key)
    found = [texts.get(code) for code in languages]
    return ["" if text is None else forms.clean(text["value"]) for text in found]


def _values(statements: simdjson.Array | None) -> list:
    """The values of the statements of the best rank."""
    normal, preferred = [], []
    for statement in statements or ():
        rank, snak = statement["rank"], statement["mainsnak"]
        if rank != "deprecated" and snak["snaktype"] == "value":
            value = snak["datavalue"]["value"]
            (preferred if rank == "preferred" else normal).append(value)
    return preferred or normal


def _id(value: simdjson.Object) -> str:
    # Dumps before 2017 have the number alone.
    found = value.get("id")
    found = found if found is not None else f"Q{value['numeric-id']}"
    if not _QID.fullmatch(found):
        raise TypeError(found)
    return found
