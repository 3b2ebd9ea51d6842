"""Mentions of a block of captions: the gazetteer's names and spaCy's, one for each place.

A name of the knowledge base that spaCy finds too has its type; one that is a small piece of what
spaCy finds is told to be that; and a person's name of several words says what its last word means
where it stands again.
"""

from __future__ import annotations

import html
import itertools
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.kb import lookup, names, people
from data_prep.linking import ner, words

Reader = Callable[[Sequence[str]], Iterable[Sequence[ner.Span]]]  # texts -> their spans
ELSEWHERE = "elsewhere"  # kind of mentions below a text, which only say what those in it mean


class Mention(NamedTuple):
    """Characters start:end of a text, who found them, their normal form, spaCy's type (a code)."""

    start: int
    end: int
    kind: str
    form: str
    label: int = ner.NONE
    qid: str = ""
    full: tuple[tuple[int, int], ...] = ()  # where whole names with it stand


class Text(NamedTuple):
    """A text, and the mentions in it and in the lines below it, people who are named elsewhere."""

    text: str
    mentions: list[Mention]  # by their places
    was_read: bool  # by spaCy
    capitals: int  # `words.capitals`, of the text without those lines


class Forms:
    """Names that occur in a block, each looked up once.

    Attributes:
      number: of each normalised name.
      found: the candidates of all.
    """

    def __init__(self, kb: lookup.KnowledgeBase):
        self._kb = kb
        self.number: dict[str, int] = {}
        self.found = kb.look_up([])

    def add(self, forms: Iterable[str]) -> None:
        new = [form for form in dict.fromkeys(forms) if form not in self.number]
        found = self._kb.look_up(new)
        found = found._replace(surface=found.surface + len(self.number))
        self.number.update(zip(new, itertools.count(len(self.number))))
        self.found = lookup.Candidates(*map(np.concatenate, zip(self.found, found, strict=True)))

    def open(self) -> np.ndarray:
        """bool, by name: whether spaCy may tell if a proper name is meant, or which.

        Several words, one in no dictionary, mean what they say.
        """
        is_open = np.zeros(len(self.number), bool)
        is_open[self.found.surface[self.found.case > words.LOWER]] = True
        forms = list(self.number)
        for number in np.flatnonzero(is_open).tolist():
            form = forms[number]
            is_open[number] = " " not in form or words.use(form) != words.OTHER
        return is_open

    def of_people(self, kb: lookup.KnowledgeBase) -> set[int]:
        """The numbers of the names whose likeliest candidate is a person."""
        first = np.flatnonzero(np.diff(self.found.surface, prepend=-1))
        person = np.isin(kb.kind[self.found.entity[first]], people.CODES)
        return set(self.found.surface[first[person]].tolist())


def gather(
    texts: Sequence[str],
    kb: lookup.KnowledgeBase,
    forms: Forms,
    read: Reader | None,
    every: bool,
    people: Sequence[str],
) -> list[Text]:
    """The mentions of each text.

    Args:
      texts: what is to be seen of captions.
      kb: the knowledge base.
      forms: collects the names.
      read: asks spaCy; None: without it.
      every: ask it about every text; otherwise only where its answer counts: where a name is
        `Forms.open` and has a capital, without which the small model sees none, or where a
        capitalised word is a part of a person's name and no name explains it.
      people: whom the pages of texts name (`people_named`), which become the lines below them.
    """
    scanned = [kb.scan(text) for text in texts]
    forms.add(match.form for matches in scanned for match in matches)
    found = [
        {(start, end): Mention(start, end, "gazetteer", form) for start, end, form in matches}
        for matches in scanned
    ]
    capitals = [words.capitals(text) for text in texts]
    parts = [
        _parts_of_people(text, matches, kb) if code != words.ONE_CASE else []
        for text, matches, code in zip(texts, scanned, capitals, strict=True)
    ]
    asked = np.zeros(len(texts), bool)
    if read is not None:
        is_open = forms.open()
        asked[:] = [
            every
            or bool(unexplained)
            or any(
                is_open[forms.number[match.form]] and not text[match.start : match.end].islower()
                for match in matches
            )
            for text, matches, unexplained in zip(texts, scanned, parts, strict=True)
        ]
        rows = np.flatnonzero(asked).tolist()
        for row, spans in zip(rows, read([_as_title(texts[row]) for row in rows]), strict=True):
            for span in spans:
                _add_span(texts[row], found[row], span)
    for own, unexplained in zip(found, parts, strict=True):
        for part in unexplained:
            covers = (m for m in own.values() if m.start < part.end and part.start < m.end)
            if all(m.kind == "ner" and m.form.count(" ") >= _SENTENCE for m in covers):
                own[part.start, part.end] = part
    for text, own, lines in zip(texts, found, people, strict=True):
        own.update(_elsewhere(len(text) + 1, lines))
    texts = [
        f"{text}\n{lines}" if lines else text for text, lines in zip(texts, people, strict=True)
    ]
    forms.add(mention.form for own in found for mention in own.values())
    named = forms.of_people(kb)
    for text, own in zip(texts, found, strict=True):
        full = [m for m in own.values() if " " in m.form and forms.number[m.form] in named]
        if full:
            _add_short_names(text, own, full)
    forms.add(mention.form for own in found for mention in own.values())
    return [
        Text(text, sorted(own.values()), *known)
        for text, own, *known in zip(texts, found, asked.tolist(), capitals, strict=True)
    ]


def people_named(texts: Sequence[str], kb: lookup.KnowledgeBase) -> list[str]:
    """The whole names of people in titles, addresses and the like: a line for each, in order.

    All have capitals: addresses have none.
    """
    scanned = dict.fromkeys(texts, ())
    for text in filter(None, scanned):
        matches = kb.scan(urllib.parse.unquote(html.unescape(text)))
        scanned[text] = tuple(dict.fromkeys(match.form for match in matches if " " in match.form))
    forms = Forms(kb)
    forms.add(itertools.chain.from_iterable(scanned.values()))
    named = forms.of_people(kb)
    lines = {
        text: "\n".join(form.title() for form in found if forms.number[form] in named)
        for text, found in scanned.items()
    }
    return [lines[text] for text in texts]


def _elsewhere(start: int, lines: str) -> Iterator[tuple[tuple[int, int], Mention]]:
    for line in lines.splitlines():
        end = start + len(line)
        yield (start, end), Mention(start, end, ELSEWHERE, names.normalize(line))
        start = end + 1


def _as_title(text: str) -> str:
    """A text all in capitals as spaCy sees more in it: "MERKEL IN BERLIN" is one name to it."""
    if not text.isupper():
        return text
    titled = words.WORD.sub(lambda word: word[0].capitalize(), text)
    return titled if len(titled) == len(text) else text  # places stay what they are


_SENTENCE = 3  # spaces; so long a span is more than a name


def _add_span(text: str, own: dict[tuple[int, int], Mention], span: ner.Span) -> None:
    start, end, label = span.start, span.end, ner.CODES.get(span.label, ner.NONE)
    if (start, end) in own and not any(
        (start, end) != place and start <= place[0] < end for place in own
    ):
        own[start, end] = own[start, end]._replace(label=label, qid=span.qid)
        return
    tokens = names.tokenize(text[start:end])
    if label == ner.PERSON:
        tokens = people.without_titles(tokens)
    if not tokens:
        return
    end, start = start + tokens[-1].end, start + tokens[0].start
    covered = False
    for place, mention in own.items():
        common = min(place[1], end) - max(place[0], start)
        if common <= 0:
            continue
        whole = 2 * common >= end - start
        if whole and place != (start, end):
            covered = covered or label != ner.PERSON or " " in mention.form
        inside = start <= place[0] and place[1] <= end
        if whole or inside:
            own[place] = mention._replace(
                label=label if whole else ner.INSIDE, qid=span.qid if whole else mention.qid
            )
    if not covered and (start, end) not in own:
        form = " ".join(token.form for token in tokens)
        own[start, end] = Mention(start, end, "ner", form, label, span.qid)


def _parts_of_people(
    text: str, matches: Sequence[lookup.Match], kb: lookup.KnowledgeBase
) -> list[Mention]:
    """Capitalised words that no name explains and that are a part of a person's.

    spaCy's small model passes over half of the family names that begin a caption.
    """
    found = []
    for match in words.CAPITALISED_WORD.finditer(text):
        word = match[0]
        form = word.lower() if word.isascii() else names.normalize(word)
        if kb.is_part(form) and words.use(form) >= words.NOUNS:
            start, end = match.span()
            if not any(m.start < end and start < m.end for m in matches):
                found.append(Mention(start, end, "name_part", form))
    return found


def _add_short_names(text: str, own: dict, full: list[Mention]) -> None:
    """Words of a person's whole name that stand elsewhere in the text, alone."""
    lower = text.lower()
    if len(lower) != len(text):
        return  # places in it are not those in the text
    for mention in full:
        first, last = mention.form.partition(" ")[0], mention.form.rpartition(" ")[2]
        for word in (last, first) if last != first else (last,):
            if lower.count(word) < 2 or len(word) < 3 or words.use(word) < words.NOUNS:
                continue
            end = 0
            while (start := lower.find(word, end)) >= 0:
                end = start + len(word)
                if lower[start - 1 : start].isalnum() or lower[end : end + 1].isalnum():
                    continue
                if any(a <= start and end <= b and (a, b) != (start, end) for a, b in own):
                    continue  # a piece of a longer name
                before = own.get((start, end)) or Mention(start, end, "short_name", word)
                if not before.full or mention.kind == ELSEWHERE:  # of the text's own the first
                    places = (*before.full, (mention.start, mention.end))
                    own[start, end] = before._replace(full=places)
