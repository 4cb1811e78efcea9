"""Sources in given shares, one bucket a batch: quotas against a plain count, complete epochs, the same for any ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadiff.config.errors import ConfigError, UserError
from megadiff.data.errors import DataError
from megadiff.data.reading.mixture import Mixture, Quota
from megadiff.data.shards.shard import Manifest, ShardEntry

SHARES = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def plain_choices(shares: list[int], count: int) -> list[int]:
    """The choices in order, all of them written down: turn j of choice k stands at (j + 1/2) / its share."""
    turns = [(Fraction(2 * j + 1, 2 * share), k) for k, share in enumerate(shares) for j in range(count + 1)]
    return [k for _, k in sorted(turns)[:count]]


def manifest(*shards: tuple[int, str | None]) -> Manifest:
    return Manifest(tuple(ShardEntry(f"{i}.tar", size, 0, "", bucket) for i, (size, bucket) in enumerate(shards)))


def plain(*sizes: int) -> Manifest:
    return manifest(*((size, None) for size in sizes))


@given(SHARES, st.integers(0, 150), st.integers(0, 40))
def test_a_quotas_choices_and_counts_are_those_of_the_plain_list(shares: list[int], first: int, count: int) -> None:
    quota = Quota(shares)
    choices = plain_choices(shares, first + count)
    before = Counter(choices[:first])
    assert quota.counts(first) == [before[k] for k in range(len(shares))]
    chosen, turns = quota.span(first, count)
    assert chosen.tolist() == choices[first:]
    for choice, turn in zip(chosen.tolist(), turns.tolist(), strict=True):
        assert turn == before[choice]
        before[choice] += 1


@given(SHARES, st.integers(1, 5))
def test_after_as_many_choices_as_the_shares_add_up_to_each_has_had_its_share(shares: list[int], times: int) -> None:
    assert Quota(shares).counts(times * sum(shares)) == [times * share for share in shares]


@given(SHARES, st.integers(10**15, 10**18))
def test_a_quota_far_ahead_is_near_its_shares_and_consistent(shares: list[int], first: int) -> None:
    quota = Quota(shares)
    counts = quota.counts(first)
    assert sum(counts) == first
    assert all(
        abs(count - Fraction(first * share, sum(shares))) <= len(shares) for count, share in zip(counts, shares, strict=True)
    )
    chosen, turns = quota.span(first, 3)
    assert turns[0] == counts[chosen[0]]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 10**6),
)  # fmt: skip
def test_sources_by_size_are_each_read_once_in_an_epoch(a: list[int], b: list[int], lanes: int, seed: int) -> None:
    sizes = ([4 * lanes * n for n in a], [4 * lanes * n for n in b])
    mixture = Mixture({"a": plain(*sizes[0]), "b": plain(*sizes[1])}, lanes, 2, seed)
    total = sum(sizes[0]) + sum(sizes[1])
    steps = [mixture.step(step, range(2 * lanes), 2 * lanes) for step in range(total // (2 * lanes))]
    seen = [(s, n) for step in steps for s, n in zip(step.source.tolist(), step.number.tolist(), strict=True)]
    assert sorted(number for _, number in seen) == list(range(total))
    assert all((number < sum(sizes[0])) == (source == 0) for source, number in seen)


def test_weights_hold_within_every_batch() -> None:
    mixture = Mixture({"big": plain(*[50] * 40), "small": plain(40)}, 8, 2, 3, {"big": 0.75, "small": 0.25})
    for step in range(30):
        drawn = Counter(mixture.step(step, range(64), 64).source.tolist())
        assert abs(drawn[1] - 16) <= 8  # at most one a lane from its quota


def test_a_source_that_the_weights_leave_out_is_not_read() -> None:
    mixture = Mixture({"a": plain(30), "b": plain(30)}, 2, 2, 3, {"b": 7})
    assert set(mixture.step(0, range(8), 8).source.tolist()) == {1}
    assert set(mixture.shards_ahead(0, range(8), 8)) == {1}


def test_a_batch_is_of_one_bucket_and_buckets_come_as_often_as_their_samples_say() -> None:
    shards = [(32, "64x64"), (16, "32x96"), (32, "64x64"), (48, "96x32")]
    mixture = Mixture({"train": manifest(*shards)}, 4, 2, 9)
    seen: Counter[str | None] = Counter()
    numbers = []
    for step in range(16):  # 128 samples in batches of 8
        found = mixture.step(step, range(8), 8)
        assert {shards[shard][1] for shard in found.shard.tolist()} == {found.bucket}
        seen[found.bucket] += 1
        numbers += found.number.tolist()
    assert seen == {"64x64": 8, "32x96": 2, "96x32": 6}
    assert sorted(numbers) == list(range(128))


@given(st.sampled_from([1, 2, 4]), st.integers(0, 10**9), st.integers(0, 10**6))
def test_buckets_and_sources_are_the_same_for_any_ranks(ranks: int, step: int, seed: int) -> None:
    sources = {"a": manifest((9, "8x8"), (21, "4x8")), "b": manifest((30, "8x8"))}
    mixture = Mixture(sources, 4, 1, seed, {"a": 1, "b": 2.5})
    whole = mixture.step(step, range(12), 12)
    parts = [mixture.step(step, mixture.slots_of_rank(rank, ranks, 12), 12) for rank in range(ranks)]
    for column in ("source", "epoch", "shard", "offset", "number"):
        assert np.concatenate([getattr(part, column) for part in parts]).tolist() == getattr(whole, column).tolist()
    assert {part.bucket for part in parts} == {whole.bucket}


@given(st.integers(0, 300), st.integers(0, 10**6))
def test_the_shards_ahead_hold_the_next_steps_samples(step: int, seed: int) -> None:
    sources = {"a": manifest((40, "8x8"), (40, "8x8"), (40, "4x8")), "b": manifest(*[(8, "8x8")] * 12)}
    mixture = Mixture(sources, 4, 2, seed, {"a": 1, "b": 1})
    ahead = mixture.shards_ahead(step, range(4), 4)
    found = mixture.step(step, range(4), 4)
    for source, shard in zip(found.source.tolist(), found.shard.tolist(), strict=True):
        assert shard in ahead[source]


def test_giving_the_only_source_a_name_and_adding_another_keep_its_order() -> None:
    alone = Mixture({"train": plain(50, 60)}, 2, 1, 5).step(3, range(8), 8)
    named = Mixture({"x": plain(50, 60), "y": plain(9)}, 2, 1, 5, {"x": 1}).step(3, range(8), 8)
    assert alone.number.tolist() == named.number.tolist()


@pytest.mark.parametrize(
    ("sources", "weights", "kind", "said"),
    [
        ({"a": plain(9)}, {"b": 1}, ConfigError, "mixture names b; data.train has a"),
        ({"a": plain(9)}, {"a": 0}, ConfigError, "every weight of the mixture is 0"),
        ({"a": manifest((9, "8x8"), (9, None))}, {}, DataError, "some shards have a bucket and others have none"),
        ({"a": manifest((9, "8x8"), (3, "4x8"))}, {}, UserError, r"larger than the number of samples of 4x8 \(3\)"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(
    sources: dict[str, Manifest], weights: dict[str, float], kind: type[UserError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        Mixture(sources, 8, 2, 0, weights)
