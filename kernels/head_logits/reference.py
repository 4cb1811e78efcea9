"""The reference for logits at chosen positions: plain torch, float32.

Legend: D width, V vocabulary, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.products import multiply


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """float32 logits [R, V] of chosen positions.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.
        rows: int64 [R], indices into the flattened positions.
    """
    chosen = hidden.flatten(0, -2).index_select(0, rows)
    if torch.is_grad_enabled() or chosen.dtype != weight.dtype or chosen.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(chosen.float(), weight.float(), None if bias is None else bias.float())
    logits = chosen.new_empty(len(chosen), len(weight), dtype=torch.float32)
    multiply(chosen, weight.T, logits)
    return logits if bias is None else logits.add_(bias)
