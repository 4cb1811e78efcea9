"""The reference for the head's loss: plain torch, float32 inside.

Legend: B samples, S positions, D width, V vocabulary, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.head_logits.reference import head_logits
from megadiff.types import CrossEntropy


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    weights: Tensor,
    count: int | None = None,
) -> CrossEntropy:
    """Cross entropy per position, weighted and unweighted; logits exist for the scored positions only, never as [B, S, V].

    Without a scored position the result still depends on hidden, weight and bias, with zero gradients: under ZeRO-3 a rank
    whose micro-batch scores nothing must run the same backward as the others.

    Args:
        hidden: [B, S, D] or [R0, D].
        weight: the head's [V, D].
        bias: [V] or None.
        targets: int64 [B, S] or [R0]; below V where scored, anything elsewhere.
        scored: bool like `targets`; includes positions of weight 0, which are part of the unweighted result.
        weights: float32 like `targets`, of the training loss; finite everywhere.
        count: the number of scored positions; None asks the device, and waits.
    """
    rows = chosen_rows(scored, count)
    losses = F.cross_entropy(head_logits(hidden, weight, bias, rows), targets.flatten()[rows], reduction="none")
    return at_positions(losses, rows, weights)


def at_positions(losses: Tensor, rows: Tensor, weights: Tensor) -> CrossEntropy:
    """Cross entropies float32 [R] at their positions, of which there are as many as weights; zero at the others."""
    zeros = torch.zeros(weights.numel(), dtype=losses.dtype, device=losses.device)
    entropies = zeros.index_copy(0, rows, losses).view(weights.shape)
    return CrossEntropy(entropies * weights, entropies.detach())


def chosen_rows(scored: Tensor, count: int | None) -> Tensor:
    """int64 [R]: indices of the scored positions; waits for the device if `count` is None."""
    flat = scored.flatten()
    return (flat.nonzero() if count is None else flat.nonzero_static(size=count)).squeeze(1)
