"""What a mention of a person may mean when it is not a name as the knowledge base has it.

"Mr. Singh"              whose family name it is, less likely whose given name
"Howard Kingsbury Smith" who is called so without what is in the middle
"Singh Manmohan"         who is called so the other way round
"Bob Nardelli"           whose family name it is, hardly, as the given name is another's
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_prep.kb import lookup, people

# Of what people are called by a single word: family names mostly, in captions as in articles.
_ROLES = np.zeros(3, np.float32)
_ROLES[people.FAMILY], _ROLES[people.GIVEN], _ROLES[people.OTHER] = 1.0, 0.25, 0.5
_MIDDLE_LEFT_OUT, _TURNED_ROUND = 0.5, 0.25
_OTHER_GIVEN_NAME = 0.05  # than the text has


class Parts(NamedTuple):
    """Candidates of mentions, one entry each; a mention's persons once."""

    mention: np.ndarray  # int64 [c]
    entity: np.ndarray  # int32 [c]
    weight: np.ndarray  # float32 [c]


def candidates(kb: lookup.KnowledgeBase, asked: Iterable[tuple[int, str]]) -> Parts:
    """The people that mentions may mean, beside those who have the very name.

    Args:
      kb: the knowledge base.
      asked: the number and the normalised name of each mention.
    """
    names: list[tuple[int, str, float]] = []  # of people, with words left out or turned round
    single: list[tuple[int, str]] = []
    ends: list[tuple[int, str, bool]] = []  # given names, then family names
    for mention, form in asked:
        words = form.split(" ")
        single.append((mention, form))
        if len(words) == 1:
            continue
        if len(words) > 2:
            names.append((mention, f"{words[0]} {words[-1]}", _MIDDLE_LEFT_OUT))
            names.append((mention, " ".join(words[-2:]), _MIDDLE_LEFT_OUT))
            names.append((mention, " ".join(words[:-1]), _TURNED_ROUND))
        names.append((mention, " ".join([words[-1], *words[:-1]]), _TURNED_ROUND))
        ends += [(mention, words[0], False), (mention, words[-1], True)]

    found = kb.look_up([name for _, name, _ in names])
    found = found.take(np.flatnonzero(np.isin(kb.kind[found.entity], people.CODES)))
    number = np.array([mention for mention, _, _ in names], np.int64)
    factor = np.array([factor for _, _, factor in names], np.float32)
    rows = [(number[found.surface], found.entity, found.prior * factor[found.surface])]

    known = kb.look_up_parts([form for _, form in single])
    number = np.array([mention for mention, _ in single], np.int64)
    rows.append((number[known.part], known.entity, known.prior * _ROLES[known.role]))

    known = kb.look_up_parts([word for _, word, _ in ends])
    number = np.array([mention for mention, _, _ in ends], np.int64)[known.part]
    last = np.array([last for _, _, last in ends], bool)[known.part]
    fits = (known.role == people.FAMILY) == last
    both = _in_both(number, known.entity, last & fits, ~last & fits)
    weight = np.where(both, known.prior, known.prior * _OTHER_GIVEN_NAME)
    kept = last & fits
    rows.append((number[kept], known.entity[kept], weight[kept]))
    return _once(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _in_both(mention: np.ndarray, entity: np.ndarray, *among: np.ndarray) -> np.ndarray:
    """bool [c]: whether a mention's person is in each of two selections."""
    codes = mention << 32 | entity
    common = np.intersect1d(*(codes[selection] for selection in among))
    return np.isin(codes, common)


def _once(mention: np.ndarray, entity: np.ndarray, weight: np.ndarray) -> Parts:
    """Each mention's person once, with the largest weight."""
    order = np.lexsort((-weight, entity, mention))
    mention, entity, weight = mention[order], entity[order], weight[order]
    first = np.ones(len(mention), bool)
    first[1:] = (np.diff(mention) != 0) | (np.diff(entity) != 0)
    return Parts(mention[first], entity[first].astype(np.int32), weight[first].astype(np.float32))
