"""Mentions that spaCy finds: named entities and, if asked, noun chunks."""

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mofi_jax.common import errors

BATCH = 256  # texts; fastest on one core, and a quarter of the memory of 1,024


class Span(NamedTuple):
    """Characters start:end of a text, how they were found, and what spaCy's linker says of them."""

    start: int
    end: int
    kind: str
    qid: str = ""


def spacy_spans(texts: Sequence[str], model: str, noun_chunks: bool) -> Iterator[list[Span]]:
    """The spans of the named entities, then of the noun chunks, of each text.

    Articles, possessives and punctuation at the edges are cut off.

    Args:
      texts: any number.
      model: spaCy pipeline, a package's name or a folder.
      noun_chunks: whether to parse for them, which takes a third more time.
    """
    nlp = load_spacy(model, noun_chunks)
    for first in range(0, len(texts), BATCH):
        # Without the zone the vocabulary grows with every new word for the life of the process.
        with nlp.memory_zone():
            for doc in nlp.pipe(texts[first : first + BATCH], batch_size=BATCH):
                spans = [(span, "ner", span.kb_id_) for span in doc.ents]
                if noun_chunks:
                    spans += [(span, "noun_chunk", "") for span in doc.noun_chunks]
                trimmed = ((_trim(span), kind, qid) for span, kind, qid in spans)
                yield [Span(*ends, kind, qid) for ends, kind, qid in trimmed if ends is not None]


# What begins a noun phrase without being part of a name.
_DETERMINERS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those my your his her its our their some any each every no all"
        " both another what which whose i you he she it we they me him us them",
    )
)


def _trim(span) -> tuple[int, int] | None:
    tokens = [token for token in span if not token.is_space]
    while tokens and (tokens[0].lower_ in _DETERMINERS or not _is_word(tokens[0].text)):
        tokens.pop(0)
    while tokens and (tokens[-1].text in ("'s", "’s", "'", "’") or not _is_word(tokens[-1].text)):
        tokens.pop()
    return (tokens[0].idx, tokens[-1].idx + len(tokens[-1])) if tokens else None


def _is_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def pipeline_files(model: str) -> list[str]:
    """All files of a pipeline, a package or a folder: what it finds depends on nothing else.

    Raises:
      BadInput: there is none of this name.
    """
    folder = model
    if not os.path.isdir(model):
        found = importlib.util.find_spec(model) if model.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise errors.BadInput(
                f"config.spacy_model={model!r} is no installed spaCy package and no folder of a"
                " pipeline: pip install it, or name another."
            )
        [folder] = found.submodule_search_locations
    return sorted(
        os.path.join(at, name)
        for at, _, names in os.walk(folder)
        for name in names
        if os.path.basename(at) != "__pycache__"
    )


@functools.lru_cache(maxsize=1)
def load_spacy(model: str, noun_chunks: bool):
    """The pipeline with just what finds named entities and, if asked, noun chunks."""
    import spacy

    from data_prep.kb import spacy_adapter  # noqa: F401  a pipeline's entity_linker finds it by its name

    unused = ["lemmatizer", "textcat", "senter"]
    if not noun_chunks:  # they need the parser and the parts of speech
        unused += ["parser", "tagger", "attribute_ruler"]
    return spacy.load(model, exclude=unused)
