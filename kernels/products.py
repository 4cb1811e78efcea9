"""Matrix products of 16-bit numbers with float32 sums and results, which no rounding to 16 bits comes between."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(first: Tensor, second: Tensor, out: Tensor) -> None:
    """out = first @ second, float32 [m, n]; of [m, k] and [k, n] of one dtype."""
    if first.device.type != "cpu" and first.dtype != torch.float32:
        torch.mm(first, second, out_dtype=torch.float32, out=out)
    else:
        torch.mm(first.float(), second.float(), out=out)


def accumulate(first: Tensor, second: Tensor, out: Tensor) -> None:
    """out += first @ second, float32 [m, n]; of [m, k] and [k, n] of one dtype."""
    if first.device.type != "cpu" and first.dtype != torch.float32:
        torch.addmm(out, first, second, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(first.float(), second.float())
