"""Linking: captions -> mentions -> candidate entities. pairs/ -> links/.

Sources of mentions, because each misses what another finds (spaCy's small model finds 65 % of the
mentions of Wikidata-MEL exactly: it was trained on news, minds case, and knows no species, food or
everyday things):

    gazetteer    the longest names of the knowledge base, also in hashtags and file names
    ner          spaCy's named entities, with their types
    name_part    capitalised words that are a part of a person's name
    short_name   words of a person's whole name that stand elsewhere: in the caption, or in what
                 `config.context_columns` keeps of its page

A span found twice is one mention, of the first kind in this order. Boilerplate of the web is not
looked at (`boilerplate`). All candidates of an ambiguous name are kept with their priors, made more
or less likely by what the caption says, and so is that a mention means nothing (`disambiguate`):
the picture decides later. A mention without candidates is kept too; it tells what the knowledge
base lacks. This stage never sees a picture.

Web captions repeat, and spaCy is what takes the time, so every caption is read once, wherever it
occurs; with the people that the pages name, where they do. Stages:

    caption_rows/  scattered by the caption: caption, context, key, shard, row
    spacy_model/   fingerprint.txt: of the pipeline's files
    captions/      NNNNN.parquet  caption, people (`mentions.people_named` in the context), lists of
                   the keys, shards and rows where it occurs, its mentions and candidates. What an
                   earlier run has read is taken from there.
    link_rows/     scattered by the shard: shard, row, key, mentions, candidates
    gathered/      manifests of
    links/         NNNNN.parquet  a row for each of pairs/NNNNN.parquet, in its order
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
import numpy as np
from etils import epath

from data_prep import engine
from data_prep.kb import lookup, names
from data_prep.linking import boilerplate, disambiguate, languages, ner
from data_prep.linking import mentions as mention_rows
from data_prep.linking import rows as link_rows
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = 4096  # captions that are linked at a time
_LINKED = ("text", "people")  # columns: what is read, once

# Texts are in the same bucket as long as their number is of the same order: only new ones are read
# again. 512 buckets of a billion captions are 40 minutes on one core each.
_BUCKETS = {1: 4_000, 8: 2_000_000, 64: 30_000_000, 512: float("inf")}

_SCATTER_CAPTIONS = f"""
    SELECT text, {{context}} AS context, key, parse_filename(filename, true) AS shard,
           CAST(file_row_number AS INT) AS "row", {engine.bucket_of("text")} AS bucket
    FROM read_parquet($files, filename = true, file_row_number = true)
"""
MAX_CONTEXT = 500  # characters, so that millions of rows that are scattered at a time fit memory
# Half a surrogate pair is JSON to Python, but not here.
_CONTEXT = f"""coalesce(left(array_to_string(json_extract_string(
    CASE WHEN json_valid(extras) THEN extras END, $places), ' | '), {MAX_CONTEXT}), '')"""

_OCCURRENCES = """
    SELECT unnest(shards) AS shard, unnest("rows") AS "row", unnest(keys) AS key,
           mentions, candidates
    FROM read_parquet($files)
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
    for name in ("case_weight", "ner_weight", "linker_weight"):
        if not 1 <= config[name] < np.inf:
            raise errors.BadInput(
                f"config.{name}={config[name]!r} cannot be used: give 1, which turns it off, or"
                " more."
            )
    if not 0 <= config.nil_weight < np.inf:
        raise errors.BadInput(
            f"config.nil_weight={config.nil_weight!r} cannot be used: give 0, which turns it off,"
            " or more."
        )
    ner.pipeline_files(config.spacy_model)


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes links/NNNNN.parquet: one row for each of pairs/NNNNN.parquet, in its order.

    Columns: key; mentions, a list of (start, end, surface, kind, label), characters start:end of
    the text, sorted, label spaCy's type or empty; candidates, a list of (mention, entity, prior),
    where mention counts in `mentions` and entity is a row of the knowledge base, most likely first
    within a mention. Priors of a mention sum to the probability that it means one of them.

    Args:
      config: `spacy_model` (None: without), `boilerplate` (regular expressions),
        `context_columns` (of what pairs/ kept of the input), and the fields of `disambiguate.Rule`.
      work: the engine; its work directory holds pairs/ and kb/.

    Returns:
      The manifests; counts `texts`, `linked` (rows with a candidate), `mentions`, `candidates`.

    Raises:
      BadInput: `context_columns` that no pair has.
    """
    import pyarrow.parquet as pq

    workdir = work.workdir
    pairs = engine.listed(workdir / "pairs")
    rows = sum(pq.read_metadata(path).num_rows for path in pairs)
    buckets = next(count for count, most in _BUCKETS.items() if rows <= most)
    tasks = engine.run_tasks(pairs)
    context = config.context_columns
    sql = _SCATTER_CAPTIONS.format(context=_CONTEXT if context else "''")
    places = [f"/{name.replace('~', '~0').replace('/', '~1')}" for name in context]  # RFC 6901
    parameters = {"buckets": buckets, "places": places}
    scattered = work.scatter("caption_rows", sql, tasks, buckets, parameters)
    if context and rows and not any(map(_has_context, scattered.files)):
        raise errors.BadInput(
            f"config.context_columns={tuple(context)}: no pair has any of these: name columns or"
            " fields of the input as they are written there."
        )

    pipeline = work.fingerprint("spacy_model", ner.pipeline_files(config.spacy_model))
    inputs = (workdir / "kb/manifest.json", pipeline, *scattered.files)
    tasks = [engine.Task(f"{bucket:05d}", inputs) for bucket in range(buckets)]
    settings = {
        "version": 11,
        "spacy": importlib.metadata.version("spacy"),
        "nouns": importlib.metadata.version(names.NOUNS),
        "languages": importlib.metadata.version("py3langid"),
        "boilerplate": list(config.boilerplate),
        **disambiguate.Rule.of(config)._asdict(),
    }
    function = functools.partial(_link_captions, config.spacy_model)
    work.map_shards("captions", function, tasks, settings, keys=_keys_in_bucket)

    # A file each: lists of mentions and candidates are what memory goes for.
    tasks = [engine.Task(path.stem, (path,)) for path in engine.listed(workdir / "captions")]
    tasks, settings = work.to_shards(
        "link_rows", _OCCURRENCES, tasks, pairs, keys=_keys_of_captions
    )
    settings["version"] = 2
    function = functools.partial(_keys_of_shards, settings["spills"])
    return work.map_shards("gathered", _gather, tasks, settings, keys=function)


# ----------------------------------------------------------------------------------------- captions


def _has_context(path: str) -> bool:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(columns=["context"])
        return any(pc.any(pc.not_equal(batch.column(0), "")).as_py() for batch in batches)


def _link_captions(
    model: str, task: engine.Task, outputs: engine.Outputs, settings: dict
) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kb_manifest, pipeline, *spills = task.inputs
    bucket = int(task.name)
    kb = lookup.KnowledgeBase(os.path.dirname(kb_manifest))
    table = engine.read_buckets(spills, bucket, bucket + 1)
    contexts, table = table["context"], table.drop_columns(["context"])
    blocks = (contexts.slice(at, _BLOCK).to_pylist() for at in range(0, len(table), _BLOCK))
    people = [pa.array(mention_rows.people_named(block, kb), pa.string()) for block in blocks]
    table = table.append_column("people", pa.chunked_array(people, pa.string()))
    table = table.sort_by([(name, "ascending") for name in (*_LINKED, "shard", "row")])
    places = {"key": "keys", "shard": "shards", "row": "rows"}
    table = table.group_by(_LINKED, use_threads=False).aggregate([(n, "list") for n in places])
    table = table.rename_columns({f"{name}_list": lists for name, lists in places.items()})
    rule = disambiguate.Rule.of(settings)
    blank = boilerplate.Blanker(settings["boilerplate"])
    _settle(model)
    name = f"captions/{task.name}.parquet"
    types = {"mentions": mentions_type(), "candidates": candidates_type()}
    store = _Store(outputs.kept(name, kb_manifest, pipeline), types)
    counts = {"captions": len(table), "mentions": 0}
    schema = pa.schema([*table.schema, *types.items()])
    with pq.ParquetWriter(os.fspath(outputs.path(name)), schema, compression="zstd") as writer:
        for start in range(0, len(table), _BLOCK):
            block = table.slice(start, _BLOCK).combine_chunks()
            place = store.find(block)
            texts, people = (block[name].filter(place < 0).to_pylist() for name in _LINKED)
            found = store.fill_in(place, link(texts, blank, kb, rule, model, people))
            counts["mentions"] += len(found[0].flatten())
            writer.write_table(pa.table([*block.columns, *found], schema=schema))
    return counts


@functools.cache
def _settle(model: str | None) -> None:
    """Loads what lives as long as the process, so that garbage is not looked for in it again.

    spaCy's tables are a million objects; looking through them took a quarter of the time.
    """
    names.dictionary()
    if model is not None:
        ner.load_spacy(model)
    gc.freeze()


class _Store:
    """Captions that an earlier run has read, with the columns that it found."""

    def __init__(self, path: epath.Path | None, types: Mapping[str, pa.DataType]):
        import pyarrow as pa

        schema = pa.schema([*((name, pa.string()) for name in _LINKED), *types.items()])
        table = schema.empty_table()
        if path is not None:
            table = engine.read_table(path, schema.names).cast(schema)
        self._texts = _joined(table)
        self._columns = [table[name].combine_chunks() for name in types]

    def find(self, block: pa.Table) -> np.ndarray:
        """int64 [n]: where each caption of a block stands, with its people, -1 for new ones."""
        return link_rows.positions(_joined(block), self._texts)

    def fill_in(self, place: np.ndarray, new: Sequence[pa.Array] | None) -> list[pa.Array]:
        """The columns of all texts: those of `new` for texts that `find` did not, in order."""
        import pyarrow as pa

        new = new or [column[:0] for column in self._columns]
        rows = np.where(place < 0, len(self._texts) - 1 + np.cumsum(place < 0), place)
        return [
            pa.concat_arrays([known, found]).take(pa.array(rows))
            for known, found in zip(self._columns, new, strict=True)
        ]


def _joined(table: pa.Table) -> pa.Array:
    """Captions and people as one text each: captions are single lines."""
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*(table[name] for name in _LINKED), "\n").combine_chunks()


def mentions_type():
    """The parquet type of the column mentions."""
    import pyarrow as pa

    fields = [("start", pa.int32()), ("end", pa.int32())]
    texts = ((name, pa.string()) for name in ("surface", "kind", "label"))
    return pa.list_(pa.struct([*fields, *texts]))


def candidates_type():
    """The parquet type of the column candidates."""
    import pyarrow as pa

    fields = [("mention", pa.int32()), ("entity", pa.int32()), ("prior", pa.float32())]
    return pa.list_(pa.struct(fields))


def link(
    texts: Sequence[str],
    blank: boilerplate.Blanker,
    kb: lookup.KnowledgeBase,
    rule: disambiguate.Rule,
    model: str | None,
    people: Sequence[str] | None = None,
):
    """What texts mention, and what that may mean.

    Args:
      texts: n captions.
      blank: takes out boilerplate.
      kb: the knowledge base.
      rule: how candidates are weighed.
      model: spaCy pipeline; None: without it.
      people: of each caption's page (`mentions.people_named`); None: of none.

    Returns:
      Arrow arrays of length n: mentions and candidates, as links/ hold them.
    """
    unescaped = [boilerplate.unescape(text) for text in texts]
    visible = [blank(text) for text, _ in unescaped]
    forms = mention_rows.Forms(kb)
    read = functools.partial(ner.spacy_spans, model=model) if model else None
    every = model is not None and ner.links_itself(model)
    found = mention_rows.gather(visible, kb, forms, read, every, people or [""] * len(texts))
    spoken = languages.of(visible, kb.languages)
    meanings = disambiguate.weigh(kb, rule, found, forms, spoken)
    if people and any(people):
        found, meanings = disambiguate.within_texts(found, meanings)
    bounds = np.cumsum([0, *(len(text.mentions) for text in found)])
    return (
        _mention_lists(bounds, texts, [places for _, places in unescaped], found),
        _candidate_lists(bounds, meanings),
    )


def _mention_lists(bounds, texts, places, found):
    import pyarrow as pa

    starts, ends, surfaces, kinds, labels = columns = [], [], [], [], []
    for text, places_of, own in zip(texts, places, found, strict=True):
        for start, end, kind, _, label, *_ in own.mentions:
            if places_of is not None:
                last = places_of[end - 1]  # several characters may stand for a single entity
                start, end = places_of[start], next(at for at in places_of[end:] if at > last)
            starts.append(start)
            ends.append(end)
            surfaces.append(text[start:end])
            kinds.append(kind)
            labels.append(ner.LABELS[label])
    fields = list(mentions_type().value_type)
    arrays = [pa.array(c, field.type) for c, field in zip(columns, fields, strict=True)]
    rows = pa.StructArray.from_arrays(arrays, fields=fields)
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), rows)


def _candidate_lists(bounds, meanings: disambiguate.Meanings):
    import pyarrow as pa

    text_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    mention = meanings.mention - bounds[text_of[meanings.mention]]
    columns = [pa.array(mention, pa.int32()), pa.array(meanings.entity, pa.int32())]
    columns.append(pa.array(meanings.prior, pa.float32()))
    rows = pa.StructArray.from_arrays(columns, fields=list(candidates_type().value_type))
    ends = np.searchsorted(meanings.mention, bounds)  # of a text: before its first mention
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), rows)


# ----------------------------------------------------------------------------------- back to shards


def _keys_in_bucket(task: engine.Task) -> Iterator:
    """The keys of the pairs with a bucket's captions; see `engine.Engine.map_shards`."""
    bucket = int(task.name)
    yield engine.read_buckets(task.inputs[2:], bucket, bucket + 1)["key"]


def _keys_of_captions(task: engine.Task) -> Iterator:
    """The same of files of captions/."""
    for path in task.inputs:
        yield engine.read_table(path, ["keys"])["keys"].combine_chunks().flatten()


def _keys_of_shards(spills: int, task: engine.Task) -> Iterator:
    """The same of the pairs that `_gather` gathers."""
    for path in task.inputs[spills:]:
        yield engine.read_table(path, ["key"])["key"]


def _gather(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow.compute as pc

    counts = dict.fromkeys(("texts", "linked", "mentions", "candidates"), 0)
    # A caption in quarantine leaves its pairs without a row here.
    for shard, own in engine.gather_shards(task, settings):
        outputs.write_table(f"links/{shard}.parquet", own.drop_columns(["row"]))
        counts["texts"] += len(own)
        for name in ("mentions", "candidates"):
            lengths = pc.list_value_length(own[name])
            counts[name] += pc.sum(lengths).as_py() or 0
        counts["linked"] += pc.sum(pc.greater(lengths, 0)).as_py() or 0
    return counts
