"""The order of the class table's rows, and their padding to the mesh."""

from typing import Any

from jax.sharding import Mesh

# Of `table_rows`: a table whose rows lie in another order names the wrong entities.
TABLE_ORDER = 1


def padded_rows(rows: int, mesh: Mesh) -> int:
    """Rows of the class table, rounded up so that every device holds the same number."""
    return -(-rows // mesh.size) * mesh.size


def table_rows(ids: Any, num_entities: int) -> Any:
    """Rows of the class table at which entities live: a strided permutation of range(num_entities).

    Ids come by descending image count, and devices hold contiguous rows: in that order the first
    device would own every frequent entity, and in sampled training nearly all labels of a batch.
    So the ids of each residue modulo the stride lie together, and the residues in the order of
    golden-ratio multiplication, which keeps neighbours apart.  The permutation depends on the
    number of entities alone, so a checkpoint fits any number of devices.

    Args:
      ids: int32, numpy or jax, any shape; ids outside [0, num_entities) stay as they are.
    """
    stride, multiplier = _stride(num_entities)
    run = num_entities // stride
    rows = ids % stride * multiplier % stride * run + ids // stride
    # The rarest entities, from the last multiple of the stride on, stay where they are.
    moved = (ids >= 0) & (ids < stride * run)
    return ids + moved * (rows - ids)


def table_entities(rows: Any, num_entities: int) -> Any:
    """The inverse of `table_rows`: entity ids of rows of the class table."""
    stride, multiplier = _stride(num_entities)
    run = num_entities // stride
    ids = rows // run * pow(multiplier, -1, stride) % stride + rows % run * stride
    moved = (rows >= 0) & (rows < stride * run)
    return rows + moved * (ids - rows)


def _stride(num_entities: int) -> tuple[int, int]:
    """The stride (a power of two, many times the devices of a pod) and the residues' multiplier."""
    stride = 1
    while stride < 4096 and 16 * stride <= num_entities:
        stride *= 2
    return stride, round(stride * 0.6180339887) | 1
