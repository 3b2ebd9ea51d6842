"""What every layout of a picture set comes down to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Reader = Callable[[int], bytes]  # the file of picture i; safe to call from several threads


# Columns of class labels, the likeliest first.
LABELS = ("label", "labels", "fine_label", "class", "category")


class Listing(NamedTuple):
    """The pictures of a set in its order."""

    names: Sequence[str]  # unique
    classes: Int[np.ndarray, " n"]  # int64
    labels: dict[int, str]  # of the classes, where the layout names them
    read: Reader
