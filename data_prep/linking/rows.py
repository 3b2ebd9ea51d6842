"""links/ as flat arrays, one element for each candidate: what is computed over a shard at a time.

A shard's pairs are numbered by their row in links/; all arrays are in the order of links/ or, for
distinct entities, by row and entity.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

import numpy as np

from data_prep import engine

if typing.TYPE_CHECKING:
    import pyarrow as pa


class LinkRows(typing.NamedTuple):
    """A shard of links/.

    Attributes:
      keys: string [n], of all pairs, also those without a candidate.
      mentions: int64 [n], how many mentions each caption has.
      row: int64 [c], the pair of each candidate, ascending.
      mention: int32 [c], its mention's number within the caption.
      entity: int32 [c], row of the knowledge base.
      prior: float32 [c], p(entity | name).
    """

    keys: pa.Array
    mentions: np.ndarray
    row: np.ndarray
    mention: np.ndarray
    entity: np.ndarray
    prior: np.ndarray


class Distinct(typing.NamedTuple):
    """Each entity of a pair once, by row and entity, with its highest prior."""

    row: np.ndarray  # int64 [p]
    entity: np.ndarray  # int32 [p]
    prior: np.ndarray  # float32 [p]


def read(path: str | os.PathLike[str]) -> LinkRows:
    """Reads a shard of links/."""
    return flatten(engine.read_table(path, columns=["key", "mentions", "candidates"]))


def flatten(table: pa.Table) -> LinkRows:
    """Rows of links/."""
    found = whole(table["candidates"])
    fields = found.flatten()  # honours offsets and nulls, as .values does not
    columns = (fields.field(name) for name in ("mention", "entity", "prior"))
    mention, entity, prior = (column.to_numpy(zero_copy_only=False) for column in columns)
    return LinkRows(
        whole(table["key"]),
        lengths(table["mentions"]),
        np.repeat(np.arange(len(table)), lengths(found)),
        mention.astype(np.int32, copy=False),
        entity.astype(np.int32, copy=False),
        prior.astype(np.float32, copy=False),
    )


def distinct(links: LinkRows) -> Distinct:
    """The entities of each pair, whichever of its mentions mean them."""
    order = np.lexsort((-links.prior, links.entity, links.row))
    row, entity, prior = (x[order] for x in (links.row, links.entity, links.prior))
    first = starts_run(row, entity)
    return Distinct(row[first], entity[first], prior[first])


def mention_of(links: LinkRows) -> np.ndarray:
    """int64 [c]: the number of each candidate's mention among all of the shard that have one."""
    width = int(links.mention.max(initial=0)) + 1
    return np.unique(links.row * width + links.mention, return_inverse=True)[1]


def starts_run(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where a row differs from the one before it in any of the (sorted) columns."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


def positions(keys: pa.Array, among: pa.Array) -> np.ndarray:
    """int64 [n]: where each of `keys` stands in `among`, -1 where it does not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.fill_null(pc.index_in(keys, value_set=among), pa.scalar(-1, pa.int32()))
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """float64 [c]: of each of `wanted` its value, by ascending keys; NaN where there is none."""
    found = np.full(len(wanted), np.nan)
    place = np.searchsorted(keys, wanted)
    known = place < len(keys)
    known[known] = keys[place[known]] == wanted[known]
    found[known] = values[place[known]]
    return found


def read_column(path: str | os.PathLike[str], name: str) -> pa.Array:
    """A column of a parquet file in one piece."""
    return whole(engine.read_table(path, columns=[name])[name])


def lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: of each list of a column of lists."""
    import pyarrow.compute as pc

    found = pc.list_value_length(column)
    return found.to_numpy().astype(np.int64) if len(column) else np.zeros(0, np.int64)


def lists(values: np.ndarray, starts: Sequence[int] | np.ndarray) -> pa.ListArray:
    """A column of lists: row i holds values[starts[i]:starts[i + 1]]."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
