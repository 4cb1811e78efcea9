"""The truth for the gated residual and adaLN: plain torch, float32 inside.

Legend: B samples, S tokens, D width, R rows of packed tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GatedSum(NamedTuple):
    """The sum tokens + gate * change, and its normalised and modulated form; both have the tokens' shape and dtype."""

    tokens: Tensor
    normal: Tensor


def adaln(tokens: Tensor, shift: Tensor, scale: Tensor, samples: Tensor | None, eps: float, one_plus: bool) -> Tensor:
    """LayerNorm(tokens) * scale + shift, without gain and bias of its own.

    Args:
        tokens: [B, S, D], or packed [R, D].
        shift, scale: [B, D]; contiguous in the last axis.
        samples: int64 [R], the sample of each row, ascending; None for dense tokens.
        eps: added to the variance.
        one_plus: scale by 1 + scale.
    """
    shift, scale = spread(shift, samples), spread(scale, samples)
    normal = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return torch.addcmul(shift, normal, 1 + scale if one_plus else scale)


def gated_adaln(
    tokens: Tensor,
    change: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    samples: Tensor | None,
    eps: float,
    one_plus: bool,
) -> GatedSum:
    """tokens + gate * change, and `adaln` of it.

    Args:
        tokens, change: [B, S, D], or packed [R, D].
        gate, shift, scale: [B, D], one row per sample.
        samples, eps, one_plus: see `adaln`.
    """
    summed = torch.addcmul(tokens, spread(gate, samples), change)
    return GatedSum(summed, adaln(summed, shift, scale, samples, eps, one_plus))


def spread(vectors: Tensor, samples: Tensor | None) -> Tensor:
    """Vectors [B, D] for dense tokens as [B, 1, D], for packed rows as [R, D]."""
    return vectors[:, None] if samples is None else vectors.index_select(0, samples)
