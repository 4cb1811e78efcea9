"""Draws by Triton's kernels: the reference's ids for the same keys, and its figures."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from megadiff import rng
from megadiff.kernels.agreement import converted, outcome, relative_errors
from megadiff.kernels.head_draw import reference
from megadiff.types import DrawRule, RowKeys, TokenDraws
from tests.kernels.harness import DEVICE, KERNEL_DTYPES, numbers, poison, poisoned_memory

op = pytest.importorskip("megadiff.kernels.head_draw.op")
RULES = [
    DrawRule(),
    DrawRule(temperature=0.7),
    DrawRule(temperature=0.0, top_k=3),
    DrawRule(top_k=5),
    DrawRule(temperature=1.3, top_p=0.8),
    DrawRule(temperature=1.3, top_k=40, top_p=0.9, min_p=0.05),
]


def case(branches, vocabulary, count, dtype, rule, bias=True) -> list[Any]:
    """Hidden states are NaN where no row is read."""
    length, width = 7, 24
    rows = torch.randperm(3 * length)[:count] + torch.arange(branches)[:, None] * 3 * length
    unread = torch.ones(3 * branches * length, dtype=torch.bool)
    unread[rows.flatten()] = False
    hidden = poison(numbers(3 * branches, length, width, dtype=dtype, grad=False), unread.view(-1, length))
    weight = numbers(vocabulary, width, dtype=dtype, grad=False) / 2
    weights = torch.rand(branches, count)
    weights[0] = 1 - weights[1:].sum(0)
    keys = RowKeys(rng.sample_keys(3, rows[0] // length).to(DEVICE), "words token", (rows[0] % length).to(DEVICE))
    offset = numbers(vocabulary, dtype=dtype, grad=False).to(DEVICE) if bias else None
    return [hidden.to(DEVICE), weight.to(DEVICE), offset, rows.to(DEVICE), weights.to(DEVICE), keys, rule]


CASES = [*itertools.product(RULES, KERNEL_DTYPES[:1]), *itertools.product(RULES[-1:], KERNEL_DTYPES[1:])]


@pytest.mark.parametrize(("rule", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(("branches", "vocabulary", "bias"), [(1, 1, True), (2, 131, False), (3, 600, True)])
def test_ids_and_figures_are_the_reference_s(branches, vocabulary, bias, rule, dtype):
    arguments = case(branches, vocabulary, 17, dtype, rule, bias)
    with poisoned_memory():
        found = op.head_draw(*arguments)
    wanted = reference.head_draw(*arguments)
    if dtype == torch.float32 or branches == 1:
        assert torch.equal(found.ids, wanted.ids)
    same = found.ids == wanted.ids
    assert same.double().mean() > 0.8  # mixed hidden states are rounded to the weight's dtype
    tolerance = 2e-6 if dtype == torch.float32 or branches == 1 else 4e-2
    for name in TokenDraws._fields[1:]:
        one, other = getattr(found, name)[same], getattr(wanted, name)[same]
        torch.testing.assert_close(one, other, atol=tolerance, rtol=10 * tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_numbers_of_a_row_are_those_of_the_reference_to_the_bit():
    """Uniform logits: the tile follows from the numbers alone, and the token too."""
    keys = rng.sample_keys(2**62 + 5, torch.arange(40)).to(DEVICE)
    keys[0], places = 2**63 - 1, torch.arange(40, device=DEVICE) * (2**33 + 1)
    arguments = torch.zeros(1, 40, 4, device=DEVICE), torch.zeros(2000, 4, device=DEVICE), None
    rows, weights = torch.arange(40, device=DEVICE)[None], torch.ones(1, 40, device=DEVICE)
    rule = DrawRule(), DrawRule(temperature=1.5)
    for each in rule:
        draws = [
            run(*arguments, rows, weights, RowKeys(keys, "x", places), each).ids for run in (op.head_draw, reference.head_draw)
        ]
        assert torch.equal(*draws)
        assert len(draws[0].unique()) > 20


def test_tokens_without_probability_are_not_drawn_and_make_no_nan():
    """Whole tiles of minus infinity, which a bias makes."""
    for rule in (DrawRule(), DrawRule(temperature=0.9, top_p=0.999)):
        arguments = case(1, 700, 9, torch.float32, rule)
        arguments[2] = torch.full((700,), -math.inf, device=DEVICE)
        arguments[2][300:302] = 0
        found, wanted = (run(*arguments) for run in (op.head_draw, reference.head_draw))
        assert torch.equal(found.ids, wanted.ids)
        assert {*found.ids.tolist()} <= {300, 301}
        torch.testing.assert_close(found.entropy, wanted.entropy, atol=1e-6, rtol=1e-5)


def test_ties_at_the_cut_are_all_kept_and_two_likeliest_tokens_have_no_margin():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 2.0], device=DEVICE)
    count = 60
    keys = RowKeys(rng.sample_keys(1, torch.arange(count)).to(DEVICE), "ties", torch.arange(count, device=DEVICE))
    rows, weights = torch.zeros(1, count, dtype=torch.int64, device=DEVICE), torch.ones(1, count, device=DEVICE)
    arguments = torch.ones(1, 1, 1, device=DEVICE), logits[:, None], None, rows, weights, keys
    for rule, kept in ((DrawRule(top_k=3), {0, 1, 2, 3, 5}), (DrawRule(top_p=0.6), {0, 5}), (DrawRule(min_p=0.9), {0, 5})):
        found, wanted = (run(*arguments, rule) for run in (op.head_draw, reference.head_draw))
        assert torch.equal(found.ids, wanted.ids)
        assert {*found.ids.tolist()} == kept
        assert not found.margin.any()


def test_a_rows_draw_is_the_same_to_the_bit_alone_and_among_any_others():
    hidden, weight = torch.randn(1, 300, 96, device=DEVICE), torch.randn(260, 96, device=DEVICE) / 4
    keys = rng.sample_keys(5, torch.arange(300)).to(DEVICE)

    def drawn(rows):
        own = RowKeys(keys[rows], "draw", rows)
        return op.head_draw(hidden, weight, None, rows[None], torch.ones(1, len(rows), device=DEVICE), own, DrawRule())

    every = drawn(torch.arange(300, device=DEVICE))
    for rows in (torch.tensor([270]), torch.randperm(300)[:5]):
        assert all(torch.equal(own, column[rows.to(DEVICE)]) for own, column in zip(drawn(rows.to(DEVICE)), every, strict=True))


def test_a_thousand_draws_have_their_distribution():
    count, vocabulary = 1000, 150
    logits = torch.randn(vocabulary, device=DEVICE) / 2
    places = torch.arange(count, device=DEVICE)
    keys = RowKeys(rng.sample_keys(9, places // 10, device=DEVICE), "draw", places % 10)
    rows, weights = torch.zeros(1, count, dtype=torch.int64, device=DEVICE), torch.ones(1, count, device=DEVICE)
    rule = DrawRule(temperature=0.8)
    ids = op.head_draw(torch.ones(1, 1, 1, device=DEVICE), logits[:, None], None, rows, weights, keys, rule).ids
    expected = count * (logits.double() / 0.8).softmax(0)
    chi_square = ((torch.bincount(ids, minlength=vocabulary) - expected).square() / expected).sum().item()
    freedom = vocabulary - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_no_row_gives_no_draw():
    found = op.head_draw(*case(2, 5, 0, torch.float32, DrawRule()))
    assert [(len(column), column.dtype) for column in found] == [(0, torch.int64), *[(0, torch.float32)] * 3]


def test_the_operator_is_registered_rightly():
    *arguments, keys, rule = case(2, 20, 3, torch.float32, DrawRule(min_p=0.1))
    torch.library.opcheck(op._head_draw, (*(argument.nan_to_num() for argument in arguments), *keys, *rule, False))


def test_the_example_of_the_check_at_start_up_agrees():
    example = converted(op.example("head_draw", DEVICE), torch.float32)
    errors = relative_errors(outcome(op.head_draw, example), outcome(reference.head_draw, example))
    assert errors
    assert max(errors.values()) < 1e-5
