"""The order of the training data: which record stands at which position, by arithmetic alone.

Records are shuffled when their shards are written.  Training shuffles blocks of consecutive records
anew for each epoch, so that consecutive positions are few large reads of a disk or bucket.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np


def example_order(
    lengths: Sequence[int], weights: Sequence[float], *, seed: int, block: int
) -> grain.MapDataset:
    """(set, record) at every position, without end; any position takes the same short time.

    An epoch of a set is a permutation of its records: blocks of ``block`` consecutive ones in a
    random order.  Epochs begin at a record of their own, so that blocks have other borders in each;
    what is left over after the last whole block ends the epoch.

    Args:
      lengths: records of each set.
      weights: shares of the sets, which Grain mixes by whole numbers: they are exact to one percent
        of the smallest one.
      block: 1 shuffles single records; larger than a set, its records come in the order of writing.
    """
    sets = [
        grain.MapDataset.range(sys.maxsize).map(
            # A seed for each set, so that sets of one length are not walked in step; Grain takes
            # the seeds that follow it for the next epochs.
            _BlockShuffle(
                i,
                length,
                min(block, length),
                int(np.random.SeedSequence((seed, 1 + i)).generate_state(1)[0]),
            )
        )
        for i, length in enumerate(lengths)
    ]
    return sets[0] if len(sets) == 1 else grain.MapDataset.mix(sets, weights=list(weights))


@dataclasses.dataclass(frozen=True)
class _BlockShuffle:
    """(set, record) of each draw from one set."""

    number: int  # of the set
    length: int
    block: int
    seed: int

    def __call__(self, draw: int) -> tuple[int, int]:
        epoch, place = divmod(draw, self.length)
        block, within = divmod(place, self.block)
        whole_blocks = self.length // self.block
        if block < whole_blocks:
            block = _shuffled(whole_blocks, self.seed, epoch * whole_blocks + block)
        first = _first_record(self.seed, epoch, self.length) if self.block > 1 else 0
        return self.number, (first + block * self.block + within) % self.length


@functools.lru_cache
def _permutations(length: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(length).shuffle(seed=seed).repeat()


@functools.lru_cache(4_096)  # Grain takes up to 10 ms for a place among few blocks
def _shuffled(length: int, seed: int, place: int) -> int:
    return _permutations(length, seed)[place]


@functools.lru_cache
def _first_record(seed: int, epoch: int, length: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]) % length
