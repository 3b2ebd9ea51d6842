"""The pictures of the data card, with everything that was known about them.

They are few and chosen by the hash of their key, never by looks: the same every time, and as cheap
for a billion pairs as for a thousand.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import typing
from collections.abc import Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.card.numbers import FINAL, Files, ask, collect
from data_prep.dataset import shards
from data_prep.linking import rows as link_rows
from data_prep.pairs import stage as pairs_stage
from data_prep.selection import choose, embed
from mofi_jax.data import ops, records

if typing.TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

# Stages that tell of all pairs, labelled or not, which may be shown to nobody.
JUDGES = ("takedowns", "unsafe", "eval_matches", "eval_cosines")
# Pictures of the gallery, by what happened to them.
GALLERY = {"changed": 16, "agreed": 12, "rejected": 12}
TOP_ENTITIES = RARE_ENTITIES = 12
PICTURES_PER_ENTITY = 8
_CANDIDATES = 200  # for the gallery, labelled ones and rejected ones each
_THUMBNAIL = 112  # px of the shorter side


def entity_strips(
    connection: duckdb.DuckDBPyConnection, files: Files, entities: records.Entities
) -> dict[str, list[dict]]:
    """The entities with most pictures, top_entities, and some with fewest, rare_entities.

    Returns:
      For both: {qid, name, description, images, keys}, keys of some of its pictures. Whatever is
      among the top is not repeated among the rare.
    """
    counts = entities.counts
    by_count = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    top, rest = by_count[:TOP_ENTITIES], by_count[TOP_ENTITIES:]
    # All that have as few pictures as the last one chosen compete, by the hash of their qid.
    rest = rest[counts[rest] <= counts[rest[-RARE_ENTITIES:]].max(initial=0)]
    rare = sorted(rest, key=lambda i: (counts[i], _hash(entities.qids[i]), i))[:RARE_ENTITIES]
    kb_rows = np.load(files["vocabulary"][1])
    rows = ask(
        connection,
        f"""
        SELECT entity, arg_min(key, md5(key), {PICTURES_PER_ENTITY}) FROM (
            SELECT unnest(entities) AS entity, key FROM {FINAL}
        ) WHERE entity IN (SELECT unnest($shown)) GROUP BY entity
        """,
        shown=[int(kb_rows[i]) for i in [*top, *rare]],
        **files,
    )
    keys = dict(rows)

    def strip(i: int) -> dict:
        return {
            "qid": entities.qids[i],
            "name": entities.names[i],
            "description": entities.descriptions[i],
            "images": int(counts[i]),
            "keys": keys.get(int(kb_rows[i]), []),
        }

    return {"top_entities": [*map(strip, top)], "rare_entities": [*map(strip, rare)]}


def _hash(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def gallery(connection: duckdb.DuckDBPyConnection, files: Files, config: dict) -> list[dict]:
    """Pictures that are published and that the selection rejected, grouped as in `GALLERY`.

    What later filters removed is not shown: it may be unsafe, or not to be kept. Nor are rejected
    pictures that a filter would have removed, or of which one could not tell.

    Returns:
      {key, group, reason (None: labelled), text, mentions [[start, end, kind]], candidates [{name,
      description, prior, by_text, chosen; with evidence also z_score and shown}]}.
    """
    judges = [stage for stage in JUDGES if stage in files]
    unblocked = " ".join(f"ANTI JOIN read_parquet(${stage}) USING (key)" for stage in judges)
    rejected = collect(
        connection,
        f"""
        SELECT key FROM (SELECT key, reason FROM read_parquet($labels)) {unblocked}
        WHERE reason = 'below_min_probability'
        ORDER BY md5(key) LIMIT {_CANDIDATES}
        """,
        files,
        ("labels", *judges),
    )
    final = ask(
        connection, f"SELECT key FROM {FINAL} ORDER BY md5(key) LIMIT {_CANDIDATES}", **files
    )
    # More than are shown: which group a labelled picture belongs to is known only afterwards.
    keys = sorted((key for [key] in rejected), key=_hash)[:_CANDIDATES]
    keys = sorted([*keys, *(key for [key] in final)], key=_hash)
    rows = _of_keys(connection, files["labels"], keys, "entities, reason")
    labels = {key: label for key, *label in rows}
    linked = engine.ask(
        connection,
        "SELECT key, mentions, candidates FROM read_parquet($files)"
        " WHERE key IN (SELECT unnest($keys))",
        {"files": files["links"], "keys": keys},
    ).to_arrow_table()
    by_text: dict[str, set[int]] = {key: set() for key in keys}
    # What may be no label is left out of both choices: the picture did not rule it out.
    barred = engine.ask(connection, "FROM read_parquet($barred) ORDER BY entity", files)
    barred = barred.to_arrow_table()["entity"].to_numpy()
    likeliest = choose.choose_by_text(link_rows.flatten(linked), barred)
    for row, entity in zip(likeliest.row.tolist(), likeliest.entity.tolist(), strict=True):
        by_text[linked["key"][row].as_py()].add(entity)
    links = {row["key"]: (row["mentions"], row["candidates"]) for row in linked.to_pylist()}
    texts = dict(_of_keys(connection, files["pairs"], keys, "text"))
    evidence = _evidence(connection, files, linked) if embed.is_on(config) else {}
    rows = ask(
        connection,
        "SELECT file_row_number, label, coalesce(description, '')"
        " FROM read_parquet($kb, file_row_number = true)"
        " WHERE file_row_number IN (SELECT unnest($entities))",
        entities=sorted({c["entity"] for _, candidates in links.values() for c in candidates}),
        **files,
    )
    names = {entity: words for entity, *words in rows}
    found, left = [], dict(GALLERY)
    # That a picture chose something else says more than that it dropped a label.
    for key in sorted(keys, key=lambda key: {*labels[key][0]} <= by_text[key]):
        chosen, reason = labels[key]
        mentions, candidates = links[key]
        group = "rejected" if reason else "agreed" if set(chosen) == by_text[key] else "changed"
        if not left[group]:
            continue
        left[group] -= 1
        rows = []
        # An entity may be a candidate of several mentions.
        distinct = {c["entity"]: c for c in sorted(candidates, key=lambda c: c["prior"])}
        for entity, candidate in distinct.items():
            row = {
                "name": names[entity][0],
                "description": names[entity][1],
                "prior": round(candidate["prior"], 3),
                "by_text": entity in by_text[key],
                "chosen": entity in chosen,
            }
            if (key, entity) in evidence:
                row["z_score"], row["shown"] = evidence[key, entity]
            rows.append(row)
        found.append(
            {
                "key": key,
                "group": group,
                "reason": reason,
                "text": texts[key],
                "mentions": [[m["start"], m["end"], m["kind"]] for m in mentions],
                "candidates": rows,
            }
        )
    return sorted(found, key=lambda picture: list(GALLERY).index(picture["group"]))


def thumbnails(
    connection: duckdb.DuckDBPyConnection, files: Files, workdir: epath.Path, keys: Sequence[str]
) -> dict[str, str]:
    """JPEG as base64 of the pictures, by key; without those that cannot be decoded any more."""
    columns = 'path, "offset", length'
    rows = sorted(_of_keys(connection, files["pairs"], sorted(set(keys)), columns))
    pointers = list(zip(*rows, strict=True))[1:] if rows else [(), (), ()]
    found = {}
    for row, data in pairs_stage.read_pictures(workdir, *pointers):
        with contextlib.suppress(ops.UndecodableImage):
            jpeg, _, _ = shards.to_jpeg(data, max_side=_THUMBNAIL, quality=85)
            found[rows[row][0]] = base64.b64encode(jpeg).decode()
    return found


def _of_keys(
    connection: duckdb.DuckDBPyConnection, files: Sequence[str], keys: list[str], columns: str
) -> list[tuple]:
    """Rows (key, columns) of a table of pairs."""
    return ask(
        connection,
        f"SELECT key, {columns} FROM read_parquet($files) WHERE key IN (SELECT unnest($keys))",
        files=files,
        keys=keys,
    )


def _evidence(
    connection: duckdb.DuckDBPyConnection, files: Files, linked: pa.Table
) -> dict[tuple, tuple[float, float]]:
    """Of rows of links/ z-score and probability to be shown, by key and entity; both rounded."""
    links = link_rows.flatten(linked)
    shown = {"keys": links.keys.to_pylist(), "entities": np.unique(links.entity).tolist()}
    tables = (
        engine.ask(connection, sql, {**files, **shown}).to_arrow_table()
        for sql in (
            "SELECT * FROM read_parquet($z_scores) WHERE key IN (SELECT unnest($keys))",
            *(
                f"SELECT * FROM read_parquet(${stage}) WHERE entity IN (SELECT unnest($entities))"
                " ORDER BY entity"
                for stage in ("visibility", "barred")
            ),
        )
    )
    known, _ = choose.evidence(links, *tables)
    return {
        (shown["keys"][row], entity): (round(z_score, 4), round(probability, 4))
        for row, entity, z_score, probability in zip(
            *(x.tolist() for x in (links.row, links.entity, known.z_score, known.shown)),
            strict=True,
        )
        if not np.isnan(z_score)
    }
