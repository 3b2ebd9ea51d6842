"""Meanings: which candidates of a mention the caption itself makes likely. No picture, no spaCy.

The prior of an entity given a name (`kb.lookup`) is weighed by

    case      "apple" in a caption that otherwise uses capitals is hardly Apple; "it" is hardly IT.
    company   optionally: a candidate of the same kind as candidates of the other mentions is the
              likelier one (the paper's linker is collective too)
    linker    optionally: what a trained `entity_linker` of the spaCy pipeline chose (`spacy_kb`)

and the weights of a mention's candidates are divided by their sum. Short names that are words of
the language are dropped, everything else is only pushed back.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.kb import lookup

_LOWER, _CAPITALISED, _CAPITALS = 0, 1, 2  # of surfaces, as of names in the knowledge base
_SHORT = 3  # letters


class Rule(NamedTuple):
    """How candidates are weighed.

    Attributes:
      max_candidates: of a mention.
      case_penalty: factor of a candidate whose name is written with capitals where the caption,
        which uses capitals elsewhere, has none; 1 turns it off.
      company_weight: how much more likely a candidate is that shares a kind with all other
        mentions; 0 turns it off.
      linker_weight: how much more likely the choice of a trained `entity_linker` of the spaCy
        pipeline is, where it has one.
    """

    max_candidates: int
    case_penalty: float
    company_weight: float
    linker_weight: float

    @classmethod
    def of(cls, config: Mapping) -> "Rule":
        return cls(*(config[name] for name in cls._fields))


def weigh(
    kb: lookup.KnowledgeBase,
    rule: Rule,
    texts: Sequence[str],
    text_of: np.ndarray,
    surfaces: Sequence[str],
    forms: Sequence[str],
    linked: Mapping[int, str] | None = None,
) -> lookup.Candidates:
    """The candidates of mentions.

    Args:
      kb: the knowledge base.
      rule: how to weigh.
      texts: captions.
      text_of: int [m], the caption of each mention, ascending.
      surfaces, forms: m mentions as they stand in the caption, and normalised.
      linked: the id of the entity that spaCy's linker chose, by mention.

    Returns:
      At most `rule.max_candidates` of each mention, most likely first; priors of a mention sum to
      at most 1.
    """
    found = kb.look_up(forms)
    weights = found.prior * _case_factors(rule, found, texts, text_of, surfaces, forms)
    if rule.company_weight:
        weights = weights * _company_factors(kb, rule, found, weights, text_of)
    for mention, qid in (linked or {}).items():
        for at in np.flatnonzero(found.surface == mention):
            if kb.qid(int(found.entity[at])) == qid:
                weights[at] *= 1 + rule.linker_weight
    totals = np.bincount(found.surface, weights, minlength=len(forms))[found.surface]
    prior = (weights / np.where(totals > 0, totals, 1)).astype(np.float32)
    found = found._replace(prior=prior).take(np.flatnonzero(prior > 0))
    # Stable: of equals the knowledge base's order stays.
    found = found.take(np.lexsort((-found.prior, found.surface)))
    rank = np.arange(len(found.surface)) - np.searchsorted(found.surface, found.surface)
    return found.take(np.flatnonzero(rank < rule.max_candidates))


# --------------------------------------------------------------------------------------------- case


def _case_factors(rule, found, texts, text_of, surfaces, forms) -> np.ndarray:
    """float32, one for each of `found`."""
    mixed = np.array([not (text.islower() or text.isupper()) for text in texts], bool)
    mixed = mixed[text_of][found.surface]
    surface = np.array([_case(text) for text in surfaces], np.uint8)[found.surface]
    short = np.array([len(form) <= _SHORT for form in forms], bool)[found.surface]
    words = _function_words()
    word = np.array([form in words for form in forms], bool)[found.surface]
    acronym = found.case == _CAPITALS
    as_acronym = acronym & (surface == _CAPITALS)

    factors = np.ones(len(found.surface), np.float32)
    factors[(found.case > surface) & (mixed | (short & acronym))] = rule.case_penalty
    factors[short & word & ~(as_acronym & mixed)] = 0
    return factors


def _case(surface: str) -> int:
    if surface.isupper() and len(surface) > 1:
        return _CAPITALS
    return _CAPITALISED if any(map(str.isupper, surface)) else _LOWER


@functools.cache
def _function_words() -> frozenset[str]:
    """Words such as "it", "us" and "may", which captions hardly ever mean as names."""
    from spacy.lang.en.stop_words import STOP_WORDS

    return frozenset(STOP_WORDS)


# ------------------------------------------------------------------------------------------ company


def _company_factors(kb, rule, found, weights, text_of) -> np.ndarray:
    """1 + company_weight * the share of the other mentions with a related meaning."""
    factors = np.ones(len(weights), np.float32)
    texts = text_of[found.surface]
    for begin, end in _runs(texts):
        mentions = found.surface[begin:end]
        others = len(np.unique(mentions)) - 1
        if not others:
            continue
        kinds = [kb.kinds(entity) for entity in found.entity[begin:end].tolist()]
        related = np.array([[bool(a & b) for b in kinds] for a in kinds], np.float32)
        related *= mentions[:, None] != mentions[None, :]
        # The probability of a related meaning, summed over the other mentions.
        company = related @ weights[begin:end] / others
        factors[begin:end] = 1 + rule.company_weight * np.minimum(company, 1)
    return factors


def _runs(values: np.ndarray):
    """(begin, end) of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
