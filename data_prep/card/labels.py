"""The numbers of the data card that are about labels: histograms, thresholds, entity types.

As in `numbers`: pairs are looked at a shard at a time, entities are grouped out of core. What would
be labelled, `selection.choose` says.
"""

from __future__ import annotations

import collections
import typing
from collections.abc import Iterator

import numpy as np

from data_prep.card import numbers as card_numbers
from data_prep.card.numbers import FINAL, Files, ask, batches
from data_prep.kb import kinds as kb_kinds
from data_prep.linking import rows as link_rows
from data_prep.selection import choose, twins

if typing.TYPE_CHECKING:
    import duckdb

PROBABILITY_BIN = 0.05  # and the step between the thresholds that are tried
_SHOWN_TYPES = 15
_EXAMPLES = 2  # of a type


def labels_per_picture(connection: duckdb.DuckDBPyConnection, files: Files) -> dict[str, int]:
    """Final pictures by their number of labels."""
    rows = ask(
        connection,
        f"SELECT len(entities), count(*) FROM {FINAL} GROUP BY 1 ORDER BY 1",
        **files,
    )
    return {str(labels): count for labels, count in rows}


def images_per_entity(counts: np.ndarray) -> dict:
    """Entities by their number of pictures.

    Args:
      counts: int64 [e], pictures of each entity; those without are passed over.

    Returns:
      bins that double (1, 2-3, 4-7, ...): {from, to, entities, labels, share}, of which share is
      the part of all labels held by the entities of this bin and of those with more pictures;
      head: {entities, share}, the part of all labels held by the largest 1 % and 10 % of entities.
    """
    counts = np.sort(counts[counts > 0])[::-1]
    total = int(counts.sum())
    bins = [
        {
            **{"from": 2**b, "to": 2 ** (b + 1) - 1, "entities": int(np.sum(counts >> b == 1))},
            "labels": int(counts[counts >> b == 1].sum()),
            "share": round(int(counts[counts >> b > 0].sum()) / total, 4),
        }
        for b in card_numbers.doubling(counts)
    ]
    head = []
    for part in (0.01, 0.1):
        number = max(1, round(part * len(counts)))
        share = round(int(counts[:number].sum()) / total, 4)
        head.append({"part": part, "entities": number, "share": share})
    return {"bins": bins, "head": head}


# -------------------------------------------------------------------------------------- thresholds


def _evident(files: Files) -> Iterator[tuple[link_rows.LinkRows, choose.Evidence, str]]:
    """The candidates of each shard, what is known of them, and its file of twins/."""
    for shard in batches(files, ("links", "z_scores", "labels", "twins"), 1):
        links = link_rows.read(*shard["links"])
        own = (*shard["z_scores"], *files["visibility"], *files["barred"])
        yield links, choose.read_evidence(links, *own)[0], *shard["twins"]


def thresholds(connection: duckdb.DuckDBPyConnection, files: Files, config: dict) -> dict:
    """How probable candidates are, and what other thresholds would label.

    Only kept evidence is read.

    Args:
      connection: where to count.
      files: links, z_scores, visibility, barred and twins are read.
      config: the fields of `choose.Rule` in force, and `min_images`.

    Returns:
      probabilities: threshold and bins {from, chosen, others} of the likeliest candidates of
      mentions, as far as a picture may have so many labels; sensitivity: min_probability, points
      {value, pictures, entities, configured}, by value; pictures before any later filter, and
      entities that have at least min_images of these, of equal ones the first.
    """
    rule = choose.Rule.of(config)
    steps = np.arange(1 / PROBABILITY_BIN) * PROBABILITY_BIN
    values = sorted({*(round(float(step), 4) for step in steps), rule.min_probability})
    ask(
        connection,
        "CREATE OR REPLACE TEMP TABLE swept"
        " (entity INTEGER, reached BIGINT, images BIGINT, pictures BIGINT)",
    )
    bins: collections.Counter[int] = collections.Counter()
    for links, known, same in _evident(files):
        chosen = choose.choose(links, known, rule._replace(min_probability=0.0))
        new = ~twins.among(links.keys, chosen.row, chosen.entity, same)
        _add(connection, "swept", _count(chosen, new, values))
        place = np.floor(np.round(chosen.probability / PROBABILITY_BIN, 6)).astype(int)
        place = np.minimum(place, len(steps) - 1)  # a probability of 1 is in the last one
        code = 2 * place + (chosen.probability >= rule.min_probability)
        bins.update(
            dict(zip(*map(np.ndarray.tolist, np.unique(code, return_counts=True)), strict=True))
        )
    rows = ask(
        connection,
        """
        SELECT place, sum(pictures)::BIGINT, count(*) FILTER (images >= $min_images) FROM (
            SELECT place, entity, sum(pictures) AS pictures, sum(images) AS images
            FROM swept, (SELECT unnest(range(len($values))) AS place)
            WHERE reached > place GROUP BY place, entity
        ) GROUP BY place
        """,
        values=values,
        min_images=config["min_images"],
    )
    found = {place: counts for place, *counts in rows}
    points = [
        {
            **dict(zip(("pictures", "entities"), found.get(place, (0, 0)), strict=True)),
            **{"value": value, "configured": value == rule.min_probability},
        }
        for place, value in enumerate(values)
    ]
    return {
        "probabilities": {
            "threshold": rule.min_probability,
            "bins": [
                {
                    "from": round(b * PROBABILITY_BIN, 4),
                    **{"chosen": bins[2 * b + 1], "others": bins[2 * b]},
                }
                for b in sorted({code // 2 for code in bins})
            ],
        },
        "sensitivity": {"min_probability": points},
    }


def _add(connection: duckdb.DuckDBPyConnection, table: str, columns: dict) -> None:
    import pyarrow as pa

    connection.register("added_rows", pa.table(columns))
    connection.execute(f"INSERT INTO {table} SELECT * FROM added_rows")
    connection.unregister("added_rows")


def _count(chosen: choose.Chosen, new: np.ndarray, values: list[float]) -> dict:
    """Labels of a shard for all values of min_probability, those that are new counted by entity.

    What is chosen does not depend on it, it only cuts it off: so one number, how many of the
    ascending values a label reaches, stands for them all.
    """
    # Entity and reached in one number: unique along an axis is ten times slower.
    reached = np.searchsorted(values, chosen.probability, side="right")
    steps = len(values) + 1
    kinds, kind = np.unique(chosen.entity.astype(np.int64) * steps + reached, return_inverse=True)
    best = link_rows.starts_run(chosen.row)
    return {
        "entity": (kinds // steps).astype(np.int32),
        "reached": kinds % steps,
        "images": np.bincount(kind[new], minlength=len(kinds)),
        "pictures": np.bincount(kind[best], minlength=len(kinds)),
    }


# ------------------------------------------------------------------------------------ entity types


def entity_types(connection: duckdb.DuckDBPyConnection, files: Files) -> dict:
    """Labels by kind and type of entity, before and after: those of text alone, and the final ones.

    An entity of several types counts for each, so that shares may add up to more than one.

    Returns:
      text_labels and labels, the totals; types: {type, name (None: the knowledge base has none),
      text_labels, labels, entities (final ones), examples: names of those with most labels} of the
      types with most final labels; others, the number of types that are not listed;
      untyped: {text_labels, labels, entities}; kinds: {kind (None: unknown), text_labels, labels,
      entities, guessed: how many of the text's labels have a guessed kind}, by text_labels.
    """
    columns = card_numbers.columns_of(connection, files["kb"])
    lists = [f"list_distinct({name})" for name in ("types", "hypernyms") if name in columns]
    # The first that is not empty: a thing that is an instance of nothing may be a kind of another.
    choice = " ".join(f"WHEN len({types}) > 0 THEN {types}" for types in lists)
    types = f"CASE {choice} ELSE []::VARCHAR[] END" if lists else "[]::VARCHAR[]"
    kind, came = (n if n in columns else "NULL::VARCHAR" for n in ("kind", "kind_from"))
    ask(connection, "CREATE OR REPLACE TEMP TABLE text_labels (entity INTEGER, n BIGINT)")
    for path in files["links"]:
        by_text = choose.choose_by_text(link_rows.read(path)).entity
        counted = zip(("entity", "n"), np.unique(by_text, return_counts=True), strict=True)
        _add(connection, "text_labels", dict(counted))
    ask(
        connection,
        f"""
        CREATE OR REPLACE TEMP TABLE typed AS
        SELECT {types} AS types, {kind} AS kind, {came} AS came, before, after, label,
               file_row_number AS row
        FROM read_parquet($kb, file_row_number = true) AS kb JOIN (
            SELECT entity, coalesce(before, 0)::BIGINT AS before, coalesce(n, 0)::BIGINT AS after
            FROM (SELECT entity, sum(n) AS before FROM text_labels GROUP BY entity)
            FULL JOIN (
                SELECT entity, count(*) AS n
                FROM (SELECT unnest(entities) AS entity FROM {FINAL})
                GROUP BY entity
            ) USING (entity)
        ) AS counted ON counted.entity = kb.file_row_number
        """,
        **files,
    )
    sums = (
        "coalesce(sum(before), 0)::BIGINT AS before, coalesce(sum(after), 0)::BIGINT AS after,"
        " count(*) FILTER (after > 0) AS entities"
    )
    [totals] = ask(connection, f"SELECT {sums} FROM typed")
    [untyped] = ask(connection, f"SELECT {sums} FROM typed WHERE len(types) = 0")
    rows = ask(
        connection,
        f"""
        SELECT type, any_value(label), before, after, entities, most, total FROM (
            SELECT *, count(*) OVER () AS total FROM (
                SELECT type, {sums},
                       coalesce(arg_max(label, after * {2**32} - row, {_EXAMPLES})
                           FILTER (after > 0), []) AS most
                FROM (SELECT unnest(types) AS type, before, after, label, row FROM typed)
                GROUP BY type
            ) ORDER BY after DESC, before DESC, type LIMIT {_SHOWN_TYPES}
        ) LEFT JOIN (SELECT qid, label FROM read_parquet($kb)) ON qid = type
        GROUP BY type, before, after, entities, most, total
        ORDER BY after DESC, before DESC, type
        """,
        **files,
    )
    names = ("type", "name", "text_labels", "labels", "entities", "examples")
    kinds = ask(
        connection,
        f"""
        SELECT kind, {sums},
               coalesce(sum(before) FILTER (came = '{kb_kinds.GUESSED}'), 0)::BIGINT AS guessed
        FROM typed GROUP BY kind ORDER BY before DESC, after DESC, kind
        """,
    )
    of_kind = ("kind", "text_labels", "labels", "entities", "guessed")
    return {
        "kinds": [dict(zip(of_kind, row, strict=True)) for row in kinds],
        "text_labels": totals[0],
        "labels": totals[1],
        "types": [dict(zip(names, row[:-1], strict=True)) for row in rows],
        "others": rows[0][-1] - len(rows) if rows else 0,
        "untyped": dict(zip(names[2:5], untyped, strict=True)),
    }
