"""Which sample comes when: a pure function of (seed, data step), whatever the number of ranks or workers.

Shards are permuted by (seed, epoch) and laid end to end as one list of N samples. The list is cut into L lanes of
floor(N / L) samples; the N mod L that are left over rotate with the epoch. Within a lane, samples are permuted in blocks of a
few shards' worth, so that a reader needs only a few shards at a time; the lanes' blocks end at different steps, so that new
shards are needed evenly over time. Lanes run on across epochs. A rank owns contiguous lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megadiff.config.errors import UserError
from megadiff.data.generator import generator

Numbers = NDArray[np.int64]


class Visits(NamedTuple):
    """Readings of samples, each an array of as many numbers.

    Attributes:
        shard: indices into the manifest's shards.
        offset: the samples' places within their shards.
        number: the samples' numbers over all shards in the manifest's order; with the epoch they identify the visits.
    """

    epoch: Numbers
    shard: Numbers
    offset: Numbers
    number: Numbers


class _Block(NamedTuple):
    """A part of a lane's epoch within which samples are permuted: places `start` to `stop`."""

    number: int
    start: int
    stop: int


class Order:
    """The order of samples of one list of shards."""

    def __init__(
        self, shard_samples: Sequence[int] | Numbers, lanes: int, block_shards: int, seed: int, *, name: str = ""
    ) -> None:
        """Take the number of samples of each shard.

        Args:
            name: keys the random numbers, so that lists of one run are shuffled differently.

        Raises:
            UserError: there are fewer samples than lanes.
        """
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.samples = int(self.starts[-1])
        self.lanes, self.seed = lanes, seed
        self._words = (seed, name) if name else (seed,)
        self.lane_samples = self.samples // lanes
        if self.lane_samples == 0:
            where = f" of {name}" if name else ""
            raise UserError(
                f"data.lanes ({lanes}) is larger than the number of samples{where} ({self.samples}); lower data.lanes"
            )
        mean = max(1.0, self.samples / max(1, len(self.sizes)))
        self.block = max(1, min(self.lane_samples, round(block_shards * mean)))
        self._shards_of_epoch = lru_cache(maxsize=4)(self._permuted_shards)
        self._permutation_of = lru_cache(maxsize=4 * lanes)(self._permutation)
        self._shards_of = lru_cache(maxsize=8 * lanes)(self._shards_of_block)

    @property
    def left_over(self) -> int:
        """Samples that each epoch leaves out; others each time."""
        return self.samples % self.lanes

    def visits(self, lane: int, position: int, count: int) -> Visits:
        """The samples at `count` of a lane's positions, which run on across epochs."""
        parts = []
        while count:
            epoch, place = divmod(position, self.lane_samples)
            block = self._block_at(lane, place)
            taken = min(count, block.stop - place)
            within = self._permutation_of(epoch, lane, block)[place - block.start : place - block.start + taken]
            listed = self._listed(epoch, lane, block.start + within)
            order, ends = self._shards_of_epoch(epoch)
            nth = np.searchsorted(ends, listed, side="right")
            shard = order[nth]
            offset = listed - (ends[nth] - self.sizes[shard])
            parts.append(Visits(np.full(taken, epoch, dtype=np.int64), shard, offset, self.starts[shard] + offset))
            position, count = position + taken, count - taken
        return parts[0] if len(parts) == 1 else Visits(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def shards_ahead(self, lane: int, position: int) -> list[int]:
        """The shards that a lane needs from a position on: all of the present block, and a share of the next block that grows
        as the present one is used up."""
        epoch, place = divmod(position, self.lane_samples)
        block = self._block_at(lane, place)
        following = divmod(position - place + block.stop, self.lane_samples)
        present = self._shards_of(epoch, lane, block)
        coming = self._shards_of(following[0], lane, self._block_at(lane, following[1]))
        share = (place - block.start + 1) / (block.stop - block.start)
        return [*present, *coming[: -(-int(len(coming) * share * 1024) // 1024)]]

    def _block_at(self, lane: int, place: int) -> _Block:
        # A shift per lane, so that blocks end at different steps; none if one block holds all, for it would be cut in two.
        ahead = lane * self.block // self.lanes if self.block < self.lane_samples else 0
        number = (place + ahead) // self.block
        return _Block(number, max(0, number * self.block - ahead), min(self.lane_samples, (number + 1) * self.block - ahead))

    def _listed(self, epoch: int, lane: int, places: Numbers) -> Numbers:
        """Places in the list of all samples. It starts at another sample each epoch, so that those left over rotate."""
        listed: Numbers = (lane * self.lane_samples + places + epoch * self.left_over) % self.samples
        return listed

    def _shards_of_block(self, epoch: int, lane: int, block: _Block) -> list[int]:
        order, ends = self._shards_of_epoch(epoch)
        first, last = self._listed(epoch, lane, np.array([block.start, block.stop - 1]))
        a, b = np.searchsorted(ends, [first, last], side="right").tolist()
        turns = range(a, b + 1) if first <= last else [*range(a, len(order)), *range(b + 1)]
        return [int(order[nth]) for nth in turns if self.sizes[order[nth]]]

    def _permuted_shards(self, epoch: int) -> tuple[Numbers, Numbers]:
        order = generator(*self._words, "shards", epoch).permutation(len(self.sizes))
        return order, np.cumsum(self.sizes[order])

    def _permutation(self, epoch: int, lane: int, block: _Block) -> Numbers:
        return generator(*self._words, "block", epoch, lane, block.number).permutation(block.stop - block.start)
