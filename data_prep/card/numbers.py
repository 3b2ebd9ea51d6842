"""The numbers of the data card that are about pairs: counted by DuckDB over the stages' tables.

Files of one name hold the same pairs in every stage. So whatever needs two tables of pairs is
joined a few shards at a time and only sums are kept: memory does not grow with the number of pairs.
What sees them all at once (group-bys over keys, entities or sha256) DuckDB spills to disk.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_prep import engine
from data_prep.pairs import stage as pairs_stage

if typing.TYPE_CHECKING:
    import duckdb

# Paths of the stages' tables by stage.
Files = Mapping[str, Sequence[str]]

_SHARDS_AT_ONCE = 32

# What is in the shards: key, entities, scores.
FINAL = "(FROM read_parquet($labels_final) WHERE key NOT IN (SELECT unnest($unwritten)))"
_WRITING = ("ordered-i2e", "planned-i2e", "shards-i2e")

# The order in which pairs get lost; reasons and stages not named here come in the middle.
_STAGES = (
    *(*pairs_stage.STAGES, "caption_rows", "captions", "link_rows", "gathered", "embeddings"),
    *("z_scores", "labels", "", "labels_final", *_WRITING),
)
_REASONS = (
    *("removed", "eval_duplicate", "blocked_hash", "blocked_domain", "unsafe_column"),
    *("unsafe_score", "", "duplicate", "over_cap", "rare_entity", "picture_unreadable"),
    "quarantined",
)

_SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Armenian", "Georgian", "Arabic", "Hebrew", "Ethiopic"),
    *("Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam"),
    *("Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Hangul", "Japanese", "Han"),
)
_SAMPLED_CAPTIONS = 20_000  # at 24 patterns each: seconds


def ask(connection: duckdb.DuckDBPyConnection, sql: str, **parameters) -> list[tuple]:
    """The rows of a query; $NAMEs that it does not mention may be among the parameters."""
    found = engine.ask(connection, sql, parameters)
    return found.fetchall() if found else []


def collect(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    files: Files,
    stages: Sequence[str],
    **parameters,
) -> Iterator[tuple]:
    """The rows of a query, a few shards at a time.

    Args:
      connection: where to ask.
      sql: a query in which $STAGE stands for files of that stage, of the same shards in each.
      files: all files by stage.
      stages: the stages that the query reads.
      **parameters: further $NAMEs.
    """
    for batch in batches(files, stages, _SHARDS_AT_ONCE):
        yield from ask(connection, sql, **batch, **parameters)


def batches(files: Files, stages: Sequence[str], at_once: int) -> Iterator[dict[str, list[str]]]:
    """Files by stage of a few shards at a time.

    Only shards that all the stages have: one in quarantine is missing from later stages.
    """
    by_name = [{os.path.basename(path): path for path in files[stage]} for stage in stages]
    names = sorted(set(by_name[0]).intersection(*by_name[1:]))
    for start in range(0, len(names), at_once):
        chunk = names[start : start + at_once]
        yield {
            stage: [paths[name] for name in chunk]
            for stage, paths in zip(stages, by_name, strict=True)
        }


def columns_of(connection: duckdb.DuckDBPyConnection, files: Sequence[str]) -> set[str]:
    """The column names of parquet files of one schema."""
    described = "DESCRIBE SELECT * FROM read_parquet($files)"
    return {row[0] for row in ask(connection, described, files=list(files[:1]))}


def unwritten(connection: duckdb.DuckDBPyConnection, rejects: Sequence[str]) -> list[str]:
    """The keys in labels_final/ of pairs that no shard holds, which only damage leaves out."""
    sql = f"SELECT key FROM read_parquet($rejects) WHERE stage IN {_WRITING} ORDER BY key"
    return [key for [key] in ask(connection, sql, rejects=rejects)]


# ------------------------------------------------------------------------------------- the funnel


def by_source(connection: duckdb.DuckDBPyConnection, files: Files) -> list[dict]:
    """The funnel of each source: source, valid, with_mention, with_candidate, labelled, final."""
    steps = {
        "valid": ("pairs", "(SELECT key FROM read_parquet($pairs))"),
        "with_mention": ("links", "(FROM read_parquet($links) WHERE len(mentions) > 0)"),
        "with_candidate": ("links", "(FROM read_parquet($links) WHERE len(candidates) > 0)"),
        "labelled": ("labels", "(FROM read_parquet($labels) AS l WHERE l.reason IS NULL)"),
        "final": ("labels_final", FINAL),
    }
    found: dict[str, dict[str, int]] = {}
    for name, (stage, keys) in steps.items():
        sql = f"SELECT source, count(*) FROM read_parquet($pairs) SEMI JOIN {keys} USING (key)"
        sql, more = f"{sql} GROUP BY source", {"unwritten": files["unwritten"]}
        for source, count in collect(connection, sql, files, ("pairs", stage), **more):
            found.setdefault(source, dict.fromkeys(steps, 0))[name] += count
    return [{"source": source, **found[source]} for source in sorted(found)]


def funnel(
    connection: duckdb.DuckDBPyConnection, files: Files, sources: Sequence[dict], final: int
) -> dict:
    """How many pairs are left after each step, in order.

    Args:
      connection: where to ask.
      files: labels and rejects are read.
      sources: of `by_source`.
      final: how many pairs the shards hold.

    Returns:
      read, valid, with_mention, with_candidate, labelled; removed: what labelled pairs were lost to
      afterwards, in order, as {reason, count, left}, of which the reason None stands for pairs that
      no reject accounts for; final.
    """
    names = ("valid", "with_mention", "with_candidate", "labelled")
    steps = {name: sum(source[name] for source in sources) for name in names}
    before = f"SELECT count(*) FROM read_parquet($rejects) WHERE stage IN {pairs_stage.STAGES}"
    [(invalid,)] = ask(connection, before, **files)
    losses = ask(
        connection,
        f"""
        SELECT split_part(reason, ':', 1) AS kind, count(*) FROM read_parquet($rejects)
        SEMI JOIN (SELECT key FROM read_parquet($labels) AS l WHERE l.reason IS NULL) USING (key)
        WHERE stage NOT IN {pairs_stage.STAGES} GROUP BY kind
        """,
        **files,
    )
    losses.sort(key=lambda row: _rank(_REASONS, row[0]))
    if unexplained := steps["labelled"] - final - sum(count for _, count in losses):
        losses.append((None, unexplained))
    removed, left = [], steps["labelled"]
    for reason, count in losses:
        left -= count
        removed.append({"reason": reason, "count": count, "left": left})
    return {"read": steps["valid"] + invalid, **steps, "removed": removed, "final": final}


def _rank(order: Sequence[str], name: str) -> tuple[int, str]:
    return order.index(name if name in order else ""), name


def rejects(connection: duckdb.DuckDBPyConnection, files: Files) -> list[dict]:
    """Every stage and reason in rejects/ with its number of pairs, in the order of the stages."""
    rows = ask(
        connection,
        "SELECT stage, reason, count(*) FROM read_parquet($rejects) GROUP BY stage, reason",
        **files,
    )
    rows.sort(key=lambda row: (*_rank(_STAGES, row[0]), -row[2], row[1]))
    return [{"stage": stage, "reason": reason, "count": n} for stage, reason, n in rows]


# ------------------------------------------------------------------------------ pictures, captions


def picture_sizes(connection: duckdb.DuckDBPyConnection, files: Files) -> dict:
    """Pixels of the shorter side of the pictures read: median, and bins that double."""
    rows = ask(
        connection,
        "SELECT least(width, height) AS side, count(*) FROM read_parquet($pairs)"
        " GROUP BY side ORDER BY side",
        **files,
    )
    if not rows:
        return {"median": 0, "bins": []}
    sides, counts = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    median = sides[np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)]
    bins = [
        {"from": 2**b, "to": 2 ** (b + 1) - 1, "pictures": int(counts[sides >> b == 1].sum())}
        for b in doubling(sides)
    ]
    return {"median": int(median), "bins": bins}


def doubling(values: np.ndarray) -> range:
    """The b of all bins from 2**b to 2**(b + 1) - 1 between the least and the largest of values."""
    return range(int(values.min()).bit_length() - 1, int(values.max()).bit_length())


def duplicates(
    connection: duckdb.DuckDBPyConnection, files: Files, matches: Mapping[str, int]
) -> dict:
    """Pictures that occur again byte for byte, and labelled ones near an evaluation set's picture.

    Args:
      connection: where to ask.
      files: pairs, rejects and, where there is any, eval_limits are read.
      matches: what the filter counted as eval_duplicate:SET:LAYER; other counts are passed over.

    Returns:
      repeated: pairs whose picture another pair has too, but for one of each picture; None where
      no sha256 is known. evaluation: {set, removed, by_layer (pictures found, by how), cosine (from
      which on it is a copy; None: not told by cosines)} of each set; a picture near two sets is
      removed for the first and found in both.
    """
    repeated = None
    if "sha256" in columns_of(connection, files["pairs"]):
        # Half of each digest, as a number: an eighth of the memory.
        [(repeated,)] = ask(
            connection,
            "SELECT count(*) - count(DISTINCT ('0x' || substr(sha256, 1, 16))::UBIGINT)"
            " FROM read_parquet($pairs)",
            **files,
        )
    prefix = "eval_duplicate:"
    removed = dict(
        ask(
            connection,
            f"SELECT substr(reason, {len(prefix) + 1}), count(DISTINCT key)"
            f" FROM read_parquet($rejects) WHERE starts_with(reason, '{prefix}') GROUP BY 1",
            **files,
        )
    )
    limits = {}
    if files.get("eval_limits"):
        limits = dict(
            ask(connection, 'SELECT "set", 1 - "limit" FROM read_parquet($eval_limits)', **files)
        )
    layers: dict[str, dict[str, int]] = {name: {} for name in (*removed, *limits)}
    for name, number in sorted(matches.items()):
        if name.startswith(prefix) and name.count(":") == 2:
            _, of_set, layer = name.split(":")
            layers.setdefault(of_set, {})[layer] = number
    return {
        "repeated": repeated,
        "evaluation": [
            {
                **{"set": name, "removed": removed.get(name, 0), "by_layer": layers[name]},
                "cosine": None if limits.get(name) is None else round(limits[name], 6),
            }
            for name in sorted(layers)
        ],
    }


def scripts(
    connection: duckdb.DuckDBPyConnection, files: Files, most: int = _SAMPLED_CAPTIONS
) -> dict:
    """The writing systems of captions: the one with most letters, in a sample by hash of the key.

    A caption with kana counts as Japanese whatever its other characters. Letters of scripts that
    are not told apart count as "other", a caption without letters as "no letters".

    Args:
      connection: where to ask.
      files: `pairs` is read.
      most: about how many captions are looked at; all of them where there are fewer.

    Returns:
      sampled, the number of captions looked at; scripts: {script, captions}, most frequent first.
    """
    [(pairs,)] = ask(connection, "SELECT count(*) FROM read_parquet($pairs)", **files)
    letters = {name: rf"\p{{{name}}}" for name in _SCRIPTS}
    letters["Japanese"] = r"\p{Hiragana}\p{Katakana}"
    lengths = [f"length(regexp_replace(text, '[^{letters[name]}]', '', 'g'))" for name in _SCRIPTS]
    kana = _SCRIPTS.index("Japanese")
    lengths[kana] = f"CASE WHEN {lengths[kana]} > 0 THEN length(text) ELSE 0 END"
    rows = ask(
        connection,
        f"""
        WITH counted AS (
            SELECT [{", ".join(lengths)}] AS letters, regexp_matches(text, '\\p{{L}}') AS any_letter
            FROM read_parquet($pairs) WHERE md5_number_lower(key) % $step::UBIGINT = 0
        )
        SELECT CASE WHEN list_max(letters) > 0
                    THEN $names[list_position(letters, list_max(letters))]
                    WHEN any_letter THEN 'other' ELSE 'no letters' END AS script, count(*) AS n
        FROM counted GROUP BY script ORDER BY n DESC, script
        """,
        step=max(1, pairs // most),
        names=list(_SCRIPTS),
        **files,
    )
    return {
        "sampled": sum(count for _, count in rows),
        "scripts": [{"script": script, "captions": count} for script, count in rows],
    }
