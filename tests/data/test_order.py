"""The order of samples: complete, the same for any number of ranks, cheap to jump in, and kind to readers of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadiff.config.errors import UserError
from megadiff.data.reading.mixture import Mixture
from megadiff.data.reading.order import Order
from megadiff.data.shards.shard import Manifest, ShardEntry

pytestmark = pytest.mark.thorough

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**62 - 1)
BLOCKS = st.integers(1, 12)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(SIZES)
    return Order(sizes, draw(st.integers(1, min(8, sum(sizes)))), draw(BLOCKS), draw(SEEDS))


class Visit(NamedTuple):
    epoch: int
    shard: int
    offset: int
    number: int


def visit(order: Order, lane: int, position: int) -> Visit:
    return Visit(*(int(column[0]) for column in order.visits(lane, position, 1)))


def epoch_of(order: Order, epoch: int) -> list[int]:
    """The sample numbers of a whole epoch, lane after lane."""
    first, count = epoch * order.lane_samples, order.lane_samples
    return [number for lane in range(order.lanes) for number in order.visits(lane, first, count).number.tolist()]


def one_source(sizes: Sequence[int], lanes: int, block_shards: int, seed: int) -> Mixture:
    manifest = Manifest(tuple(ShardEntry(f"{i}.tar", size, 0, "") for i, size in enumerate(sizes)))
    return Mixture({"train": manifest}, lanes, block_shards, seed)


def batch_of(mixture: Mixture, step: int, samples: int, slots: range | None = None) -> list[Visit]:
    found = mixture.step(step, slots or range(samples), samples)
    return [Visit(*map(int, row)) for row in zip(found.epoch, found.shard, found.offset, found.number, strict=True)]


@given(orders(), st.integers(0, 10**12))
def test_every_position_of_a_lane_is_a_sample_that_exists(order: Order, position: int) -> None:
    for lane in range(order.lanes):
        found = visit(order, lane, position)
        assert found.epoch == position // order.lane_samples
        assert 0 <= found.offset < order.sizes[found.shard]
        assert found.number == sum(order.sizes[: found.shard]) + found.offset < order.samples


@given(orders(), st.integers(0, 10**6))
def test_one_epoch_visits_as_many_different_samples_as_the_lanes_hold(order: Order, epoch: int) -> None:
    seen = epoch_of(order, epoch)
    assert len(seen) == len(set(seen)) == order.samples // order.lanes * order.lanes
    assert order.samples - len(seen) == order.left_over


@given(SIZES, BLOCKS, SEEDS)
def test_samples_that_an_epoch_leaves_out_come_in_other_epochs(sizes: list[int], block_shards: int, seed: int) -> None:
    order = Order(sizes, min(8, sum(sizes)), block_shards, seed)
    counts = Counter(index for epoch in range(200) for index in epoch_of(order, epoch))
    assert len(counts) == order.samples


def test_samples_left_out_by_many_epochs_are_spread_evenly() -> None:
    order = Order([5, 9, 9, 4, 8], lanes=8, block_shards=2, seed=3)
    assert order.left_over == 3
    epochs = 1000
    counts = Counter(index for epoch in range(epochs) for index in epoch_of(order, epoch))
    left_out = [epochs - counts[index] for index in range(order.samples)]
    assert sum(left_out) == order.left_over * epochs
    assert max(left_out) < 4 * sum(left_out) / order.samples


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9).filter(lambda s: sum(s) >= 8), BLOCKS, SEEDS, st.integers(0, 10**9))
def test_the_global_batch_is_the_same_whatever_the_split_over_ranks(
    sizes: list[int], block_shards: int, seed: int, step: int
) -> None:
    order = one_source(sizes, 8, block_shards, seed)
    whole = batch_of(order, step, 24)
    for ranks in (1, 2, 4, 8):
        parts = [order.slots_of_rank(rank, ranks, 24) for rank in range(ranks)]
        assert [slot for part in parts for slot in part] == list(range(24))
        assert [found for part in parts for found in batch_of(order, step, 24, part)] == whole


@given(SIZES.filter(lambda s: sum(s) >= 4), BLOCKS, SEEDS)
def test_consecutive_global_batches_walk_through_the_lanes_without_a_gap(
    sizes: list[int], block_shards: int, seed: int
) -> None:
    order, mixture = Order(sizes, 4, block_shards, seed), one_source(sizes, 4, block_shards, seed)
    steps = 2 * order.lane_samples
    batches = [batch_of(mixture, step, 12) for step in range(steps)]
    for lane in range(4):
        read = [found for batch in batches for found in batch[3 * lane : 3 * lane + 3]]
        assert read == [visit(order, lane, position) for position in range(3 * steps)]


@given(SIZES.filter(lambda s: sum(s) >= 2), SEEDS, st.integers(0, 10**9))
def test_a_new_object_gives_the_same_order(sizes: list[int], seed: int, step: int) -> None:
    assert batch_of(one_source(sizes, 2, 2, seed), step, 4) == batch_of(one_source(sizes, 2, 2, seed), step, 4)


def test_a_jump_far_ahead_draws_as_few_permutations_as_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(kind: str) -> None:
        original = getattr(Order, kind)
        monkeypatch.setattr(Order, kind, lambda self, *words: drawn.append((kind, *words)) or original(self, *words))

    counted("_permuted_shards")
    counted("_permutation")
    batch_of(one_source([100] * 50, lanes=8, block_shards=4, seed=0), 0, 64)
    at_start = len(drawn)
    drawn.clear()
    batch_of(one_source([100] * 50, lanes=8, block_shards=4, seed=0), 10**15, 64)
    # Eight places of a lane lie in one block, or in two neighbours.
    assert at_start <= 9
    assert len(drawn) <= 8 * 2 + 2


def test_a_step_reads_again_no_permutation_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = Order._permutation
    monkeypatch.setattr(Order, "_permutation", lambda self, *words: drawn.append(words) or original(self, *words))
    order = one_source([40] * 20, lanes=8, block_shards=2, seed=0)
    for step in range(100):
        batch_of(order, step, 16)
    assert len(drawn) == len(set(drawn))


@given(st.integers(1, 6), st.integers(2, 40), st.integers(1, 8), SEEDS)
def test_a_block_of_a_lane_touches_at_most_one_shard_more_than_its_size(
    block_shards: int, samples: int, lanes: int, seed: int
) -> None:
    order = Order([samples] * (lanes * block_shards * 2), lanes, block_shards, seed)
    for lane in range(lanes):
        for block in blocks_of(order, lane):
            touched = set(order.visits(lane, block.start, block.stop - block.start).shard.tolist())
            assert len(touched) <= block_shards + 1


def blocks_of(order: Order, lane: int) -> list[range]:
    """The places of each block, seen from outside: within one, the shards that are expected first do not change."""
    starts = [0]
    while starts[-1] < order.lane_samples:
        starts.append(order._block_at(lane, starts[-1]).stop)
    assert starts[-1] == order.lane_samples
    return [range(start, stop) for start, stop in pairwise(starts)]


@given(orders(), st.integers(0, 50))
def test_the_shards_ahead_are_those_of_the_block_and_more_and_more_of_the_next(order: Order, epoch: int) -> None:
    for lane in range(order.lanes):
        first = epoch * order.lane_samples
        for block in blocks_of(order, lane):
            length = block.stop - block.start
            now = set(order.visits(lane, first + block.start, length).shard.tolist())
            coming = [set(order.shards_ahead(lane, first + place)) for place in block]
            assert all(now <= ahead for ahead in coming)
            assert all(before <= after for before, after in pairwise(coming))
            following = order.shards_ahead(lane, first + block.stop)[: len(coming[-1])]
            present = order._block_at(lane, (first + block.stop) % order.lane_samples)
            needed = set(order.visits(lane, first + block.stop, present.stop - present.start).shard.tolist())
            assert needed <= coming[-1] | now, (following, needed)


def test_the_lanes_begin_new_blocks_at_different_steps() -> None:
    order = Order([100] * 64, lanes=8, block_shards=4, seed=1)
    ends = {blocks_of(order, lane)[0].stop for lane in range(8)}
    assert len(ends) == 8


def test_samples_within_a_block_are_shuffled_over_its_shards() -> None:
    order = Order([100] * 16, lanes=2, block_shards=4, seed=1)
    shards = order.visits(0, 0, order.block).shard.tolist()
    changes = sum(before != after for before, after in pairwise(shards))
    assert len(set(shards)) == 4
    # Four shards in a random order: three of four neighbours differ; unshuffled it would be 3 in all.
    assert changes > 0.6 * len(shards)


def test_other_seeds_and_other_epochs_give_other_orders() -> None:
    order = Order([20] * 10, lanes=4, block_shards=2, seed=0)
    other = Order([20] * 10, lanes=4, block_shards=2, seed=1)
    epochs = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(order, 2), epoch_of(other, 0)]
    for number, mine in enumerate(epochs):
        for theirs in epochs[number + 1 :]:
            assert sum(a == b for a, b in zip(mine, theirs, strict=True)) < 20
            assert set(mine) == set(theirs)


def test_the_order_is_the_one_that_runs_have_used_so_far() -> None:
    """A change of these numbers changes every run that is resumed."""
    order = one_source([5, 7, 6], lanes=2, block_shards=1, seed=42)
    numbers = [visit.number for step in range(3) for visit in batch_of(order, step, 4)]
    assert numbers == [10, 9, 3, 4, 5, 8, 2, 12, 7, 6, 15, 13]


def test_more_lanes_than_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"data\.lanes \(8\) .* number of samples \(7\)"):
        Order([3, 4], lanes=8, block_shards=1, seed=0)


def test_ranks_that_do_not_divide_the_lanes_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"data\.lanes \(8\) .* ranks \(3\)"):
        one_source([30], lanes=8, block_shards=1, seed=0).slots_of_rank(0, 3, 24)


def test_a_global_batch_that_the_lanes_do_not_divide_is_refused_with_both_numbers() -> None:
    order = one_source([30], lanes=8, block_shards=1, seed=0)
    with pytest.raises(UserError, match=r"global_samples \(12\) .* data\.lanes \(8\)"):
        batch_of(order, 0, 12)
