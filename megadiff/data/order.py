"""Which sample comes when: a pure function of (seed, data step), whatever the number of ranks or workers.

Shards are permuted by (seed, epoch) and laid end to end as one list of N samples. The list is cut into L lanes of
floor(N / L) samples; the N mod L that are left over rotate with the epoch. Within a lane, samples are permuted in blocks of a
few shards' worth, so that a reader needs only a few shards at a time. Lanes run on across epochs. A rank owns contiguous lanes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megadiff.config.errors import UserError


@dataclass(frozen=True)
class Visit:
    """One reading of one sample.

    Attributes:
        shard: index into the manifest's shards.
        offset: the sample's place within the shard.
        index: the sample's number over all shards in the manifest's order; with the epoch it identifies the visit.
    """

    epoch: int
    shard: int
    offset: int
    index: int


class Order:
    """The order of samples of one source."""

    def __init__(self, shard_samples: Sequence[int], lanes: int, block_shards: int, seed: int) -> None:
        """Take the number of samples of each shard.

        Raises:
            UserError: there are fewer samples than lanes.
        """
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.samples = int(self.starts[-1])
        self.lanes, self.seed = lanes, seed
        self.lane_samples = self.samples // lanes
        if self.lane_samples == 0:
            raise UserError(f"data.lanes ({lanes}) is larger than the number of samples ({self.samples}); lower data.lanes")
        mean = max(1.0, self.samples / max(1, len(self.sizes)))
        self.block = max(1, min(self.lane_samples, round(block_shards * mean)))
        self._shards_of_epoch = lru_cache(maxsize=4)(self._permuted_shards)
        self._block_of = lru_cache(maxsize=4 * lanes)(self._permuted_block)

    @property
    def left_over(self) -> int:
        """How many samples each epoch leaves out (others each time)."""
        return self.samples % self.lanes

    def visit(self, lane: int, position: int) -> Visit:
        """The sample at a lane's `position`, which counts on across epochs."""
        epoch, place = divmod(position, self.lane_samples)
        block, within = divmod(place, self.block)
        place = block * self.block + int(self._block_of(epoch, lane, block)[within])
        # The list starts at another sample each epoch, so that the samples left over at its end rotate.
        listed = (lane * self.lane_samples + place + epoch * self.left_over) % self.samples
        order, ends = self._shards_of_epoch(epoch)
        nth = int(np.searchsorted(ends, listed, side="right"))
        shard = int(order[nth])
        offset = listed - int(ends[nth] - self.sizes[shard])
        return Visit(epoch, shard, offset, int(self.starts[shard]) + offset)

    def global_batch(self, data_step: int, global_samples: int) -> list[Visit]:
        """All visits of a step, by slot: slot = lane * (global_samples / lanes) + j."""
        return self.slots(data_step, global_samples, range(global_samples))

    def slots(self, data_step: int, global_samples: int, slots: range) -> list[Visit]:
        """The visits of some slots of a step.

        Raises:
            UserError: the lanes do not divide the global batch.
        """
        per_lane = self._per_lane(global_samples)
        return [self.visit(slot // per_lane, data_step * per_lane + slot % per_lane) for slot in slots]

    def slots_of_rank(self, data_rank: int, data_ranks: int, global_samples: int) -> range:
        """The contiguous slots (whole lanes) of one data-parallel rank.

        Raises:
            UserError: the ranks do not divide the lanes, or the lanes the global batch.
        """
        per_lane = self._per_lane(global_samples)
        if self.lanes % data_ranks:
            raise UserError(f"data.lanes ({self.lanes}) must be a multiple of the data-parallel ranks ({data_ranks})")
        share = self.lanes // data_ranks * per_lane
        return range(data_rank * share, (data_rank + 1) * share)

    def _per_lane(self, global_samples: int) -> int:
        if global_samples % self.lanes:
            raise UserError(f"batch.global_samples ({global_samples}) must be a multiple of data.lanes ({self.lanes})")
        return global_samples // self.lanes

    def _permuted_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = generator(self.seed, "shards", epoch).permutation(len(self.sizes))
        return order, np.cumsum(self.sizes[order])

    def _permuted_block(self, epoch: int, lane: int, block: int) -> NDArray[np.int64]:
        size = min(self.block, self.lane_samples - block * self.block)
        return generator(self.seed, "block", epoch, lane, block).permutation(size)


def generator(*words: int | str) -> np.random.Generator:
    """A Philox generator keyed by the words; the same on every platform."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
