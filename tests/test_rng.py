"""Keyed random numbers: known answers, distributions, and independence of whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadiff import rng

ALL_ONES = 0xFFFFFFFF
KEYS = rng.sample_keys(5, torch.arange(400))


def words_of(counter: list[int], key: list[int]) -> list[int]:
    columns = [torch.tensor([number]) for number in (*counter, *key)]
    words = rng._philox(tuple(columns[:4]), (columns[4], columns[5]))
    return [int(word) for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ALL_ONES] * 4, [ALL_ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, answer):
    assert words_of(counter, key) == answer
    whole = np.array([key[0] | key[1] << 32], dtype=np.uint64)
    evens, odds = (np.array(counter[start::2], dtype=np.uint64)[:, None] for start in (0, 1))
    evens, odds = rng._philox_in_numpy(evens, odds, whole)
    assert [int(word[0]) for pair in zip(evens, odds, strict=True) for word in pair] == answer


def test_numbers_in_numpy_are_those_of_torch(monkeypatch):
    draws = [lambda: rng.uniform(KEYS, "x", (7,)), lambda: rng.normal(KEYS, "x", (3, 2)), lambda: rng.fold(KEYS, KEYS)]
    found = [draw() for draw in draws]
    monkeypatch.setattr(rng, "_in_numpy", lambda keys: False)
    for draw, numbers in zip(draws, found, strict=True):
        assert torch.equal(draw(), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_lie_in_the_open_interval_even_for_extreme_words(dtype, monkeypatch):
    for word in (0, ALL_ONES):
        monkeypatch.setattr(rng, "_words", lambda keys, purpose, blocks, w=word: torch.full((len(keys), blocks, 4), w))
        numbers = rng.uniform(KEYS[:1], "x", (4,), dtype=dtype)
        assert (numbers > 0).all()
        assert (numbers < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_have_the_moments_and_the_distribution_of_a_uniform(dtype):
    numbers = rng.uniform(KEYS, "moments", (250,), dtype=dtype).flatten().double()
    count = len(numbers)
    assert abs(numbers.mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    assert abs(numbers.square().mean() - 1 / 3) < 4 * (4 / 45 / count) ** 0.5
    distance = (numbers.sort().values - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2.3 / count**0.5  # Kolmogorov-Smirnov at about four sigma


def test_normal_numbers_have_the_moments_of_a_standard_normal():
    numbers = rng.normal(KEYS, "moments", (251,)).flatten().double()
    count = len(numbers)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - moment) < 4 * (variance / count) ** 0.5
    cumulative = torch.special.ndtr(numbers.sort().values)
    assert (cumulative - (torch.arange(count) + 0.5) / count).abs().max() < 2.3 / count**0.5


def test_the_two_numbers_of_a_box_muller_pair_are_uncorrelated_also_in_their_squares():
    pairs = rng.normal(KEYS, "pairs", (250, 2)).double().flatten(0, 1)
    bound = 4 / len(pairs) ** 0.5
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < bound
    assert abs(torch.corrcoef(pairs.square().T)[0, 1]) < bound


def test_purposes_keys_and_folded_values_give_uncorrelated_numbers():
    shape = (250,)
    draws = [
        rng.uniform(KEYS, "one", shape),
        rng.uniform(KEYS, "two", shape),
        rng.uniform(KEYS + 1, "one", shape),
        rng.uniform(rng.fold(KEYS, 0), "one", shape),
        rng.uniform(rng.fold(KEYS, 1), "one", shape),
        rng.uniform(rng.fold(KEYS, "one"), "one", shape),
    ]
    matrix = torch.corrcoef(torch.stack([draw.flatten().double() for draw in draws]))
    assert (matrix - torch.eye(len(draws), dtype=torch.float64)).abs().max() < 4.5 / KEYS.numel() ** 0.5 / 250**0.5


def test_a_sample_gets_the_same_numbers_in_any_batch():
    order = torch.tensor([7, 3, 300])
    for draw in (rng.uniform, rng.normal):
        assert torch.equal(draw(KEYS, "same", (3, 5))[order], draw(KEYS[order], "same", (3, 5)))
        assert torch.equal(draw(KEYS, "same", (3, 5))[3:4], draw(KEYS[3:4], "same", (3, 5)))
    assert torch.equal(rng.fold(KEYS, 9)[order], rng.fold(KEYS[order], 9))


def test_longer_draws_begin_with_the_numbers_of_shorter_ones():
    assert torch.equal(rng.uniform(KEYS, "long", (10,))[:, :3], rng.uniform(KEYS, "long", (3,)))
    assert torch.equal(rng.normal(KEYS, "long", (10,))[:, :3], rng.normal(KEYS, "long", (3,)))


def test_shapes_are_kept_down_to_a_single_number_per_sample():
    assert rng.uniform(KEYS, "x").shape == (400,)
    assert rng.normal(KEYS, "x", (1, 2, 3)).shape == (400, 1, 2, 3)
    assert rng.uniform(KEYS[:0], "x", (3,)).shape == (0, 3)


def test_float64_numbers_have_52_random_bits():
    numbers = rng.uniform(KEYS, "fine", (250,), dtype=torch.float64).flatten()
    assert len(numbers.unique()) == numbers.numel()  # of 100,000 float32 numbers about 600 pairs would collide
    bits = (numbers * 2.0**52 - 0.5).long()
    for position in (0, 1, 25, 26, 51):
        assert abs(((bits >> position) & 1).double().mean() - 0.5) < 4 * 0.5 / len(bits) ** 0.5


def test_keys_differ_for_any_difference_in_seed_epoch_or_sample():
    index = torch.arange(1000)
    keys = torch.cat([rng.sample_keys(seed, epoch, index) for seed in (0, 1, 2**61) for epoch in (0, 1)])
    assert len(keys.unique()) == len(keys)
    assert (keys >= 0).all()
    assert torch.equal(rng.sample_keys(1, 2, index)[17:18], rng.sample_keys(1, 2, index[17:18]))
