"""Draws of tokens: the right distribution, exact at the ends, and no logits of all positions."""

from __future__ import annotations

import math

import pytest
import torch

from megadiff import rng
from megadiff.kernels.head_draw import draw_rows, head_draw, row_uniforms
from megadiff.kernels.head_draw.reference import PRODUCT_ROWS, ROWS_AT_ONCE, TILE, draw_with
from megadiff.types import DrawRule, RowKeys, TokenDraws
from tests.kernels.harness import DTYPES, TOLERANCES, assert_agrees, numbers, poison
from tests.ranks import ROOT, run_ranks

COUNT = 20_000


def keys_of(count: int, first: int = 0) -> RowKeys:
    return RowKeys(rng.sample_keys(5, torch.arange(first, first + count)), "draw", torch.zeros(count, dtype=torch.int64))


KEYS = keys_of(COUNT)


def pairs(numbers: list[float]) -> torch.Tensor:
    """Uniforms of rows with one tile, for its choice and within it."""
    within = torch.tensor(numbers, dtype=torch.float64)
    return torch.stack([torch.full_like(within, 0.5), within], dim=-1)[:, None]


def assert_shares(ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square within four deviations of its mean, and nothing of probability zero."""
    found = torch.bincount(ids, minlength=len(expected)).double()
    likely = expected > 0
    assert found[~likely].sum() == 0
    freedom = int(likely.sum()) - 1
    chi_square = ((found - len(ids) * expected).square()[likely] / (len(ids) * expected[likely])).sum().item()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom) + 1, (chi_square, freedom)


@pytest.mark.parametrize("vocabulary", [2, 5, TILE, TILE + 1, 3 * TILE - 7])
def test_ids_are_drawn_with_the_probabilities_of_their_logits(vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    drawn = draw_rows(logits.expand(COUNT, -1), KEYS, DrawRule())
    expected = logits.double().softmax(0)
    assert_shares(drawn.ids, expected)
    torch.testing.assert_close(drawn.log_probability, expected.log().float()[drawn.ids])
    torch.testing.assert_close(drawn.entropy, -(expected * expected.log()).sum().float().expand(COUNT))


def test_a_draw_within_a_tile_is_the_inverse_of_its_distribution_function():
    logits = torch.randn(TILE, generator=torch.Generator().manual_seed(1))
    uniforms = row_uniforms(keys_of(2000), TILE)
    expected = torch.searchsorted(logits.double().softmax(0).cumsum(0), uniforms[:, 0, 1].contiguous(), right=True)
    found = draw_with(logits.expand(2000, -1), uniforms, DrawRule()).ids
    assert torch.equal(found, expected)


def test_the_tile_of_a_draw_is_the_first_of_exponential_races():
    """Tile t wins if its waiting time, exponential with its share as the rate, is the shortest."""
    logits = torch.randn(5 * TILE, generator=torch.Generator().manual_seed(1))
    uniforms = row_uniforms(keys_of(2000), 5 * TILE)
    waits = -uniforms[..., 0].log() / logits.double().softmax(0).view(5, TILE).sum(1)
    assert torch.equal(draw_with(logits.expand(2000, -1), uniforms, DrawRule()).ids // TILE, waits.argmin(1))


def test_rounding_of_the_logits_changes_next_to_no_id():
    """Inverting the distribution function of the whole vocabulary would change one in 400: every id's end of it moves."""
    logits = torch.randn(300, 40_000)
    moved = logits * (1 + 1e-6 * torch.randn_like(logits))
    draws = [draw_rows(each, keys_of(300), DrawRule()).ids for each in (logits, moved)]
    assert torch.equal(*draws)


def test_temperature_divides_the_logits_and_zero_takes_the_likeliest():
    logits = torch.tensor([0.3, 1.1, -0.4, 1.0])
    drawn = draw_rows(logits.expand(COUNT, -1), KEYS, DrawRule(temperature=0.5))
    assert_shares(drawn.ids, (logits.double() / 0.5).softmax(0))
    for temperature in (0.0, 1e-40):
        drawn = draw_rows(logits.expand(10, -1), keys_of(10), DrawRule(temperature=temperature))
        assert drawn.ids.tolist() == [1] * 10
        torch.testing.assert_close(drawn.log_probability, logits.log_softmax(0)[1].expand(10))


def test_top_k_and_top_p_cut_the_tail_and_nothing_else():
    shares = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64)
    logits = shares.log().float().expand(COUNT, -1)
    two = torch.where(shares >= 0.25, shares, 0.0)
    assert_shares(draw_rows(logits, KEYS, DrawRule(top_k=2)).ids, two / two.sum())
    three = torch.where(shares >= 0.2, shares, 0.0)
    assert_shares(draw_rows(logits, KEYS, DrawRule(top_p=0.8)).ids, three / three.sum())
    assert_shares(draw_rows(logits, KEYS, DrawRule(top_k=3, top_p=0.99)).ids, three / three.sum())
    assert set(draw_rows(logits, KEYS, DrawRule(top_p=1e-6)).ids.tolist()) == {1}
    assert_shares(draw_rows(logits, KEYS, DrawRule(top_k=9)).ids, shares)


def test_min_p_cuts_at_a_share_of_the_likeliest_after_the_temperature():
    shares = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64)
    logits = shares.log().float().expand(COUNT, -1)
    for temperature, least in ((1.0, 0.2), (2.0, 0.1)):  # 0.4 * 0.45, and 0.4 * 0.45^2
        kept = torch.where(shares >= least, shares, 0.0) ** (1 / temperature)
        assert_shares(draw_rows(logits, KEYS, DrawRule(temperature, min_p=0.45)).ids, kept / kept.sum())


def test_draws_have_the_resolution_of_float64():
    """Gumbel noise or a cumulative sum in float32 cannot draw an id of probability 1e-9 at the right rate."""
    logits = torch.tensor([[1e-9, 1.0]]).log().repeat(2, 1)
    assert draw_with(logits, pairs([0.5e-9, 2e-9]), DrawRule()).ids.tolist() == [0, 1]


def test_an_id_of_probability_zero_is_never_drawn_at_either_end():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).repeat(2, 1)
    drawn = draw_with(logits, pairs([2.0**-53, 1 - 2.0**-53]), DrawRule())
    assert drawn.ids.tolist() == [1, 1]
    assert drawn.entropy.tolist() == [0, 0]


HIDDEN = torch.randn(6, 200, 8, generator=torch.Generator().manual_seed(2))
WEIGHT = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
BIAS = torch.randn(40, generator=torch.Generator().manual_seed(4))


def test_rows_are_drawn_from_the_head_at_those_rows_whatever_the_chunk():
    rows = torch.arange(0, 1200, 2)
    assert len(rows) > ROWS_AT_ONCE
    drawn = head_draw(HIDDEN, WEIGHT, BIAS, rows[None], torch.ones(1, len(rows)), keys_of(len(rows)), DrawRule())
    logits = HIDDEN.flatten(0, 1)[rows] @ WEIGHT.T + BIAS
    wanted = draw_rows(logits, keys_of(len(rows)), DrawRule())
    assert torch.equal(drawn.ids, wanted.ids)
    torch.testing.assert_close(drawn.entropy, wanted.entropy)


def test_a_rows_draw_is_the_same_to_the_bit_alone_and_among_any_others():
    """A library sums in another order for another number of rows; so the product has always the same number."""
    hidden, weight, bias = torch.randn(1, 3 * PRODUCT_ROWS, 96), torch.randn(1000, 96) / 4, torch.randn(1000)
    keys = keys_of(3 * PRODUCT_ROWS)

    def drawn(rows: torch.Tensor) -> TokenDraws:
        own = RowKeys(keys.keys[rows], keys.purpose, keys.places[rows])
        return head_draw(hidden, weight, bias, rows[None], torch.ones(1, len(rows)), own, DrawRule(min_p=0.01))

    every = drawn(torch.arange(3 * PRODUCT_ROWS))
    for rows in (torch.tensor([150]), torch.tensor([5, 70, 6]), torch.randperm(3 * PRODUCT_ROWS)[: PRODUCT_ROWS + 1]):
        assert all(torch.equal(own, column[rows]) for own, column in zip(drawn(rows), every, strict=True))


def test_branches_are_mixed_as_logits_are():
    """The head is linear and weights add up to 1: mixing hidden states mixes log-probabilities, up to their normaliser."""
    rows = torch.stack([torch.arange(50), torch.arange(600, 650)])
    weights = torch.stack([torch.linspace(0, 5, 50), 1 - torch.linspace(0, 5, 50)])
    drawn = head_draw(HIDDEN, WEIGHT, BIAS, rows, weights, keys_of(50), DrawRule())
    logs = (HIDDEN.flatten(0, 1)[rows] @ WEIGHT.T + BIAS).log_softmax(-1)
    mixed = (weights[..., None] * logs).sum(0)
    wanted = draw_rows(mixed, keys_of(50), DrawRule())
    assert torch.equal(drawn.ids, wanted.ids)
    torch.testing.assert_close(drawn.log_probability, wanted.log_probability, atol=1e-4, rtol=1e-4)


def test_no_row_gives_no_draw():
    rows = torch.empty(2, 0, dtype=torch.int64)
    drawn = head_draw(HIDDEN, WEIGHT, None, rows, torch.empty(2, 0), keys_of(0), DrawRule())
    assert [len(column) for column in drawn] == [0, 0, 0, 0]
    assert drawn.ids.dtype == torch.int64


def naive_draw(hidden, weight, bias, rows, weights, keys, rule):
    """Row by row: the tile whose exponential clock rings first, then the inverse distribution function of that tile."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    drawn = []
    for index, places in enumerate(rows.T.tolist()):
        logits = sum(weights[k, index] * (weight @ flat[place] + bias) for k, place in enumerate(places))
        shares = logits.softmax(0)
        pointed = (logits / rule.temperature).softmax(0)
        if rule.top_k:
            pointed = torch.where(pointed >= pointed.sort(descending=True).values[rule.top_k - 1], pointed, 0.0)
        pointed = torch.where(pointed >= rule.min_p * pointed.max(), pointed, 0.0)
        own = rng.fold(keys.keys[index : index + 1], int(keys.places[index]))
        tiles = pointed.split(TILE)
        uniforms = rng.uniform(own, keys.purpose, (len(tiles), 2), dtype=torch.float64)[0]
        waits = [-uniform.log() / tile.sum() for tile, (uniform, _) in zip(tiles, uniforms, strict=True)]
        tile = int(torch.stack(waits).argmin())
        token = tile * TILE + int((tiles[tile].cumsum(0) <= uniforms[tile, 1] * tiles[tile].sum()).sum())
        best = shares.sort(descending=True).values
        drawn.append((torch.tensor(token), shares[token].log(), torch.special.entr(shares).sum(), best[0] - best[1]))
    return [torch.stack(column) for column in zip(*drawn, strict=True)]


RULES = [DrawRule(), DrawRule(temperature=0.6, top_k=3), DrawRule(temperature=1.7, min_p=0.3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("branches", "vocabulary"), [(1, 5), (1, 2 * TILE + 3), (2, 41), (3, TILE)])
@torch.no_grad()
def test_head_draw_draws_what_a_naive_loop_draws_with_the_same_keys(branches, vocabulary, rule, dtype):
    batch, length, width, count = 3 * branches, 7, 9, 17
    rows = torch.randperm(3 * length)[:count] + torch.arange(branches)[:, None] * 3 * length
    unread = torch.ones(batch * length, dtype=torch.bool)
    unread[rows.flatten()] = False
    hidden = poison(numbers(batch, length, width, dtype=dtype, grad=False), unread.view(batch, length))
    weight, bias = numbers(vocabulary, width, dtype=dtype, grad=False), numbers(vocabulary, dtype=dtype, grad=False)
    weights = torch.rand(branches, count)
    weights[0] = 1 - weights[1:].sum(0)
    keys = RowKeys(rng.sample_keys(3, rows[0] // length), "words token", rows[0] % length)
    # Inputs are rounded to bfloat16 alike for both, and nothing after them is.
    tolerance = 20 * TOLERANCES[torch.float32]
    assert_agrees(head_draw, naive_draw, hidden, weight, bias, rows, weights, keys, rule, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_head_that_is_split_by_the_vocabulary_draws_the_whole_one_s_tokens():
    """Three ranks, tiles that two of them share, all rules, and no row."""
    for report in run_ranks(ROOT / "tests" / "kernels" / "draws_worker.py", 3, {}):
        assert len(report) == 7
        assert max(found["ids"] for found in report) == 0
        assert max(value for found in report for value in found.values()) < 5e-6
