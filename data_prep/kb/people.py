"""The parts of people's names, and what is left of a full name when people shorten it.

    "Sir Ludwig Johannes van der Example III, 2nd Baron Sample"
    names     "Ludwig van der Example", "Ludwig J van der Example", "Baron Sample", and the first
              part without what is after the comma, then without III, then without "Sir"
    parts     family: "van der example", "example"; given: "ludwig"; other: "l van der example",
              "l j van der example", "johannes van der example", "ludwig johannes", "sample"

What a text adds, or writes in another order, is the linker's to undo: it looks up "John Smith" for
"Smith, John" and "Elizabeth II" for "Queen Elizabeth II". What a text leaves out has to be stored.
Shortened names are still the name of one person among few, so that they are names of lower weight,
found wherever they stand; parts and initials are the names of thousands, so that they lie apart,
to be looked up only where something says that a person is meant.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from data_prep.kb import forms, kinds, names
from data_prep.kb import parts as kb_parts

FAMILY, GIVEN, OTHER = range(3)  # `part_role.npy`
KINDS = ("person", "character")
CODES = [kinds.KINDS.index(kind) for kind in KINDS]

_MOST_NAMES = 10  # spellings of an entity that are taken apart

_TITLES = frozenset(
    re.findall(
        r"\w+",
        "archbishop archduchess archduke baron baroness bishop blessed brother caliph captain"
        " cardinal chancellor colonel commander count countess dame doctor dr duchess duke earl"
        " emir emperor empress father friar general governor grand hon imam infanta infante judge"
        " justice king lady lieutenant lord madame maharaja maharani major marquess marquis master"
        " mayor miss mother mr mrs ms pharaoh pope president prince princess prof professor queen"
        " rabbi rev reverend saint sayyid senator sergeant shah sheikh shri sir sister sri st"
        " sultan swami tsar tsarina viscount",
    )
)
_SUFFIXES = frozenset(re.findall(r"\w+", "esq jnr jr junior kbe md mp obe phd qc senior snr sr"))
_PARTICLES = frozenset(
    re.findall(
        r"\w+",
        "a af al and av ap bar ben bin bint d da dal dalla das de degli dei del della den der di do"
        " dos du e el fitz ibn la las le los mac mc o of san santa st ten ter the van vom von y"
        " zu zum zur",
    )
)
# Between these words begins what is no part of the name itself: "Anne of Austria", "Ivan the
# Terrible".
_EPITHET = re.compile(r" (?:of|the) ", re.IGNORECASE)
_NUMERAL = re.compile(r"[IVX]+")
# Where the family name comes first, at home at least: both ends may be it.
_FAMILY_FIRST = re.compile(
    r"\b(?:chinese|china|taiwan(?:ese)?|hong kong|korean?|vietnam(?:ese)?|japan(?:ese)?"
    r"|hungar(?:y|ian)|cambodian?)\b",
    re.IGNORECASE,
)


class Found(NamedTuple):
    """What the names of a person yield.

    Attributes:
      shortened: normal form -> weight against the label's, case.
      parts: normal form and role -> weight against the label's.
    """

    shortened: dict[str, tuple[float, int]]
    parts: dict[tuple[str, int], float]


def take_apart(label: str, aliases: list[str], description: str, factor: float) -> Found:
    """The parts and the shortened names of a person.

    Args:
      label: the main name.
      aliases: the others.
      description: says where the family name comes first.
      factor: the weight of an alias against the label.
    """
    found = Found({}, {})
    both_ends = bool(_FAMILY_FIRST.search(description))
    own = {forms.normal_of(name) for name in (label, *aliases)}
    for i, name in enumerate((label, *aliases[: _MOST_NAMES - 1])):
        _take_apart(forms.without_bracket(name), factor if i else 1.0, factor, both_ends, found)
    for form in own.intersection(found.shortened):
        del found.shortened[form]
    return found


def _take_apart(name: str, weight: float, factor: float, both_ends: bool, found: Found) -> None:
    def part(words: list[str], role: int, factor: float = 1.0) -> None:
        form = forms.normal_of(" ".join(words))
        if len(form) > 1:
            texts = (form,) if form.isascii() else {form, names.fold_diacritics(form)}
            for key in ((text, role) for text in texts):
                found.parts[key] = max(found.parts.get(key, 0.0), weight * factor)

    def shorten(words: list[str]) -> None:
        text = " ".join(words)
        form = forms.normal_of(text)
        if " " in form and text != name:
            before, case = found.shortened.get(form, (0.0, 2))
            value = max(before, weight * factor * factor)
            found.shortened[form] = (value, min(case, forms.case_of(text)))

    main, _, rest = name.partition(",")
    words = _EPITHET.split(main)[0].split()
    if not words or any(_is_small(word) for word in (words[0], words[-1])):
        return  # a noun such as "film maker"
    epithet = len(words) < len(main.split())
    ranks = rest.split()
    titles = [i for i, word in enumerate(ranks) if _bare(word) in _TITLES]
    if titles and not _is_small(ranks[-1]):
        part(ranks[-1:], OTHER)  # "2nd Baron Sample"
        shorten(ranks[titles[0] :])
    shorten(words)
    while len(words) > 1 and _bare(words[0]) in _TITLES:
        words = words[1:]
    while len(words) > 1 and _bare(words[-1]) in _SUFFIXES:
        words = words[:-1]
    regnal = len(words) > 1 and _NUMERAL.fullmatch(words[-1]) is not None
    if regnal and len(words) > 2 and len(words[-1]) > 1 and not epithet:
        words, regnal = words[:-1], False  # "Robert Downey III"
        shorten(words)
    shorten(words)
    if len(words) == 1 or regnal or epithet:
        part(words[:1], GIVEN if regnal or epithet else OTHER)
        return

    begin = len(words) - 1  # of the family name
    while begin > 1 and _is_particle(words[begin - 1]):
        begin -= 1
    given, middle, family = words[:1], words[1:begin], words[begin:]
    part(family, FAMILY)
    part(given, GIVEN)
    if len(family) > 1:
        part(family[-1:], FAMILY)
    elif "-" in family[0]:
        part(family[0].split("-")[-1:], FAMILY, factor)  # "al-Atrash"
    if both_ends:
        part(given, FAMILY)
        part(words[1:], GIVEN)
    initials = [word[0] for word in (*given, *middle)]
    part([initials[0], *family], OTHER)
    if middle:
        shorten([*given, *family])
        shorten([*given, *initials[1:], *family])
        part([*initials, *family], OTHER)
        # Two family names, of which either may be left out, or a middle name that is used.
        part([middle[-1], *family], OTHER)
        part([*given, *middle], OTHER)


def _bare(word: str) -> str:
    return word.rstrip(".").replace(".", "").lower()


def _is_particle(word: str) -> bool:
    return _bare(word) in _PARTICLES


def _is_small(word: str) -> bool:
    return word[0].islower() and not _is_particle(word) and "-" not in word


def without_titles(tokens: list[names.Token]) -> list[names.Token]:
    """The words of a person's name in a text without titles, a possessive and what follows a name.

    One word stays.
    """
    start, end = 0, len(tokens)
    while end - start > 1 and tokens[start].form in _TITLES:
        start += 1
    while end - start > 1 and (tokens[end - 1].form in _SUFFIXES or tokens[end - 1].form == "s"):
        end -= 1
    return tokens[start:end]


class Writer(NamedTuple):
    """Takes the people apart whom a row group of entities.parquet holds.

    Attributes:
      entities: the file.
      folder: where NUMBER.names.parquet (`parts.numbered_schema`) and NUMBER.parts.parquet (form,
        entity, weight, role) are written.
      factor: the weight of an alias against the label.
      alpha: the exponent of sitelinks + 1.
    """

    entities: str
    folder: str
    factor: float
    alpha: float

    def __call__(self, group: int) -> str:
        """Writes the two files; returns their path without the endings."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = ["kind", "label", "aliases", "description", "sitelinks"]
        with pq.ParquetFile(self.entities) as file:
            first = sum(file.metadata.row_group(i).num_rows for i in range(group))
            table = file.read_row_group(group, columns)
        shortened, parts = [], []
        rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
        for entity, (kind, label, aliases, description, links) in enumerate(rows, first):
            if kind not in KINDS:
                continue
            weight = float(links + 1) ** self.alpha
            found = take_apart(label, aliases, description, self.factor)
            for form, (share, case) in found.shortened.items():
                how = (case, forms.SHORTENED, forms.ANY)
                shortened.append((entity, form, weight * share, *how))
            for (form, role), share in found.parts.items():
                parts.append((form, entity, weight * share, role))
        path = os.path.join(self.folder, f"{group:07d}")
        schema = {"form": pa.string(), "entity": pa.int32(), "weight": pa.float64()}
        schema = pa.schema({**schema, "role": pa.uint8()})
        kb_parts.write(f"{path}.parts.parquet", kb_parts.table(parts, schema))
        schema = kb_parts.numbered_schema()
        kb_parts.write(f"{path}.names.parquet", kb_parts.table(shortened, schema))
        return path
