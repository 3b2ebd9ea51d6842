"""Right and wrong labels: in all, by kind and size of the entity, by kind of caption.

Only pictures that the truth knows and that stand in links/ count. Memory is a few numbers for each
entity of the knowledge base, and for each label where its probability is to be calibrated.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence, Set

import numpy as np

from data_prep.linking import rows as link_rows
from data_prep.quality.truth import Truth

# Entities by the labels they have, as ImageNet-LT splits classes (arXiv 1904.05160).
SIZES = (("many (over 100)", 100), ("medium (20 to 100)", 20), ("few (under 20)", 0))
BINS = 10  # of the calibration


class Pictures:
    """The truth of a shard's pictures, by their row in links/.

    Attributes:
      known: bool [n], whether the truth has the picture.
      named, wrong, silent: bool [n], whether the caption names what the picture shows, is another
        picture's, or names nothing.
      entity: int64 [n], a row of the knowledge base that is right; -1 for none.
    """

    def __init__(
        self,
        keys: Sequence[str],
        truth: Mapping[str, Truth],
        numbers: Mapping[str, int],
        above: Mapping[str, Set[str]],
    ):
        """
        Args:
          keys: of the shard's pictures.
          truth: by key.
          numbers: the rows of the knowledge base of all entities that `truth` and `above` name.
          above: what each entity that is right somewhere is a kind of, near and far.
        """
        nothing = Truth(frozenset(), frozenset(), False)
        pictures = [truth.get(key) for key in keys]
        self.known = np.array([picture is not None for picture in pictures], bool)
        pictures = [picture or nothing for picture in pictures]
        self.named = np.array([picture.named for picture in pictures], bool)
        self.wrong = np.array([picture.wrong_caption for picture in pictures], bool)
        self.silent = self.known & np.array([not picture.says for picture in pictures], bool)
        self._width = max(numbers.values(), default=0) + 1
        rights = [sorted(numbers[e] for e in p.right if e in numbers) for p in pictures]
        self.entity = np.array([rows[0] if rows else -1 for rows in rights], np.int64)
        self._right = self._codes(rights)
        broader = [{e for entity in p.right for e in above.get(entity, ())} for p in pictures]
        self._broader = self._codes(
            [[numbers[e] for e in some if e in numbers] for some in broader]
        )
        self._said = self._codes(
            [[numbers[e] for e in p.says - p.right if e in numbers] for p in pictures]
        )

    def _codes(self, entities: Sequence[Sequence[int]]) -> np.ndarray:
        rows = [row * self._width + e for row, some in enumerate(entities) for e in some]
        return np.array(rows, np.int64)

    def _among(self, codes: np.ndarray, row: np.ndarray, entity: np.ndarray) -> np.ndarray:
        # An entity that the truth never names would be the code of another pair.
        inside = entity < self._width
        return inside & np.isin(row * self._width + entity, codes)

    def right(self, row: np.ndarray, entity: np.ndarray) -> np.ndarray:
        """bool [p]: whether the pictures show the entities."""
        return self._among(self._right, row, entity)

    def broader(self, row: np.ndarray, entity: np.ndarray) -> np.ndarray:
        """bool [p]: whether the pictures show the entities, or a kind of them."""
        return self.right(row, entity) | self._among(self._broader, row, entity)

    def said(self, row: np.ndarray, entity: np.ndarray) -> np.ndarray:
        """bool [p]: whether the captions name the entities, which the pictures do not show."""
        return self._among(self._said, row, entity)


class Labels(typing.NamedTuple):
    """Labels of a shard: distinct pairs of a row of links/ and an entity; perhaps probabilities."""

    row: np.ndarray
    entity: np.ndarray
    probability: np.ndarray | None = None


class Counts:
    """Counts of one way to label, over all shards."""

    def __init__(self, entities: int):
        """`entities`: of the knowledge base."""
        # Of each entity: labels, right ones; pictures whose captions name it, those that got it.
        self._by_entity = np.zeros((4, entities), np.int64)
        self._sums = dict.fromkeys(
            (
                *("pictures", "named", "found", "wrong", "wrong_so", "wrong_any"),
                *("silent", "silent_any", "decided", "decided_right", "broader"),
            ),
            0,
        )
        self._calibration = np.zeros((3, BINS))  # labels, sum of probabilities, right ones

    def add(self, pictures: Pictures, links: link_rows.LinkRows, labels: Labels) -> None:
        """Counts a shard."""
        kept = pictures.known[labels.row]
        row, entity = labels.row[kept], labels.entity[kept].astype(np.int64)
        right = pictures.right(row, entity)
        n = len(pictures.known)
        any_label, found, so = (
            np.bincount(some, minlength=n) > 0
            for some in (row, row[right], row[pictures.said(row, entity)])
        )
        entities = self._by_entity.shape[1]
        named = pictures.named & (pictures.entity >= 0)
        for counts, of in zip(
            self._by_entity,
            (
                *(entity, entity[right]),
                *(pictures.entity[named], pictures.entity[named & found]),
            ),
            strict=True,
        ):
            counts += np.bincount(of, minlength=entities)
        decided = self._decided(pictures, links, row, entity)
        for name, some in {
            "pictures": any_label,
            "named": pictures.named,
            "found": pictures.named & found,
            "wrong": pictures.wrong,
            "wrong_so": pictures.wrong & so,
            "wrong_any": pictures.wrong & any_label,
            "silent": pictures.silent,
            "silent_any": pictures.silent & any_label,
            "decided": decided,
            "decided_right": decided & found,
            "broader": pictures.broader(row, entity),
        }.items():
            self._sums[name] += int(some.sum())
        if labels.probability is not None:
            probability = labels.probability[kept]
            place = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
            for sums, values in zip(
                self._calibration, (None, probability, right.astype(float)), strict=True
            ):
                sums += np.bincount(place, values, minlength=BINS)

    @staticmethod
    def _decided(pictures, links, row, entity) -> np.ndarray:
        """bool [n]: pictures whose thing an ambiguous name means, and that name has a label."""
        mention = link_rows.starts_run(links.row, links.mention).cumsum() - 1
        count = int(mention[-1]) + 1 if len(mention) else 0
        width = int(max(links.entity.max(initial=0), entity.max(initial=0))) + 1
        chosen = np.isin(links.row * width + links.entity, row * width + entity)
        right = pictures.right(links.row, links.entity)
        several, decided, means = (
            np.bincount(mention[some], minlength=count) > least
            for some, least in ((slice(None), 1), (chosen, 0), (right, 0))
        )
        found = np.zeros(len(pictures.known), bool)
        first = np.flatnonzero(link_rows.starts_run(links.row, links.mention))
        found[links.row[first[several & decided & means]]] = True
        return found

    def result(self, kinds: np.ndarray, sizes: np.ndarray) -> dict:
        """What was counted.

        Args:
          kinds: string [entities], "" where unknown.
          sizes: int64 [entities], the labels that an entity has.

        Returns:
          chosen, right, pictures, named, found, precision, recall, or_broader; by_kind and by_size,
          the same of the entities of each; wrong_captions, silent_captions and senses.
        """
        s = self._sums
        chosen, right = self._by_entity[:2].sum(axis=1)
        total = _rates((chosen, right, s["named"], s["found"]))
        used = self._by_entity.any(axis=0)
        by_kind = {
            kind or "unknown": _rates(self._by_entity[:, used & (kinds == kind)].sum(axis=1))
            for kind in np.unique(kinds[used])
        }
        by_size, most = {}, np.iinfo(np.int64).max
        for name, least in SIZES:
            some = (sizes >= least) & (sizes < most) & used
            by_size[name], most = _rates(self._by_entity[:, some].sum(axis=1)), least
        return {
            **total,
            "pictures": s["pictures"],
            "or_broader": _share(s["broader"], int(chosen)),
            "by_kind": by_kind,
            "by_size": by_size,
            "wrong_captions": {
                "pictures": s["wrong"],
                "without_its_label": _share(s["wrong"] - s["wrong_so"], s["wrong"]),
                "without_label": _share(s["wrong"] - s["wrong_any"], s["wrong"]),
            },
            "silent_captions": {
                "pictures": s["silent"],
                "without_label": _share(s["silent"] - s["silent_any"], s["silent"]),
            },
            "senses": {
                "pictures": s["decided"],
                "right": _share(s["decided_right"], s["decided"]),
            },
        }

    def calibration(self) -> dict | None:
        """Of labels by probability: how many, the mean probability, the share that is right.

        Returns:
          bins, and error: the expected calibration error (arXiv 1706.04599). None where no label
          has a probability.
        """
        labels, sums, right = self._calibration
        if not labels.sum():
            return None
        some = np.flatnonzero(labels)
        bins = [
            {
                "labels": int(labels[i]),
                "probability": sums[i] / labels[i],
                "precision": right[i] / labels[i],
            }
            for i in some
        ]
        return {"bins": bins, "error": float(np.abs(sums - right).sum() / labels.sum())}


def _rates(counts: np.ndarray) -> dict:
    chosen, right, named, found = map(int, counts)
    return {
        "precision": _share(right, chosen),
        "recall": _share(found, named),
        **{"chosen": chosen, "right": right, "named": named, "found": found},
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
