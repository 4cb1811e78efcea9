"""The gated residual's kernels at real sizes on a GPU: bfloat16 against float64, over poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.gated_adaln import op, reference
from tests.gpu.harness import assert_no_worse_than_eager

pytestmark = pytest.mark.gpu
SAMPLES, LENGTH = 8, 376


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("width", [1000, 1024, 4096])
def test_bfloat16_is_as_near_to_float64_as_the_reference_in_bfloat16(width, packed):
    torch.manual_seed(0)
    shape = (SAMPLES * LENGTH, width) if packed else (SAMPLES, LENGTH, width)
    shapes = [shape, shape, *[(SAMPLES, width)] * 3]
    floats = [torch.randn(size, device="cuda").bfloat16().requires_grad_() for size in shapes]
    samples = torch.randint(SAMPLES, (SAMPLES * LENGTH,), device="cuda").sort().values if packed else None
    assert_no_worse_than_eager(op.gated_adaln, reference.gated_adaln, *floats, samples, 1e-6, True)
    plain = [floats[0], *floats[3:]]
    assert_no_worse_than_eager(op.adaln, reference.adaln, *plain, samples, 1e-6, True)
