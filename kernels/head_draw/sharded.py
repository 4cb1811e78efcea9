"""Draws with a head that is split by the vocabulary over ranks: two levels across them, without gathering logits.

Legend: R rows, V vocabulary, v tokens of this rank, T tiles of the vocabulary, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.head_draw.reference import ROWS_AT_ONCE, TILE, logits_of, mixed_rows, row_uniforms
from megadiff.kernels.head_loss.reference import Shard
from megadiff.types import DrawRule, RowKeys, TokenDraws

LOWEST = torch.finfo(torch.float32).min


class Part(NamedTuple):
    """This rank's logits float32 [R, v], the token of their first column, V, and the ranks."""

    logits: Tensor
    first: int
    vocabulary: int
    group: dist.ProcessGroup

    def sum(self, own: Tensor) -> Tensor:
        dist.all_reduce(own, group=self.group)
        return own

    def gathered(self, own: Tensor) -> Tensor:
        """[R, n] of each rank to [R, P * n]: as a sum of zeros and one number, which is exact."""
        whole = own.new_zeros(dist.get_world_size(self.group), *own.shape)
        whole[dist.get_rank(self.group)] = own
        return self.sum(whole).transpose(0, 1).flatten(1)


def head_draw_sharded(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    weights: Tensor,
    keys: RowKeys,
    rule: DrawRule,
    shard: Shard,
) -> TokenDraws:
    """`head_draw` with this rank's part of the head; equal on all ranks, the ids are those of the whole head.

    Of a row, ranks exchange two numbers per tile, the logits of one tile, and figures; nothing of size V.

    Args:
        hidden, rows, weights, keys, rule: as in `head_draw`; equal on all ranks.
        weight, bias: [v, D] and [v], tokens from shard.first on; v is the same on all ranks.
    """
    head = weight.float(), None if bias is None else bias.float()
    vocabulary = len(weight) * dist.get_world_size(shard.group)
    flat, parts = hidden.flatten(0, 1), []
    for start in range(0, max(rows.shape[1], 1), ROWS_AT_ONCE):
        chosen = slice(start, start + ROWS_AT_ONCE)
        logits = logits_of(mixed_rows(flat, rows[:, chosen], weights[:, chosen]), *head)
        uniforms = row_uniforms(RowKeys(keys.keys[chosen], keys.purpose, keys.places[chosen]), vocabulary)
        parts.append(_draw(Part(logits, shard.first, vocabulary, shard.group), uniforms, rule))
    return TokenDraws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _draw(part: Part, uniforms: Tensor, rule: DrawRule) -> TokenDraws:
    """As `draw_with`, of logits that are split."""
    logits, tiles = part.logits, uniforms.shape[1]
    tops = _in_tiles(part, logits, tiles, -torch.inf).amax(-1)
    dist.all_reduce(tops, dist.ReduceOp.MAX, part.group)
    best = tops.amax(-1, keepdim=True)
    below = logits - best
    shares = below.exp()
    figures = part.sum(torch.stack([shares.sum(-1), (shares * below.clamp_min(LOWEST)).sum(-1)]))
    largest = part.gathered(logits.topk(min(2, logits.shape[1])).values)
    largest = largest.topk(min(2, part.vocabulary)).values - best
    total, moment = figures
    if rule.temperature == 0:
        tile = tops.argmax(-1, keepdim=True)
        z = _logits_of(part, tile)
        place = z.argmax(-1, keepdim=True)
    else:
        least = _least_logit(part, best, rule)
        # A tile without a token that may be drawn has a finite top too: it has no share, and not NaN.
        tops = tops.clamp_min(LOWEST)
        spread = tops.repeat_interleave(TILE, 1)[:, part.first : part.first + logits.shape[1]]
        drawn = ((logits - spread) / rule.temperature).exp().masked_fill(logits < least, 0)
        sums = part.sum(_in_tiles(part, drawn, tiles, 0.0).sum(-1))
        logs = (tops - best) / rule.temperature + sums.log()
        tile = (logs - (-uniforms[..., 0].log()).log()).argmax(-1, keepdim=True)
        z = _logits_of(part, tile)
        ends = ((z - tops.gather(1, tile)) / rule.temperature).exp().masked_fill(z < least, 0).double().cumsum(-1)
        target = uniforms[..., 1].gather(1, tile) * ends[:, -1:]
        place = (ends <= target).sum(-1, keepdim=True)
    of_token = (z.gather(1, place) - best)[:, 0]
    margin = (largest[:, 0].exp() - largest[:, 1:].exp().sum(-1)) / total
    return TokenDraws((tile * TILE + place)[:, 0], of_token - total.log(), total.log() - moment / total, margin)


def _in_tiles(part: Part, values: Tensor, tiles: int, nothing: float) -> Tensor:
    """[R, T, TILE]: this rank's [R, v] at their places, `nothing` elsewhere."""
    after = tiles * TILE - part.first - values.shape[1]
    return F.pad(values, (part.first, after), value=nothing).view(len(values), tiles, TILE)


def _logits_of(part: Part, tile: Tensor) -> Tensor:
    """float32 [R, TILE] of all ranks, of one tile [R, 1] in each row; minus infinity beyond the vocabulary."""
    tokens = tile * TILE + torch.arange(TILE, device=tile.device)
    own = tokens - part.first
    here = (own >= 0) & (own < part.logits.shape[1])
    found = part.logits.gather(1, own.where(here, 0)).where(here, 0.0)
    return part.sum(found).masked_fill(tokens >= part.vocabulary, -torch.inf)


def _least_logit(part: Part, best: Tensor, rule: DrawRule) -> Tensor:
    """float32 [R, 1]: the smallest logit of all ranks that may be drawn."""
    least = torch.full_like(best, -torch.inf)
    if 0 < rule.top_k < part.vocabulary:
        own = part.logits.topk(min(rule.top_k, part.logits.shape[1])).values
        least = part.gathered(own).topk(rule.top_k).values[:, -1:]
    if rule.top_p < 1:
        shares = ((part.logits - best) / rule.temperature).exp().double()

        def mass(limit: Tensor) -> Tensor:
            return part.sum(shares.masked_fill(part.logits < limit, 0).sum(-1, keepdim=True))

        least = _largest_with(rule.top_p * mass(least), mass, least, best)
    if rule.min_p > 0:
        least = torch.maximum(least, best + rule.temperature * math.log(rule.min_p))
    return least


def _largest_with(goal: Tensor, mass: Callable[[Tensor], Tensor], least: Tensor, best: Tensor) -> Tensor:
    """The largest number from `least` up such that the mass from it up reaches the goal: a search over 32 bits."""
    low, high = _rank(least).long(), _rank(best).long() + 1
    for _ in range(32):
        middle = (low + high) >> 1
        reached = mass(_unrank(middle.int())) >= goal
        low, high = middle.where(reached, low), high.where(reached, middle)
    return _unrank(low.int())


def _rank(values: Tensor) -> Tensor:
    """float32 as int32 in the same order; `_unrank` is its inverse."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unrank(ranks: Tensor) -> Tensor:
    return (ranks ^ ((ranks >> 31) & 0x7FFFFFFF)).view(torch.float32)
