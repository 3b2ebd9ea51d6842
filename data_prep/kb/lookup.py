"""The knowledge base: names -> candidate entities with priors, memory-mapped.

Looks up what `kb_build` wrote (its docstring has the files). Processes on one machine share the
memory of an opened base.
"""

from __future__ import annotations

import functools
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.kb import kinds, names
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

VERSION = 6  # of what `kb.build` writes
MAX_STORED = 30  # candidates of a name
UNKNOWN = 255  # kind
_COLUMNS = ("entity", "prior", "case", "form", "languages")  # of candidates, as files
_DERIVED = 0.25  # of a plural meaning its singular where it is a name itself
_QID = re.compile(r"(?:wd:)?[qQ]([1-9][0-9]*)")  # as others write it
MAX_TOKENS = 8  # longer names are found when they are looked up, not when a text is scanned


class Match(typing.NamedTuple):
    """A name found in a text: characters start:end, and their normal form."""

    start: int
    end: int
    form: str


class Candidates(typing.NamedTuple):
    """What surfaces may mean, one entry for each (surface, entity), entries of a surface together.

    Attributes:
      surface: int64 [c], position in what was looked up, ascending.
      entity: int32 [c], row of the knowledge base.
      prior: float32 [c], p(entity | surface); descending within a surface.
      case: uint8 [c], how the name is written in the knowledge base, see `kb_build`.
      form: uint8 [c], how the name came to be, see `forms`.
      languages: uint16 [c], those in which it is a name, a bit each; 0: any.
      linked: float32 [c], how often the surface is a link in Wikipedia; NaN: unknown.
    """

    surface: np.ndarray
    entity: np.ndarray
    prior: np.ndarray
    case: np.ndarray
    form: np.ndarray
    languages: np.ndarray
    linked: np.ndarray

    def take(self, index: np.ndarray) -> Candidates:
        return Candidates(*(values[index] for values in self))


class Parts(typing.NamedTuple):
    """Whose names have a part, one entry for each (part, person), entries of a part together."""

    part: np.ndarray  # int64 [c], position in what was looked up, ascending
    entity: np.ndarray  # int32 [c]
    prior: np.ndarray  # float32 [c], p(person | part in this role)
    role: np.ndarray  # uint8 [c], see `people`


def check(folder: epath.PathLike) -> None:
    """Raises BadInput where a folder was built by another version of the project."""
    try:
        manifest = json.loads((epath.Path(folder) / "manifest.json").read_text())
        version = manifest["settings"]["version"]
    except (ValueError, KeyError, TypeError):
        version = None
    if version != VERSION:
        raise errors.BadInput(
            f"knowledge_base: {folder} was built by another version of `mofi kb` (its"
            f" manifest says version {version}, needed is {VERSION}): build it again."
        )


class KnowledgeBase:
    """A built folder, opened read-only."""

    def __init__(self, path: epath.PathLike):
        import marisa_trie

        self.path = epath.Path(path)
        self._trie = marisa_trie.Trie().mmap(os.fspath(self.path / "aliases.marisa"))
        load = functools.partial(np.load, mmap_mode="r")
        self._offsets, self._linked, *self._columns = (
            load(self.path / f"{name}.npy")
            for name in ("alias_offsets", "alias_linked", *(f"cand_{name}" for name in _COLUMNS))
        )
        self._parts = marisa_trie.Trie().mmap(os.fspath(self.path / "parts.marisa"))
        self._part_offsets, *self._part_columns = (
            load(self.path / f"part_{name}.npy") for name in ("offsets", *Parts._fields[1:])
        )

    def __contains__(self, form: str) -> bool:
        """Whether a normalised surface, or what it may be the plural of, is a name."""
        return form in self._trie or any(single in self._trie for single in names.singulars(form))

    def candidates(self, form: str, top: int) -> list[tuple[int, float]]:
        """What a normalised surface may mean: the `top` most likely (entity, prior), best first."""
        found = self.look_up([form])
        return list(zip(found.entity[:top].tolist(), found.prior[:top].tolist(), strict=True))

    def look_up(self, forms: Sequence[str]) -> Candidates:
        """What normalised surfaces may mean.

        A surface that is a name itself and the plural of another ("glasses") may mean either, the
        former four times as likely; so may one with a possessive s ("mcdonald s"). One with
        diacritics that is no name is looked up without them.
        """
        alias, surface, share = [], [], []
        get = self._trie.get
        for number, form in enumerate(forms):
            exact = get(form)
            found = [] if exact is None else [exact]
            others = names.singulars(form)
            if form.endswith(" s"):
                others.append(form[:-2])
            found += [name for name in map(get, others) if name is not None]
            if not found and not form.isascii():
                found = [name for name in [get(names.fold_diacritics(form))] if name is not None]
            if not found:
                continue
            alias += found
            surface += [number] * len(found)
            if len(found) == 1:
                share.append(1.0)
            else:
                shares = [1.0 if name == exact else _DERIVED for name in found]
                share += [value / sum(shares) for value in shares]
        alias, surface = np.array(alias, np.int64), np.array(surface, np.int64)
        rows, lengths = _rows(self._offsets, alias)
        entity, prior, *rest = (column[rows] for column in self._columns)
        prior = prior * np.repeat(np.array(share, np.float32), lengths)
        linked = np.repeat(self._linked[alias], lengths)
        found = Candidates(np.repeat(surface, lengths), entity, prior, *rest, linked)
        return _merged(found) if np.any(surface[1:] == surface[:-1]) else found

    def look_up_parts(self, parts: Sequence[str]) -> Parts:
        """The people of whose names normalised words are a part."""
        found = [(number, self._parts.get(part)) for number, part in enumerate(parts)]
        found = np.array([pair for pair in found if pair[1] is not None], np.int64).reshape(-1, 2)
        rows, lengths = _rows(self._part_offsets, found[:, 1])
        columns = (column[rows] for column in self._part_columns)
        return Parts(np.repeat(found[:, 0], lengths), *columns)

    def is_part(self, form: str) -> bool:
        """Whether a normalised word is a part of a person's name."""
        return form in self._parts

    def qid(self, entity: int) -> str:
        """The id of an entity in its source."""
        return self._qids[entity].as_py()

    @functools.cached_property
    def _qids(self) -> pa.Array:
        return engine.read_table(self.path / "entities.parquet", ["qid"])["qid"].combine_chunks()

    @functools.cached_property
    def languages(self) -> list[str]:
        """The codes of the languages of which it has names, in the order of their bits."""
        return json.loads((self.path / "manifest.json").read_text())["settings"]["languages"]

    @functools.cached_property
    def kind(self) -> np.ndarray:
        """uint8, by entity: the place of its kind in `kinds.KINDS`, `UNKNOWN` for none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = engine.read_table(self.path / "entities.parquet", ["kind"])["kind"]
        code = pc.index_in(kind.combine_chunks(), value_set=pa.array(kinds.KINDS))
        return pc.fill_null(code, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.uint8)

    @functools.cached_property
    def has_capital(self) -> np.ndarray:
        """bool, by entity: whether its label has a capital letter, as those of named things do."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        found = [np.zeros(0, bool)]
        with pq.ParquetFile(os.fspath(self.path / "entities.parquet")) as parquet:
            for batch in parquet.iter_batches(columns=["label"]):
                label = pc.fill_null(batch.column(0).cast(pa.string()), "")
                other = pc.not_equal(label, pc.utf8_lower(label))
                found.append(other.to_numpy(zero_copy_only=False))
        return np.concatenate(found)

    def scan(self, text: str) -> list[Match]:
        """The names in a text: at each word the longest that begins there, none inside another.

        A name may run across punctuation ("Paris, Texas"), and then the names on either side of it
        are found as well. A word that belongs to no name is looked into: "AlarmClock_2", "rose12";
        and so is a run of letters without spaces, as Chinese and Thai have them.
        """
        tokens = names.tokenize(text)
        matches = set(self._maximal(text, tokens))
        if any(names.has_punctuation(text, match.start, match.end) for match in matches):
            for run in names.split_at_punctuation(text, tokens):
                matches.update(self._maximal(text, run))
        if not text.isascii():
            folded = [token._replace(form=names.fold_diacritics(token.form)) for token in tokens]
            if folded != tokens:
                starts = {match.start for match in matches}
                more = self._maximal(text, folded)
                matches.update(match for match in more if match.start not in starts)
        reached = 0
        ends = dict[int, int]()
        for match in matches:
            ends[match.start] = max(match.end, ends.get(match.start, 0))
        for token in tokens:
            reached = max(reached, ends.get(token.start, 0))
            if token.start >= reached:
                word = text[token.start : token.end]
                if names.is_plain(word) or self.is_part(token.form):  # "McEntire"
                    continue
                if names.is_unspaced(word):
                    matches.update(self._inside(token))
                else:
                    parts = names.split_word(word, token.start)
                    if len(parts) > 1:
                        matches.update(self._maximal(text, parts))
        return sorted(matches)

    def _inside(self, token: names.Token) -> Iterator[Match]:
        """The longest names inside a run of letters without spaces, none overlapping."""
        form, at = token.form, 0
        if len(form) != token.end - token.start:
            return  # places are those of letters that unfolded
        while at < len(form):
            ends = sorted(at + len(name) for name in self._trie.prefixes(form[at:]) if name)
            ends = [end for end in ends if names.may_be_cut(form, at, end)]
            if ends:
                yield Match(token.start + at, token.start + ends[-1], form[at : ends[-1]])
            at = ends[-1] if ends else at + 1

    def _maximal(self, text: str, tokens: Sequence[names.Token]) -> list[Match]:
        # One question to the trie for each word, "which names does this begin with", instead of one
        # for each run of words: the answers are those whose end is the end of a word.
        forms = [token.form for token in tokens]
        joined = " ".join(forms)
        starts, stops, at = [], [], 0
        for form in forms:
            starts.append(at)
            at += len(form)
            stops.append(at)
            at += 1
        ends = {stop: number for number, stop in enumerate(stops)}
        irregular = [i for i, form in enumerate(forms) if _changes_before_its_end(form)]
        matches, reached, count, size = [], -1, len(forms), len(joined)
        prefixes, find = self._trie.prefixes, joined.find
        for i, start in enumerate(starts):
            if forms[i] == "s" and _is_possessive(text, tokens[i].start):
                continue  # a possessive begins no name
            last = min(i + MAX_TOKENS, count) - 1
            end = -1
            for name in reversed(prefixes(joined[start : stops[last]])):
                at = start + len(name)
                if at in ends:
                    end = ends[at]
                elif at + 3 >= size or find(" ", at, at + 4) >= 0:
                    end = _end_of_plural(joined, at, ends)
                if end >= 0:
                    break
            for j in irregular:
                if max(i, end + 1) <= j <= last and joined[start : stops[j]] in self:
                    end = j
            if end > reached:
                matches.append(Match(tokens[i].start, tokens[end].end, joined[start : stops[end]]))
                reached = end
        return matches


def rows_of(folder: epath.PathLike, ids: Sequence[str]) -> np.ndarray:
    """int64 [n]: the entities of ids in a built folder, redirects followed; -1 where there is none.

    One that is no id of the base is looked up again as what others write for one: q42, wd:Q42, or
    an address that ends in it.
    """
    spelt, folder = [*ids, *map(_last_part, ids)], epath.Path(folder)
    rows = _find(folder / "entities.parquet", "qid", spelt)
    moved = _find(folder / "redirects.parquet", "qid", spelt)
    target = engine.read_table(folder / "redirects.parquet", ["entity"])["entity"].to_numpy()
    known = (rows < 0) & (moved >= 0)
    rows[known] = target[moved[known]]
    exact, last = rows[: len(ids)], rows[len(ids) :]
    return np.where(exact < 0, last, exact)


def _last_part(text: str) -> str:
    """The id at the end of an address, which may stand in <>; that of Wikidata with its Q."""
    last = text.strip("<> /").rpartition("/")[2]
    found = _QID.fullmatch(last)
    return f"Q{found[1]}" if found else last


def rows_of_titles(folder: epath.PathLike, titles: Sequence[str]) -> np.ndarray:
    """int64 [n]: the entities of titles of Wikipedia's pages; -1 where there is none."""
    titles = [title.replace("_", " ") for title in titles]
    return _find(epath.Path(folder) / "entities.parquet", "title", titles)


def _find(path: epath.Path, column: str, values: Sequence[str]) -> np.ndarray:
    """int64 [n]: the first row with each value; -1 where there is none.

    The file is read through for each call, as an index of a hundred million would fill the
    memory of each process: many values are to be asked for at a time.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted, place = np.unique(np.array(values, object), return_inverse=True)
    rows, first = np.full(len(wanted), -1, np.int64), 0
    among = pa.array(wanted, pa.string())
    with pq.ParquetFile(os.fspath(path)) as parquet:
        for batch in parquet.iter_batches(columns=[column]) if len(wanted) else ():
            found = pc.index_in(batch.column(column), value_set=among)
            # Backwards, so that of several rows the first one is written last.
            at = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))[::-1]
            new = found.take(pa.array(at)).to_numpy(zero_copy_only=False)
            fresh = rows[new] < 0
            rows[new[fresh]] = first + at[fresh]
            first += len(batch)
    return rows[place]


def _rows(offsets: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of all candidates of names, and how many each name has."""
    begins = offsets[number]
    lengths = offsets[number + 1] - begins
    return np.repeat(begins - (np.cumsum(lengths) - lengths), lengths) + np.arange(
        int(lengths.sum())
    ), lengths


def _is_possessive(text: str, start: int) -> bool:
    return start > 0 and text[start - 1] in names.APOSTROPHES


def _end_of_plural(joined: str, at: int, ends: dict[int, int]) -> int:
    """The word of which a name ending at `at` is the beginning and the singular; or -1."""
    begin, end = joined.rfind(" ", 0, at) + 1, joined.find(" ", at)
    end = len(joined) if end < 0 else end
    if end - at <= 3 and joined[begin:at] in names.singulars(joined[begin:end]):  # "child" + "ren"
        return ends.get(end, -1)
    return -1


@functools.lru_cache(maxsize=1 << 16)
def _changes_before_its_end(word: str) -> bool:
    """Whether a plural's singular is no prefix of it: "ponies", "leaves", "mice"."""
    return any(not word.startswith(single) for single in names.singulars(word))


def _merged(found: Candidates) -> Candidates:
    """One entry for each surface and entity: priors summed, the least capitalised spelling."""
    order = np.lexsort((found.entity, found.surface))
    found, size = found.take(order), len(order)
    first = np.ones(size, bool)
    first[1:] = (np.diff(found.surface) != 0) | (np.diff(found.entity) != 0)
    starts = np.flatnonzero(first)
    languages = np.bitwise_or.reduceat(found.languages, starts)
    languages[np.minimum.reduceat(found.languages, starts) == 0] = 0  # any
    summed = Candidates(
        found.surface[starts],
        found.entity[starts],
        np.add.reduceat(found.prior, starts),
        np.minimum.reduceat(found.case, starts),
        np.minimum.reduceat(found.form, starts),
        languages,
        np.fmax.reduceat(found.linked, starts),
    )
    # Of equals, what has the very name comes first, as it came.
    came = np.minimum.reduceat(order, starts)
    return summed.take(np.lexsort((came, -summed.prior, summed.surface)))


def read_entities(path: epath.PathLike) -> pa.Table:
    """The entities of a built folder, see `kb_build`; an entity is a row number."""

    return engine.read_table(epath.Path(path) / "entities.parquet")
