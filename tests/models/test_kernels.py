"""The reference kernels against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadiff.kernels.joint_attention import joint_attention
from megadiff.kernels.masked_cross_entropy import masked_cross_entropy, row_logits
from megadiff.kernels.streams import Projected, Span


def random_streams(lengths, visible, heads=2, width=4, batch=3):
    return [
        Projected(
            torch.randn(batch, length, 3, heads, width, dtype=torch.float64), None, None, Span(batch, length, visible=mask)
        )
        for length, mask in zip(lengths, visible)
    ]


def naive_attention(streams):
    query, key, value = torch.cat([stream.qkv for stream in streams], 1).unbind(2)
    batch, count, heads, width = query.shape
    seen = torch.cat(
        [torch.ones(s.qkv.shape[:2], dtype=torch.bool) if s.span.visible is None else s.span.visible for s in streams], 1
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
    visible = [None] * len(lengths)
    if hidden:
        visible[-1] = torch.rand(3, lengths[-1]) < 0.5
        visible[-1][:, 0] = True
    streams = random_streams(lengths, visible)
    outputs = joint_attention(streams)
    assert [output.shape for output in outputs] == [(3, length, 2, 4) for length in lengths]
    assert torch.allclose(torch.cat(outputs, 1), naive_attention(streams), atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_are_not_there_are_neither_seen_nor_computed(packed):
    lengths = torch.tensor([2, 0, 4], dtype=torch.int32)
    there = torch.arange(4) < lengths[:, None]
    picture, words = random_streams((5, 4), (None, None))
    expected = joint_attention([picture, words._replace(span=Span(3, 4, visible=there))])
    span = Span(3, 4, torch.tensor([0, 2, 2], dtype=torch.int32) if packed else None, lengths)
    found = joint_attention([picture, Projected(words.qkv[there] if packed else words.qkv, None, None, span)])
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1] if packed else found[1][there], expected[1][there])
    assert packed or not found[1][~there].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sample_whose_keys_are_all_hidden_attends_to_nothing(dtype):
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[1] = False
    (words,) = random_streams((5,), (visible,))
    words = words._replace(qkv=words.qkv.to(dtype).requires_grad_())
    (attended,) = joint_attention([words])
    attended.square().sum().backward()
    assert not attended[1].any()
    assert not words.qkv.grad[1].any()
    assert attended[[0, 2]].all()
    assert words.qkv.grad.isfinite().all()


def test_no_mask_exists_when_everything_is_visible():
    streams = [stream._replace(qkv=stream.qkv.float()) for stream in random_streams((3, 5), (None, None))]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        joint_attention(streams)


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
    streams = [stream._replace(qkv=stream.qkv.bfloat16()) for stream in random_streams((3, 5), (None, None))]
    assert {output.dtype for output in joint_attention(streams)} == {torch.bfloat16}
