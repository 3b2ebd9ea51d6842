"""What spaCy says of a caption: named entities, and the kinds that their types agree with."""

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.kb import kinds, names
from mofi_jax.common import errors

BATCH = 256  # texts; fastest on one core, and a quarter of the memory of 1,024

# The kinds of what spaCy's types stand for (OntoNotes 5); where a type is often given to another,
# as to an organisation that of its building, both are there. After the bar, neighbours that speak
# neither for nor against it: the brand and what it sells, a town and its river.
_KINDS = {
    "PERSON": "person character",
    "NORP": "group communication",
    "FAC": "building place artifact | nature group",
    "ORG": "group product building work | food artifact",
    "GPE": "place group | nature building",
    "LOC": "place nature | building",
    "PRODUCT": "product artifact food work | group",
    "EVENT": "event",
    "WORK_OF_ART": "work product artifact",
    "LAW": "work communication",
    "LANGUAGE": "communication",
    "DATE": "time",
    "TIME": "time",
    "PERCENT": "quantity",
    "MONEY": "quantity",
    "QUANTITY": "quantity",
    "ORDINAL": "quantity",
    "CARDINAL": "quantity",
}
# Types as codes: of no span, of a smaller piece of a span, then spaCy's.
LABELS = ("", "INSIDE", *_KINDS)
CODES = {label: code for code, label in enumerate(LABELS)}
NONE, INSIDE, PERSON = CODES[""], CODES["INSIDE"], CODES["PERSON"]


@functools.cache
def agreement() -> np.ndarray:
    """int8 [labels, 256]: 1 where a kind (its code) is one of a label's, -1 where not, 0 unknown.

    What is a piece of another name contradicts every kind, even one that nobody knows, twice.
    """
    found = np.zeros((len(LABELS), 256), np.int8)
    for label, words in _KINDS.items():
        found[CODES[label], : len(kinds.KINDS)] = -1
        for side, says in zip(words.split(" | "), (1, 0), strict=False):
            found[CODES[label], [kinds.KINDS.index(word) for word in side.split()]] = says
    found[INSIDE] = -2
    return found


class Span(NamedTuple):
    """Characters start:end of a text, spaCy's type, what its linker says of them if anything."""

    start: int
    end: int
    label: str
    qid: str = ""


def spacy_spans(texts: Sequence[str], model: str) -> Iterator[list[Span]]:
    """The named entities of each text, without articles and punctuation at their edges.

    Args:
      texts: any number.
      model: spaCy pipeline, a package's name or a folder.
    """
    nlp = load_spacy(model)
    for first in range(0, len(texts), BATCH):
        # Without the zone the vocabulary grows with every new word for the life of the process.
        with nlp.memory_zone():
            batch = texts[first : first + BATCH]
            for text, doc in zip(batch, nlp.pipe(batch, batch_size=BATCH), strict=True):
                yield [
                    Span(start, end, span.label_, span.kb_id_)
                    for span in doc.ents
                    for start, end in [_trim(text, span.start_char, span.end_char)]
                    if start < end
                ]


# What begins a noun phrase without being part of a name; and what ends one.
_BEFORE = re.compile(
    r"(?:\W|_|(?:a|an|the|this|that|these|those|my|your|his|her|its|our|their)\b)+", re.IGNORECASE
)
_AFTER = re.compile(rf"(?:[{names.APOSTROPHES}]s\b|\W|_)+\Z")


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    before = _BEFORE.match(text, start, end)
    start = before.end() if before else start
    if text[end - 1].isalnum() and text[end - 2 : end - 1] not in names.APOSTROPHES:
        return start, end
    after = _AFTER.search(text[start:end])
    return start, start + after.start() if after else end


def pipeline_files(model: str | None) -> list[str]:
    """All files of a pipeline, a package or a folder: what it finds depends on nothing else.

    Raises:
      BadInput: there is none of this name.
    """
    if model is None:
        return []
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


def links_itself(model: str) -> bool:
    """Whether a pipeline has a trained entity_linker."""
    return "entity_linker" in load_spacy(model).pipe_names


@functools.lru_cache(maxsize=1)
def load_spacy(model: str):
    """The pipeline with just what finds named entities."""
    import spacy

    from data_prep.kb import spacy_adapter  # noqa: F401  a pipeline's entity_linker finds it by its name

    unused = ["lemmatizer", "textcat", "senter", "parser", "tagger", "attribute_ruler"]
    return spacy.load(model, exclude=unused)
