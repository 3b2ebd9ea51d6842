"""The knowledge base: names -> candidate entities with priors, memory-mapped.

It opens the folder that `data_prep.kb_build` writes and describes.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

from etils import epath

from data_prep import names

if typing.TYPE_CHECKING:
    import pyarrow as pa

MAX_STORED = 30  # candidates of a name
MAX_TOKENS = 8  # longer names are found when they are looked up, not when a text is scanned


class Match(typing.NamedTuple):
    """A name found in a text: characters start:end, and their normal form."""

    start: int
    end: int
    form: str


class KnowledgeBase:
    """A built folder, opened read-only; processes on one machine share its memory."""

    def __init__(self, path: epath.PathLike):
        import marisa_trie
        import numpy as np

        path = epath.Path(path)
        self._trie = marisa_trie.Trie().mmap(os.fspath(path / "aliases.marisa"))
        self._offsets = np.load(path / "alias_offsets.npy", mmap_mode="r")
        self._entity = np.load(path / "cand_entity.npy", mmap_mode="r")
        self._prior = np.load(path / "cand_prior.npy", mmap_mode="r")

    def __contains__(self, form: str) -> bool:
        """Whether a normalised surface, or what it may be the plural of, is a name."""
        return form in self._trie or any(single in self._trie for single in names.singulars(form))

    def candidates(self, form: str, top: int) -> list[tuple[int, float]]:
        """What a normalised surface may mean.

        A surface that is a name itself and the plural of another ("glasses") may mean either: both
        lists are kept, each with half of the probability.

        Returns:
          The `top` most likely (entity, prior), most likely first.
        """
        found = [name for name in (form, *names.singulars(form)) if name in self._trie]
        if len(found) <= 1:
            return self._stored(found[0], top) if found else []
        merged: dict[int, float] = {}
        for name in found:
            for entity, prior in self._stored(name, MAX_STORED):
                merged[entity] = merged.get(entity, 0.0) + prior / len(found)
        # The sort is stable: of equals, what has the very name comes first.
        return sorted(merged.items(), key=lambda item: -item[1])[:top]

    def _stored(self, name: str, top: int) -> list[tuple[int, float]]:
        number = self._trie[name]
        begin = int(self._offsets[number])
        end = min(int(self._offsets[number + 1]), begin + top)
        return list(
            zip(self._entity[begin:end].tolist(), self._prior[begin:end].tolist(), strict=True)
        )

    def scan(self, text: str) -> list[Match]:
        """The names in a text: at each word the longest that begins there, none inside another.

        A name may run across punctuation ("Paris, Texas"), and then the names on either side of it
        are found as well. A word that belongs to no name is looked into: "AlarmClock_2", "rose12".
        """
        tokens = names.tokenize(text)
        matches = set(self._maximal(tokens))
        for run in names.split_at_punctuation(text, tokens):
            matches.update(self._maximal(run))
        for token in tokens:
            if not any(match.start <= token.start < match.end for match in matches):
                parts = names.split_word(text[token.start : token.end], token.start)
                if len(parts) > 1:
                    matches.update(self._maximal(parts))
        return sorted(matches)

    def _maximal(self, tokens: Sequence[names.Token]) -> list[Match]:
        matches = []
        reached = 0
        for i, token in enumerate(tokens):
            form = ""
            forms = []
            for following in tokens[i : i + MAX_TOKENS]:
                form = f"{form} {following.form}" if form else following.form
                forms.append(form)
            for j in range(len(forms), 0, -1):
                if forms[j - 1] in self:
                    if i + j > reached:
                        matches.append(Match(token.start, tokens[i + j - 1].end, forms[j - 1]))
                        reached = i + j
                    break
        return matches


def read_entities(path: epath.PathLike) -> pa.Table:
    """The entities of a built folder: qid, label, aliases, description, hypernyms."""
    import pyarrow.parquet as pq

    return pq.read_table(os.fspath(epath.Path(path) / "entities.parquet"))
