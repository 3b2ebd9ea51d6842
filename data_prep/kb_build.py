"""Builds the knowledge base: rows of names and sitelinks -> names with candidates and priors.

`build` turns a JSONL file, one entity a line,

    {"id" or "qid": "Q34718", "label": "tea", "aliases": ["cup of tea"], "description": "...",
     "hypernyms": ["Q8486"], "sense_rank": [1, 2] or "sitelinks": 170}

into a folder

    entities.parquet     qid, label, aliases, description, hypernyms; an entity is a row number
    aliases.marisa       marisa trie: normalised name -> alias number
    alias_offsets.npy    int64 [a+1]; the candidates of alias i are offsets[i]:offsets[i+1] of
    cand_entity.npy      int32, most likely first, and
    cand_prior.npy       float32, p(entity | alias), of sum 1 for each alias
    rejects.parquet      key ("line 17"), stage, reason: lines that could not be used
    manifest.json        written last

Priors. Where `sense_rank` gives the rank of this sense of each name (label, then aliases; 1 = the
most frequent, as in WordNet), the weight of the name is 1/rank: Zipf's law, and the rank is already
about that very name. Otherwise it is (sitelinks + 1), times 0.5 for an alias. The weights of a
name's entities are divided by their sum; the 30 largest are kept.

Names of several words are also entered joined ("alarm clock" -> "alarmclock"), as hashtags and
file names write them, unless something else has that name.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence

import ml_collections
from etils import epath

from data_prep import engine, knowledge_base, names
from mofi_jax import errors

ALIAS_FACTOR = 0.5


def check_source(source: str) -> None:
    """Raises BadInput unless `source` is a file that can be built from, or a finished folder."""
    if not source:
        raise errors.BadInput(
            "knowledge_base is not set: write kb=PATH in --config, a .jsonl or .jsonl.gz file or a"
            " folder made by data_prep.build_kb."
        )
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "manifest.json")):
            raise errors.BadInput(
                f"knowledge_base: {source} is no finished knowledge base: make it with python -m"
                " data_prep.build_kb."
            )
    elif not os.path.isfile(source):
        raise errors.BadInput(
            f"knowledge_base: {source} does not exist: name a .jsonl or .jsonl.gz file, or a folder"
            " made by data_prep.build_kb."
        )
    elif not source.endswith((".jsonl", ".jsonl.gz")):
        raise errors.BadInput(
            f"knowledge_base: {source} has an unknown suffix: give a .jsonl or .jsonl.gz file."
        )


def prepare(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Puts the knowledge base `config.knowledge_base` at W/kb: built from a file, or a link.

    Raises:
      BadInput: neither a file that can be built from nor a finished folder.
    """
    check_source(config.knowledge_base)
    source, kb = os.path.abspath(config.knowledge_base), os.path.abspath(epath.Path(workdir) / "kb")
    if os.path.islink(kb) and os.readlink(kb) != source:
        os.unlink(kb)
    if not os.path.isdir(source):
        build(source, kb)
    elif source != kb and not os.path.islink(kb):
        if os.path.exists(kb):
            raise errors.BadInput(
                f"knowledge_base: {kb} was built from a file, but {source} is a folder: name"
                " another --workdir, or remove the former."
            )
        os.makedirs(os.path.dirname(kb), exist_ok=True)
        os.symlink(source, kb)


def build(source: epath.PathLike, out: epath.PathLike) -> dict:
    """Builds the folder `out` from a `.jsonl` or `.jsonl.gz` file; a finished one is left alone.

    Returns:
      The manifest; counts `entities`, `aliases`, `candidates`, `rejected` and `empty_names`.

    Raises:
      BadInput: no such file, an unknown suffix, or not one usable row.
    """
    source, out = os.path.abspath(os.fspath(source)), os.path.abspath(os.fspath(out))
    check_source(source)
    if os.path.isdir(source):
        raise errors.BadInput(
            f"knowledge_base: {source} is a folder: give a .jsonl or .jsonl.gz file."
        )
    task = engine.Task("manifest", (source,))
    settings = {"version": 1, "max_stored": knowledge_base.MAX_STORED, "alias_factor": ALIAS_FACTOR}
    stage, workdir = os.path.basename(out), os.path.dirname(out)
    (manifest,) = engine.Engine(workdir).map_shards(stage, _build, [task], settings)
    return manifest


@dataclasses.dataclass
class _Row:
    qid: str
    label: str
    aliases: list[str]
    description: str
    hypernyms: list[str]
    weights: list[float]  # of the label and of each alias


def _build(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import marisa_trie
    import numpy as np
    import pyarrow as pa

    columns: dict[str, list] = {
        name: [] for name in ("qid", "label", "aliases", "description", "hypernyms")
    }
    rejects: list[tuple[str, str]] = []
    weights: dict[str, dict[int, float]] = {}  # alias -> entity -> weight
    seen: set[str] = set()
    empty_names = 0
    for number, line in _lines(task.inputs[0]):
        try:
            row = _parse(line, settings["alias_factor"])
            if row.qid in seen:
                raise ValueError("duplicate_id")
        except ValueError as error:
            rejects.append((f"line {number}", str(error)))
            continue
        seen.add(row.qid)
        entity = len(columns["qid"])
        for name, values in columns.items():
            values.append(getattr(row, name))
        for name, weight in zip([row.label, *row.aliases], row.weights, strict=True):
            form = sys.intern(names.normalize(name))
            if not form:
                empty_names += 1
                continue
            candidates = weights.setdefault(form, {})
            candidates[entity] = max(weight, candidates.get(entity, 0.0))
    if not seen:
        raise errors.BadInput(
            f"knowledge_base: {task.inputs[0]} has no usable row in {len(rejects)}: give one JSON"
            ' object a line with "id" and "label".'
        )
    _add_joined(weights)

    trie = marisa_trie.Trie(weights)
    offsets = np.zeros(len(trie) + 1, np.int64)
    entities, priors = [], []
    for number, name in enumerate(sorted(weights, key=trie.__getitem__)):
        ranked = sorted(weights[name].items(), key=lambda item: (-item[1], item[0]))
        ranked = ranked[: settings["max_stored"]]
        total = sum(weight for _, weight in ranked)
        entities += [entity for entity, _ in ranked]
        priors += [weight / total for _, weight in ranked]
        offsets[number + 1] = len(entities)
    folder = outputs.stage
    trie.save(os.fspath(outputs.path(f"{folder}/aliases.marisa")))
    np.save(outputs.path(f"{folder}/alias_offsets.npy"), offsets)
    np.save(outputs.path(f"{folder}/cand_entity.npy"), np.asarray(entities, np.int32))
    np.save(outputs.path(f"{folder}/cand_prior.npy"), np.asarray(priors, np.float32))
    strings = pa.list_(pa.string())
    types = {"aliases": strings, "hypernyms": strings}
    outputs.write_table(
        f"{folder}/entities.parquet",
        pa.table({n: pa.array(v, types.get(n, pa.string())) for n, v in columns.items()}),
    )
    outputs.write_table(
        f"{folder}/rejects.parquet",
        pa.table(
            {
                "key": pa.array([key for key, _ in rejects], pa.string()),
                "stage": pa.array([folder] * len(rejects), pa.string()),
                "reason": pa.array([reason for _, reason in rejects], pa.string()),
            }
        ),
    )
    return {
        "entities": len(seen),
        "aliases": len(trie),
        "candidates": len(entities),
        "rejected": len(rejects),
        "empty_names": empty_names,
    }


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise errors.BadInput(
            f"knowledge_base: {path} is damaged after line {number} ({error}): fetch it again."
        ) from error


def _parse(line: bytes, alias_factor: float) -> _Row:
    """One row; raises ValueError with a reason in one word."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not_utf8") from None
    except (ValueError, RecursionError):
        raise ValueError("broken_json") from None
    if not isinstance(row, dict):
        raise ValueError("no_object")
    qid = row.get("qid") or row.get("id")
    label = row.get("label")
    if not isinstance(qid, str):
        raise ValueError("no_id")
    if not isinstance(label, str) or not label.strip():
        raise ValueError("no_label")
    aliases, hypernyms = row.get("aliases") or [], row.get("hypernyms") or []
    ranks, sitelinks = row.get("sense_rank") or [], row.get("sitelinks") or 0
    description = row.get("description") or ""
    for strings in (aliases, hypernyms, [description]):
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise ValueError("wrong_type")
    if not isinstance(ranks, list) or not _all_numbers([sitelinks, *ranks]):
        raise ValueError("wrong_type")
    if ranks and (len(ranks) != 1 + len(aliases) or min(ranks) < 1):
        raise ValueError("wrong_sense_rank")
    if sitelinks < 0:
        raise ValueError("wrong_sitelinks")
    if ranks:
        weights = [1.0 / rank for rank in ranks]
    else:
        weights = [sitelinks + 1.0] + [alias_factor * (sitelinks + 1.0)] * len(aliases)
    return _Row(qid, label.strip(), aliases, description, hypernyms, weights)


def _all_numbers(values: Sequence) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _add_joined(weights: dict[str, dict[int, float]]) -> None:
    joined: dict[str, dict[int, float]] = {}
    for name, candidates in weights.items():
        if " " in name:
            squashed = name.replace(" ", "")
            if squashed not in weights:
                target = joined.setdefault(squashed, {})
                for entity, weight in candidates.items():
                    target[entity] = max(weight, target.get(entity, 0.0))
    weights.update(joined)
