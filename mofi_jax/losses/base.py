"""What every loss returns: sums over the global batch, divided once, at the end."""

from typing import NamedTuple

from jaxtyping import Array, Float


class LossSum(NamedTuple):
    """Sums over the rows of the global batch that take part in a loss; all fp32 scalars.

    The mean loss is ``total / max(count, 1)``.  Sums of several batches or tasks add up, means of
    means do not.

    Attributes:
      total: sum of the rows' losses, the only member that carries a gradient.
      count: number of rows that take part.
      correct: number of those rows that rank the right answer strictly above every wrong one,
        margin aside.
      cosine: sum of those rows' cosines with the right answer, the closest where there are several.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    correct: Float[Array, ""]
    cosine: Float[Array, ""]
