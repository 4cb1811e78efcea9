"""The reference for the head's loss: plain torch, float32 inside.

Legend: B samples, S positions, D width, V vocabulary, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.head_logits.reference import head_logits
from megadiff.types import CrossEntropy


class Shard(NamedTuple):
    """A rank's part of a head that is split by the vocabulary.

    Attributes:
        first: the token of its first row.
        group: the ranks that hold the parts.
    """

    first: int
    group: dist.ProcessGroup


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scored: Tensor,
    weights: Tensor,
    count: int | None = None,
    shard: Shard | None = None,
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
        shard: which part of the head `weight` and `bias` are; None: the whole. The gradient of `hidden` is this part's then,
            to be added up over the ranks.
    """
    rows = chosen_rows(scored, count)
    logits, own_targets = head_logits(hidden, weight, bias, rows), targets.flatten()[rows]
    if shard is None:
        losses = F.cross_entropy(logits, own_targets, reduction="none")
    else:
        losses = _sharded_cross_entropy(logits, own_targets - shard.first, shard.group)
    zeros = torch.zeros(weights.numel(), dtype=losses.dtype, device=losses.device)
    entropies = zeros.index_copy(0, rows, losses).view(weights.shape)
    return CrossEntropy(entropies * weights, entropies.detach())


def _sharded_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of this rank's logits [R, V / T], by which targets count; equal on all ranks."""
    best = logits.detach().amax(-1)
    dist.all_reduce(best, dist.ReduceOp.MAX, group)
    inside = (targets >= 0) & (targets < logits.shape[1])
    of_target = logits.gather(1, targets.where(inside, 0)[:, None])[:, 0].where(inside, best) - best
    figures = torch.stack([(logits - best[:, None]).exp().sum(-1), of_target])
    added = figures.detach().clone()
    dist.all_reduce(added, group=group)
    summed: Tensor = figures + (added - figures.detach())  # the gradient of each rank's part is that of the sum
    return summed[0].log() - summed[1]


def chosen_rows(scored: Tensor, count: int | None) -> Tensor:
    """int64 [R]: indices of the scored positions; waits for the device if `count` is None."""
    flat = scored.flatten()
    return (flat.nonzero() if count is None else flat.nonzero_static(size=count)).squeeze(1)
