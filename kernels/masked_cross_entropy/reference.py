"""The truth for the masked cross entropy: plain torch, float32 inside.

Legend: B samples, S positions, D width, V vocabulary, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    count: int | None = None,
) -> Tensor:
    """Cross entropy per position; logits exist for the scored positions only, never as [B, S, V].

    With no scored position at all the result still depends on hidden, weight and bias, with zero gradients: under ZeRO-3 a
    rank whose micro-batch scores nothing must run the same backward as the others.

    Args:
        hidden: [B, S, D] or [R0, D].
        weight: the head's [V, D].
        bias: [V] or None.
        targets: int64 [B, S] or [R0]; below V where scored, anything elsewhere.
        scored: bool like `targets`.
        count: how many positions are scored, where the host knows; without it the device must tell.

    Returns:
        float32 like `targets`, zero where not scored.
    """
    rows = chosen_rows(scored, count)
    logits = row_logits(hidden, weight, bias, rows)
    losses = F.cross_entropy(logits, targets.flatten()[rows], reduction="none")
    zeros = torch.zeros(scored.numel(), dtype=losses.dtype, device=losses.device)
    return zeros.index_copy(0, rows, losses).view(scored.shape)


def chosen_rows(scored: Tensor, count: int | None) -> Tensor:
    """int64 [R]: indices of the true ones; the host waits for the device only where `count` is unknown."""
    flat = scored.flatten()
    return (flat.nonzero() if count is None else flat.nonzero_static(size=count)).squeeze(1)


def row_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """float32 logits [R, V] of chosen positions.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.
        rows: int64 [R], indices into the flattened positions.
    """
    chosen = hidden.flatten(0, -2).index_select(0, rows)
    return F.linear(chosen.float(), weight.float(), None if bias is None else bias.float())
