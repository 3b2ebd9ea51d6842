"""The training stream: one order fixed by the seed, any number of hosts, exact from any point.

The position is one number, examples consumed.  The order over all epochs is a function of the index
(`mofi_jax.data.order`), random operations are keyed by the global index, and row r of a batch is
the example r places behind its position, whichever host feeds it; so any number of hosts continues
exactly where any other stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Int

from mofi_jax.common import processes
from mofi_jax.common.errors import BadInput
from mofi_jax.data import limits, ops, order, records, tokenizer
from mofi_jax.distributed import preemption

TEXT_SOURCES = ("name", "name_and_description", "alt_text")

# Examples that a thread reads and makes at once: a run of records is one read.  From another
# process a shared array costs as much as two images, so that groups are larger where few threads
# have one each.
_GROUPS = (32, 128)


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Records -> training examples; a pure function of record, seed and position, picklable."""

    image_ops: str  # for `ops.apply`
    text_sources: Mapping[str, float]  # weights; without entities it is the alt-text
    tokenizer_path: str
    context_length: int
    entities: records.Entities | None
    max_labels: int  # of an example: the best-scored ones

    def __post_init__(self) -> None:
        if unknown := set(self.text_sources) - set(TEXT_SOURCES):
            raise BadInput(
                f"config.data.text_sources has {min(unknown)!r}: choose from "
                f"{', '.join(TEXT_SOURCES)}."
            )

    @functools.cached_property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.Tokenizer(self.tokenizer_path, self.context_length)

    @functools.cached_property
    def _sources(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The text sources, and up to which number in [0, 1) each is drawn."""
        shares = np.cumsum(list(self.text_sources.values()), dtype=np.float64)
        return tuple(self.text_sources), shares / shares[-1]

    def examples(
        self, seed: int, placed: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The examples of some (position, record); draws depend on seed and position alone.

        Returns:
          For each image uint8 [s, s, 3], tokens int32 [t], text_group int32, text_valid bool,
          entity_ids int32 [k] (-1 where there is none), entity_weights float32 [k] (sum 1 or 0).
        """
        # First all texts, then all images: an image takes the whole cache of a core, and making
        # texts between two of them takes twice as long.
        draw = _Draws(seed)
        texts = [self._text_and_labels(record, draw.at(index, 0)) for index, record in placed]
        return [
            {"image": self._image(record, draw.at(index, 1)), **made}
            for (index, record), made in zip(placed, texts, strict=True)
        ]

    def _image(self, record: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        try:
            image = ops.apply(self.image_ops, record["image"], rng)
        except ops.UndecodableImage as error:
            raise BadInput(
                f"{record['place']}, {record['key']!r}, has a picture that cannot be decoded "
                f"({error}): copy the shard again, or take the record out with "
                "data_prep.remove_keys."
            ) from error
        return np.ascontiguousarray(image)

    def _text_and_labels(
        self, record: Mapping[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        ids = np.full(self.max_labels, -1, np.int32)
        weights = np.zeros(self.max_labels, np.float32)
        labels = record["entity_ids"][:0]
        if self.entities is not None:
            records.validate_entity_ids(record["entity_ids"], len(self.entities), record["key"])
            best = np.argsort(-record["entity_scores"], kind="stable")[: self.max_labels]
            labels = record["entity_ids"][best]
        ids[: len(labels)] = labels
        weights[: len(labels)] = 1.0 / max(1, len(labels))
        text, group = self._text(record, labels, rng)
        return {
            "tokens": self._tokenizer([text])[0],
            "text_group": np.int32(group),
            "text_valid": np.bool_(bool(text.strip())),
            "entity_ids": ids,
            "entity_weights": weights,
        }

    def _text(
        self, record: Mapping[str, Any], labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[str, int]:
        """Draws the text source, then one of the labels; the group says which texts mean the same.

        Pairs of one group are no negatives of one another (losses/contrastive.py): pictures
        labelled with one entity, or with the same caption.
        """
        names, shares = self._sources
        source = names[shares.searchsorted(rng.random(), side="right")]
        if not len(labels):
            digest = hashlib.blake2b(record["text"].strip().lower().encode(), digest_size=4)
            # Negative, so that no hash is mistaken for an entity.
            return record["text"], -1 - (int.from_bytes(digest.digest(), "big") >> 1)
        entity = int(labels[rng.integers(len(labels))])
        if source == "alt_text" and record["text"].strip():  # it may come without a caption
            return record["text"], entity
        return self.entities.text(entity, with_description=source != "name"), entity


class _Draws:
    """The random numbers of an example: Philox, keyed by seed and position."""

    def __init__(self, seed: int):
        self._rng = np.random.Generator(np.random.Philox(key=seed))
        self._fresh = self._rng.bit_generator.state

    def at(self, position: int, purpose: int) -> np.random.Generator:
        # Setting the state takes a fifth of the time of making another generator.
        self._fresh["state"]["key"][1] = position
        self._fresh["state"]["counter"][3] = purpose
        self._rng.bit_generator.state = self._fresh
        return self._rng


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of the mixture; the first of several is the primary one."""

    name: str  # prefix of the keys of its examples
    source: records.Source
    weight: float = 1.0  # share of the examples, relative to the other sets
    # int32 [entities of this set], the id of each in the primary vocabulary, -1 where it has none;
    # None keeps the ids, as for the primary set.
    remap: np.ndarray | None = None

    def records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records with the labels that the primary vocabulary has, by its ids.

        New are `set`, the name of this part, and `place`, where it was read.
        """
        found = self.source.read(indices)
        for index, record in zip(indices, found, strict=True):
            record |= {"set": self.name, "place": self.source.place(index)}
            if self.remap is not None:
                records.validate_entity_ids(record["entity_ids"], len(self.remap), record["key"])
                ids = self.remap[record["entity_ids"]]
                known = ids >= 0
                record["entity_ids"] = ids[known]
                record["entity_scores"] = record["entity_scores"][known]
        return found


def open_extra(
    extra: Mapping[str, Mapping[str, Any]], entities: records.Entities | None
) -> list[Part]:
    """Opens ``config.data.extra``, the sets mixed into the primary one, in the order of the names.

    Entities are matched by QID; labels that the primary vocabulary ``entities`` lacks are dropped.
    ``extra`` is {name: {dir, name, weight}}; the weight of the primary set is 1.

    Raises BadInput: as `records.open_source`; a weight that is not positive; other keys.
    """
    ids = {qid: i for i, qid in enumerate(entities.qids)} if entities else {}
    parts = []
    for name, wanted in sorted(extra.items()):
        if set(wanted) != {"dir", "name", "weight"}:
            raise BadInput(
                f"config.data.extra.{name} has the keys {', '.join(sorted(wanted)) or 'none'}: "
                "give it dir, name and weight."
            )
        if not (wanted["weight"] > 0 and math.isfinite(wanted["weight"])):
            raise BadInput(
                f"config.data.extra.{name}.weight={wanted['weight']} is not positive: set it to "
                "the examples of this set for each one of the primary set, or leave the set out."
            )
        source = records.open_source(wanted["dir"], wanted["name"])
        path = source.directory / records.ENTITIES_FILE
        remap = np.zeros(0, np.int32)  # without a vocabulary no record may carry a label
        if path.exists():
            own = records.read_entities(path)
            remap = np.array([ids.get(qid, -1) for qid in own.qids], np.int32)
            missing = remap < 0
            logging.info(
                "%s: %d of %d entities are not in the primary vocabulary; their %d labels of %d "
                "are dropped",
                *(name, missing.sum(), len(own), own.counts[missing].sum(), own.counts.sum()),
            )
        parts.append(Part(name, source, float(wanted["weight"]), remap))
    return parts


def examples_per_epoch(parts: Sequence[Part]) -> int:
    """Examples of the mixture among which each of the primary set comes once."""
    return round(len(parts[0].source) * sum(p.weight for p in parts) / parts[0].weight)


def check_shards(parts: Sequence[Part], hosts: int) -> None:
    """Raises BadInput for a set of fewer shards than hosts.

    The examples would be right, but several hosts would always read the same file of a shared disk
    or bucket, whose throughput is per file.
    """
    for part in parts:
        if len(part.source.files) < hosts:
            raise BadInput(
                f"{part.source.directory} has {len(part.source.files)} shards for {hosts} hosts, "
                "which would wait for one another's reads: write it with a smaller "
                "config.shard_examples (data_prep.build_i2e), or train on fewer hosts."
            )


def _order(parts: Sequence[Part], seed: int, block: int) -> grain.MapDataset:
    lengths, weights = zip(*((len(part.source), part.weight) for part in parts), strict=True)
    return order.example_order(lengths, weights, seed=seed, block=block)


def _read(parts: Sequence[Part], places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The records at some (set, record), in their order; those of a set are read together."""
    read = [
        iter(part.records([record for of, record in places if of == number]))
        for number, part in enumerate(parts)
    ]
    return [next(read[number]) for number, _ in places]


def batch_keys(
    parts: Sequence[Part], seed: int, start: int, count: int, block: int = 1
) -> list[str]:
    """SET:KEY of the examples at the positions start, ..., start + count - 1.

    Recomputed from the position, so that no keys travel with the batches; reads the records.
    """
    places = _order(parts, seed, block)
    keys: list[str] = []
    for first in range(start, start + count, _GROUPS[0]):  # not all images in memory at once
        last = min(first + _GROUPS[0], start + count)
        found = _read(parts, [places[i] for i in range(first, last)])
        keys += [f"{record['set']}:{record['key']}" for record in found]
    return keys


@dataclasses.dataclass(frozen=True, repr=False)  # Grain logs it, and the vocabulary is long
class _Groups:
    """The examples of one host in groups by number, ``per_batch`` of them a batch."""

    parts: Sequence[Part]
    order: grain.MapDataset
    builder: ExampleBuilder
    seed: int
    start: int
    batch_size: int
    rows: Int[np.ndarray, " n"]
    per_batch: int

    def positions(self, number: int) -> list[int]:
        """Where in the order the examples of a group are."""
        batch, group = divmod(number, self.per_batch)
        first, last = (i * len(self.rows) // self.per_batch for i in (group, group + 1))
        return (self.start + batch * self.batch_size + self.rows[first:last]).tolist()

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        positions = self.positions(number)
        found = _read(self.parts, [self.order[i] for i in positions])
        examples = self.builder.examples(self.seed, list(zip(positions, found, strict=True)))
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _batches(groups: grain.DatasetIterator, local: int) -> Iterator[dict[str, np.ndarray]]:
    """Concatenates groups to batches of ``local`` examples."""
    batch: dict[str, np.ndarray] = {}
    row = 0
    try:
        for group in groups:
            for name, values in group.items():
                if not row:
                    batch[name] = np.empty((local, *values.shape[1:]), values.dtype)
                batch[name][row : row + len(values)] = values
            row += len(group["tokens"])
            if row == local:
                yield batch
                batch, row = {}, 0
    finally:
        groups.close()


class Buffers(NamedTuple):
    """Prefetch buffers of a host."""

    groups: int  # of a batch: what a thread makes at once
    ahead: int  # groups that wait in each process that decodes: two batches over all
    shared: int  # examples in shared memory, as measured: four groups of each worker, and one


def buffers(local: int, threads: int, workers: int) -> Buffers:
    """Prefetch buffers for batches of ``local`` examples a host; see `training_stream`."""
    smallest, largest = _GROUPS
    group = min(local, max(smallest, min(largest, 256 // threads if workers else 0)))
    groups = -(-local // group)
    processes = max(1, workers)
    ahead = max(2 * threads, -(-2 * groups // processes))
    return Buffers(groups, ahead, (4 * workers + 1) * group if workers else 0)


def training_stream(
    parts: Sequence[Part],
    builder: ExampleBuilder,
    *,
    seed: int,
    start: int,
    batch_size: int,
    threads: int,
    workers: int,
    host: int = 0,
    hosts: int = 1,
    rows: Int[np.ndarray, " n"] | None = None,
    block: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of every global batch from example ``start`` on, without end.

    Args:
      start: examples consumed so far by all hosts.
      batch_size: global.
      threads: of each process that decodes.
      workers: extra processes; 0 decodes in this one.
      host, hosts: this host feeds the ``host``-th of ``hosts`` equal parts of every batch ...
      rows: ... or these of its rows (`global_batch.batch_rows`), ascending.
      block: see `order.example_order`.
    """
    if rows is None:
        rows = np.array_split(np.arange(batch_size), hosts)[host]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own in its workers
    held = buffers(len(rows), threads, workers)
    places = _order(parts, seed, block)
    groups = _Groups(parts, places, builder, seed, start, batch_size, rows, held.groups)
    stream = (
        grain.MapDataset.range(sys.maxsize)
        .map(groups)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=held.ahead))
    )
    if workers:
        [example] = builder.examples(seed, [(start, *_read(parts, [places[start]]))])
        size = sum(values.nbytes for values in example.values())
        limits.require_shared_memory(held.shared * size, workers)
        # Grain hands the groups to its workers in turn, and takes them back in turn.
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), _start_worker
        )
    with processes.deaf_to_interrupts() if workers else contextlib.nullcontext():
        return _batches(iter(stream), len(rows))


def _start_worker(worker: int, workers: int) -> None:
    del worker, workers
    preemption.ignore_signals()
    processes.begin_worker()
