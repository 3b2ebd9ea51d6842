"""Names in sorted order -> their candidates with priors -> a trie beside memory-mapped arrays.

Nothing is kept in memory but, for each name, the bytes of the trie and a number or two: the names
stream through numpy, whole names at a time, and the results go to files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_prep import engine
from data_prep.kb import forms

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 500_000  # names, with their candidates, that are ranked at a time


class Ranked(NamedTuple):
    """Whole names and their candidates.

    Attributes:
      forms: string [n].
      sizes: uint8 [n], how many candidates each has.
      columns: of the candidates; `entity` and `prior` among them, most likely first.
      linked: float32 [n], link probability; NaN where it is unknown.
      by_links_alone: how many of the names are there by links alone.
    """

    forms: pa.Array
    sizes: np.ndarray
    columns: dict[str, np.ndarray]
    linked: np.ndarray
    by_links_alone: int


def rank(rows: pa.Table, max_stored: int, smoothing: float) -> Ranked:
    """The candidates of whole names.

    Args:
      rows: form, entity, weight, how, links, linked and columns that are passed on; sorted by form.
      max_stored: candidates kept of a name.
      smoothing: links shared out by the weights where a name has links.
    """
    import pyarrow.compute as pc

    form = rows["form"].combine_chunks()
    columns = {name: rows[name].to_numpy() for name in rows.column_names if name != "form"}

    def starts_of(form) -> np.ndarray:
        differs = pc.not_equal(form.slice(1), form.slice(0, len(form) - 1))
        return np.concatenate([[0], 1 + np.flatnonzero(differs.to_numpy(zero_copy_only=False))])

    # A joined name gives way to what has that very name.
    joined = columns["how"] == forms.JOINED
    starts = starts_of(form)
    own = np.logical_or.reduceat(~joined, starts)
    keep = ~(joined & np.repeat(own, np.diff(starts, append=len(joined))))
    form = form.filter(keep)
    columns = {name: values[keep] for name, values in columns.items()}

    starts = starts_of(form)
    sizes = np.diff(starts, append=len(form))
    name = np.repeat(np.arange(len(starts)), sizes)
    weight, links = columns.pop("weight"), columns.pop("links")
    linked = columns.pop("linked")[starts].astype(np.float32)
    weights, total_links = np.add.reduceat(weight, starts), np.add.reduceat(links, starts)
    share = weight / np.where(weights > 0, weights, 1)[name]
    value = np.where(total_links[name] > 0, links + smoothing * share, weight)

    order = np.lexsort((columns["entity"], -value, name))
    stored = np.arange(len(order)) - starts[name] < max_stored
    order, name = order[stored], name[stored]
    sizes, value = np.minimum(sizes, max_stored), value[order]
    totals = np.add.reduceat(value, np.cumsum(sizes) - sizes)
    columns = {name: values[order] for name, values in columns.items()}
    columns["prior"] = (value / totals[name]).astype(np.float32)
    by_links_alone = int(np.count_nonzero(weights == 0))
    return Ranked(form.take(starts), sizes.astype(np.uint8), columns, linked, by_links_alone)


def whole_names(rows: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Cuts sorted rows into tables so that no name is in two of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held: list[pa.Table] = []
    for batch in rows:
        held.append(pa.Table.from_batches([batch]))
        if sum(table.num_rows for table in held) < BATCH:
            continue
        table = pa.concat_tables(held)
        last = pc.equal(table["form"], table["form"][-1])
        end = pc.index(last, True).as_py()
        if end:
            yield table.slice(0, end)
        held = [table.slice(end)]
    if held:
        yield pa.concat_tables(held)


class Index:
    """Names in sorted order with their candidates: to files, then into the order of the trie."""

    def __init__(self, scratch: str, columns: Mapping[str, tuple[str, str]]):
        """
        Args:
          scratch: a folder of its own, which is made.
          columns: of the candidates: name -> the name and the dtype of its array's file.
        """
        import pyarrow as pa

        os.makedirs(scratch)
        self._path = scratch
        self._stored = dict(columns)
        self._columns = {
            name: open(os.path.join(scratch, name), "wb")  # noqa: SIM115  closed in write()
            for name in ("sizes", "linked", *columns)
        }
        self._schema = pa.schema({"form": pa.string()})
        self._forms = pa.ipc.new_file(os.path.join(scratch, "forms"), self._schema)

    def add(self, ranked: Ranked) -> None:
        import pyarrow as pa

        columns = {"sizes": ranked.sizes, "linked": ranked.linked}
        for name, (_, dtype) in self._stored.items():
            columns[name] = ranked.columns[name].astype(dtype, copy=False)
        for name, values in columns.items():
            values.tofile(self._columns[name])
        self._forms.write_batch(pa.record_batch([ranked.forms], schema=self._schema))

    def _batches(self) -> Iterator[list[str]]:
        import pyarrow as pa

        with pa.memory_map(os.path.join(self._path, "forms")) as file:
            reader = pa.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).column(0).to_pylist()

    def write(
        self, outputs: engine.Outputs, trie: str, offsets: str, linked: str | None = None
    ) -> tuple[int, int]:
        """Writes the trie and the arrays to files of these names in the stage's folder.

        Returns:
          How many names and candidates there are.
        """
        import marisa_trie

        self._forms.close()
        for file in self._columns.values():
            file.close()

        def target(name: str) -> str:
            return os.fspath(outputs.path(f"{outputs.stage}/{name}"))

        def column(name: str, dtype: str) -> np.ndarray:
            path = os.path.join(self._path, name)
            return np.memmap(path, dtype, "r") if os.path.getsize(path) else np.empty(0, dtype)

        names = marisa_trie.Trie(form for forms in self._batches() for form in forms)
        names.save(target(trie))
        sizes = np.fromfile(os.path.join(self._path, "sizes"), np.uint8)
        number = np.empty(len(sizes), np.int32)
        start = 0
        for forms_ in self._batches():
            number[start : start + len(forms_)] = [names[form] for form in forms_]
            start += len(forms_)
        del names
        begins = np.zeros(len(sizes) + 1, np.int64)
        begins[1:][number] = sizes
        np.cumsum(begins, out=begins)
        np.save(target(offsets), begins)
        if linked:
            probabilities = np.empty(len(sizes), np.float32)
            probabilities[number] = column("linked", "float32")
            np.save(target(linked), probabilities)
        for name, (stem, dtype) in self._stored.items():
            values = column(name, dtype)
            stored = np.lib.format.open_memmap(target(f"{stem}.npy"), "w+", dtype, values.shape)
            begin = 0
            for first in range(0, len(sizes), BATCH):
                some = slice(first, first + BATCH)
                ends = np.cumsum(sizes[some], dtype=np.int64)
                shift = np.repeat(begins[number[some]] - (ends - sizes[some]), sizes[some])
                count = int(ends[-1])
                stored[shift + np.arange(count)] = values[begin : begin + count]
                begin += count
            stored.flush()
        return len(sizes), int(begins[-1])
