"""Linking: captions -> mentions -> candidate entities. pairs/ -> links/.

Three sources of mentions, because each misses what another finds (spaCy's small model finds 65 % of
the mentions of Wikidata-MEL exactly: it was trained on news, minds case, and knows no species, food
or everyday things):

    gazetteer    the longest names of the knowledge base, also in hashtags and file names
    ner          spaCy's named entities
    noun_chunk   spaCy's noun chunks, without their articles

A span found twice is one mention, of the first kind in this order. Boilerplate of the web is not
looked at (`boilerplate`). All candidates of an ambiguous name are kept with their priors, the
unlikely ones by the caption's case pushed back (`meanings`): the picture decides later. A mention
without candidates is kept too; it tells what the knowledge base lacks. This stage never sees a
picture.

Web captions repeat, and spaCy is what takes the time, so every caption is read once, wherever it
occurs. Stages:

    caption_rows/  scattered by the caption: caption, shard, row
    captions/      NNNNN.parquet  caption, its mentions and candidates, and the lists shard, row of
                   where it occurs
    link_rows/     scattered by the shard: shard, row, mentions, candidates
    gathered/      manifests of
    links/         NNNNN.parquet  a row for each of pairs/NNNNN.parquet, in its order
"""

import functools
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath

from data_prep import engine
from data_prep.kb import lookup, names
from data_prep.linking import boilerplate, disambiguate
from mofi_jax.common import errors

BATCH = 256  # texts; fastest on one core, and a quarter of the memory of 1,024
_BLOCK = 4096  # captions that are linked at a time

# See `engine.runs`. 512 tasks of a billion captions are 40 minutes on one core each.
_CAPTIONS_PER_TASK = 1_000
_ROWS_PER_SPILL = 20_000
_MOST_TASKS = 512
_MOST_SPILLS = 256

_SCATTER_CAPTIONS = """
    SELECT text, CAST(parse_filename(filename, true) AS INT) AS shard,
           CAST(file_row_number AS INT) AS "row",
           ('0x' || left(md5(text), 8))::UBIGINT * $buckets // 4294967296 AS bucket
    FROM read_parquet($files, filename = true, file_row_number = true)
"""

_SCATTER_LINKS = """
    SELECT *, shard // $shards_per_bucket AS bucket FROM (
        SELECT unnest(shards) AS shard, unnest("rows") AS "row", mentions, candidates
        FROM read_parquet($files)
    )
"""


def check(config: ml_collections.ConfigDict) -> None:
    """Checks what `run` reads.

    Raises:
      BadInput: naming the first key that cannot be used.
    """
    try:
        boilerplate.Blanker(config.boilerplate)
    except re.error as error:
        raise errors.BadInput(
            f"config.boilerplate cannot be used: {error.pattern!r} is no regular expression"
            f" ({error}): correct it."
        ) from error
    limits = {"case_penalty": 1.0, "company_weight": np.inf, "linker_weight": np.inf}
    for name, most in limits.items():
        if not 0 <= config[name] <= most:
            raise errors.BadInput(
                f"config.{name}={config[name]!r} cannot be used: give a number from 0 to {most}."
            )
    if not os.path.isdir(config.spacy_model) and not importlib.util.find_spec(config.spacy_model):
        raise errors.BadInput(
            f"config.spacy_model={config.spacy_model!r} is no installed spaCy package and no folder"
            " of a pipeline: pip install it, or name another."
        )


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes links/NNNNN.parquet: one row for each of pairs/NNNNN.parquet, in its order.

    Columns: key; mentions, a list of (start, end, surface, kind), characters start:end of the text,
    sorted; candidates, a list of (mention, entity, prior), where mention counts in `mentions` and
    entity is a row of the knowledge base, most likely first within a mention.

    Args:
      config: `spacy_model`, `noun_chunks`, `boilerplate` (regular expressions), and the fields of
        `meanings.Rule`.
      work: the engine; its work directory holds pairs/ and kb/.

    Returns:
      The manifests; counts `texts`, `linked` (rows with a candidate), `mentions`, `candidates`.
    """
    import pyarrow.parquet as pq

    workdir = work.workdir
    pairs = engine.listed(workdir / "pairs")
    rows = sum(pq.read_metadata(path).num_rows for path in pairs)

    spills = min(_MOST_SPILLS, max(1, -(-rows // _ROWS_PER_SPILL)))
    tasks = _tasks(pairs, spills)
    buckets = min(_MOST_TASKS, max(1, -(-rows // _CAPTIONS_PER_TASK)))
    parameters = {"buckets": buckets}
    scattered = work.scatter("caption_rows", _SCATTER_CAPTIONS, tasks, buckets, parameters)

    manifest = workdir / "kb/manifest.json"
    tasks = [
        engine.Task(f"{bucket:05d}", (manifest, *scattered.files)) for bucket in range(buckets)
    ]
    settings = {
        "version": 2,
        "spacy_model": config.spacy_model,
        "noun_chunks": config.noun_chunks,
        "boilerplate": list(config.boilerplate),
        **disambiguate.Rule.of(config)._asdict(),
    }
    function = functools.partial(_keys_in_bucket, workdir)
    work.map_shards("captions", _link_captions, tasks, settings, keys=function)

    captions = engine.listed(workdir / "captions")
    groups = engine.runs(len(pairs), _MOST_TASKS)
    parameters = {"shards_per_bucket": len(groups[0])}
    tasks = _tasks(captions, spills)
    function = functools.partial(_keys_of_captions, workdir)
    scattered = work.scatter(
        "link_rows", _SCATTER_LINKS, tasks, len(groups), parameters, keys=function
    )
    tasks = [
        engine.Task(f"{number:05d}", (*scattered.files, *pairs[group.start : group.stop]))
        for number, group in enumerate(groups)
    ]
    settings = {"version": 1, "spills": len(scattered.files)}
    return work.map_shards("gathered", _gather, tasks, settings)


def _tasks(files: Sequence[epath.Path], most: int) -> list[engine.Task]:
    """At most `most` tasks of a run of files each."""
    return [
        engine.Task(f"{number:05d}", tuple(files[run.start : run.stop]))
        for number, run in enumerate(engine.runs(len(files), most))
    ]


# ----------------------------------------------------------------------------------------- captions


def _link_captions(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest, *spills = task.inputs
    bucket = int(task.name)
    table = engine.read_buckets(spills, bucket, bucket + 1)
    table = table.sort_by([("text", "ascending"), ("shard", "ascending"), ("row", "ascending")])
    table = table.group_by("text", use_threads=False).aggregate(
        [("shard", "list"), ("row", "list")]
    )
    table = table.rename_columns({"shard_list": "shards", "row_list": "rows"})
    kb = lookup.KnowledgeBase(os.path.dirname(manifest))
    rule = disambiguate.Rule.of(settings)
    blank = boilerplate.Blanker(settings["boilerplate"])
    counts = {"captions": len(table), "mentions": 0}
    schema = table.schema
    for name, kind in (("mentions", mentions_type()), ("candidates", candidates_type())):
        schema = schema.append(pa.field(name, kind))
    path = os.fspath(outputs.path(f"captions/{task.name}.parquet"))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(table), _BLOCK):
            block = table.slice(start, _BLOCK)
            texts = block["text"].to_pylist()
            blanked = [blank(text) for text in texts]
            spans = spacy_spans(blanked, settings["spacy_model"], settings["noun_chunks"])
            mentions, candidates = link(texts, blanked, spans, kb, rule)
            counts["mentions"] += len(mentions.flatten())
            columns = [*block.columns, mentions, candidates]
            writer.write_table(pa.table(columns, schema=schema))
    return counts


def mentions_type():
    """The parquet type of the column mentions."""
    import pyarrow as pa

    fields = [("start", pa.int32()), ("end", pa.int32())]
    return pa.list_(pa.struct([*fields, ("surface", pa.string()), ("kind", pa.string())]))


def candidates_type():
    """The parquet type of the column candidates."""
    import pyarrow as pa

    fields = [("mention", pa.int32()), ("entity", pa.int32()), ("prior", pa.float32())]
    return pa.list_(pa.struct(fields))


class Span(NamedTuple):
    """Characters start:end of a text, how they were found, and what spaCy's linker says of them."""

    start: int
    end: int
    kind: str
    qid: str = ""


def link(
    texts: Sequence[str],
    blanked: Sequence[str],
    spans: Iterable[Sequence[Span]],
    kb: lookup.KnowledgeBase,
    rule: disambiguate.Rule,
):
    """Joins the spans of texts with the gazetteer's and looks up what they may mean.

    Args:
      texts: n captions.
      blanked: the same without boilerplate.
      spans: what `spacy_spans` found in each of `blanked`, or nothing.
      kb: the knowledge base.
      rule: how candidates are weighed.

    Returns:
      Arrow arrays of length n: mentions and candidates, as links/ hold them.
    """
    starts, ends, surfaces, kinds, forms = [], [], [], [], []
    mentions_until, linked = [0], dict[int, str]()
    for text, visible, found in zip(texts, blanked, spans, strict=True):
        merged: dict[tuple[int, int], tuple[str, str]] = {}  # span -> kind, normal form
        linked_spans: dict[tuple[int, int], str] = {}
        for start, end, form in kb.scan(visible):
            merged[start, end] = ("gazetteer", form)
        for start, end, kind, qid in found:
            if (start, end) not in merged:
                merged[start, end] = (kind, names.normalize(text[start:end]))
            if qid:
                linked_spans[start, end] = qid
        for start, end in sorted(merged):
            kind, form = merged[start, end]
            if (start, end) in linked_spans:
                linked[len(forms)] = linked_spans[start, end]
            starts.append(start)
            ends.append(end)
            surfaces.append(text[start:end])
            kinds.append(kind)
            forms.append(form)
        mentions_until.append(len(forms))
    bounds = np.array(mentions_until)
    text_of = np.repeat(np.arange(len(texts)), np.diff(bounds))
    candidates = disambiguate.weigh(kb, rule, texts, text_of, surfaces, forms, linked)
    return (
        _mention_lists(bounds, starts, ends, surfaces, kinds),
        _candidate_lists(bounds, text_of, candidates),
    )


def _mention_lists(bounds, starts, ends, surfaces, kinds):
    import pyarrow as pa

    columns = [pa.array(starts, pa.int32()), pa.array(ends, pa.int32())]
    columns += [pa.array(surfaces, pa.string()), pa.array(kinds, pa.string())]
    rows = pa.StructArray.from_arrays(columns, fields=list(mentions_type().value_type))
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), rows)


def _candidate_lists(bounds, text_of, candidates: lookup.Candidates):
    import pyarrow as pa

    mention = candidates.surface - bounds[text_of[candidates.surface]]
    columns = [pa.array(mention, pa.int32()), pa.array(candidates.entity, pa.int32())]
    columns.append(pa.array(candidates.prior, pa.float32()))
    rows = pa.StructArray.from_arrays(columns, fields=list(candidates_type().value_type))
    ends = np.searchsorted(candidates.surface, bounds)  # of a text: before its first mention
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), rows)


# -------------------------------------------------------------------------------------------- spaCy


def spacy_spans(texts: Sequence[str], model: str, noun_chunks: bool) -> Iterator[list[Span]]:
    """The spans of the named entities, then of the noun chunks, of each text.

    Articles, possessives and punctuation at the edges are cut off.

    Args:
      texts: any number.
      model: spaCy pipeline, a package's name or a folder.
      noun_chunks: whether to parse for them, which takes a third more time.
    """
    nlp = load_spacy(model, noun_chunks)
    for first in range(0, len(texts), BATCH):
        # Without the zone the vocabulary grows with every new word for the life of the process.
        with nlp.memory_zone():
            for doc in nlp.pipe(texts[first : first + BATCH], batch_size=BATCH):
                spans = [(span, "ner", span.kb_id_) for span in doc.ents]
                if noun_chunks:
                    spans += [(span, "noun_chunk", "") for span in doc.noun_chunks]
                trimmed = ((_trim(span), kind, qid) for span, kind, qid in spans)
                yield [Span(*ends, kind, qid) for ends, kind, qid in trimmed if ends is not None]


# What begins a noun phrase without being part of a name.
_DETERMINERS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those my your his her its our their some any each every no all"
        " both another what which whose i you he she it we they me him us them",
    )
)


def _trim(span) -> tuple[int, int] | None:
    tokens = [token for token in span if not token.is_space]
    while tokens and (tokens[0].lower_ in _DETERMINERS or not _is_word(tokens[0].text)):
        tokens.pop(0)
    while tokens and (tokens[-1].text in ("'s", "’s", "'", "’") or not _is_word(tokens[-1].text)):
        tokens.pop()
    return (tokens[0].idx, tokens[-1].idx + len(tokens[-1])) if tokens else None


def _is_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


@functools.lru_cache(maxsize=1)
def load_spacy(model: str, noun_chunks: bool):
    """The pipeline with just what finds named entities and, if asked, noun chunks."""
    import spacy

    from data_prep.kb import spacy_adapter  # noqa: F401  a pipeline's entity_linker finds it by its name

    unused = ["lemmatizer", "textcat", "senter"]
    if not noun_chunks:  # they need the parser and the parts of speech
        unused += ["parser", "tagger", "attribute_ruler"]
    return spacy.load(model, exclude=unused)


# ----------------------------------------------------------------------------------- back to shards


def _keys_in_bucket(workdir: epath.Path, task: engine.Task) -> Iterator:
    """The keys of the pairs with a bucket's captions; see `engine.Engine.map_shards`."""
    bucket = int(task.name)
    table = engine.read_buckets(task.inputs[1:], bucket, bucket + 1)
    return _keys_at(workdir, table["shard"].to_numpy(), table["row"].to_numpy())


def _keys_of_captions(workdir: epath.Path, task: engine.Task) -> Iterator:
    """The same of files of captions/."""
    for path in task.inputs:
        table = engine.read_table(path, ["shards", "rows"])
        yield from _keys_at(
            workdir,
            *(table[name].combine_chunks().flatten().to_numpy() for name in ("shards", "rows")),
        )


def _keys_at(workdir: epath.Path, shards: np.ndarray, rows: np.ndarray) -> Iterator:
    for path in engine.listed(workdir / "pairs"):
        own = rows[shards == int(path.stem)]
        if len(own):
            yield engine.read_table(path, ["key"])["key"].take(own)


def _gather(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow.compute as pc

    spills, pairs = task.inputs[: settings["spills"]], task.inputs[settings["spills"] :]
    bucket = int(task.name)
    table = engine.read_buckets(spills, bucket, bucket + 1)
    table = table.sort_by([("shard", "ascending"), ("row", "ascending")])
    counts = dict.fromkeys(("texts", "linked", "mentions", "candidates"), 0)
    for path in pairs:
        shard = epath.Path(path).stem
        own = table.filter(pc.equal(table["shard"], int(shard)))
        keys = engine.read_table(path, columns=["key"])["key"]
        # A caption in quarantine leaves its pairs without a row here.
        own = own.append_column("key", keys.take(own["row"]))
        own = own.select(["key", "mentions", "candidates"]).combine_chunks()
        outputs.write_table(f"links/{shard}.parquet", own)
        counts["texts"] += len(own)
        for name in ("mentions", "candidates"):
            lengths = pc.list_value_length(own[name])
            counts[name] += pc.sum(lengths).as_py() or 0
        counts["linked"] += pc.sum(pc.greater(lengths, 0)).as_py() or 0
    return counts
