"""From the parts of a knowledge base to its folder, out of core.

The merge keeps no table in memory but, for each name, the bytes of the trie and a number or two:
DuckDB sorts all names, on disk where memory is short, they stream through numpy in that order, and
the results go to files.
"""

from __future__ import annotations

import collections
import os
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence

from data_prep import engine
from data_prep.kb import anchors as kb_anchors
from data_prep.kb import parts as kb_parts
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_ROW_GROUP = 65_536  # entities
_BATCH = 500_000  # names, with their candidates, that are ranked at a time


# -------------------------------------------------------------------------------------------- merge


def merge(
    parts: Sequence[str],
    outputs: engine.Outputs,
    settings: dict,
    source: str,
    config: Mapping,
) -> dict[str, int]:
    """Writes the folder of the stage from all parts in order; see `data_prep.kb.build.build`."""
    import duckdb

    folder, scratch = outputs.stage, os.fspath(outputs.temporary("merge"))
    os.makedirs(scratch)
    limits = {"threads": config["workers"], "memory_limit": f"{config['memory_gb']} GB"}
    with duckdb.connect(config={**limits, "temp_directory": scratch}) as connection:
        counts, entities = _write_entities(parts, outputs, connection)
        _check_rejects(parts, counts, config["reject_budget"], source)
        names = _numbered_names(parts, entities)
        path = os.fspath(outputs.path(f"{folder}/entities.parquet"))
        anchors = kb_anchors.Anchors(config["anchors"], path, config["anchor_min_links"], scratch)
        rows = kb_anchors.sorted_names(connection, names, anchors)
        ranked = _Ranked(scratch)
        for batch in _whole_names(rows):
            ranked.add(*_rank(batch, settings["max_stored"], settings["anchor_smoothing"]))
        ranked.close()
        counts["linked_names"] = ranked.linked
    counts["aliases"], counts["candidates"] = ranked.write(outputs)
    shutil.rmtree(scratch)
    order = ("entities", "aliases", "candidates", "rejected", "empty_names", "linked_names")
    dropped = sorted(key for key in counts if key not in order)
    return {key: counts[key] for key in (*order, *dropped)}


def _write_entities(
    parts: Sequence[str], outputs: engine.Outputs, connection
) -> tuple[dict[str, int], list[np.ndarray]]:
    """Writes entities.parquet and rejects.parquet.

    Returns:
      The counts, and for each part the entity of each of its rows, int32; -1 for one whose id an
      earlier row has.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    twice = _ids_of_several_rows(parts, connection)
    seen: set[str] = set()
    counts = {"entities": 0, "rejected": 0}
    rejects: list[tuple[int, str]] = []
    numbers = []
    folder = outputs.stage
    with pq.ParquetWriter(
        os.fspath(outputs.path(f"{folder}/entities.parquet")),
        kb_parts.entities_schema(),
        compression="zstd",
    ) as writer:
        held: list[pa.Table] = []
        for path in parts:
            note = kb_parts.read(path)
            for key, value in note["counts"].items():
                counts[key] = counts.get(key, 0) + value
            table = engine.read_table(f"{path}.entities.parquet")
            fresh = np.ones(table.num_rows, bool)
            found = [(line, reason) for line, reason in note["rejects"]]
            if twice:
                suspects = pc.is_in(table["qid"], value_set=pa.array(sorted(twice)))
                for i in np.flatnonzero(suspects.to_numpy(zero_copy_only=False)).tolist():
                    qid = table["qid"][i].as_py()
                    if qid in seen:
                        fresh[i] = False
                        found.append((table["line"][i].as_py(), "duplicate_id"))
                    seen.add(qid)
            rejects += sorted(found)
            number = np.full(table.num_rows, -1, np.int32)
            kept = int(fresh.sum())
            number[fresh] = np.arange(counts["entities"], counts["entities"] + kept)
            numbers.append(number)
            counts["entities"] += kept
            held.append(table.drop_columns("line").filter(pa.array(fresh)))
            held = _write_row_groups(writer, held, _ROW_GROUP)
        _write_row_groups(writer, held, 1)
    counts["rejected"] = len(rejects)
    rows = [(f"line {line}", reason) for line, reason in rejects]
    outputs.write_table(f"{folder}/rejects.parquet", engine.rejects_table(folder, rows))
    return counts, numbers


def _check_rejects(
    parts: Sequence[str], counts: dict[str, int], budget: float, source: str
) -> None:
    """Raises BadInput where there is no entity, or more lines cannot be used than can be meant."""
    rejects = [reject for path in parts for reject in kb_parts.read(path)["rejects"]]
    dropped = sum(count for key, count in counts.items() if key.startswith("dropped_"))
    total = counts["entities"] + counts["rejected"] + dropped
    if counts["entities"] and len(rejects) <= budget * total:
        return
    remedy = 'one JSON object a line with "id" and "label", or a dump of Wikidata in the languages'
    if not rejects:
        raise errors.BadInput(
            f"knowledge_base: {source} has no usable row in {total}: give {remedy} chosen."
        )
    [(reason, most)] = collections.Counter(reason for _, reason in rejects).most_common(1)
    example = next(line for line, why in rejects if why == reason)
    told = f"{most} {reason}, the first in line {example}"
    if not counts["entities"]:
        raise errors.BadInput(
            f"knowledge_base: {source} has no usable row in {total} ({told}): give {remedy} chosen."
        )
    raise errors.BadInput(
        f"knowledge_base: {len(rejects)} of {total} lines of {source} cannot be used ({told}): give"
        f" {remedy} chosen, or raise config.reject_budget={budget} if that is as it should be."
    )


def _ids_of_several_rows(parts: Sequence[str], connection) -> set[str]:
    if not parts:
        return set()
    rows = engine.ask(
        connection,
        "SELECT qid FROM read_parquet($parts) GROUP BY qid HAVING count(*) > 1",
        {"parts": [f"{path}.entities.parquet" for path in parts]},
    ).fetchall()
    return {qid for (qid,) in rows}


def _write_row_groups(writer, held: list[pa.Table], least: int) -> list[pa.Table]:
    """Writes groups of `_ROW_GROUP` rows while `least` rows are there; returns the rest."""
    import pyarrow as pa

    if sum(table.num_rows for table in held) < least:
        return held
    table = pa.concat_tables(held).combine_chunks()
    while table.num_rows >= least:
        writer.write_table(table.slice(0, _ROW_GROUP), row_group_size=_ROW_GROUP)
        table = table.slice(_ROW_GROUP)
    return [table]


def _numbered_names(parts: Sequence[str], entities: Sequence[np.ndarray]) -> pa.RecordBatchReader:
    """All names of all parts: form, entity, weight, case, joined."""
    import pyarrow as pa

    schema = kb_parts.names_schema().set(0, pa.field("entity", pa.int32()))

    def batches() -> Iterator[pa.RecordBatch]:
        for path, numbers in zip(parts, entities, strict=True):
            table = engine.read_table(f"{path}.names.parquet")
            entity = numbers[table["index"].to_numpy()]
            columns = [pa.array(entity), *(table[name] for name in schema.names[1:])]
            table = pa.table(columns, schema=schema).filter(pa.array(entity >= 0))
            yield from table.to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


# ----------------------------------------------------------------------------------------- ranking


def _whole_names(rows: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Cuts sorted rows into tables so that no name is in two of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held: list[pa.Table] = []
    for batch in rows:
        held.append(pa.Table.from_batches([batch]))
        if sum(table.num_rows for table in held) < _BATCH:
            continue
        table = pa.concat_tables(held)
        last = pc.equal(table["form"], table["form"][-1])
        end = pc.index(last, True).as_py()
        if end:
            yield table.slice(0, end)
        held = [table.slice(end)]
    if held:
        yield pa.concat_tables(held)


def _rank(
    rows: pa.Table, max_stored: int, smoothing: float
) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """The candidates of whole names.

    Args:
      rows: form, entity, weight, case, joined, links; sorted by form.
      max_stored: candidates kept of a name.
      smoothing: links shared out by the weights where a name has links.

    Returns:
      Names; the number of candidates of each, uint8; their entities, priors and cases; how many of
      the names are there by links alone.
    """
    import numpy as np
    import pyarrow.compute as pc

    form = rows["form"].combine_chunks()
    entity, weight, case, joined, links = (
        rows[name].to_numpy() for name in ("entity", "weight", "case", "joined", "links")
    )

    def starts_of(form) -> np.ndarray:
        differs = pc.not_equal(form.slice(1), form.slice(0, len(form) - 1))
        return np.concatenate([[0], 1 + np.flatnonzero(differs.to_numpy(zero_copy_only=False))])

    # A joined name gives way to what has that very name.
    starts = starts_of(form)
    sizes = np.diff(starts, append=len(entity))
    own = np.repeat(np.logical_or.reduceat(~joined, starts), sizes)
    keep = ~(joined & own)
    form = form.filter(keep)
    entity, weight, case, links = entity[keep], weight[keep], case[keep], links[keep]

    starts = starts_of(form)
    sizes = np.diff(starts, append=len(entity))
    name = np.repeat(np.arange(len(starts)), sizes)
    weights, linked = np.add.reduceat(weight, starts), np.add.reduceat(links, starts)
    by_links = linked[name] > 0
    share = weight / np.where(weights > 0, weights, 1)[name]
    value = np.where(by_links, links + smoothing * share, weight)

    order = np.lexsort((entity, -value, name))
    entity, case, value = entity[order], case[order], value[order]
    stored = np.arange(len(entity)) - starts[name] < max_stored
    entity, case, value, name = entity[stored], case[stored], value[stored], name[stored]
    sizes = np.minimum(sizes, max_stored)
    totals = np.add.reduceat(value, np.cumsum(sizes) - sizes)
    priors = (value / totals[name]).astype(np.float32)
    by_links_alone = int(np.count_nonzero(weights == 0))
    return form.take(starts), sizes.astype(np.uint8), entity, priors, case, by_links_alone


class _Ranked:
    """Names in sorted order with their candidates: to files, then into the order of the trie."""

    _DTYPES: typing.ClassVar = {"entity": "int32", "prior": "float32", "case": "uint8"}

    def __init__(self, scratch: str):
        import pyarrow as pa

        self._path = scratch
        self._columns = {
            name: open(os.path.join(scratch, name), "wb")  # noqa: SIM115  closed in close()
            for name in ("sizes", *self._DTYPES)
        }
        self._schema = pa.schema({"form": pa.string()})
        self._forms = pa.ipc.new_file(os.path.join(scratch, "forms"), self._schema)
        self.linked = 0

    def add(self, forms, sizes, entity, priors, case, linked: int) -> None:
        import pyarrow as pa

        columns = {"sizes": sizes, "entity": entity, "prior": priors, "case": case}
        for name, values in columns.items():
            values.tofile(self._columns[name])
        self._forms.write_batch(pa.record_batch([forms], schema=self._schema))
        self.linked += linked

    def close(self) -> None:
        self._forms.close()
        for file in self._columns.values():
            file.close()

    def _batches(self) -> Iterator[list[str]]:
        import pyarrow as pa

        with pa.memory_map(os.path.join(self._path, "forms")) as file:
            reader = pa.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).column(0).to_pylist()

    def write(self, outputs: engine.Outputs) -> tuple[int, int]:
        """Writes the trie and the arrays; returns how many aliases and candidates there are."""
        import marisa_trie
        import numpy as np

        folder = outputs.stage
        trie = marisa_trie.Trie(form for forms in self._batches() for form in forms)
        trie.save(os.fspath(outputs.path(f"{folder}/aliases.marisa")))
        sizes = np.fromfile(os.path.join(self._path, "sizes"), np.uint8)
        number = np.empty(len(sizes), np.int32)
        start = 0
        for forms in self._batches():
            number[start : start + len(forms)] = [trie[form] for form in forms]
            start += len(forms)
        del trie
        offsets = np.zeros(len(sizes) + 1, np.int64)
        offsets[1:][number] = sizes
        np.cumsum(offsets, out=offsets)
        np.save(outputs.path(f"{folder}/alias_offsets.npy"), offsets)
        for name, dtype in self._DTYPES.items():
            values = np.memmap(os.path.join(self._path, name), dtype, "r")
            target = np.lib.format.open_memmap(
                outputs.path(f"{folder}/cand_{name}.npy"), "w+", dtype, (len(values),)
            )
            begin = 0
            for first in range(0, len(sizes), _BATCH):
                some = slice(first, first + _BATCH)
                ends = np.cumsum(sizes[some], dtype=np.int64)
                shift = np.repeat(offsets[number[some]] - (ends - sizes[some]), sizes[some])
                count = int(ends[-1])
                target[shift + np.arange(count)] = values[begin : begin + count]
                begin += count
            target.flush()
        return len(sizes), int(offsets[-1])
