"""The training stream: one order fixed by the seed, any number of hosts, exact from any point.

The position is one number, examples consumed.  The order over all epochs is an index permutation
(Grain MapDataset: shuffle, repeat), random operations are keyed by the global index, and host h of
n takes every n-th example from the position on; so any number of hosts continues exactly where any
other number stopped.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from mofi_jax.data import ops, records, tokenizer
from mofi_jax.errors import BadInput

TEXT_SOURCES = ("name", "name_and_description", "alt_text")


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """One record -> one training example; a pure function of (record, rng), picklable.

    Attributes:
      image_ops: specification for `ops.build`.
      text_sources: source -> probability, see `TEXT_SOURCES`; a record without entities falls back
        to its alt-text.
      max_labels: labels per example; the best-scored ones are kept.
    """

    image_ops: str
    text_sources: Mapping[str, float]
    tokenizer_path: str
    context_length: int
    entities: records.Entities | None
    max_labels: int

    @functools.cached_property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.Tokenizer(self.tokenizer_path, self.context_length)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_tokenizer", None)
        return state

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Returns image uint8 [s, s, 3], tokens int32 [t], text_group int32, text_valid bool,
        entity_ids int32 [k] (-1 where there is none), entity_weights float32 [k] (sum 1 or 0)."""
        image = ops.build(self.image_ops)({"image": record["image"]}, rng)["image"]
        ids = np.full(self.max_labels, -1, np.int32)
        weights = np.zeros(self.max_labels, np.float32)
        best = np.argsort(-record["entity_scores"], kind="stable")[: self.max_labels]
        if len(best) and self.entities is not None:
            records.validate_entity_ids(record["entity_ids"], len(self.entities), record["key"])
            ids[: len(best)] = record["entity_ids"][best]
            weights[: len(best)] = 1.0 / len(best)
        text, group = self._text(record, ids, int(np.sum(ids >= 0)), rng)
        return {
            "image": np.ascontiguousarray(image),
            "tokens": self._tokenizer([text])[0],
            "text_group": np.int32(group),
            "text_valid": np.bool_(bool(text.strip())),
            "entity_ids": ids,
            "entity_weights": weights,
        }

    def _text(
        self, record: Mapping[str, Any], ids: np.ndarray, labels: int, rng: np.random.Generator
    ) -> tuple[str, int]:
        """Draws the text source, then one of the labels; the group says which texts mean the same.

        Pairs of one group are no negatives of one another (losses/contrastive.py): two pictures
        labelled with one entity, or two pictures with the same words.
        """
        names, probabilities = zip(*self.text_sources.items(), strict=True)
        source = names[rng.choice(len(names), p=np.asarray(probabilities) / sum(probabilities))]
        if not labels or self.entities is None:
            digest = hashlib.blake2b(record["text"].strip().lower().encode(), digest_size=4)
            # Negative, so that no hash is mistaken for an entity.
            return record["text"], -1 - (int.from_bytes(digest.digest(), "big") >> 1)
        entity = int(ids[rng.integers(labels)])
        if source == "alt_text":
            return record["text"], entity
        return self.entities.text(entity, with_description=source != "name"), entity


def training_stream(
    source: Any,
    builder: ExampleBuilder,
    *,
    seed: int,
    start: int,
    host: int,
    hosts: int,
    batch_size: int,
    threads: int,
    workers: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This host's part of every global batch from example ``start`` on, for ever.

    Args:
      source: `records.open_source`.
      start: examples consumed so far by all hosts.
      batch_size: global; must divide by ``hosts``.
      threads: decoding threads per process.
      workers: extra processes; 0 decodes in this one.
    """
    if batch_size % hosts:
        raise BadInput(
            f"config.batch_size={batch_size} does not divide over {hosts} hosts: choose a multiple."
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own in its workers
    # Two batches ahead, over all processes that decode for this host.
    ahead = max(threads, 2 * batch_size // hosts // max(1, workers))
    stream = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(builder)[start + host :: hosts]
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        .batch(batch_size // hosts, drop_remainder=True)
    )
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
