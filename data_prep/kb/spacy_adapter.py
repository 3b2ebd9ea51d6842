"""A built knowledge base as spaCy's `KnowledgeBase`: a trained `entity_linker` can be plugged in.

Importing this module registers, for a config of spaCy,

    [components.entity_linker.generate_empty_kb]
    @misc = "mofi.EmptyKnowledgeBase.v1"

    [initialize.components.entity_linker.kb_loader]
    @misc = "mofi.KnowledgeBase.v1"
    folder = "kb/"

A saved pipeline holds the path of the folder, not its gigabytes. The vectors of the entities, which
the linker compares texts with, are read from `entity_vectors.npy` in the folder where it exists:
[entities, d] of any float, a row for each row of entities.parquet, memory-mapped.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import spacy
from spacy import kb as spacy_kb
from spacy.tokens import Span
from spacy.vocab import Vocab

from data_prep import engine
from data_prep.kb import lookup, names
from mofi_jax.common import errors

VECTORS = "entity_vectors.npy"
_NOTE = "knowledge_base.json"


class FolderKnowledgeBase(spacy_kb.KnowledgeBase):
    """spaCy's face of a folder made by `data_prep.build_kb`.

    Attributes:
      folder: its path; None before one is opened.
      top: candidates of a mention.
    """

    def __init__(self, vocab: Vocab, entity_vector_length: int, top: int = 10):
        """An empty one; `open_folder` or `from_disk` fills it."""
        super().__init__(vocab, entity_vector_length)
        self.folder: str | None = None
        self.top = top
        self._base: lookup.KnowledgeBase | None = None
        self._vectors: np.ndarray | None = None

    def open_folder(self, folder: str | os.PathLike[str]) -> None:
        """Opens a built folder; the length of vectors is that of its entity_vectors.npy, if any.

        Raises:
          BadInput: no finished knowledge base is there, or the vectors are of another.
        """
        folder = os.path.abspath(folder)
        if not os.path.isfile(os.path.join(folder, "manifest.json")):
            raise errors.BadInput(
                f"knowledge base: {folder} is no finished knowledge base: make it with python -m"
                f" data_prep.build_kb, or write where it lies now into the pipeline's {_NOTE}."
            )
        lookup.check(folder)
        self.folder = folder
        self._base = lookup.KnowledgeBase(folder)
        self._vectors = None
        self.__dict__.pop("_entities", None)
        path = os.path.join(folder, VECTORS)
        if os.path.isfile(path):
            vectors = np.load(path, mmap_mode="r")
            if vectors.ndim != 2 or len(vectors) != len(self._entities[0]):
                raise errors.BadInput(
                    f"knowledge base: {path} has the shape {list(vectors.shape)}, but there are"
                    f" {len(self._entities[0])} entities: write one row for each."
                )
            self._vectors = vectors
            super().__init__(self.vocab, vectors.shape[1])

    def is_empty(self) -> bool:
        """Whether no folder is open; spaCy warns before it trains on an empty one."""
        return self._base is None

    # ------------------------------------------------------------------------------------- lookup

    def get_candidates(self, mention: Span) -> Iterable[spacy_kb.Candidate]:
        """The `top` most likely entities of a mention, best first."""
        return self.get_candidates_batch([mention])[0]

    def get_candidates_batch(self, mentions: Iterable[Span]) -> list[list[spacy_kb.Candidate]]:
        """The candidates of several mentions."""
        texts = [mention.text for mention in mentions]
        if self._base is None:
            return [[] for _ in texts]
        ids, sitelinks = self._entities
        found = []
        for text in texts:
            alias = self.vocab.strings.add(text)
            candidates = self._base.candidates(names.normalize(text), self.top)
            vectors = self._of_rows([entity for entity, _ in candidates])
            found.append(
                [
                    spacy_kb.Candidate(
                        kb=self,
                        entity_hash=self.vocab.strings.add(ids[entity].as_py()),
                        entity_freq=float(sitelinks[entity]),
                        entity_vector=vector.tolist(),
                        alias_hash=alias,
                        prior_prob=prior,
                    )
                    for (entity, prior), vector in zip(candidates, vectors, strict=True)
                ]
            )
        return found

    def get_vector(self, entity: str) -> Sequence[float]:
        """The vector of an entity by its id; zeros for one that is not here."""
        return self.get_vectors([entity])[0]

    def get_vectors(self, entities: Iterable[str]) -> list[list[float]]:
        """The vectors of several entities."""
        ids = list(entities)
        if self._base is None or not ids:
            return np.zeros((len(ids), self.entity_vector_length)).tolist()
        rows = lookup.rows_of(self.folder, ids)
        vectors = self._of_rows(rows)
        vectors[rows < 0] = 0
        return vectors.tolist()

    def _of_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        if self._vectors is None:
            return np.zeros((len(rows), self.entity_vector_length), np.float32)
        return self._vectors[np.asarray(rows, np.int64)].astype(np.float32)

    @functools.cached_property
    def _entities(self):
        """Ids, as an Arrow array, and sitelinks of all entities."""

        path = os.path.join(self.folder, "entities.parquet")
        table = engine.read_table(path, columns=["qid", "sitelinks"]).combine_chunks()
        return table["qid"].combine_chunks(), table["sitelinks"].to_numpy()

    # ------------------------------------------------------------------------------ serialisation

    def to_bytes(self, **kwargs) -> bytes:
        """The path of the folder; `kwargs` as spaCy passes them are not needed."""
        return json.dumps({"folder": self.folder, "top": self.top}).encode()

    def from_bytes(self, bytes_data: bytes, *, exclude: Sequence[str] = ()) -> FolderKnowledgeBase:
        """Opens the folder whose path `to_bytes` kept.

        Raises:
          BadInput: it is not there any more.
        """
        note = json.loads(bytes_data)
        self.top = note["top"]
        if note["folder"] is not None:
            self.open_folder(note["folder"])
        return self

    def to_disk(self, path: str | os.PathLike[str], exclude: Iterable[str] = ()) -> None:
        """Writes a folder with the path of the knowledge base in knowledge_base.json."""
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _NOTE).write_bytes(self.to_bytes())

    def from_disk(
        self, path: str | os.PathLike[str], exclude: Iterable[str] = ()
    ) -> FolderKnowledgeBase:
        """Opens what `to_disk` noted."""
        return self.from_bytes((pathlib.Path(path) / _NOTE).read_bytes())

    def __reduce__(self):
        return _restore, (self.vocab, self.entity_vector_length, self.to_bytes())


def _restore(vocab: Vocab, length: int, note: bytes) -> FolderKnowledgeBase:
    return FolderKnowledgeBase(vocab, length).from_bytes(note)


@spacy.registry.misc("mofi.KnowledgeBase.v1")
def load(folder: str, top: int = 10) -> Callable[[Vocab], FolderKnowledgeBase]:
    """A `kb_loader` of spaCy's entity_linker, for a built folder."""

    def load_folder(vocab: Vocab) -> FolderKnowledgeBase:
        base = FolderKnowledgeBase(vocab, 64, top)  # 64: spaCy's default, where no vectors are
        base.open_folder(folder)
        return base

    return load_folder


@spacy.registry.misc("mofi.EmptyKnowledgeBase.v1")
def empty(top: int = 10) -> Callable[[Vocab, int], FolderKnowledgeBase]:
    """A `generate_empty_kb` of spaCy's entity_linker, so that a saved pipeline can be loaded."""

    def make(vocab: Vocab, entity_vector_length: int) -> FolderKnowledgeBase:
        return FolderKnowledgeBase(vocab, entity_vector_length, top)

    return make
