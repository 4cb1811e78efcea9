"""Logits at chosen positions, with and without gradients."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.head_logits import head_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [[3, 0, 5], []])
@pytest.mark.parametrize("biased", [True, False])
def test_logits_are_those_of_float32_with_and_without_gradients(dtype: torch.dtype, rows: list[int], biased: bool) -> None:
    hidden, weight = torch.randn(2, 3, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    bias = torch.randn(11, dtype=dtype) if biased else None
    chosen = torch.tensor(rows, dtype=torch.int64)
    expected = hidden.double().view(6, 8)[chosen] @ weight.double().T + (0 if bias is None else bias.double())
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            logits = head_logits(hidden, weight, bias, chosen)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
