"""Makes nouns.tsv.gz, from which kinds are guessed: common nouns and their kinds, by WordNet.

    python -m data_prep.kb.sources.nouns wordnet_nouns.jsonl.gz nouns.tsv.gz

The source is WordNet as rows of the generic JSONL with `lexname`, `hypernyms` and `sense_rank`. A
noun's kind is that of its most frequent sense; senses that heads of descriptions seldom
have weigh less. Kept are words that glosses use at least twice, and compounds that are of another
kind than their last word.
"""

from __future__ import annotations

import collections
import gzip
import os
import re
import sys

import orjson
from etils import epath

from data_prep import engine
from data_prep.kb import kinds

_LICENCE = os.path.join(os.path.dirname(__file__), "../../sample/LICENSE-WordNet-3.0.txt")
_WEIGHTS = {"abstract": 0.3, "communication": 0.6, "person": 1.5, "quantity": 0.3, "time": 0.6}
_NOUN = re.compile(r"[a-z]+(?:-[a-z]+)*(?: [a-z]+)?")
_WORD = re.compile(r"[a-z]+")


def kinds_of(rows: list[dict]) -> dict[str, str | None]:
    """The kind of each synset: that of the nearest root of its hypernyms, else by its lexname."""
    by_id = {row["id"]: row for row in rows}
    roots = {root: kind for root, kind in kinds.ROOTS if root.startswith("n")}
    found = {}
    for row in rows:
        todo = [row["id"]]
        for name in todo:  # breadth first: it grows
            if name in roots:
                break
            todo += [parent for parent in by_id[name]["hypernyms"] if parent not in todo]
        found[row["id"]] = roots.get(name) or kinds.LEXNAMES[row["lexname"]]
    return found


def table(rows: list[dict]) -> dict[str, str]:
    """Noun -> kind."""
    kind_of = kinds_of(rows)
    used = collections.Counter[str]()
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        used.update(set(_WORD.findall(row["description"].lower())))
        kind = kind_of[row["id"]]
        for noun, rank in zip([row["label"], *row["aliases"]], row["sense_rank"], strict=True):
            if kind and _NOUN.fullmatch(noun):
                score = scores.setdefault(noun, {})
                score[kind] = max(score.get(kind, 0.0), _WEIGHTS.get(kind, 1.0) / rank)
    best = {noun: max(sorted(score), key=score.get) for noun, score in scores.items()}
    return {
        noun: kind
        for noun, kind in sorted(best.items())
        if min(used[word] for word in _WORD.findall(noun)) >= (15 if " " in noun else 2)
        and (" " not in noun or best.get(noun.split()[1]) != kind)
    }


def main(source: str, target: str) -> None:
    with gzip.open(source) as file:
        found = table([orjson.loads(line) for line in file])
    words: dict[str, list[str]] = {}
    for noun, kind in found.items():
        words.setdefault(kind, []).append(noun)
    with open(_LICENCE) as file:
        lines = [f"# {line}".rstrip() for line in file.read().splitlines()]
    lines += [f"{kind}\t{','.join(nouns)}" for kind, nouns in sorted(words.items())]
    data = gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)
    engine.write_durably(epath.Path(target), data)


if __name__ == "__main__":
    main(*sys.argv[1:])
