"""Draws of tokens: the right distribution, exact at the ends, and no logits of all positions."""

from __future__ import annotations

import math

import pytest
import torch

from megadiff import rng
from megadiff.kernels.sample_rows import draw_rows, sample_rows
from megadiff.kernels.sample_rows.reference import ROWS_AT_ONCE, TILE

COUNT = 20_000
UNIFORMS = rng.uniform(rng.sample_keys(5, torch.arange(COUNT)), "draw", dtype=torch.float64)


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
    drawn = draw_rows(logits.expand(COUNT, -1), UNIFORMS)
    expected = logits.double().softmax(0)
    assert_shares(drawn.ids, expected)
    torch.testing.assert_close(drawn.log_probability, expected.log().float()[drawn.ids])
    torch.testing.assert_close(drawn.entropy, -(expected * expected.log()).sum().float().expand(COUNT))


def test_a_draw_is_the_inverse_of_the_distribution_function():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1))
    ends = logits.double().softmax(0).cumsum(0)
    expected = torch.searchsorted(ends, UNIFORMS[:2000].contiguous(), right=True)
    found = draw_rows(logits.expand(2000, -1), UNIFORMS[:2000]).ids
    assert (found != expected).sum() <= 1  # a draw within rounding of a boundary


def test_temperature_sharpens_and_zero_takes_the_likeliest():
    logits = torch.tensor([0.3, 1.0, -0.5, 0.9])
    assert_shares(draw_rows(logits.expand(COUNT, -1), UNIFORMS, 0.5).ids, (logits.double() / 0.5).softmax(0))
    greedy = draw_rows(logits.expand(10, -1), UNIFORMS[:10], 0.0)
    assert greedy.ids.tolist() == [1] * 10
    assert draw_rows(logits.expand(10, -1), UNIFORMS[:10], 1e-40).ids.tolist() == [1] * 10
    torch.testing.assert_close(greedy.log_probability, logits.log_softmax(0)[1].expand(10))


def test_top_k_and_top_p_cut_the_tail_and_nothing_else():
    shares = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64)
    logits = shares.log().float().expand(COUNT, -1)
    two = torch.where(shares >= 0.25, shares, 0.0)
    assert_shares(draw_rows(logits, UNIFORMS, top_k=2).ids, two / two.sum())
    three = torch.where(shares >= 0.2, shares, 0.0)
    assert_shares(draw_rows(logits, UNIFORMS, top_p=0.8).ids, three / three.sum())
    assert_shares(draw_rows(logits, UNIFORMS, top_k=3, top_p=0.99).ids, three / three.sum())
    assert set(draw_rows(logits, UNIFORMS, top_p=1e-6).ids.tolist()) == {1}
    assert_shares(draw_rows(logits, UNIFORMS, top_k=9).ids, shares)


def test_draws_have_the_resolution_of_float64():
    """Gumbel noise or a cumulative sum in float32 cannot draw an id of probability 1e-9 at the right rate."""
    logits = torch.tensor([[1e-9, 1.0]]).log().repeat(2, 1)
    assert draw_rows(logits, torch.tensor([0.5e-9, 2e-9], dtype=torch.float64)).ids.tolist() == [0, 1]


def test_an_id_of_probability_zero_is_never_drawn_at_either_end():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).repeat(2, 1)
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    drawn = draw_rows(logits, ends)
    assert drawn.ids.tolist() == [1, 1]
    assert drawn.entropy.tolist() == [0, 0]


HIDDEN = torch.randn(6, 200, 8, generator=torch.Generator().manual_seed(2))
WEIGHT = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
BIAS = torch.randn(40, generator=torch.Generator().manual_seed(4))


def test_rows_are_drawn_from_the_head_at_those_rows_whatever_the_chunk():
    rows = torch.arange(0, 1200, 2)
    assert len(rows) > ROWS_AT_ONCE
    drawn = sample_rows(HIDDEN, WEIGHT, BIAS, rows[None], torch.ones(1, len(rows)), UNIFORMS[: len(rows)])
    logits = HIDDEN.flatten(0, 1)[rows] @ WEIGHT.T + BIAS
    wanted = draw_rows(logits, UNIFORMS[: len(rows)])
    assert torch.equal(drawn.ids, wanted.ids)
    torch.testing.assert_close(drawn.entropy, wanted.entropy)


def test_branches_are_mixed_as_logits_are():
    """The head is linear and weights add up to 1: mixing hidden states mixes log-probabilities, up to their normaliser."""
    rows = torch.stack([torch.arange(50), torch.arange(600, 650)])
    weights = torch.stack([torch.linspace(0, 5, 50), 1 - torch.linspace(0, 5, 50)])
    drawn = sample_rows(HIDDEN, WEIGHT, BIAS, rows, weights, UNIFORMS[:50])
    logs = (HIDDEN.flatten(0, 1)[rows] @ WEIGHT.T + BIAS).log_softmax(-1)
    mixed = (weights[..., None] * logs).sum(0)
    wanted = draw_rows(mixed, UNIFORMS[:50])
    assert torch.equal(drawn.ids, wanted.ids)
    torch.testing.assert_close(drawn.log_probability, wanted.log_probability, atol=1e-4, rtol=1e-4)


def test_no_row_gives_no_draw():
    drawn = sample_rows(HIDDEN, WEIGHT, None, torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0), UNIFORMS[:0])
    assert [len(column) for column in drawn] == [0, 0, 0, 0]
    assert drawn.ids.dtype == torch.int64
