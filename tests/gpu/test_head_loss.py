"""The head's loss at real sizes on a GPU: bfloat16 against float64, memory, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.head_loss import op, reference
from tests.gpu.harness import assert_no_worse_than_eager

pytestmark = pytest.mark.gpu
WIDTH, VOCABULARY = 1_024, 49_408
MOST_BYTES = 0.4e9
"""Of one call at 7,680 rows, its gradients included."""


def arguments(samples: int, length: int, share: float):
    torch.manual_seed(0)
    hidden = torch.randn(samples, length, WIDTH, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, device="cuda") / WIDTH**0.5).bfloat16().requires_grad_()
    bias = torch.randn(VOCABULARY, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (samples, length), device="cuda")
    scored = torch.rand(samples, length, device="cuda") < share
    return hidden, weight, bias, targets, scored, 5 * torch.rand(samples, length, device="cuda")


def test_bfloat16_is_as_near_to_float64_as_the_reference_in_bfloat16():
    assert_no_worse_than_eager(op.head_loss, reference.head_loss, *arguments(8, 120, 0.6), arriving=0.01)


def test_its_memory_at_the_paper_s_size_is_a_tenth_of_eager_s():
    own = arguments(64, 120, 2.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    op.head_loss(*own, count=64 * 120)
    assert torch.cuda.max_memory_allocated() - before < MOST_BYTES


def test_nothing_waits_for_the_device():
    own = arguments(8, 120, 0.6)
    count = int(own[4].sum())
    op.head_loss(*own, count=count)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.head_loss(*own, count=count).weighted.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
