"""Attention's kernels at real sizes on a GPU: bfloat16 against float64, over poisoned memory."""

from __future__ import annotations

import functools

import pytest
import torch

from megadiff.kernels.joint_attention import op, reference
from megadiff.kernels.qk_norm_pack.op import qk_norm_pack
from megadiff.kernels.streams import Projected, Span
from tests.gpu.harness import assert_no_worse_than_eager

pytestmark = pytest.mark.gpu
SAMPLES, HEADS, PICTURE, TEXT = 4, 8, 256, 120


def streams(channels: int, rotary: bool = False, picture: int = PICTURE) -> list[Projected]:
    """A picture and packed captions of 0 to 120 tokens; `rotary`: the picture has rotary positions."""
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 40, TEXT], dtype=torch.int32, device="cuda")
    spans = [Span(SAMPLES, picture), Span(SAMPLES, TEXT, (lengths.cumsum(0) - lengths).int(), lengths)]
    angles = 3 * torch.rand(picture, 1, channels // 2, device="cuda")
    made = []
    for span, shape in zip(spans, [(SAMPLES, picture), (int(lengths.sum()),)], strict=True):
        qkv = torch.randn(*shape, 3, HEADS, channels, device="cuda", dtype=torch.bfloat16).requires_grad_()
        gains = (1 + 0.3 * torch.randn(2, HEADS, channels, device="cuda")).requires_grad_()
        made.append(Projected(qkv, gains, None, span))
    if rotary:
        made[0] = made[0]._replace(rotary=torch.stack([angles.cos(), angles.sin()]))
    return made


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(
    ("rotary", "picture"), [(False, PICTURE), (True, PICTURE), (False, 1024)], ids=["its own", "rotary", "long"]
)
def test_bfloat16_is_as_near_to_float64_as_the_reference_in_bfloat16(channels, rotary, picture):
    """The attention kernels; packing and flash attention of the tokens that exist."""
    arguments = streams(channels, rotary, picture)
    assert op.refusal("joint_attention", arguments) is None
    assert (op._packing(arguments) is None) == (not rotary and picture == PICTURE)
    assert_no_worse_than_eager(op.joint_attention, reference.joint_attention, arguments)


@pytest.mark.parametrize("channels", [64, 128])
def test_packing_for_sdpa_is_as_near_to_float64(channels):
    def packed(streams: list[Projected]) -> list[torch.Tensor]:
        return reference.attend(qk_norm_pack(streams), streams)

    assert_no_worse_than_eager(packed, reference.joint_attention, streams(channels, rotary=True))


def test_attention_without_padding_is_that_with_a_mask():
    own = streams(64, rotary=True)
    kernel = op._varlen_kernel(own)
    assert kernel is not None
    ragged = functools.partial(op._attended_ragged, kernel=kernel)
    assert_no_worse_than_eager(ragged, reference.joint_attention, own)
