"""Boilerplate: what captions of the web say about the page, the file or the shop.

It is blanked out, not cut out: places in the caption stay what they are.
"""

import html
import re
from collections.abc import Iterable

# Regular expressions, matched without regard to case.
PATTERNS = (
    r"https?://\S+",
    r"\bwww\.\S+",
    r"\.(?:jpe?g|png|gif|webp|svg|bmp|tiff?)\b",
    # What cameras and screens call their files, and sizes.
    r"\b(?:img|dsc[fn]?|pict|mvi|pxl|screen ?shot)[ _-]?\d{2,}\w*",
    r"\b\d{3,5} ?[x×] ?\d{3,5}(?: ?(?:px|pixels?))?\b",
    # Page furniture.
    r"\b(?:photo|image|picture|img|fig(?:ure)?|slide|thumbnail)s? ?(?:#|no\.?|nr\.?)? ?\d+"
    r"(?: ?(?:of|/) ?\d+)?\b",
    r"\bclick (?:here|(?:on (?:the )?\w+ )?(?:to|for)(?: \w+){1,2})",
    r"\b(?:read|see|view|show|load|learn) more\b",
    r"\b(?:image|photo|picture) (?:courtesy|credit)s?\b:?",
    r"\ball rights reserved\b",
    r"©",
    # Picture agencies and shops.
    r"\bstock (?:photo|image|picture|vector|illustration|footage|video|art)s?\b",
    r"\bstock photography\b",
    r"\broyalty[- ]free\b",
    r"\b(?:free|instant|digital|high[- ]res(?:olution)?) downloads?\b",
    r"\bfree (?:shipping|delivery|returns)\b",
    r"\b(?:buy|shop|order)(?: it)? (?:now|online|here)\b",
    r"\b(?:on|for) sale\b",
    r"\b(?:in stock|best price|add to (?:cart|basket|bag))\b",
    r"\b(?:hd|4k|desktop|mobile|phone) (?:wallpaper|background)s?\b",
)

# Words that captions of the web say of any picture: they are looked at, as parts of longer names
# ("photo booth"), but alone they are hardly what the picture shows.
WORDS = frozenset(
    re.findall(
        r"\w+",
        "album background backgrounds bargain caption clipart close closeup closeups copyright"
        " download downloads footage free gallery gif hd hq icon icons illustration illustrations"
        " image images img jpeg jpg pdf photo photograph photographer photographs photography"
        " photos pic pics picture pictures png poster posters preview print prints sale screenshot"
        " screenshots shot snapshot snapshots stock svg thumbnail thumbnails up vector vectors"
        " video videos view views wallpaper wallpapers",
    )
)

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def unescape(text: str) -> tuple[str, list[int] | None]:
    """A text with the characters that HTML's entities stand for, and where they come from.

    Returns:
      The text, and for each of its characters, and its end, the place in the given one; None where
      the text is as it was.
    """
    if "&" not in text or not _ENTITY.search(text):
        return text, None
    pieces, places, at = [], [], 0
    for match in _ENTITY.finditer(text):
        found = html.unescape(match[0])
        places += [*range(at, match.start()), *[match.start()] * len(found)]
        pieces += [text[at : match.start()], found]
        at = match.end()
    places += range(at, len(text) + 1)
    return "".join([*pieces, text[at:]]), places


def _begins_a_word(pattern: str) -> bool:
    """Whether all that a pattern matches begins where a word does."""
    bare, before = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "", pattern), None
    while bare != before:  # without its groups
        bare, before = re.sub(r"\([^()]*\)", "", bare), bare
    return pattern.startswith(r"\b") and "|" not in bare


class Blanker:
    """Replaces every match of the patterns by as many spaces."""

    def __init__(self, patterns: Iterable[str]):
        """
        Raises:
          re.error: a pattern that is no regular expression.
        """
        anywhere, words = [], []  # those of words in one group, so that each place is asked once
        for pattern in patterns:
            re.compile(pattern)
            (words if _begins_a_word(pattern) else anywhere).append(f"(?:{pattern})")
        if words:
            anywhere.append(rf"\b(?:{'|'.join(words)})")
        self._pattern = re.compile("|".join(anywhere), re.IGNORECASE) if anywhere else None

    def __call__(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: " " * len(match.group()), text)
