"""The order of samples: complete, the same for any number of ranks, cheap to jump in, and kind to readers of shards."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadiff.config.errors import UserError
from megadiff.data.order import Order

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**62 - 1)
BLOCKS = st.integers(1, 12)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(SIZES)
    return Order(sizes, draw(st.integers(1, min(8, sum(sizes)))), draw(BLOCKS), draw(SEEDS))


def epoch_of(order: Order, epoch: int) -> list[int]:
    """The sample indices of a whole epoch, lane after lane."""
    places = range(epoch * order.lane_samples, (epoch + 1) * order.lane_samples)
    return [order.visit(lane, place).index for lane in range(order.lanes) for place in places]


@given(orders(), st.integers(0, 10**12))
def test_every_position_of_a_lane_is_a_sample_that_exists(order: Order, position: int) -> None:
    for lane in range(order.lanes):
        visit = order.visit(lane, position)
        assert visit.epoch == position // order.lane_samples
        assert 0 <= visit.offset < order.sizes[visit.shard]
        assert visit.index == sum(order.sizes[: visit.shard]) + visit.offset < order.samples


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
    order = Order(sizes, 8, block_shards, seed)
    whole = order.global_batch(step, 24)
    for ranks in (1, 2, 4, 8):
        parts = [order.slots_of_rank(rank, ranks, 24) for rank in range(ranks)]
        assert [slot for part in parts for slot in part] == list(range(24))
        assert [visit for part in parts for visit in order.slots(step, 24, part)] == whole


@given(SIZES.filter(lambda s: sum(s) >= 4), BLOCKS, SEEDS)
def test_consecutive_global_batches_walk_through_the_lanes_without_a_gap(
    sizes: list[int], block_shards: int, seed: int
) -> None:
    order = Order(sizes, 4, block_shards, seed)
    steps = 2 * order.lane_samples
    batches = [order.global_batch(step, 12) for step in range(steps)]
    for lane in range(4):
        read = [visit for batch in batches for visit in batch[3 * lane : 3 * lane + 3]]
        assert read == [order.visit(lane, position) for position in range(3 * steps)]


@given(SIZES.filter(lambda s: sum(s) >= 2), SEEDS, st.integers(0, 10**9))
def test_a_new_object_gives_the_same_order(sizes: list[int], seed: int, step: int) -> None:
    assert Order(sizes, 2, 2, seed).global_batch(step, 4) == Order(sizes, 2, 2, seed).global_batch(step, 4)


def test_a_jump_far_ahead_draws_as_few_permutations_as_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(kind: str) -> None:
        original = getattr(Order, kind)
        monkeypatch.setattr(Order, kind, lambda self, *words: drawn.append((kind, *words)) or original(self, *words))

    counted("_permuted_shards")
    counted("_permuted_block")
    first = Order([100] * 50, lanes=8, block_shards=4, seed=0)
    first.global_batch(0, 64)
    at_start = len(drawn)
    drawn.clear()
    Order([100] * 50, lanes=8, block_shards=4, seed=0).global_batch(10**15, 64)
    # Eight places of a lane lie in one block, or in two neighbours.
    assert at_start <= 9
    assert len(drawn) <= 8 * 2 + 2


def test_a_step_reads_again_no_permutation_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = Order._permuted_block
    monkeypatch.setattr(Order, "_permuted_block", lambda self, *words: drawn.append(words) or original(self, *words))
    order = Order([40] * 20, lanes=8, block_shards=2, seed=0)
    for step in range(2 * order.lane_samples // 2):
        order.global_batch(step, 16)
    assert len(drawn) == len(set(drawn))


@given(st.integers(1, 6), st.integers(2, 40), st.integers(1, 8), SEEDS)
def test_a_block_of_a_lane_touches_at_most_one_shard_more_than_its_size(
    block_shards: int, samples: int, lanes: int, seed: int
) -> None:
    order = Order([samples] * (lanes * block_shards * 2), lanes, block_shards, seed)
    for lane in range(lanes):
        for block in range(0, order.lane_samples, order.block):
            touched = {order.visit(lane, place).shard for place in range(block, min(block + order.block, order.lane_samples))}
            assert len(touched) <= block_shards + 1


def test_samples_within_a_block_are_shuffled_over_its_shards() -> None:
    order = Order([100] * 16, lanes=2, block_shards=4, seed=1)
    shards = [order.visit(0, place).shard for place in range(order.block)]
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
    order = Order([5, 7, 6], lanes=2, block_shards=1, seed=42)
    indices = [visit.index for step in range(3) for visit in order.global_batch(step, 4)]
    assert indices == [10, 9, 3, 12, 5, 8, 13, 4, 7, 6, 14, 2]


def test_more_lanes_than_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"data\.lanes \(8\) .* number of samples \(7\)"):
        Order([3, 4], lanes=8, block_shards=1, seed=0)


def test_ranks_that_do_not_divide_the_lanes_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"data\.lanes \(8\) .* ranks \(3\)"):
        Order([30], lanes=8, block_shards=1, seed=0).slots_of_rank(0, 3, 24)


def test_a_global_batch_that_the_lanes_do_not_divide_is_refused_with_both_numbers() -> None:
    order = Order([30], lanes=8, block_shards=1, seed=0)
    with pytest.raises(UserError, match=r"global_samples \(12\) .* data\.lanes \(8\)"):
        order.global_batch(0, 12)
