"""Boilerplate: what captions of the web say about the page, the file or the shop.

It is blanked out, not cut out: places in the caption stay what they are.
"""

import re
from collections.abc import Iterable

# Regular expressions, matched without regard to case.
PATTERNS = (
    r"https?://\S+|\bwww\.\S+",
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
    r"\ball rights reserved\b|©",
    # Picture agencies and shops.
    r"\bstock (?:photo|image|picture|vector|illustration|footage|video|art)s?\b",
    r"\bstock photography\b|\broyalty[- ]free\b",
    r"\b(?:free|instant|digital|high[- ]res(?:olution)?) downloads?\b",
    r"\bfree (?:shipping|delivery|returns)\b",
    r"\b(?:buy|shop|order)(?: it)? (?:now|online|here)\b",
    r"\b(?:on|for) sale\b|\bin stock\b|\bbest price\b|\badd to (?:cart|basket|bag)\b",
    r"\b(?:hd|4k|desktop|mobile|phone) (?:wallpaper|background)s?\b",
)


class Blanker:
    """Replaces every match of the patterns by as many spaces."""

    def __init__(self, patterns: Iterable[str]):
        """
        Raises:
          re.error: a pattern that is no regular expression.
        """
        joined = "|".join(f"(?:{pattern})" for pattern in patterns)
        self._pattern = re.compile(joined, re.IGNORECASE) if joined else None

    def __call__(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: " " * len(match.group()), text)
