"""The numbers of the data card that are about labels: histograms, thresholds, entity types.

As in `report_numbers`: tables of pairs are joined a few shards at a time, entities are grouped out
of core.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np

from data_prep import engine
from data_prep.card import numbers as card_numbers
from data_prep.card.numbers import Files, ask, batches, collect
from data_prep.selection import embed

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

FIT_BIN, SCORE_BIN = 0.25, 0.02
_FIT_STEPS = 8  # of a bin each, to either side of the configured threshold
_SCORE_STEPS = 10  # at most
_SHOWN_TYPES = 15


def labels_per_picture(connection: duckdb.DuckDBPyConnection, files: Files) -> dict[str, int]:
    """Final pictures by their number of labels."""
    rows = ask(
        connection,
        "SELECT len(entities), count(*) FROM read_parquet($labels_final) GROUP BY 1 ORDER BY 1",
        **files,
    )
    return {str(labels): count for labels, count in rows}


def images_per_entity(counts: np.ndarray) -> dict:
    """Entities by their number of pictures.

    Args:
      counts: int64 [e], pictures of each entity, all at least 1.

    Returns:
      bins that double (1, 2-3, 4-7, ...): {from, to, entities, labels, share}, of which share is
      the part of all labels held by the entities of this bin and of those with more pictures;
      head: {entities, share}, the part of all labels held by the largest 1 % and 10 % of entities.
    """
    exponents = np.floor(np.log2(counts)).astype(int)
    total, held, bins = int(counts.sum()), 0, []
    for b in range(exponents.max(), exponents.min() - 1, -1):
        inside = counts[exponents == b]
        held += int(inside.sum())
        bins.append(
            {
                "from": 2**b,
                "to": 2 ** (b + 1) - 1,
                "entities": len(inside),
                "labels": int(inside.sum()),
                "share": round(held / total, 4),
            }
        )
    descending = np.sort(counts)[::-1]
    head = []
    for part in (0.01, 0.1):
        number = max(1, round(part * len(counts)))
        share = round(int(descending[:number].sum()) / total, 4)
        head.append({"part": part, "entities": number, "share": share})
    return {"bins": bins[::-1], "head": head}


# -------------------------------------------------------------------------------------- thresholds

# Candidates with the numbers of the decision, as `selection.Evidence` has them.
_KNOWN = f"""
    WITH known AS (
        SELECT key, entity, score::DOUBLE AS score,
               round((text_fit::DOUBLE + $prototype_weight * picture_fit) / (1 + $prototype_weight)
                     + $coherence_weight * coherence, {embed.DECIMALS}) AS fit
        FROM (
            SELECT key, unnest(s.entities) AS entity, unnest(scores) AS score,
                   unnest(text_fits) AS text_fit, unnest(picture_fits) AS picture_fit
            FROM read_parquet($scores) AS s JOIN read_parquet($fits) USING (key)
        ) JOIN read_parquet($coherence) USING (entity)
    )
"""


def histograms(connection: duckdb.DuckDBPyConnection, files: Files, config: dict) -> dict:
    """Candidates by fit and by cosine, those that became labels apart from the others.

    Returns:
      fits and scores: each with its threshold and bins {from, chosen, others}.
    """
    collect(
        connection,
        "candidate_bins",
        f"""
        {_KNOWN}, chosen AS (SELECT key, unnest(entities) AS entity FROM read_parquet($labels))
        SELECT floor(round(fit / {FIT_BIN}, 6))::INT AS fit_bin,
               floor(round(score / {SCORE_BIN}, 6))::INT AS score_bin,
               chosen.key IS NOT NULL AS chosen, count(*) AS n
        FROM known LEFT JOIN chosen USING (key, entity) GROUP BY ALL
        """,
        files,
        ("scores", "fits", "labels"),
        coherence=files["coherence"],
        **_weights(config),
    )
    found = {}
    for name, column, width, threshold in (
        ("fits", "fit_bin", FIT_BIN, "min_fit"),
        ("scores", "score_bin", SCORE_BIN, "min_score"),
    ):
        rows = ask(
            connection,
            f"SELECT {column}, coalesce(sum(n) FILTER (chosen), 0)::BIGINT,"
            " coalesce(sum(n) FILTER (NOT chosen), 0)::BIGINT"
            " FROM candidate_bins GROUP BY 1 ORDER BY 1",
        )
        found[name] = {
            "threshold": config[threshold],
            "bins": [
                {"from": round(b * width, 4), "chosen": chosen, "others": others}
                for b, chosen, others in rows
            ],
        }
    return found


def sensitivity(
    connection: duckdb.DuckDBPyConnection, files: Files, config: dict, scores: dict
) -> dict[str, list[dict]]:
    """What other thresholds would label: the rule of `selection` for many of them at once.

    `min_fit` is tried in steps of a bin around the configured value, `min_score` over the cosines
    that occur, the other one staying as configured. Only kept evidence is read.

    Args:
      connection: where to ask.
      files: links, scores, fits and coherence are read.
      config: the fields of `selection.Rule` and `min_images`.
      scores: the histogram of cosines.

    Returns:
      min_fit and min_score: points {value, pictures, entities, configured}, by value; pictures
      before any later filter, and entities that have at least min_images of these.
    """
    steps = range(-_FIT_STEPS, _FIT_STEPS + 1)
    fits = [round(float(config["min_fit"]) + FIT_BIN * step, 10) for step in steps]
    floors = _floors(scores["bins"], config["min_score"])
    ask(
        connection,
        "CREATE OR REPLACE TEMP TABLE swept (floor DOUBLE, entity INTEGER, reached BIGINT,"
        " labelled BOOLEAN, labels BIGINT, pictures BIGINT)",
    )
    for shard in batches(files, ("links", "scores", "fits"), 1):
        found = engine.ask(
            connection,
            f"""
            {_KNOWN}, candidate AS (
                SELECT row, key, unnest(candidates, max_depth := 2)
                FROM (
                    SELECT file_row_number AS row, key, candidates
                    FROM read_parquet($links, file_row_number = true)
                )
            )
            SELECT row, mention, entity, score, fit, fit + $prior_weight * ln(prior) AS strength
            FROM candidate JOIN known USING (key, entity)
            """,
            {
                **shard,
                "coherence": files["coherence"],
                "prior_weight": config["prior_weight"],
                **_weights(config),
            },
        ).fetchnumpy()
        found = {name: np.asarray(column) for name, column in found.items()}
        order = np.lexsort((found["entity"], -found["strength"], found["mention"], found["row"]))
        found = {name: column[order] for name, column in found.items()}
        for floor in floors:
            connection.register("found_labels", _would_label(found, floor, fits, config))
            connection.execute("INSERT INTO swept SELECT * FROM found_labels")
            connection.unregister("found_labels")
    return {
        "min_fit": _sweep(connection, "floor = $own AND reached > place", fits, "min_fit", config),
        "min_score": _sweep(
            connection, "floor = $values[place + 1] AND labelled", floors, "min_score", config
        ),
    }


def _would_label(
    found: dict[str, np.ndarray], floor: float, fits: list[float], config: dict
) -> pa.Table:
    """Labels of a shard for one min_score and all values of min_fit, counted by entity.

    Fits of labels do not depend on min_fit, which only cuts them off: so one number, how many of
    the ascending values `fits` a label reaches, stands for them all.
    """
    import pyarrow as pa

    likely = np.flatnonzero(found["score"] >= floor)
    row, mention = found["row"][likely], found["mention"][likely]
    strongest = likely[_starts(row, mention)]
    row, entity, fit = (found[name][strongest] for name in ("row", "entity", "fit"))
    order = np.lexsort((entity, -fit, row))
    # An entity of two mentions has one fit: it follows itself.
    order = order[_starts(row[order], entity[order])]
    row, entity, fit = row[order], entity[order], fit[order]
    first = np.flatnonzero(_starts(row))
    best = np.repeat(first, np.diff(first, append=len(row)))
    place = np.arange(len(row)) - best
    kept = (place < config["max_labels"]) & (-fit <= -fit[best] + config["max_gap"])
    entity, fit, place = entity[kept], fit[kept], place[kept]
    # Entity, reached and labelled in one number: unique along an axis is ten times slower.
    reached, steps = np.searchsorted(fits, fit, side="right"), len(fits) + 1
    code = 2 * (entity.astype(np.int64) * steps + reached) + (fit >= config["min_fit"])
    kinds, kind = np.unique(code, return_inverse=True)
    return pa.table(
        {
            "floor": np.full(len(kinds), floor),
            "entity": (kinds // 2 // steps).astype(np.int32),
            "reached": kinds // 2 % steps,
            "labelled": pa.array(kinds % 2 == 1),
            "labels": np.bincount(kind, minlength=len(kinds)),
            "pictures": np.bincount(kind[place == 0], minlength=len(kinds)),
        }
    )


def _starts(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where equal rows of sorted columns begin."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def _weights(config: dict) -> dict[str, float]:
    return {name: float(config[name]) for name in ("prototype_weight", "coherence_weight")}


def _floors(bins: Sequence[dict], configured: float) -> list[float]:
    """Round values over the middle 98 % of cosines, and the configured one; ascending."""
    if not bins:
        return [round(float(configured), 10)]
    counts = np.cumsum([b["chosen"] + b["others"] for b in bins])
    low, high = (bins[int(np.searchsorted(counts, q * counts[-1]))]["from"] for q in (0.01, 0.99))
    step = next((s for s in (0.02, 0.05, 0.1) if (high - low) / s < _SCORE_STEPS), 0.2)
    grid = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
    return sorted({round(float(configured), 10), *(round(float(value), 4) for value in grid)})


def _sweep(
    connection: duckdb.DuckDBPyConnection,
    condition: str,
    values: list[float],
    name: str,
    config: dict,
) -> list[dict]:
    rows = ask(
        connection,
        f"""
        SELECT place, sum(pictures)::BIGINT, count(*) FILTER (labels >= $min_images) FROM (
            SELECT place, entity, sum(pictures) AS pictures, sum(labels) AS labels
            FROM swept, (SELECT unnest(range(len($values))) AS place)
            WHERE {condition} GROUP BY place, entity
        ) GROUP BY place
        """,
        values=values,
        own=round(float(config["min_score"]), 10),
        min_images=config["min_images"],
    )
    found = {place: counts for place, *counts in rows}
    points = []
    for place, value in enumerate(values):
        pictures, entities = found.get(place, (0, 0))
        points.append(
            {
                "value": value,
                "pictures": pictures,
                "entities": entities,
                "configured": value == round(float(config[name]), 10),
            }
        )
    return points


# ------------------------------------------------------------------------------------ entity types


def entity_types(connection: duckdb.DuckDBPyConnection, files: Files) -> dict:
    """Labels by type of entity, before and after: those of text alone, and the final ones.

    An entity of several types counts for each, so that shares may add up to more than one. A type
    is called by its label where the knowledge base has it.

    Returns:
      text_labels and labels, the totals; types: {type, name, text_labels, labels, entities (final
      ones)} of the types with most final labels; others, the number of types that are not listed;
      untyped: {text_labels, labels, entities}.
    """
    columns = card_numbers.columns_of(connection, files["kb"])
    lists = [f"list_distinct({name})" for name in ("types", "hypernyms") if name in columns]
    # The first that is not empty: a thing that is an instance of nothing may be a kind of another.
    choice = " ".join(f"WHEN len({types}) > 0 THEN {types}" for types in lists)
    types = f"CASE {choice} ELSE []::VARCHAR[] END" if lists else "[]::VARCHAR[]"
    collect(
        connection,
        "text_labels",
        """
        SELECT entity, count(*) AS n FROM (
            SELECT DISTINCT key, entity FROM (
                SELECT key, entity FROM (
                    SELECT key, unnest(candidates, max_depth := 2) FROM read_parquet($links)
                )
                QUALIFY row_number() OVER (
                    PARTITION BY key, mention ORDER BY prior DESC, entity
                ) = 1
            )
        ) GROUP BY entity
        """,
        files,
        ("links",),
    )
    ask(
        connection,
        f"""
        CREATE OR REPLACE TEMP TABLE typed AS
        SELECT {types} AS types, before, after
        FROM read_parquet($kb, file_row_number = true) AS kb JOIN (
            SELECT entity, coalesce(before, 0)::BIGINT AS before, coalesce(n, 0)::BIGINT AS after
            FROM (SELECT entity, sum(n) AS before FROM text_labels GROUP BY entity)
            FULL JOIN (
                SELECT entity, count(*) AS n
                FROM (SELECT unnest(entities) AS entity FROM read_parquet($labels_final))
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
        SELECT type, coalesce(any_value(label), type), before, after, entities, total FROM (
            SELECT *, count(*) OVER () AS total FROM (
                SELECT type, {sums} FROM (SELECT unnest(types) AS type, before, after FROM typed)
                GROUP BY type
            ) ORDER BY after DESC, before DESC, type LIMIT {_SHOWN_TYPES}
        ) LEFT JOIN (SELECT qid, label FROM read_parquet($kb)) ON qid = type
        GROUP BY type, before, after, entities, total
        ORDER BY after DESC, before DESC, type
        """,
        **files,
    )
    names = ("type", "name", "text_labels", "labels", "entities")
    return {
        "text_labels": totals[0],
        "labels": totals[1],
        "types": [dict(zip(names, row[:5], strict=True)) for row in rows],
        "others": rows[0][5] - len(rows) if rows else 0,
        "untyped": dict(zip(names[2:], untyped, strict=True)),
    }
