"""Builds a knowledge base: a dump of Wikidata, rows or WordNet -> names with candidates and priors.

`build` turns a source (`data_prep.kb.sources.dump`) into a folder

    entities.parquet     qid, label, aliases, description, hypernyms (of Wikidata: P279), types
                         (P31), sitelinks, image (P18), title (in the English Wikipedia), kind
                         (`kinds.KINDS` or null), kind_from ("given", "guessed" or null); an entity
                         is a row number, in the order of the source
    aliases.marisa       marisa trie: normalised name -> alias number
    alias_offsets.npy    int64 [a+1]; the candidates of alias i are offsets[i]:offsets[i+1] of
    cand_entity.npy      int32, most likely first,
    cand_prior.npy       float32, p(entity | alias), of sum 1 for each alias, and
    cand_case.npy        uint8, how the source writes that name of that entity (`forms.case_of`)
    cand_form.npy        uint8, how the name came: 0 as it is, 1 its words joined, 2 diacritics
                         folded, 3 shortened (`forms.EXACT` and so on)
    cand_languages.npy   uint16, bit i: it is a name in the i-th of config.languages; 0: in any
    alias_linked.npy     float32 [a], link probability of the name; NaN where no anchors tell
    parts.marisa, part_offsets.npy, part_entity.npy, part_prior.npy
                         the same for parts of people's names, looked up with evidence alone, and
    part_role.npy        uint8: 0 family name, 1 given name, 2 other (`data_prep.kb.people`)
    redirects.parquet    qid, entity (row number): ids that lead to an entity of the base
    rejects.parquet      key ("line 17"), stage, reason: lines that could not be used
    manifest.json        written last; its counts tell what was dropped and why

The generic rows are JSONL, one entity a line; all but the id and the label may be missing:

    {"id" or "qid": "Q34718", "label": "tea", "aliases": ["cup of tea"], "description": "...",
     "hypernyms": ["Q8486"], "types": [...], "image": "Tea.jpg", "title": "Tea",
     "kind": "food" or "lexname": "noun.food",
     "sense_rank": [1, 2] or "sitelinks": 170}

Priors. Where `sense_rank` gives the rank of this sense of each name (label, then aliases; 1 = the
most frequent, as in WordNet), the weight of the name is 1/rank: Zipf's law, and the rank is already
about that very name. Otherwise it is (sitelinks + 1) ** alpha, times 0.5 for an alias. Where a
table of link anchors knows the name, its counts decide (`data_prep.kb.sources.anchors`). The
weights of a name's entities are divided by their sum; the 30 largest are kept.

Names of several words are also entered joined ("alarm clock" -> "alarmclock"), as hashtags and
file names write them, unless something else has that name; names with diacritics without them, at
half the weight; those of people without middle names and titles, at the weight of an alias's alias.

A chunk of lines is parsed by a worker into two parquet files in `.parts`, its part; the parts are
merged by `data_prep.kb.merge`. After a kill, parts whose lines and rules are the same are not
parsed again.
"""

from __future__ import annotations

import codecs
import collections
import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.kb import forms, kinds, lookup
from data_prep.kb import merge as kb_merge
from data_prep.kb import parts as kb_parts
from data_prep.kb.sources import dump as kb_dump
from data_prep.kb.sources import rows as kb_rows
from data_prep.kb.sources import tables, wikidata
from mofi_jax.common import errors

_PARTS = ".parts"
_CPUS = 16  # to ask of a cluster at most, whose machines may have fewer cores than this one


def check_source(source: str) -> None:
    """Raises BadInput unless `source` can be built from, or is a folder that this version built."""
    kb_dump.check(source)
    if kb_dump.is_finished(source):
        lookup.check(source)


def prepare(config: ml_collections.ConfigDict, work: engine.Engine) -> None:
    """Puts `config.knowledge_base` at W/kb: built by the rules of `config.kb`, or a link.

    Raises:
      BadInput: neither something that can be built from nor a finished folder.
    """
    check_source(config.knowledge_base)
    source, kb = os.path.abspath(config.knowledge_base), os.fspath(work.workdir / "kb")
    if os.path.islink(kb) and os.readlink(kb) != source:
        os.unlink(kb)
    if not kb_dump.is_finished(source):
        build(source, kb, config.kb, work)
    elif source != kb and not os.path.islink(kb):
        if os.path.exists(kb):
            raise errors.BadInput(
                f"knowledge_base: {kb} was built from a file, but {source} is a folder: name"
                " another --workdir, or remove the former."
            )
        os.makedirs(os.path.dirname(kb), exist_ok=True)
        os.symlink(source, kb)


def build(
    source: epath.PathLike,
    out: epath.PathLike,
    config: ml_collections.ConfigDict,
    work: engine.Engine | None = None,
) -> dict:
    """Builds the folder `out` from `source`; a finished one of the same source is left alone.

    Args:
      source: a path or "-" for standard input; see `data_prep.kb.sources.dump`.
      out: the folder.
      config: as configs/kb.py makes it.
      work: the engine of the folder that holds `out`; None makes one.

    Returns:
      The manifest; counts `entities`, `aliases`, `candidates`, `rejected` (lines), `empty_names`,
      `linked_names` (by anchors alone) and `dropped_REASON` for each rule that dropped entities.

    Raises:
      BadInput: no such source, an unknown suffix, damage, a key of the configuration that cannot be
        used, more unusable lines than `config.reject_budget`, or not one usable entity.
    """
    validate(config)
    out = os.path.abspath(os.fspath(out))
    source = os.fspath(source)
    if source != kb_dump.STDIN:
        check_source(source)
        source = os.path.abspath(source)
        if kb_dump.is_finished(source):
            raise errors.BadInput(
                f"knowledge_base: {source} is a finished knowledge base already: give what it is"
                " to be built from."
            )
    added = {key: config[key] and os.path.abspath(config[key]) for key in ("anchors", "redirects")}
    inputs = (*kb_dump.files(source), *filter(None, added.values()))
    settings = settings_of(config, kb_dump.format_of(source))
    run = functools.partial(_build, source, config.to_dict() | added)
    work = work or engine.Engine(os.path.dirname(out))
    stage = os.path.basename(out)
    task = engine.Task("manifest", inputs)
    memory = math.ceil(config.memory_gb) + 2  # GiB
    cpus = min(config.workers, _CPUS)
    (manifest,) = work.map_shards(stage, run, [task], settings, keys=None, cpus=cpus, memory=memory)
    # What makes the folder a knowledge base to others, who know nothing of stages.
    path, text = epath.Path(out) / "manifest.json", json.dumps(manifest, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        engine.write_durably(path, text.encode())
    shutil.rmtree(os.path.join(out, _PARTS), ignore_errors=True)
    if manifest["counts"]["rejected"]:
        _tell_rejects(os.path.join(out, "rejects.parquet"))
    return manifest


def _tell_rejects(path: str) -> None:
    first: dict[str, str] = {}
    counts = collections.Counter()
    for row in engine.read_table(path, ["key", "reason"]).to_pylist():
        counts[row["reason"]] += 1
        first.setdefault(row["reason"], row["key"])
    told = [f"{count} {why}, the first {first[why]}" for why, count in counts.most_common()]
    logging.warning(
        "knowledge_base: %d lines cannot be used (%s): see %s",
        counts.total(),
        "; ".join(told),
        path,
    )


def settings_of(config: ml_collections.ConfigDict, form: str) -> dict:
    """All that the base depends on besides its source, whose format is `form`."""
    return {
        "version": lookup.VERSION,
        "format": form,
        "languages": list(config.languages),
        "need_link_or_image": config.need_link_or_image,
        "drop_types": config.drop_types.to_dict(),
        "roots": zlib.crc32(repr(kinds.ROOTS).encode()),  # by these kinds are told
        "alpha": config.alpha,
        "alias_factor": config.alias_factor,
        "anchor_min_links": config.anchor_min_links,
        "anchor_smoothing": config.anchor_smoothing,
        "max_stored": lookup.MAX_STORED,
    }


def validate(config: ml_collections.ConfigDict, name: str = "config") -> None:
    """Raises BadInput that names the first key that cannot be used, as one of `name`."""

    def check(holds: bool, key: str, remedy: str) -> None:
        if not holds:
            raise errors.BadInput(f"{name}.{key}={config[key]} cannot be used: {remedy}.")

    least = {"workers": 1, "chunk_lines": 1, "memory_gb": 0.1, "anchor_min_links": 1}
    for key, value in least.items():
        check(config[key] >= value, key, f"give at least {value}")
    check(0 <= config.alpha <= 4, "alpha", "give 0 to 4")
    for key in ("alias_factor", "anchor_smoothing"):
        remedy = "give a number above 0, so that no candidate has a prior of 0"
        check(0 < config[key] < math.inf, key, remedy)
    check(0 <= config.reject_budget <= 1, "reject_budget", "give a share from 0 to 1")
    check(len(config.languages) <= forms.MOST_LANGUAGES, "languages", "give 16 at most")
    for key in ("anchors", "redirects"):
        tables.check(config[key], key)


# ---------------------------------------------------------------------------------------- the stage


def _build(
    source: str, config: dict, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    folder = os.path.join(outputs.workdir, outputs.stage, _PARTS)
    os.makedirs(folder, exist_ok=True)
    chunks = kb_dump.chunks(source, config["chunk_lines"], config["workers"])
    parts = kb_dump.parse_all(chunks, Parser(folder, settings), config["workers"])
    return kb_merge.merge(parts, outputs, settings, source, config)


# Of the settings, those that a part depends on.
_PARSED_BY = (
    *("version", "format", "languages", "need_link_or_image", "drop_types"),
    *("alpha", "alias_factor"),
)


class Parser(kb_dump.Parser):
    """Turns chunks into parts (`data_prep.kb.parts`) in a folder."""

    last = kb_parts.LAST

    def __init__(self, folder: str, settings: dict):
        super().__init__(folder, {key: settings[key] for key in _PARSED_BY})

    def parse(self, chunk: kb_dump.Chunk) -> None:
        rules = kb_rows.Rules.from_settings(self.settings)
        dump = self.settings["format"] == kb_dump.WIKIDATA
        parse = wikidata.parse if dump else kb_rows.parse
        part = kb_parts.Part()
        for number, line in _lines(chunk, dump):
            try:
                if len(line) > kb_dump.MAX_LINE:
                    raise ValueError("line_too_long")
                row = parse(line, rules)
            except ValueError as error:
                part.reject(number, str(error))
            except kb_rows.Dropped as error:
                part.drop(error)
            else:
                part.add(number, row, rules.alias_factor)
        part.write(self.path(chunk), self.made_of(chunk))


def _lines(chunk: kb_dump.Chunk, dump: bool) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; those of a dump without its brackets and commas."""
    # A line of 10 kB is copied once: cutting first and stripping then takes as long as parsing it.
    data, start, number = chunk.data, 0, chunk.first_line
    if number == 1 and data.startswith(codecs.BOM_UTF8):
        start = len(codecs.BOM_UTF8)
    closing = b" \t\r," if dump else b"\r"
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        stop = end
        short = end - start <= kb_dump.MAX_LINE  # a long line stays as long as it is
        while short and stop > start and data[stop - 1] in closing:
            stop -= 1
        line = data[start:stop].strip() if short else data[start:stop]
        if line and not (dump and line in (b"[", b"]")):
            yield number, line
        start, number = end + 1, number + 1
