"""The reference kernels against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadiff.kernels.joint_attention import joint_attention
from megadiff.kernels.joint_attention.reference import key_mask
from megadiff.kernels.masked_cross_entropy import masked_cross_entropy, row_logits


def random_projections(lengths, heads=2, width=4, batch=3):
    return [tuple(torch.randn(batch, length, heads, width, dtype=torch.float64) for _ in range(3)) for length in lengths]


def naive_attention(projections, visible):
    query, key, value = (torch.cat([p[role] for p in projections], 1) for role in range(3))
    batch, count, heads, width = query.shape
    seen = torch.cat(
        [torch.ones(p[0].shape[:2], dtype=torch.bool) if v is None else v for p, v in zip(projections, visible)], 1
    )
    output = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for i in range(count):
                weights = [
                    math.exp(float(query[b, i, h] @ key[b, j, h]) / math.sqrt(width)) * bool(seen[b, j]) for j in range(count)
                ]
                output[b, i, h] = sum(weight * value[b, j, h] for j, weight in enumerate(weights)) / sum(weights)
    return output


@pytest.mark.parametrize("lengths", [(3, 5), (4,), (1, 2, 3)])
@pytest.mark.parametrize("hidden", [False, True])
def test_joint_attention_equals_a_naive_loop(lengths, hidden):
    projections = random_projections(lengths)
    visible = [None] * len(lengths)
    if hidden:
        visible[-1] = torch.rand(3, lengths[-1]) < 0.5
        visible[-1][:, 0] = True
    outputs = joint_attention(projections, visible)
    assert [output.shape for output in outputs] == [projection[0].shape for projection in projections]
    assert torch.allclose(torch.cat(outputs, 1), naive_attention(projections, visible), atol=1e-12)


def test_no_mask_exists_when_everything_is_visible():
    assert key_mask([None, None], [3, 5], batch=2, device=torch.device("cpu")) is None
    projections = [tuple(part.float() for part in projection) for projection in random_projections((3, 5))]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        joint_attention(projections, [None, None])


@pytest.mark.parametrize("bias", [True, False])
def test_masked_cross_entropy_and_its_gradients_equal_those_over_all_positions(bias):
    hidden, weight, offset = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(7) if bias else None
    targets, scored = torch.randint(7, (2, 5)), torch.rand(2, 5) < 0.5
    scored[0, 0], scored[0, 1] = True, False
    targets[~scored] = 7  # the mask state's id, which has no row in the head
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, offset) if tensor is not None]
    weights = torch.rand(2, 5)

    losses = masked_cross_entropy(hidden, weight, offset, targets, scored)
    gradients = torch.autograd.grad((losses * weights).sum(), leaves)
    logits = F.linear(hidden, weight, offset)
    dense = F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(max=6), reduction="none").view(2, 5) * scored
    expected = torch.autograd.grad((dense * weights).sum(), leaves)

    assert losses.dtype == torch.float32
    assert torch.allclose(losses, dense, atol=1e-6)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-5)


def test_no_scored_position_gives_zero_losses_and_zero_gradients():
    leaves = [
        torch.randn(2, 5, 4, requires_grad=True),
        torch.randn(7, 4, requires_grad=True),
        torch.randn(7, requires_grad=True),
    ]
    losses = masked_cross_entropy(*leaves, torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
    losses.sum().backward()
    assert losses.shape == (2, 5)
    assert not losses.any()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_logits_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    hidden, weight = torch.randn(1, 3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    logits = row_logits(hidden, weight, None, torch.arange(3))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden[0].float() @ weight.float().T, atol=1e-4)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_bfloat16_attention_answers_in_bfloat16():
    projections = [tuple(part.bfloat16() for part in projection) for projection in random_projections((3, 5))]
    assert {output.dtype for output in joint_attention(projections, [None, None])} == {torch.bfloat16}
