"""The links of an article of Wikipedia, and its text as readers see it.

Patterns instead of a parser: of wikitext only links and what hides them matters here, and the
English Wikipedia has 100 GB of it. mwparserfromhell, which knows the whole grammar, reads a few MB
a second and a core, these patterns ten times as many.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection
from typing import NamedTuple

# What is not shown as text, or not as prose.
_HIDDEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(nowiki|pre|math|ref|source|syntaxhighlight|gallery|score|timeline)\b"
    r"(?:[^<>]*/>|[^<>]*>.*?(?:</\1\s*>|\Z))",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]([^\W\d_]*)")
_EXTERNAL = re.compile(r"\[?\bhttps?://[^\s\]<>]+ ?")
_BREAK = re.compile(r"</?(?:br|dd|div|dl|dt|h[1-6]|hr|li|ol|p|t[dhr]|ul)\b[^<>]*>", re.IGNORECASE)
_MARKUP = re.compile(r"'{2,}|</?[a-zA-Z][^<>]*>|__[A-Z]+__|\[|\]")
_BLANKS = re.compile(r"[\s_]+")
_DEEPEST = 20  # templates in templates, links in captions of pictures


class Article(NamedTuple):
    """What an article shows.

    Attributes:
      links: (text, title of the page) of each link to an article, in the order of their ends.
      text: what is to be read, links as their texts.
    """

    links: list[tuple[str, str]]
    text: str


def title_of(target: str) -> str:
    """The title that a link's target means: spaces for underscores, first letter upper case."""
    title = _BLANKS.sub(" ", html.unescape(target).partition("#")[0]).strip()
    return title[:1].upper() + title[1:]


def read(wikitext: str, namespaces: Collection[str]) -> Article:
    """Reads an article.

    Args:
      wikitext: its source.
      namespaces: names of those that are not the articles', in lower case.
    """
    text = _HIDDEN.sub(" ", wikitext)
    for _ in range(_DEEPEST):  # the innermost first
        text, found = _TEMPLATE.subn("", text)
        if not found:
            break
    links: list[tuple[str, str]] = []

    def shown(match: re.Match[str]) -> str:
        target, _, label = match[1].partition("|")
        target = target.strip()
        prefix, colon, _ = target.lstrip(":").partition(":")
        if colon and _BLANKS.sub(" ", prefix).strip().lower() in namespaces:
            # Of a picture the caption is shown, of a category nothing.
            return label.rpartition("|")[2] + match[2] if label else ""
        label = _plain(label or target.lstrip(":")) + match[2]
        if (title := title_of(target.lstrip(":"))) and label.strip():
            links.append((" ".join(label.split()), title))
        return label

    for _ in range(_DEEPEST):
        text, found = _LINK.subn(shown, text)
        if not found:
            break
    return Article(links, _plain(text))


def _plain(text: str) -> str:
    if "://" in text:
        text = _EXTERNAL.sub(" ", text)
    if "<" in text:
        text = _BREAK.sub(" ", text)
    return html.unescape(_MARKUP.sub("", text))
