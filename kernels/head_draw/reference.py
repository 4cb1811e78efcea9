"""The reference for token draws: plain torch, float32 logits, a chunk of rows at a time.

Legend: B samples, S positions, D width, V vocabulary, R rows, K branches of guidance, T tiles of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff import rng
from megadiff.types import DrawRule, RowKeys, TokenDraws

ROWS_AT_ONCE = 256
PRODUCT_ROWS = 64
"""Rows of one matrix product, padded with zeros: a library picks its order of summation by the number of rows."""
TILE = 128
"""Tokens per tile: the draws depend on it, so do not tune it."""


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
        keys: the random numbers of each row.
        rule: see `draw_with`.
    """
    head = weight.float(), None if bias is None else bias.float()
    flat = hidden.flatten(0, 1)
    parts = []
    for start in range(0, max(rows.shape[1], 1), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        logits = logits_of(mixed_rows(flat, rows[:, part], weights[:, part]), *head)
        parts.append(draw_rows(logits, RowKeys(keys.keys[part], keys.purpose, keys.places[part]), rule))
    return TokenDraws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def logits_of(mixed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [R, V] by products of `PRODUCT_ROWS` rows."""
    padded = F.pad(mixed, (0, 0, 0, -len(mixed) % PRODUCT_ROWS))
    return torch.cat([F.linear(chunk, weight, bias) for chunk in torch.split(padded, PRODUCT_ROWS)])[: len(mixed)]


def mixed_rows(flat: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """float32 [R, D]: the sum over branches of weight x hidden state, of rows int64 [K, R] of [B * S, D]."""
    branches = flat[rows.flatten()].float().view(*rows.shape, flat.shape[-1])
    return branches[0] if len(branches) == 1 else (branches * weights[..., None]).sum(0)


def draw_rows(logits: Tensor, keys: RowKeys, rule: DrawRule) -> TokenDraws:
    """One token per row of float32 logits [R, V]; see `draw_with`."""
    return draw_with(logits, row_uniforms(keys, logits.shape[1]), rule)


def row_uniforms(keys: RowKeys, vocabulary: int) -> Tensor:
    """float64 [R, T, 2] in (0, 1): for each row and tile one number for the choice of the tile, one for that within it."""
    return rng.uniform(rng.fold(keys.keys, keys.places), keys.purpose, (-(-vocabulary // TILE), 2), dtype=torch.float64)


def draw_with(logits: Tensor, uniforms: Tensor, rule: DrawRule) -> TokenDraws:
    """One token per row of float32 logits [R, V], exactly, in two levels: Gumbel-max over tiles, the inverse within one.

    A tile is chosen with its share of the probability, a token with its share of the tile's. Log-probability, entropy and
    margin are of the distribution before temperature and truncation. `top_k`, `top_p` of what that leaves, and `min_p` keep
    ties: more tokens if equal.

    Args:
        uniforms: see `row_uniforms`.
        rule: temperature 0 takes the likeliest token.
    """
    logits = logits.float()
    logs = logits.log_softmax(-1)
    shares = logs.exp()
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    ids = logits.argmax(-1) if rule.temperature == 0 else _two_level(logits, uniforms, rule)
    best = shares.topk(min(2, shares.shape[1])).values
    margin = best[:, 0] - best[:, 1:].sum(-1)
    return TokenDraws(ids, logs.gather(1, ids[:, None])[:, 0], entropy, margin)


def _two_level(logits: Tensor, uniforms: Tensor, rule: DrawRule) -> Tensor:
    vocabulary = logits.shape[1]
    kept = logits.masked_fill(logits < _least_logit(logits, rule), -torch.inf)
    tiles = F.pad(kept, (0, -vocabulary % TILE), value=-torch.inf).view(len(logits), -(-vocabulary // TILE), TILE)
    # A tile without a token that may be drawn has a finite top too: it has no share, and not NaN.
    tops = tiles.amax(-1).clamp_min(torch.finfo(torch.float32).min)
    shares = ((tiles - tops[..., None]) / rule.temperature).exp()
    logs = (tops - tops.amax(-1, keepdim=True)) / rule.temperature + shares.sum(-1).log()
    tile = (logs - (-uniforms[..., 0].log()).log()).argmax(-1, keepdim=True)
    ends = shares.take_along_dim(tile[..., None], 1)[:, 0].double().cumsum(-1)
    target = uniforms[..., 1].gather(1, tile) * ends[:, -1:]
    return tile[:, 0] * TILE + (ends <= target).sum(-1)


def _least_logit(logits: Tensor, rule: DrawRule) -> Tensor:
    """float32 [R, 1]: the smallest logit that may be drawn."""
    best = logits.amax(-1, keepdim=True)
    least = torch.full_like(best, -torch.inf)
    if 0 < rule.top_k < logits.shape[1]:
        least = logits.topk(rule.top_k).values[:, -1:]
    if rule.top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        shares = ((ordered - best) / rule.temperature).exp().masked_fill(ordered < least, 0).double()
        needed = shares.cumsum(-1) - shares < rule.top_p * shares.sum(-1, keepdim=True)
        least = torch.where(needed, ordered, torch.inf).amin(-1, keepdim=True)
    if rule.min_p > 0:
        least = torch.maximum(least, best + rule.temperature * math.log(rule.min_p))
    return least
