"""From the parts of a knowledge base to its folder, out of core.

The merge keeps no table in memory: DuckDB sorts all names, on disk where memory is short, and they
stream in that order through `data_prep.kb.ranking`.
"""

from __future__ import annotations

import collections
import os
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence

from data_prep import engine
from data_prep.engine import executors
from data_prep.kb import closure, forms, people, ranking
from data_prep.kb import parts as kb_parts
from data_prep.kb.sources import anchors as kb_anchors
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_ROW_GROUP = 65_536  # entities


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
        english = "en" in settings["languages"]
        counts, entities = _write_entities(parts, outputs, connection, english)
        _check_rejects(parts, counts, config["reject_budget"], source)
        path = os.fspath(outputs.path(f"{folder}/entities.parquet"))
        redirects = os.fspath(outputs.path(f"{folder}/redirects.parquet"))
        counts["redirects"] = closure.write_redirects(
            connection, config["redirects"], path, redirects
        )
        shortened, taken = _take_people_apart(path, scratch, settings, config["workers"])
        names = _numbered_names(parts, entities, shortened)
        anchors = kb_anchors.Anchors(
            config["anchors"], path, redirects, config["anchor_min_links"], scratch
        )
        found = kb_anchors.sorted_names(connection, names, anchors)
        index = ranking.Index(os.path.join(scratch, "names"), _NAMES)
        counts["linked_names"] = _rank_all(found, index, settings)
        written = index.write(outputs, "aliases.marisa", "alias_offsets.npy", "alias_linked.npy")
        counts["aliases"], counts["candidates"] = written
        found = engine.ask(
            connection,
            f"SELECT *, {forms.EXACT} AS how, 0 AS links, 'nan'::FLOAT AS linked"
            " FROM read_parquet($parts) ORDER BY form, entity, role",
            {"parts": taken},
        ).to_arrow_reader(100_000)
        index = ranking.Index(os.path.join(scratch, "parts"), _PARTS)
        _rank_all(found, index, settings)
        counts["parts"], _ = index.write(outputs, "parts.marisa", "part_offsets.npy")
    shutil.rmtree(scratch)
    order = ("entities", "aliases", "candidates", "parts", "redirects", "rejected")
    order += ("empty_names", "linked_names")
    dropped = sorted(key for key in counts if key not in order)
    return {key: counts[key] for key in (*order, *dropped)}


# The arrays of candidates: column -> file and dtype.
_NAMES = {
    "entity": ("cand_entity", "int32"),
    "prior": ("cand_prior", "float32"),
    "case": ("cand_case", "uint8"),
    "how": ("cand_form", "uint8"),
    "languages": ("cand_languages", "uint16"),
}
_PARTS = {
    "entity": ("part_entity", "int32"),
    "prior": ("part_prior", "float32"),
    "role": ("part_role", "uint8"),
}


def _rank_all(rows: pa.RecordBatchReader, index: ranking.Index, settings: dict) -> int:
    """Ranks sorted names into an index; returns how many are there by links alone."""
    by_links_alone = 0
    for table in ranking.whole_names(rows):
        ranked = ranking.rank(table, settings["max_stored"], settings["anchor_smoothing"])
        index.add(ranked)
        by_links_alone += ranked.by_links_alone
    return by_links_alone


def _take_people_apart(
    entities: str, scratch: str, settings: dict, workers: int
) -> tuple[list[str], list[str]]:
    """The files of the shortened names of people, and those of the parts of their names."""
    import pyarrow.parquet as pq

    folder = os.path.join(scratch, "people")
    os.makedirs(folder)
    with pq.ParquetFile(entities) as file:
        groups = range(file.num_row_groups)
    write = people.Writer(entities, folder, settings["alias_factor"], settings["alpha"])
    if workers == 1 or len(groups) < 2:
        paths = list(map(write, groups))
    else:
        with executors.spawned(workers) as pool:
            paths = list(pool.map(write, groups))
    return [f"{path}.names.parquet" for path in paths], [f"{path}.parts.parquet" for path in paths]


def _write_entities(
    parts: Sequence[str], outputs: engine.Outputs, connection, english: bool
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
        kinds = closure.Kinds(connection, parts, english).tables() if parts else ()
        for path, table in zip(parts, kinds, strict=True):
            note = kb_parts.read(f"{path}{kb_parts.LAST}")
            for key, value in note["counts"].items():
                counts[key] = counts.get(key, 0) + value
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
    notes = (kb_parts.read(f"{path}{kb_parts.LAST}") for path in parts)
    rejects = [reject for note in notes for reject in note["rejects"]]
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


def _numbered_names(
    parts: Sequence[str], entities: Sequence[np.ndarray], further: Sequence[str]
) -> pa.RecordBatchReader:
    """All names of all parts, then those of further files; columns of `parts.numbered_schema`."""
    import pyarrow as pa

    schema = kb_parts.numbered_schema()

    def batches() -> Iterator[pa.RecordBatch]:
        for path, numbers in zip(parts, entities, strict=True):
            table = engine.read_table(f"{path}.names.parquet")
            entity = numbers[table["index"].to_numpy()]
            columns = [pa.array(entity), *(table[name] for name in schema.names[1:])]
            table = pa.table(columns, schema=schema).filter(pa.array(entity >= 0))
            yield from table.to_batches()
        for path in further:
            yield from engine.read_table(path).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())
