"""The gated residual and adaLN against their formulas."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.gated_adaln import adaln, gated_adaln
from tests.kernels.harness import DTYPES, TOLERANCES, assert_agrees, numbers

EPS = 1e-5


def naive_adaln(tokens, shift, scale, samples, eps, one_plus):
    """Row by row."""
    width = tokens.shape[-1]
    rows = tokens.reshape(-1, width)
    per_sample = 0 if samples is not None else tokens.shape[1]
    made = []
    for index, row in enumerate(rows):
        sample = int(samples[index]) if samples is not None else index // per_sample
        spread = row - row.sum() / width
        normal = spread / (spread.square().sum() / width + eps).sqrt()
        made.append(normal * (scale[sample] + (1 if one_plus else 0)) + shift[sample])
    return torch.stack(made).view_as(tokens)


def naive_gated(tokens, change, gate, shift, scale, samples, eps, one_plus):
    gates = gate[:, None] if samples is None else torch.stack([gate[int(sample)] for sample in samples])
    summed = tokens + gates * change
    return summed, naive_adaln(summed, shift, scale, samples, eps, one_plus)


def case(width, packed, dtype):
    """Tokens twice and three vectors; strided as chunks of one map's output are."""
    samples = torch.tensor([0, 0, 0, 2, 2]) if packed else None
    shape = (5, width) if packed else (3, 7, width)
    vectors = numbers(3, 3 * width, dtype=dtype, grad=False).chunk(3, dim=-1)
    return numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype), [v.requires_grad_() for v in vectors], samples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus", [True, False])
@pytest.mark.parametrize(("width", "packed"), [(1, False), (13, False), (13, True), (64, True)])
class TestAgainstTheFormula:
    def test_adaln(self, width, packed, one_plus, dtype):
        tokens, _, (shift, scale, _), samples = case(width, packed, dtype)
        assert_agrees(adaln, naive_adaln, tokens, shift, scale, samples, EPS, one_plus, tolerance=TOLERANCES[dtype])

    def test_gated_adaln(self, width, packed, one_plus, dtype):
        tokens, change, vectors, samples = case(width, packed, dtype)
        # The sum is rounded to bfloat16 before its norm is taken, which weighs most where a row is nearly constant.
        tolerance = TOLERANCES[dtype] * (3 if dtype == torch.bfloat16 else 1)
        assert_agrees(gated_adaln, naive_gated, tokens, change, *vectors, samples, EPS, one_plus, tolerance=tolerance)
