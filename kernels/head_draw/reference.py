"""The reference for token draws: plain torch, float32 logits, a chunk of rows at a time.

Legend: B samples, S positions, D width, V vocabulary, R rows, K branches of guidance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff import rng
from megadiff.types import DrawRule, RowKeys, TokenDraws

ROWS_AT_ONCE = 512
TILE = 128
"""Tokens per tile; probabilities are summed within tiles, then over them. The draws depend on it, so do not tune it."""


def head_draw(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule
) -> TokenDraws:
    """One token per row from softmax(sum over branches of weight x logits).

    The head is linear and a row's weights add up to 1, so branches are mixed before it: one product per row for any number of
    branches. Log-probabilities mix like logits: their normalisers are constants of a row.

    Args:
        hidden: [B, S, D].
        weight: the head's [V, D].
        bias: [V] or None.
        rows: int64 [K, R], indices into the flattened [B * S] positions.
        weights: float32 [K, R], columns adding up to 1.
        keys: the random number of each row.
        rule: see `draw_rows`.
    """
    head = weight.float(), None if bias is None else bias.float()
    return draw_by_chunks(hidden, lambda mixed: F.linear(mixed, *head), rows, weights, keys, rule)


def draw_by_chunks(
    hidden: Tensor, logits_of: Callable[[Tensor], Tensor], rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule
) -> TokenDraws:
    """`head_draw` with any linear head.

    Args:
        logits_of: from the mixed hidden states of a chunk of rows, float32 [r, D], to their logits, float32 [r, V].
    """
    flat = hidden.flatten(0, 1)
    parts = []
    for start in range(0, max(rows.shape[1], 1), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        branches = flat[rows[:, part].flatten()].float().view(*rows[:, part].shape, hidden.shape[-1])
        mixed = branches[0] if len(branches) == 1 else (branches * weights[:, part, None]).sum(0)
        uniforms = rng.uniform_at(keys.keys[part], keys.purpose, keys.places[part])
        parts.append(draw_rows(logits_of(mixed), uniforms, *rule))
    return TokenDraws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def draw_rows(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> TokenDraws:
    """One token per row of float32 logits [R, V], by the inverse distribution function, summed in float64.

    Gumbel noise in float32 lowers the temperature (Zheng et al., arXiv 2409.02908); one float64 uniform per row does not.
    Log-probability, entropy and margin are of the distribution before temperature and truncation.

    Args:
        uniforms: float64 [R] in (0, 1).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw among (more if equal); 0 is all.
        top_p: total probability that the likeliest of those must reach, to draw among (more if equal).
        min_p: smallest probability of a token to draw, as a share of the likeliest one's, after the temperature.
    """
    logs = logits.float().log_softmax(-1)
    shares = logs.exp()
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    truncation = top_k, top_p, min_p
    ids = logs.argmax(-1) if temperature == 0 else _inverse(_shares(logs, temperature, *truncation), uniforms)
    best = shares.topk(min(2, shares.shape[1])).values
    margin = best[:, 0] - best[:, 1:].sum(-1)
    return TokenDraws(ids, logs.gather(1, ids[:, None])[:, 0], entropy, margin)


def _shares(logs: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities up to a factor, float32 [R, V]."""
    if temperature != 1:
        logs = (logs - logs.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logs.shape[1]:
        logs = logs.masked_fill(logs < logs.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered = logs.softmax(-1).sort(-1, descending=True).values
        before = ordered.double().cumsum(-1) - ordered
        least = torch.where(before < top_p, ordered, torch.inf).amin(-1, keepdim=True)
        logs = logs.masked_fill(logs.softmax(-1) < least, -torch.inf)
    shares = (logs - logs.amax(-1, keepdim=True)).exp()
    return shares.masked_fill(shares < min_p, 0)


def _inverse(shares: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulative share exceeds uniform x total; first among tiles, then within one."""
    vocabulary = shares.shape[1]
    tiles = F.pad(shares, (0, -vocabulary % TILE)).view(len(shares), -(-vocabulary // TILE), TILE)
    ends = tiles.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    tile = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(tile > 0, ends.gather(1, (tile - 1).clamp_min(0)), 0.0)
    inside = tiles.gather(1, tile[:, :, None].expand(-1, -1, TILE))[:, 0].double().cumsum(-1)
    # Rounding may put the target beyond the tile's own sum: it then means the last token of the tile with any share.
    target = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(inside[:, -1:])))
    place = torch.searchsorted(inside, target, right=True)
    return (tile * TILE + place)[:, 0].clamp_max(vocabulary - 1)
