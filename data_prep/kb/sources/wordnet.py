"""WordNet's own `dict` folder: its noun synsets as rows of the generic JSONL.

Reads `data.noun` and `index.noun` as WordNet's manual page wndb(5WN) describes them. An entity's
id is "n" and the eight digits of its place in data.noun, as ImageNet writes it; they differ from
one version of WordNet to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from data_prep.kb import kinds
from mofi_jax.common import errors

FILES = ("data.noun", "index.noun")


def is_folder(path: str) -> bool:
    """Whether `path` is a folder with the two files of the nouns."""
    return all(os.path.isfile(os.path.join(path, name)) for name in FILES)


def rows(folder: str) -> Iterator[dict]:
    """The noun synsets in the order of data.noun.

    Yields:
      `id`, `label` (the first word), `aliases`, `description` (the gloss), `hypernyms` (ids; also
      those of instances), `lexname` and `sense_rank`: which sense of each word this is, 1 = most
      frequent.

    Raises:
      BadInput: a line that is not in WordNet's format; names file and line.
    """
    senses = dict(_read(os.path.join(folder, "index.noun"), _senses))
    for synset in _read(os.path.join(folder, "data.noun"), _synset):
        offset = synset["id"][1:]
        ranks = []
        for word in (synset["label"], *synset["aliases"]):
            order = senses.get(word.replace(" ", "_").lower(), [])
            # A word that the index does not know by this synset has the last rank.
            ranks.append(order.index(offset) + 1 if offset in order else len(order) + 1)
        yield {**synset, "sense_rank": ranks}


def _read(path: str, parse) -> Iterator:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.startswith("  ") or not line.strip():  # the licence at the top
                continue
            try:
                yield parse(line)
            except (ValueError, IndexError):
                raise errors.BadInput(
                    f"knowledge_base: {path}, line {number} is not in WordNet's format: fetch the"
                    " file again."
                ) from None


def _senses(line: str) -> tuple[str, list[str]]:
    # lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset...
    lemma, _, count, *rest = line.split()
    offsets = rest[-int(count) :]
    if not all(len(offset) == 8 and offset.isdigit() for offset in offsets):
        raise ValueError(line)
    return lemma, offsets


def _synset(line: str) -> dict:
    # offset lex_filenum ss_type w_cnt (word lex_id)... p_cnt (symbol offset pos source/target)...
    # then "|" and the gloss; w_cnt is hexadecimal.
    fields, _, gloss = line.partition("|")
    offset, file, _, count, *rest = fields.split()
    if len(offset) != 8 or not offset.isdigit() or int(file) < kinds.FIRST_NOUNS:
        raise ValueError(line)
    end = 2 * int(count, 16)
    words = [word.replace("_", " ") for word in rest[:end:2]]
    pointers = rest[end + 1 :]
    if len(words) * 2 != end or len(pointers) != 4 * int(rest[end]):
        raise ValueError(line)
    parents = [
        f"n{target}"
        for symbol, target, pos in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=True)
        if symbol in ("@", "@i") and pos == "n"
    ]
    return {
        "id": f"n{offset}",
        "label": words[0],
        "aliases": words[1:],
        "description": gloss.strip(),
        "hypernyms": parents,
        "lexname": list(kinds.LEXNAMES)[int(file) - kinds.FIRST_NOUNS],
    }
