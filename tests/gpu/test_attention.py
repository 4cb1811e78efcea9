"""Attention's kernels at real sizes on a GPU: bfloat16 against float64, over poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.agreement import converted, outcome, relative_errors
from megadiff.kernels.joint_attention import op, reference
from megadiff.kernels.streams import Projected, Span
from tests.kernels.harness import poisoned_memory

SAMPLES, HEADS, PICTURE, TEXT = 4, 8, 256, 120


def streams(channels: int, rotary: bool) -> list[Projected]:
    """A picture and packed captions of 0 to 120 tokens; `rotary`: the picture has rotary positions."""
    lengths = torch.tensor([0, 1, 40, TEXT], dtype=torch.int32, device="cuda")
    spans = [Span(SAMPLES, PICTURE), Span(SAMPLES, TEXT, (lengths.cumsum(0) - lengths).int(), lengths)]
    angles = 3 * torch.rand(PICTURE, 1, channels // 2, device="cuda")
    made = []
    for span, shape in zip(spans, [(SAMPLES, PICTURE), (int(lengths.sum()),)], strict=True):
        qkv = torch.randn(*shape, 3, HEADS, channels, device="cuda", dtype=torch.bfloat16).requires_grad_()
        gains = (1 + 0.3 * torch.randn(2, HEADS, channels, device="cuda")).requires_grad_()
        made.append(Projected(qkv, gains, None, span))
    if rotary:
        made[0] = made[0]._replace(rotary=torch.stack([angles.cos(), angles.sin()]))
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("channels", [64, 128])
def test_bfloat16_is_as_near_to_float64_as_the_reference_in_bfloat16(channels, rotary):
    torch.manual_seed(0)
    arguments = (streams(channels, rotary),)
    assert op.refusal("joint_attention", *arguments) is None
    with poisoned_memory():
        actual = outcome(op.joint_attention, arguments)
    expected = outcome(reference.joint_attention, converted(arguments, torch.float64))
    eager = relative_errors(outcome(reference.joint_attention, arguments), expected)
    errors = relative_errors(actual, expected)
    assert not {name: (error, eager[name]) for name, error in errors.items() if not error <= 1.1 * eager[name]}
