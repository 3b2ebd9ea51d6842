"""Meanings: how likely a mention means each of its candidates, or nothing. No picture, no spaCy.

The odds of a candidate against nothing are those of its name, times its prior given the name
(`kb.lookup`), times what the caption says for or against it:

    case      "apple" in a text that minds case is hardly Apple, "Apple" within a sentence is
    NER       spaCy's type of the mention agrees with the candidate's kind, or contradicts it
              (nothing contradicts a whole name of several words); a name that is a piece of
              another, or that spaCy passes over, is hardly one
    language  a name in another language than the caption's
    linker    what a trained `entity_linker` of the spaCy pipeline chose (`spacy_kb`)

p(candidate) = its odds / (nil_weight + the odds of all), so that what is left is p(nothing). Case,
NER and language judge proper names alone: of everyday things the small models know nothing.

How often a name means anything where nothing else is known. By anchors, where the base has them, a
name is as likely meant as not from a link probability of 6.5 % on (Milne and Witten, Learning to
link with Wikipedia, 2008: below it they link nothing). Otherwise by `words.use`: one of a few round
numbers, which no data fitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.kb import forms as kb_forms
from data_prep.kb import kinds, lookup, people
from data_prep.linking import mentions as mention_rows
from data_prep.linking import ner, words
from data_prep.linking import people as linked_people

_USUALLY, _AS_OFTEN_AS_NOT, _SELDOM, _HARDLY, _NEVER = 0.9, 0.5, 0.1, 0.02, 0.002
_LINKABLE = 0.065  # link probability
# Ordinary words in a row: 1, 2, 3, more; of nouns one less does.
_BY_WORDS = (_HARDLY, _SELDOM, 0.3, _AS_OFTEN_AS_NOT)
# Kinds that dictionaries have names of; works and brands are named by words.
_NAMED = ("person", "character", "place", "nature", "building", "event")
_IN_DICTIONARIES = [kinds.KINDS.index(k) for k in _NAMED]
# Kinds of which each thing has a name of its own, and an everyday word only by the way: "tiger"
# of a shop, "en" of English.
_OF_ITS_OWN = ("person", "character", "group", "place", "building", "work", "product")
_OF_ITS_OWN = [kinds.KINDS.index(k) for k in (*_OF_ITS_OWN, "communication")]
# Kinds whose names are often words for something else ("Black Cat"), in capitals as well.
_WORDS_FOR_NAMES = [kinds.KINDS.index(k) for k in ("work", "group", "communication", "abstract")]
_WORDS_FOR_NAMES = [*_WORDS_FOR_NAMES, lookup.UNKNOWN]
_FLOOR = 0.01  # mentions that less likely mean anything have no candidates
_LONG = 4  # words; longer names are hardly those of people
_OTHER_LANGUAGE = 0.25
_SHORT, _CODE = 3, 2  # letters
_OTHER_SENSE = 0.05  # of a word in one text (Gale et al., One sense per discourse, 1992: 2 to 6 %)


class Rule(NamedTuple):
    """How candidates are weighed: factors of odds, 1 turns one off, but `nil_weight`.

    Attributes:
      max_candidates: of a mention.
      case_weight: of capitals that a name of the base asks for.
      ner_weight: of a type of spaCy's that agrees with the kind, or contradicts it.
      linker_weight: of the choice of a trained `entity_linker` of the pipeline, where it has one.
      nil_weight: of nothing; 0: every name that has candidates means one of them.
    """

    max_candidates: int
    case_weight: float
    ner_weight: float
    linker_weight: float
    nil_weight: float

    @classmethod
    def of(cls, config: Mapping) -> Rule:
        return cls(*(config[name] for name in cls._fields))


class Meanings(NamedTuple):
    """Candidates of mentions, most likely first within a mention."""

    mention: np.ndarray  # int64 [c], ascending
    entity: np.ndarray  # int32 [c]
    prior: np.ndarray  # float32 [c], of sum at most 1 in a mention: the rest is for nothing


def weigh(
    kb: lookup.KnowledgeBase,
    rule: Rule,
    found: Sequence[mention_rows.Text],
    forms: mention_rows.Forms,
    languages: np.ndarray,
) -> Meanings:
    """The candidates of the mentions of texts, at most `rule.max_candidates` of each.

    Args:
      kb: the knowledge base.
      rule: how to weigh.
      found: n texts, and what stands in each.
      forms: all names that occur, looked up.
      languages: uint16 [n], the bits of the languages a text may be in.
    """
    mentions = [mention for text in found for mention in text.mentions]
    text_of = np.repeat(np.arange(len(found)), [len(text.mentions) for text in found])
    traits = _Traits.of(found)
    rows = _rows(kb, forms, mentions, traits)
    kind = kb.kind[rows.entity]
    rows, demoted = _with_capitals(rows, kind, kb.has_capital, traits)

    odds = rows.prior * _name_odds(rows, kind, traits, demoted)
    odds *= _case_factor(rule, rows, traits)
    odds *= _ner_factor(rule, rows, kind, traits)
    spoken = languages[text_of][rows.surface]
    odds[(rows.languages != 0) & (rows.languages & spoken == 0)] *= _OTHER_LANGUAGE
    for number, mention in enumerate(mentions):
        if mention.qid:
            for at in np.flatnonzero(rows.surface == number):
                if kb.qid(int(rows.entity[at])) == mention.qid:
                    odds[at] *= rule.linker_weight
    rows, odds = _with_short_names(rows, odds, kind, mentions, text_of, traits)

    total = np.bincount(rows.surface, odds, minlength=len(mentions))
    # Nothing's odds, and all others' may be 0.
    whole = np.maximum(rule.nil_weight + total, np.finfo(np.float64).tiny)
    prior = odds / whole[rows.surface]
    likely = np.flatnonzero((total / whole >= _FLOOR)[rows.surface])
    # Stable: of equals the knowledge base's order stays.
    order = likely[np.lexsort((-prior[likely], rows.surface[likely]))]
    mention = rows.surface[order]
    rank = np.arange(len(mention)) - np.searchsorted(mention, mention)
    order = order[rank < rule.max_candidates]
    mention, prior = rows.surface[order], prior[order]
    kept = np.bincount(mention, prior, minlength=len(mentions))[mention]
    prior *= (total / whole)[mention] / kept
    return Meanings(mention, rows.entity[order], prior.astype(np.float32))


def within_texts(
    found: Sequence[mention_rows.Text], meanings: Meanings
) -> tuple[list[mention_rows.Text], Meanings]:
    """The same without the people that are named elsewhere."""
    inside = [[m.kind != mention_rows.ELSEWHERE for m in text.mentions] for text in found]
    texts = [
        text._replace(mentions=list(itertools.compress(text.mentions, own)))
        for text, own in zip(found, inside, strict=True)
    ]
    kept = np.array(list(itertools.chain.from_iterable(inside)), bool)
    meanings = Meanings(*(column[kept[meanings.mention]] for column in meanings))
    return texts, meanings._replace(mention=(np.cumsum(kept) - 1)[meanings.mention])


class _Traits(NamedTuple):
    """What is known of mentions before their candidates, arrays of length m."""

    use: np.ndarray  # uint8, `words.use`
    words: np.ndarray  # int32, how many
    case: np.ndarray  # uint8, of the surface
    letters: np.ndarray  # int32, how many, and spaces
    titled: np.ndarray  # bool, `words.is_titled`
    function: np.ndarray  # bool, `words.function_words_anywhere`
    tag: np.ndarray  # bool, `words.is_tag`
    minds: np.ndarray  # bool, whether the text minds case
    mixed: np.ndarray  # bool, whether it has words in lower case and others
    begins: np.ndarray  # bool, whether it would have a capital anyway
    label: np.ndarray  # uint8
    read: np.ndarray  # bool, whether spaCy has read the text

    @classmethod
    def of(cls, found: Sequence[mention_rows.Text]) -> _Traits:
        places = [(own.text, mention) for own in found for mention in own.mentions]
        sizes = [len(own.mentions) for own in found]

        def of_texts(values: Sequence[bool]) -> np.ndarray:
            return np.repeat(np.array(values, bool), sizes)

        surfaces = [text[mention.start : mention.end] for text, mention in places]
        forms = [mention.form for _, mention in places]
        functions = words.function_words_anywhere()
        minds = of_texts([own.capitals == words.MINDS_CASE for own in found])
        begins = [
            minded and words.begins_sentence(text, mention.start)
            for minded, (text, mention) in zip(minds.tolist(), places, strict=True)
        ]
        return cls(
            np.array(list(map(words.use, forms)), np.uint8),
            np.array([form.count(" ") + 1 for form in forms], np.int32),
            np.array(list(map(words.case, surfaces)), np.uint8),
            np.array(list(map(len, forms)), np.int32),
            np.array(list(map(words.is_titled, surfaces)), bool),
            np.array([form in functions for form in forms], bool),
            np.array([words.is_tag(text, m.start, m.end) for text, m in places], bool),
            minds,
            of_texts([own.capitals != words.ONE_CASE for own in found]),
            np.array(begins, bool),
            np.array([mention.label for _, mention in places], np.uint8),
            of_texts([own.was_read for own in found]),
        )


_PART = 255  # in `form`: not the name in the base, but of a person who is called so


def _rows(kb, forms, mentions, traits: _Traits) -> lookup.Candidates:
    """The candidates of all mentions, by their names and, of people, by parts of their names."""
    number = np.array([forms.number[mention.form] for mention in mentions], np.int64)
    begins = np.searchsorted(forms.found.surface, np.arange(len(forms.number) + 1))
    lengths = np.diff(begins)[number]
    own = np.repeat(begins[:-1][number] - (np.cumsum(lengths) - lengths), lengths)
    rows = forms.found.take(own + np.arange(len(own)))
    rows = rows._replace(surface=np.repeat(np.arange(len(mentions)), lengths))

    # A person, if spaCy says so; perhaps one, where capitals say something and no word is ordinary:
    # its small model gives lone names any type.
    noun = np.zeros(len(mentions), bool)
    noun[rows.surface[rows.case == words.LOWER]] = True
    perhaps = (
        (traits.mixed | (traits.label > ner.INSIDE))
        & (traits.case == words.CAPITALISED)
        & (traits.use >= words.NOUNS)
    )
    perhaps &= ~noun & (traits.words < _LONG) & (traits.label != ner.INSIDE)
    people_of = np.flatnonzero(perhaps | (traits.label == ner.PERSON)).tolist()
    parts = linked_people.candidates(kb, [(i, mentions[i].form) for i in people_of])
    # Who has the very name is there already.
    fresh = ~np.isin(parts.mention << 32 | parts.entity, rows.surface << 32 | rows.entity)
    parts = linked_people.Parts(*(column[fresh] for column in parts))
    size = len(parts.mention)
    added = lookup.Candidates(
        parts.mention,
        parts.entity,
        parts.weight,
        np.full(size, words.CAPITALISED, np.uint8),
        np.full(size, _PART, np.uint8),
        np.zeros(size, np.uint16),
        np.full(size, np.nan, np.float32),
    )
    rows = lookup.Candidates(*map(np.concatenate, zip(rows, added, strict=True)))
    return rows.take(np.argsort(rows.surface, kind="stable"))


def _with_capitals(
    rows: lookup.Candidates, kind: np.ndarray, has_capital: np.ndarray, traits: _Traits
) -> tuple[lookup.Candidates, np.ndarray]:
    """Rows with the case that names should have, and which of them (bool) are not written so.

    Bases have names in lower case of what has a capital: codes ("bo" of Bolivia), logos ("tiger").
    """
    demoted = (rows.case == words.LOWER) & has_capital[rows.entity]
    demoted &= np.isin(kind, _OF_ITS_OWN) & (traits.words[rows.surface] == 1)
    short = traits.letters[rows.surface] <= _SHORT
    should = np.where(short, words.CAPITALS, words.CAPITALISED).astype(rows.case.dtype)
    return rows._replace(case=np.where(demoted, should, rows.case)), demoted


def _name_odds(
    rows: lookup.Candidates, kind: np.ndarray, traits: _Traits, demoted: np.ndarray
) -> np.ndarray:
    """float64: of a name meaning anything against nothing, by the name alone."""
    at = rows.surface
    use, count = traits.use[at], traits.words[at]
    chance = np.full(len(at), _USUALLY)
    ordinary, nouns = use == words.ORDINARY, use == words.NOUNS
    by_words = np.array([*_BY_WORDS, _BY_WORDS[-1]])
    count = np.minimum(count, len(_BY_WORDS))
    chance[ordinary] = by_words[count - 1][ordinary]
    chance[nouns] = by_words[count][nouns]
    chance[nouns & np.isin(kind, _IN_DICTIONARIES) & ~demoted] = _AS_OFTEN_AS_NOT
    # Nobody writes "Golden Gate Bridge" of another.
    whole = nouns & (traits.words[at] > 1) & traits.titled[at] & (rows.form == kb_forms.EXACT)
    chance[whole & (rows.case > words.LOWER) & ~np.isin(kind, _WORDS_FOR_NAMES)] = _USUALLY
    known = ~np.isnan(rows.linked)
    chance[known] = rows.linked[known] / (rows.linked[known] + _LINKABLE)
    # Where the base has the word as such, it is that or one of its other senses.
    noun = _is_noun(rows, len(traits.use))
    chance[noun[at]] = _USUALLY
    # Without capitals, "de" and "bo" are words of some language.
    bare = (traits.case[at] == words.LOWER) | (
        (traits.case[at] == words.CAPITALS) & ~traits.mixed[at]
    )
    bare &= traits.function[at]
    bare |= (
        (traits.letters[at] <= _CODE)
        & (rows.case == words.CAPITALS)
        & (traits.case[at] < words.CAPITALS)
    )
    chance[bare & ~known & (rows.case > words.LOWER) & (rows.form != _PART)] = _HARDLY
    chance[use == words.NOTHING] = _NEVER
    acronym = (rows.case == words.CAPITALS) & (traits.case[at] == words.CAPITALS) & traits.minds[at]
    chance[acronym] = _USUALLY
    joined = (rows.form == kb_forms.JOINED) & ~traits.tag[at] & (use != words.OTHER)
    chance[joined] = _NEVER
    chance[traits.tag[at] & (use <= words.NOUNS) & ~noun[at]] = _AS_OFTEN_AS_NOT
    chance[rows.form == _PART] = _AS_OFTEN_AS_NOT
    return chance / (1 - chance)


def _is_noun(rows: lookup.Candidates, mentions: int) -> np.ndarray:
    """bool, by mention: whether the base has the word as such."""
    noun = np.zeros(mentions, bool)
    noun[rows.surface[(rows.case == words.LOWER) & (rows.form != kb_forms.JOINED)]] = True
    return noun


def _case_factor(rule: Rule, rows: lookup.Candidates, traits: _Traits) -> np.ndarray:
    """float64: for or against a candidate by how its name and the mention are written."""
    at = rows.surface
    factor = np.ones(len(at))
    minds, surface, proper = traits.minds[at], traits.case[at], rows.case > words.LOWER
    word = (traits.letters[at] <= _SHORT) & (traits.use[at] <= words.ORDINARY)  # "us", not "bmw"
    less = (rows.case > surface) & (minds | (word & (rows.case == words.CAPITALS)))
    # In a text without capitals the word as such is meant rather, which is half as much.
    noun = _is_noun(rows, len(traits.use))[at]
    factor[proper & noun & (surface == words.LOWER)] = rule.case_weight**-0.5
    factor[less] = 1 / rule.case_weight
    free = ~traits.begins[at] & (traits.label[at] != ner.INSIDE)
    factor[proper & minds & (surface >= rows.case) & free] = rule.case_weight
    return factor


def _ner_factor(
    rule: Rule, rows: lookup.Candidates, kind: np.ndarray, traits: _Traits
) -> np.ndarray:
    """float64: for or against a candidate by spaCy's types."""
    at = rows.surface
    agrees = ner.agreement()[traits.label[at], kind].astype(np.float64)
    # It sees nothing in a text of one case, and little in others: half a contradiction.
    unseen = (traits.label[at] == ner.NONE) & traits.read[at] & traits.minds[at]
    inside = traits.label[at] == ner.INSIDE
    agrees[unseen | (inside & ~traits.mixed[at] & (traits.case[at] == words.CAPITALS))] = -0.5
    # A whole name of several words says more than the type that the small model gives it.
    whole = (rows.form == kb_forms.EXACT) & (traits.words[at] > 1)
    agrees[~inside & whole & (agrees < 0)] = 0
    agrees[rows.case == words.LOWER] = 0
    return rule.ner_weight**agrees


def _with_short_names(rows, odds, kind, mentions, text_of, traits):
    """Rows and odds with what a person's whole name elsewhere in the text says of a short one.

    What is another's name as well ("Paris Hilton in Paris") is a person's to spaCy, or stays that.
    A word of the base's own ("a rose bush") may still mean what it says beside a page about George
    Bush, and in lower case does.
    """
    another = (rows.form == kb_forms.EXACT) & (rows.case > words.LOWER)
    another &= ~np.isin(kind, people.CODES)
    own = np.bincount(rows.surface, odds * another, minlength=len(mentions))
    taken = (own > _SELDOM) & (traits.label != ner.PERSON)
    whole = {
        (text_of[number], mention.start, mention.end): number
        for number, mention in enumerate(mentions)
        if " " in mention.form
    }
    total = np.bincount(rows.surface, odds, minlength=len(mentions))
    pairs = [
        (number, whole[text_of[number], *place])
        for number, mention in enumerate(mentions)
        for place in mention.full
    ]
    pairs = [(number, of) for number, of in pairs if total[of] > 1 and not taken[number]]
    # The text's own whole names come before those of its page.
    afar = np.array([mention.kind == mention_rows.ELSEWHERE for mention in mentions], bool)
    near = np.zeros(len(mentions), bool)
    near[[number for number, of in pairs if not afar[of]]] = True
    word = _is_noun(rows, len(mentions)) & (traits.case == words.LOWER)
    far = ~near & ~word
    pairs = [(number, of) for number, of in pairs if not afar[of] or far[number]]
    if not pairs:
        return rows, odds
    odds = odds.copy()
    others = np.isin(rows.surface, [number for number, _ in pairs])
    odds[others & (near[rows.surface] | (rows.case > words.LOWER))] *= _OTHER_SENSE
    begins = np.searchsorted(rows.surface, np.arange(len(mentions) + 1))
    short, source = [], []
    for number, of in pairs:
        for at in range(begins[of], begins[of + 1]):
            if kind[at] in people.CODES:
                short.append(number)
                source.append(at)
    added = rows.take(np.array(source, np.int64))._replace(surface=np.array(short, np.int64))
    rows = lookup.Candidates(*map(np.concatenate, zip(rows, added, strict=True)))
    odds = np.concatenate([odds, odds[source]])
    # A person once, with the larger odds.
    order = np.lexsort((-odds, rows.entity, rows.surface))
    rows, odds = rows.take(order), odds[order]
    first = np.ones(len(odds), bool)
    first[1:] = (np.diff(rows.surface) != 0) | (np.diff(rows.entity) != 0)
    return rows.take(np.flatnonzero(first)), odds[first]
