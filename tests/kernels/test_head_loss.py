"""The head's logits and its loss against one row at a time."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.head_logits import head_logits
from megadiff.kernels.head_loss import head_loss
from tests.kernels.harness import DTYPES, TOLERANCES, assert_agrees, numbers, poison

NORMALISER = 0.37
"""The gradient that arrives at weighted losses is one number for all of them."""


def naive_logits(hidden, weight, bias, rows):
    flat = hidden.reshape(-1, hidden.shape[-1])
    made = [(weight * flat[row]).sum(1) + (0 if bias is None else bias) for row in rows.tolist()]
    nothing = 0 * (weight.sum() + (0 if bias is None else bias.sum())) + 0 * flat[:0].sum()
    return torch.stack(made) if made else flat.new_zeros(0, len(weight)) + nothing


def naive_loss(hidden, weight, bias, targets, scored, weights, count=None):
    flat = hidden.reshape(-1, hidden.shape[-1])
    nothing = 0 * (weight.sum() + (0 if bias is None else bias.sum())) + 0 * flat[:0].sum()
    losses = []
    for row, (target, wanted) in enumerate(zip(targets.flatten().tolist(), scored.flatten().tolist(), strict=True)):
        if not wanted:
            losses.append(nothing)
            continue
        exponentials = ((weight * flat[row]).sum(1) + (0 if bias is None else bias)).exp()
        losses.append(-(exponentials[target] / exponentials.sum()).log())
    entropies = torch.stack(losses).view(scored.shape)
    return entropies * weights, entropies.detach()


def tolerance_of(dtype):
    """Inside it is always float32."""
    return max(TOLERANCES[dtype], TOLERANCES[torch.float32])


def case(sizes, vocabulary, bias, dtype, share=0.5):
    """Hidden states are NaN, and targets no token, where nothing is scored; one scored position weighs nothing."""
    width = 9
    scored = torch.rand(sizes) < share
    targets = torch.randint(vocabulary, sizes).masked_fill(~scored, vocabulary)
    weights = torch.rand(sizes) * 3
    weights.view(-1)[0] = 0
    hidden = poison(numbers(*sizes, width, dtype=dtype), ~scored)
    weight = numbers(vocabulary, width, dtype=dtype)
    return hidden, weight, numbers(vocabulary, dtype=dtype) if bias else None, targets, scored, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("sizes", "vocabulary"), [((2, 5), 7), ((1, 1), 2), ((3, 17), 131), ((11,), 33)])
def test_head_loss_and_its_gradients_are_those_of_one_row_at_a_time(sizes, vocabulary, bias, dtype):
    hidden, weight, offset, targets, scored, weights = case(sizes, vocabulary, bias, dtype)
    with torch.no_grad():
        hidden.view(-1, 9)[0] = 0.5
    scored.view(-1)[0], targets.view(-1)[0] = True, 1
    for count in (None, int(scored.sum())):
        arguments = hidden, weight, offset, targets, scored, weights, count
        assert_agrees(head_loss, naive_loss, *arguments, tolerance=tolerance_of(dtype), arriving=NORMALISER)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_scored_position_gives_zero_losses_and_zero_gradients(dtype):
    arguments = case((2, 5), 7, True, dtype, share=0.0)
    losses = head_loss(*arguments)
    losses.weighted.sum().backward()
    assert losses.weighted.shape == losses.unweighted.shape == (2, 5)
    assert not losses.weighted.any()
    assert not losses.unweighted.any()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in arguments[:3])


def test_both_kinds_of_loss_are_float32_and_only_the_weighted_one_has_a_gradient():
    losses = head_loss(*case((2, 5), 7, True, torch.bfloat16))
    assert {each.dtype for each in losses} == {torch.float32}
    assert losses.weighted.requires_grad
    assert not losses.unweighted.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [[3, 0, 3, 9], [7], []])
def test_head_logits_and_their_gradients_are_those_of_one_row_at_a_time(rows, bias, dtype):
    unread = torch.ones(10, dtype=torch.bool)
    unread[rows] = False
    hidden, weight = poison(numbers(2, 5, 9, dtype=dtype), unread.view(2, 5)), numbers(33, 9, dtype=dtype)
    offset = numbers(33, dtype=dtype) if bias else None
    chosen = torch.tensor(rows, dtype=torch.int64)
    assert_agrees(head_logits, naive_logits, hidden, weight, offset, chosen, tolerance=tolerance_of(dtype))


def test_logits_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    hidden, weight = torch.randn(1, 3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    logits = head_logits(hidden, weight, None, torch.arange(3))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden[0].float() @ weight.float().T, atol=1e-4)
    assert not torch.equal(logits, logits.bfloat16().float())
