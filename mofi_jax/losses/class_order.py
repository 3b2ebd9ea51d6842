"""The order of the class table's rows, and their padding to the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

# Of `table_rows`: a table whose rows lie in another order names the wrong entities.
TABLE_ORDER = 1


def padded_rows(rows: int, mesh: Mesh) -> int:
    """Rows of the class table, rounded up so that every device holds the same number."""
    return -(-rows // mesh.size) * mesh.size


def table_rows(ids: Any, num_entities: int) -> Any:
    """Rows of the class table at which entities live: a fixed shuffle of range(num_entities).

    Ids come by descending image count, and devices hold contiguous rows: without a shuffle the
    first device would own every frequent entity, and in sampled training nearly all labels of a
    batch.  The ids are dealt onto piles, consecutive ones far apart (golden-ratio multiplication),
    and the piles lie one after the other in the table.  That depends on the number of entities
    alone, so a checkpoint fits any number of devices.

    Args:
      ids: int32 entity ids, numpy or jax, any shape; ids outside [0, num_entities) stay as they
        are.
      num_entities: size of the vocabulary.
    """
    piles, multiplier = _piles(num_entities)
    height = num_entities // piles
    rows = ids % piles * multiplier % piles * height + ids // piles
    # The last, incomplete round (the rarest entities) stays where it is.
    dealt = (ids >= 0) & (ids < piles * height)
    return _where(dealt, rows, ids)


def table_entities(rows: Any, num_entities: int) -> Any:
    """The inverse of `table_rows`: entity ids of rows of the class table."""
    piles, multiplier = _piles(num_entities)
    height = num_entities // piles
    ids = rows // height * pow(multiplier, -1, piles) % piles + rows % height * piles
    dealt = (rows >= 0) & (rows < piles * height)
    return _where(dealt, ids, rows)


def _piles(num_entities: int) -> tuple[int, int]:
    """Number of piles (a power of two, many times the devices of a pod) and the dealing factor."""
    piles = 1
    while piles < 4096 and 16 * piles <= num_entities:
        piles *= 2
    return piles, round(piles * 0.6180339887) | 1


def _where(condition: Any, a: Any, b: Any) -> Any:
    return (jnp if isinstance(condition, jax.Array) else np).where(condition, a, b)
