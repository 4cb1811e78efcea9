"""Several lists of samples in one order: sources in given shares within every batch, one bucket a batch.

Quotas choose the bucket of a step and the source of a slot: after any number of choices, each list's count differs from its
share by one or two at most. The n-th choice is computed without those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from megadiff.config import checks
from megadiff.data.errors import DataError
from megadiff.data.reading.order import Numbers, Order, Visits
from megadiff.data.shards.shard import Manifest


class Quota:
    """A sequence of choices in which choice k has the share a_k / sum(a): its j-th turn is at (j + 1/2) / share."""

    def __init__(self, shares: Sequence[int]) -> None:
        """Take a whole number above 0 per choice."""
        self.shares = list(shares)
        self._total = sum(self.shares)
        common = math.lcm(*self.shares)
        self._gaps = [common // share for share in self.shares]  # distances between turns, in units that make all of them whole

    def span(self, first: int, count: int) -> tuple[Numbers, Numbers]:
        """(choices from number `first` on, the turn of each among those of the same choice), both int64 [count]."""
        if len(self.shares) == 1:
            return np.zeros(count, dtype=np.int64), np.arange(first, first + count)
        certain = self._certain(first)
        turns = self._in_order(certain, first + count)[first - sum(certain) :]
        return np.array([k for _, k, _ in turns], dtype=np.int64), np.array([turn for _, _, turn in turns], dtype=np.int64)

    def counts(self, number: int) -> list[int]:
        """Turns of each choice before choice `number`."""
        turns = self._certain(number)
        for _, k, _ in self._in_order(turns, number):
            turns[k] += 1
        return turns

    def _certain(self, number: int) -> list[int]:
        """Turns of each choice that are surely before `number`: a turn is at most half a turn per choice off its place."""
        return [max(0, (number - len(self.shares) - 2) * share // self._total) for share in self.shares]

    def _in_order(self, begins: Sequence[int], number: int) -> list[tuple[int, int, int]]:
        """(time, choice, turn) of the turns before `number`, without the first `begins` of each choice."""
        until = number + len(self.shares) + 2
        turns = [
            ((2 * turn + 1) * self._gaps[k], k, turn)
            for k, share in enumerate(self.shares)
            for turn in range(begins[k], until * share // self._total + 2)
        ]
        return sorted(turns)[: number - sum(begins)]


class SampleList(NamedTuple):
    """One list of samples: the shards of one source that are of one bucket."""

    source: int
    shards: Numbers
    order: Order


class StepSamples(NamedTuple):
    """The samples of some slots of a step.

    Attributes:
        bucket: HEIGHTxWIDTH in pixels, or None.
        source: int64, the index of each sample's source.
        number: each sample's number over all sources; with the epoch it identifies the visit.
    """

    bucket: str | None
    source: Numbers
    epoch: Numbers
    shard: Numbers
    offset: Numbers
    number: Numbers


class Mixture:
    """The order of samples of one or more sources; of buckets, where the manifests name them."""

    def __init__(
        self,
        sources: Mapping[str, Manifest],
        lanes: int,
        block_shards: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Mix sources in the proportion of `weights`, by default of their sizes.

        Raises:
            UserError: a weight's source is unknown; a list has fewer samples than lanes; some shards have a bucket, others not.
        """
        self.lanes = lanes
        self._starts = _starts(sources)
        shares = _shares(sources, weights or {})
        self.buckets: tuple[str | None, ...] = _buckets(sources, shares)
        self._lists: list[list[SampleList]] = []
        within, over = [], []
        for bucket in self.buckets:
            lists = [
                _sample_list(number, name, manifest, bucket, lanes, block_shards, seed)
                for number, (name, manifest) in enumerate(sources.items())
                if shares[name]
            ]
            lists_of_bucket = [samples for samples in lists if samples is not None]
            names = list(sources)
            weights_of_lists = [
                shares[names[samples.source]] * samples.order.samples / sources[names[samples.source]].samples
                for samples in lists_of_bucket
            ]
            self._lists.append(lists_of_bucket)
            within.append(weights_of_lists)
            over.append(sum(weights_of_lists, Fraction(0)))
        self._of_bucket = Quota(_whole(over))
        self._of_source = [Quota(_whole(numbers)) for numbers in within]
        self._chosen = lru_cache(maxsize=64)(self._choose)

    @property
    def lists(self) -> list[SampleList]:
        """Every list of samples that is read."""
        return [samples for lists in self._lists for samples in lists]

    def step(self, data_step: int, slots: range, global_samples: int) -> StepSamples:
        """The samples at some slots of a global batch; slot = lane x (global_samples / lanes) + place.

        Raises:
            ConfigError: the lanes do not divide the global batch.
        """
        per_lane = self._per_lane(global_samples)
        bucket, turn = self._chosen(data_step)
        columns: list[list[Numbers]] = [[] for _ in range(5)]
        for lane in range(slots.start // per_lane, -(-slots.stop // per_lane)):
            first = max(slots.start - lane * per_lane, 0)
            last = min(slots.stop - lane * per_lane, per_lane)
            sources, turns = self._of_source[bucket].span(turn * per_lane + first, last - first)
            rows = np.empty((5, last - first), dtype=np.int64)
            for number, samples in enumerate(self._lists[bucket]):
                where = np.flatnonzero(sources == number)
                if len(where):
                    visits = samples.order.visits(lane, int(turns[where[0]]), len(where))
                    rows[:, where] = self._rows(samples, visits)
            for column, values in zip(columns, rows, strict=True):
                column.append(values)
        return StepSamples(self.buckets[bucket], *(np.concatenate(column) for column in columns))

    def shards_ahead(self, data_step: int, slots: range, global_samples: int) -> dict[int, list[int]]:
        """The shards that the slots need at a step and soon after, by source, the soonest first."""
        per_lane = self._per_lane(global_samples)
        needed: dict[int, dict[int, None]] = {}
        turns = self._of_bucket.counts(data_step)
        for lists, quota, turn in zip(self._lists, self._of_source, turns, strict=True):
            positions = quota.counts(turn * per_lane)
            for samples, position in zip(lists, positions, strict=True):
                ahead = needed.setdefault(samples.source, {})
                for lane in range(slots.start // per_lane, -(-slots.stop // per_lane)):
                    ahead |= dict.fromkeys(samples.shards[samples.order.shards_ahead(lane, position)].tolist())
        return {source: list(shards) for source, shards in needed.items()}

    def slots_of_rank(self, data_rank: int, data_ranks: int, global_samples: int) -> range:
        """The contiguous slots (whole lanes) of one data-parallel rank.

        Raises:
            ConfigError: the ranks do not divide the lanes, or the lanes the global batch.
        """
        per_lane = self._per_lane(global_samples)
        checks.require(checks.lanes_over_ranks(self.lanes, data_ranks))
        share = self.lanes // data_ranks * per_lane
        return range(data_rank * share, (data_rank + 1) * share)

    def _per_lane(self, global_samples: int) -> int:
        checks.require(checks.batch_over_lanes(global_samples, self.lanes))
        return global_samples // self.lanes

    def _choose(self, data_step: int) -> tuple[int, int]:
        bucket, turn = self._of_bucket.span(data_step, 1)
        return int(bucket[0]), int(turn[0])

    def _rows(self, samples: SampleList, visits: Visits) -> Numbers:
        """Rows source, epoch, shard, offset, number; shards are numbered as in the manifest, not as in the list."""
        sources = np.full(len(visits.epoch), samples.source)
        shards = samples.shards[visits.shard]
        numbers = self._starts[samples.source][shards] + visits.offset
        return np.stack([sources, visits.epoch, shards, visits.offset, numbers])


def _starts(sources: Mapping[str, Manifest]) -> list[Numbers]:
    """The number, over all sources, of each shard's first sample; by source."""
    starts, first = [], 0
    for manifest in sources.values():
        ends = first + np.cumsum(_sizes(manifest))
        starts.append(np.concatenate([[first], ends[:-1]]))
        first = int(ends[-1])
    return starts


def _sizes(manifest: Manifest) -> Numbers:
    return np.fromiter(map(attrgetter("samples"), manifest.shards), dtype=np.int64, count=len(manifest.shards))


def _shares(sources: Mapping[str, Manifest], weights: Mapping[str, float]) -> dict[str, Fraction]:
    checks.require(checks.mixture_faults(weights, sources))
    if not weights:
        return {name: Fraction(manifest.samples) for name, manifest in sources.items()}
    return {name: Fraction(str(weights.get(name, 0))) for name in sources}


def _buckets(sources: Mapping[str, Manifest], shares: Mapping[str, Fraction]) -> tuple[str | None, ...]:
    read = [manifest for name, manifest in sources.items() if shares[name]]
    buckets = {shard.bucket for manifest in read for shard in manifest.shards if shard.samples}
    if None in buckets and len(buckets) > 1:
        raise DataError("some shards have a bucket and others have none; pack all sources with the same buckets, or with none")
    return tuple(sorted(buckets, key=str))


def _sample_list(
    number: int, name: str, manifest: Manifest, bucket: str | None, lanes: int, block_shards: int, seed: int
) -> SampleList | None:
    shards = np.arange(len(manifest.shards))
    if bucket is not None:
        shards = np.array([i for i, shard in enumerate(manifest.shards) if shard.bucket == bucket], dtype=np.int64)
    sizes = _sizes(manifest)[shards]
    if not sizes.sum():
        return None
    # A single list is keyed by the seed alone: a source that gets a name keeps its order.
    word = "/".join([*([name] if number else []), *([bucket] if bucket else [])])
    return SampleList(number, shards, Order(sizes, lanes, block_shards, seed, name=word))


def _whole(shares: Iterable[Fraction]) -> list[int]:
    """Whole numbers in the same proportion."""
    shares = list(shares)
    common = math.lcm(*(share.denominator for share in shares))
    numbers = [int(share * common) for share in shares]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]
