"""The kind of an entity without types, guessed from its description or the form of its label.

The head noun of an English description says what a thing is ("American actor and film director",
"1994 film by X", "species of beetle"); nouns.tsv.gz knows the kinds of nouns. A label without a
description may look like those of the people, and not like those of the others, whose kinds are
known.
"""

from __future__ import annotations

import collections
import functools
import gzip
import importlib.resources
import math
import re

from data_prep.kb import forms, names

NOUNS = "nouns.tsv.gz"  # made by `data_prep.kb.sources.nouns`

# What the frequent senses in WordNet do not tell of the heads of descriptions, and words it lacks.
_HEADS = {
    "group": "administration airline alliance authority bank board body broadcaster carrier"
    " chain conglomerate cooperative co-operative council dealer distributor duo enterprise"
    " federation franchise label lender manufacturer network office operator organisation"
    " people provider publisher retailer seller service startup subsidiary supplier system"
    " tribe trio trust utility wholesaler developer brewery",
    "place": "archdiocese borough canton capital commune comuna comune country county diocese"
    " frazione gmina hamlet intercommunality kingdom locality municipality neighborhood"
    " neighbourhood oblast park powiat prefecture raion republic seat settlement state suburb"
    " territory township verbandsgemeinde voivodeship ward zone",
    "building": "airport cinema courthouse library shop stadium store supermarket theater theatre",
    "work": "album anime article comic ep drawing episode film manga miniseries"
    " painting periodical record series show sitcom soundtrack videogame webcomic",
    "product": "brand model trademark",
    "person": "footballer filmmaker guitarist keyboardist politician rapper showrunner"
    " singer-songwriter songwriter streamer vlogger youtuber",
    "event": "championship edition season tournament war",
    "nature": "asteroid exoplanet galaxy island mountain peak volcano",
    "abstract": "award currency discipline genre honor honour position prize profession rank"
    " religion study subgenre title",
}
_HEADS = {word: kind for kind, words in _HEADS.items() for word in words.split()} | {
    "family name": "name",
    "given name": "name",
    "surname": "name",
    "video game": "work",
    "television series": "work",
    "tv series": "work",
    "web series": "work",
    "media franchise": "work",
    "film franchise": "work",
    "car model": "product",
    "school district": "group",
    "chain restaurant": "group",
    "chain store": "group",
    "disambiguation": "wikimedia",
}
# "species of beetle": what it is comes after "of".
_OF_WHAT = frozenset(
    re.findall(
        r"\w+",
        "breed class cultivar family form genus kind member one order part piece species strain"
        " style subclass subspecies tribe type variety",
    )
)
_VERBS = ("ed", "held", "ing", "ly", "spoken", "written")
_CUT = re.compile(
    r"[;:.]| (?:across|along|at|between|by|during|for|from|in|into|is|known|made|near|of|on|or|run"
    r"|serving|that|to|under|used|was|where|which|who|whose|with|within)\b"
)
_LIST = re.compile(r",(?: and)? | and ")
_DOT = re.compile(r"\b([a-z])\.")  # "u.s."
_DATES = re.compile(r"^(?:born )?[\d\s–-]+;\s*")
_OF = re.compile(r"(\S+) of (?:the |a |an )?(.*)")
_BRACKETS = re.compile(r"\s*\([^()]*\)")
_FICTION = re.compile(r"\b(?:fictional|fictitious|mythical|mythological|legendary)\b")
_PERSONS = re.compile(r"[a-z-]{3,}(?:er|or|ist|man|woman)")
_PAGES = re.compile(
    r"(?:list of|category:|template:|portal:|module:|wikipedia:) ?\w", re.IGNORECASE
)


@functools.cache
def _nouns() -> dict[str, str]:
    data = importlib.resources.files(__package__).joinpath(NOUNS).read_bytes()
    lines = gzip.decompress(data).decode().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    found = {word: kind for kind, words in rows for word in words.split(",")}
    # A compound of a word that is here is of its kind.
    return {word: kind for word, kind in found.items() if word.split()[-1] not in _HEADS} | _HEADS


@functools.lru_cache(maxsize=1 << 14)
def from_description(text: str) -> str | None:
    """The kind that an English description tells, or None."""
    text = _BRACKETS.sub("", text).strip().lower()
    if text.startswith("wikimedia "):
        return "wikimedia"
    kind = _of_clause(_DOT.sub(r"\1", _DATES.sub("", text)))
    if kind in (None, "person", "animal", "group") and _FICTION.search(text):
        return "character"
    return kind


def _of_clause(text: str) -> str | None:
    clause, *rest = _CUT.split(text, maxsplit=1)
    parts = _LIST.split(clause)
    match = _OF.match(text, clause.rfind(" ") + 1) if rest and len(parts) == 1 else None
    if match and match[1] in _OF_WHAT and (kind := _of_clause(match[2])):
        return kind
    found = [kind for kind in map(_of_words, parts) if kind]
    if not found:
        return None
    # "pulp and paper manufacturer" is a manufacturer, "actress and model" an actress.
    shared = " and " in clause and (found[0] != "person" or found[1:] == ["group"])
    return found[-1] if shared else found[0]


def _of_words(text: str) -> str | None:
    words = text.replace("/", " ").replace("–", "-").split()
    if not words:
        return None
    nouns = _nouns()
    while len(words) > 1 and words[-1].endswith(_VERBS) and words[-1] not in nouns:
        words.pop()  # "company operating"

    def known(last: str) -> str | None:
        return nouns.get(" ".join([*words[-2:-1], last])) or nouns.get(last)

    if kind := known(words[-1]):
        return kind
    for last in (*names.singulars(words[-1]), words[-1].rpartition("-")[2]):
        if kind := known(last):
            return kind
    return "person" if _PERSONS.fullmatch(words[-1]) else None


def from_row(label: str, description: str) -> str | None:
    """The kind that an entity's description tells, else the bracket in its label."""
    if _PAGES.match(label):
        return "wikimedia"
    kind = from_description(description) if description else None
    if kind is None and (bare := forms.without_bracket(label)) != label:
        kind = from_description(label[len(bare) :].strip(" ()"))
    return kind


# A word of a person's name, and one that may be small: "von", "de'".
_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[.'’-](?=[^\W\d_]))*[.’']?")
_SMALL = re.compile(r"[^\W\d_]{1,5}'?|(?:al|bin|d|el|l)['’-][^\W\d_]+")
_REGNAL = re.compile(
    r" [IVX]+$| [IVX]+ of |, (?:\w+ ){0,2}(?:count|duke|earl|king|lord|prince)", re.I
)
_TITLE = re.compile(
    r"(?:arch)?duke|(?:arch)?duchess|count(?:ess)?|emperor|empress|king|lady|lord|pope"
    r"|prince(?:ss)?|queen|saint|sir|sultan",
    re.IGNORECASE,
)


class Labels:
    """What labels of people look like: the words they begin and end with, against other labels."""

    def __init__(self):
        self._counts = collections.Counter[tuple[bool, bool, str]]()  # person, last word, word

    def learn(self, label: str, person: bool) -> None:
        """Counts the words of a label of known kind."""
        words = forms.without_bracket(label).partition(",")[0].split()
        if len(words) > 1:
            self._counts[person, False, words[0]] += 1
            self._counts[person, True, words[-1]] += 1
            self._counts[person, False, ""] += 1

    def is_person(self, label: str) -> bool:
        """Whether a label looks like a person's name.

        Two to six capitalised words without digits, small ones only in between; then naive Bayes
        over its first and last word, with less for common nouns and more for titles and numerals.
        """
        bare = forms.without_bracket(label)
        words = bare.partition(",")[0].split()
        if not 2 <= len(words) <= 6 or not all(map(_WORD.fullmatch, words)):
            return False
        if not (words[0][0].isupper() and words[-1][0].isupper()):
            return False
        if any(word[0].islower() and not _SMALL.fullmatch(word) for word in words):
            return False
        people, others = (self._counts[person, False, ""] + 1000 for person in (True, False))
        if people == 1000:  # nothing says that there are any
            return False
        nouns, last = _nouns(), words[-1].lower()
        score = 0.7
        for at_end, word in ((False, words[0]), (True, words[-1])):
            known = self._counts[True, at_end, word] * min(others / people, 5)
            score += math.log((known + 0.5) / (self._counts[False, at_end, word] + 0.5))
        score -= words[0].lower() in nouns
        score -= 2 * (last in nouns or any(single in nouns for single in names.singulars(last)))
        if _TITLE.fullmatch(words[0]) or _REGNAL.search(bare):
            score += 3
        return score > 0
