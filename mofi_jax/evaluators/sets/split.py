"""A training and a test picture set over one list of classes, for what learns before it answers."""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Int, Int32

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import tree
from mofi_jax.evaluators.sets import pictures
from mofi_jax.evaluators.sets.pictures import PictureSet


@dataclasses.dataclass(frozen=True)
class Split:
    """Two picture sets; labels are places in the sorted list of the training set's classes."""

    train: PictureSet
    test: PictureSet
    train_labels: Int32[np.ndarray, " n"]
    test_labels: Int32[np.ndarray, " m"]

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def read_split(train: epath.PathLike, test: epath.PathLike) -> Split:
    """Reads two picture sets (`pictures.read_set`).

    Where both layouts name their classes, these are the same where their names are, whatever their
    numbers.

    Raises BadInput: unusable sets, one and the same set, a single class, or a class of the test set
    without training pictures, none of whose pictures could be right.
    """
    sets = pictures.read_set(train, tree.TO_LEARN), pictures.read_set(test)
    if sets[0].path.resolve() == sets[1].path.resolve():
        raise BadInput(
            f"`train` and `images` are both {sets[1].path}, where every picture would find itself:"
            " give two sets without common pictures."
        )
    named = all(part.labels for part in sets)
    keys = [_keys(part, named) for part in sets]
    known, train_labels = np.unique(keys[0], return_inverse=True)
    missing = np.setdiff1d(keys[1], known)
    if len(missing):
        raise BadInput(
            f"Class {missing[0]} of {test} has no pictures in {train} ({len(missing)} such classes "
            f"of {len(np.unique(keys[1]))}): give the training set that belongs to the pictures."
        )
    if len(known) < 2:
        raise BadInput(
            f"All pictures of {train} are of one class, so there is nothing to tell apart: give "
            "pictures of two classes or more."
        )
    test_labels = np.searchsorted(known, keys[1])
    return Split(*sets, train_labels.astype(np.int32), test_labels.astype(np.int32))


def _keys(part: PictureSet, named: bool) -> Int[np.ndarray, " n"] | np.ndarray:
    if not named:
        return part.classes
    return np.array([part.labels[int(number)] for number in part.classes])
