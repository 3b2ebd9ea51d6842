"""Invented names, captions, knowledge bases, dump lines and a model, the same every time."""

import json
import pathlib
import random
from collections.abc import Iterator

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dataset import files as dataset_files
from data_prep.kb import kinds
from data_prep.kb import parts as kb_parts
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface
from mofi_jax.model import mofi

_SYLLABLES = [
    c + v + e for c in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "ck")
]


def words(count: int, seed: int = 0) -> list[str]:
    """Words of two to four syllables: a million of them compress about as real names do."""
    draw = random.Random(seed)
    return ["".join(draw.choices(_SYLLABLES, k=draw.choice((2, 3, 3, 4)))) for _ in range(count)]


def names(count: int, seed: int = 0) -> Iterator[str]:
    """Names of one to three capitalised words, none twice."""
    draw = random.Random(seed + 1)
    vocabulary = [word.capitalize() for word in words(max(1_000, count // 20), seed)]
    seen = set()
    while len(seen) < count:
        name = " ".join(draw.choices(vocabulary, k=draw.choice((1, 2, 2, 3))))
        if name not in seen:
            seen.add(name)
            yield name


def write_rows(path: pathlib.Path, entities: int, aliases_each: int) -> pathlib.Path:
    """A knowledge base of JSON lines with `entities * (1 + aliases_each)` names."""
    fresh = names(entities * (1 + aliases_each))
    with open(path, "w") as file:
        for number in range(entities):
            label, *aliases = (next(fresh) for _ in range(1 + aliases_each))
            row = {"qid": f"Q9{number:09d}", "label": label, "aliases": aliases}
            row |= {"description": f"thing {number}", "sitelinks": number % 200}
            file.write(json.dumps(row) + "\n")
    return path


def write_classes(folder: pathlib.Path, classes: int, items: int) -> list[str]:
    """Parts of a knowledge base whose items are of classes below the roots of `kinds`.

    Returns:
      The paths of the parts, of 5,000 items each.
    """
    draw = np.random.default_rng(0)
    roots = np.array([root for root, kind in kinds.ROOTS if kind and root[0] == "Q"], object)
    child = np.arange(len(roots), classes)
    child = np.concatenate([child, child[draw.random(len(child)) < 0.3]])  # some have two parents
    parent = (child * draw.random(len(child)) ** 3).astype(np.int64)
    count = -(-items // 5_000)
    paths = [str(folder / f"{number:07d}") for number in range(count)]
    for number, path in enumerate(paths):
        some = slice(number * len(child) // count, (number + 1) * len(child) // count)
        up = [roots[i] if i < len(roots) else f"Q9{i:010d}" for i in parent[some].tolist()]
        rows = list(zip([f"Q9{i:010d}" for i in child[some].tolist()], up, strict=True))
        kb_parts.write(f"{path}.classes.parquet", kb_parts.table(rows, kb_parts.classes_schema()))
        schema = kb_parts.part_schema()
        columns = {field.name: pa.nulls(5_000, field.type) for field in schema}
        columns["qid"] = pa.array([f"Q8{number * 5_000 + i:010d}" for i in range(5_000)])
        columns["label"] = columns["description"] = pa.array(["x"] * 5_000)
        types = draw.integers(len(roots), classes, 5_000).tolist()
        columns["types"] = pa.array([[f"Q9{of:010d}"] for of in types])
        kb_parts.write(f"{path}{kb_parts.LAST}", pa.table(columns, schema=schema))
    return paths


_CAPTIONS = (
    "A photo of {a} near {b} in summer",
    "{a} and {b} at the annual meeting of {c}, {year}",
    "vintage poster: {a} by {b}",
    "the best {w} recipes from {a} | {b}",
    "{a} walking down a street in {b}",
)


def captions(count: int, of: list[str], seed: int = 3) -> list[str]:
    """Captions of about twelve words and two or three of the names `of`."""
    draw = random.Random(seed)
    fillers = words(500, 9)
    return [
        draw.choice(_CAPTIONS).format(
            a=draw.choice(of),
            b=draw.choice(of),
            c=draw.choice(of),
            w=draw.choice(fillers),
            year=draw.randrange(1950, 2026),
        )
        for _ in range(count)
    ]


def dump_lines(count: int, size: int) -> Iterator[bytes]:
    """Items of Wikidata's dump, of about `size` bytes, most of which are claims to step over."""
    draw = random.Random(0)
    for number, label in enumerate(names(count)):
        qid = f"Q{1000 + number}"
        item = {
            "type": "item",
            "id": qid,
            "labels": _texts(("en", "de", "fr", "es", "ja", "nl"), label),
            "descriptions": _texts(("en", "de", "nl", "fr"), f"a thing called {label}"),
            "aliases": {"en": [{"language": "en", "value": f"{label} {i}"} for i in range(2)]},
            "claims": {
                "P31": [_claim(draw, qid, "P31", {"entity-type": "item", "id": "Q5"})],
                "P18": [_claim(draw, qid, "P18", f"{label}.jpg")],
            },
            "sitelinks": {
                wiki: {"site": wiki, "title": label, "badges": []} for wiki in ("enwiki", "dewiki")
            },
        }
        length = len(json.dumps(item))
        while length < size:
            name = f"P{100 + len(item['claims'])}"
            item["claims"][name] = [_claim(draw, qid, name, f"{draw.getrandbits(64):x}")]
            length += len(json.dumps(item["claims"][name])) + len(name) + 6
        yield json.dumps(item, separators=(",", ":")).encode()


def _texts(languages: tuple[str, ...], value: str) -> dict:
    return {code: {"language": code, "value": value} for code in languages}


def _claim(draw: random.Random, qid: str, name: str, value: object) -> dict:
    kind = "string" if isinstance(value, str) else "wikibase-entityid"
    return {
        "mainsnak": {
            "snaktype": "value",
            "property": name,
            "hash": f"{draw.getrandbits(160):040x}",
            "datavalue": {"value": value, "type": kind},
            "datatype": kind,
        },
        "type": "statement",
        "id": f"{qid}${draw.getrandbits(128):032x}",
        "rank": "normal",
    }


def write_pairs(workdir: pathlib.Path, captions: list[str], shard_rows: int) -> int:
    """pairs/ without pictures; returns the number of shards."""
    (workdir / "pairs").mkdir(parents=True)
    for shard, start in enumerate(range(0, len(captions), shard_rows)):
        texts = captions[start : start + shard_rows]
        keys = [f"{shard:05d}{row:05d}" for row in range(len(texts))]
        zeros = np.zeros(len(texts), np.int64)
        table = {
            "key": keys,
            "text": texts,
            "source": ["synthetic"] * len(texts),
            "path": [f"{shard:05d}.tar"] * len(texts),
            "offset": zeros,
            "length": zeros,
            "width": zeros.astype(np.int32),
            "height": zeros.astype(np.int32),
            "sha256": keys,
            "phash": np.arange(start, start + len(texts)),  # no near-duplicates
        }
        pq.write_table(pa.table(table), workdir / f"pairs/{shard:05d}.parquet")
    return shard + 1


def write_clip(folder: pathlib.Path, texts: list[str], size: int = 16, patch: int = 8) -> None:
    """A CLIP model of a few thousand random parameters, as a Hugging Face folder."""
    dataset_files.train_bpe(texts, 280, folder.with_suffix(".json"))
    tokenizer = tokenizer_lib.Tokenizer(folder.with_suffix(".json"), 12)
    tower = mofi.TowerConfig(16, 1, 2)
    config = mofi.MofiConfig(
        image_size=size,
        patch_size=patch,
        image=tower,
        text=tower,
        vocab_size=tokenizer.vocab_size,
        context_length=tokenizer.context_length,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
        dtype="float32",
    )
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    preprocess = f"decode|resize_short({size})|center_crop({size})"
    huggingface.write(folder, huggingface.Clip(config, params, tokenizer, None, preprocess))
