"""Draws of tokens from chunks of logits: the smallest logit that may be drawn, statistics of tiles, the choice.

Legend: R rows, V vocabulary, T tiles of the vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadiff import rng
from megadiff.kernels.head_draw.reference import TILE
from megadiff.kernels.toolchain.triton import Case
from megadiff.kernels.tuning import Config, Defaults, configuration, options
from megadiff.types import DrawRule, RowKeys

COLUMNS = 5
"""Of the table of tiles: largest logit, second largest, sum of exp(logit - largest), that sum weighted by logit - largest, and
the sum at the temperature of what may be drawn."""
LEAST_DEFAULTS: Defaults = {0: {"group": 32, "block": 256}, 80: {"group": 1, "block": 4096, "num_warps": 8}}
TILES_DEFAULTS: Defaults = {0: {"group": 64}, 80: {"group": 16, "num_warps": 4}}
CHOICE_DEFAULTS: Defaults = {0: {"group": 64}, 80: {"group": 1, "num_warps": 4}}
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Times a share of zero it is zero, unlike minus infinity."""


@triton.jit
def _logits_at(logits, bias, row, columns, vocabulary, HAS_BIAS: tl.constexpr):
    """[G, C] for rows [G] and columns [G or 1, C]; minus infinity beyond the vocabulary."""
    exists = columns < vocabulary
    z = tl.load(logits + row.to(tl.int64)[:, None] * vocabulary + columns, mask=exists, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=exists, other=0.0)
    return z


@triton.jit
def _rank(z):
    """float32 as int32 in the same order; `_unrank` is its inverse."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unrank(rank):
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(
    logits, bias, row, least, best, temperature, vocabulary,
    HAS_BIAS: tl.constexpr, SHARES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row's logits from `least` up: their number, or the sum of exp((logit - best) / temperature); float64 [G]."""
    total = tl.zeros([GROUP], tl.float64)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        z = _logits_at(logits, bias, row, columns, vocabulary, HAS_BIAS)
        mass = tl.exp((z - best[:, None]) / temperature) if SHARES else tl.full([GROUP, BLOCK], 1.0, tl.float32)
        total += tl.sum(tl.where((z >= least[:, None]) & (columns < vocabulary), mass, 0.0).to(tl.float64), 1)
    return total


@triton.jit
def _largest_with(
    goal, logits, bias, row, least, best, temperature, vocabulary,
    HAS_BIAS: tl.constexpr, SHARES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest number, from `least` up, such that the mass from it up reaches the goal: a search over 32 bits."""
    low, high = _rank(least).to(tl.int64), _rank(best).to(tl.int64) + 1
    for _ in range(32):
        # With one candidate left the middle is `low`, which reaches the goal.
        middle = (low + high) >> 1
        tried = _unrank(middle.to(tl.int32))
        reached = _mass(logits, bias, row, tried, best, temperature, vocabulary, HAS_BIAS, SHARES, GROUP, BLOCK) >= goal
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return _unrank(low.to(tl.int32))


@triton.jit
def least_logits(
    logits, bias, least, rows, vocabulary, temperature, top_k, top_p, log_min_p,
    HAS_BIAS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest logit of each row that may be drawn. Grid: (R / GROUP,).

    Args:
        logits: float32 [R, V].
        bias: float32 [V].
        least: float32 [R].
    """
    own = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    row = tl.minimum(own, rows - 1)
    best = tl.full([GROUP], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z = _logits_at(logits, bias, row, start + tl.arange(0, BLOCK)[None, :], vocabulary, HAS_BIAS)
        best = tl.maximum(best, tl.max(z, 1))
    result = tl.full([GROUP], float("-inf"), tl.float32)
    if TOP_K:
        goal = tl.zeros([GROUP], tl.float64) + top_k
        result = _largest_with(goal, logits, bias, row, result, best, temperature, vocabulary, HAS_BIAS, False, GROUP, BLOCK)
    if TOP_P:
        goal = top_p * _mass(logits, bias, row, result, best, temperature, vocabulary, HAS_BIAS, True, GROUP, BLOCK)
        result = _largest_with(goal, logits, bias, row, result, best, temperature, vocabulary, HAS_BIAS, True, GROUP, BLOCK)
    if MIN_P:
        result = tl.maximum(result, best + temperature * log_min_p)
    tl.store(least + own, result, mask=own < rows)


@triton.jit
def tile_figures(z):
    """Of tiles [G, TILE]: largest logit, second largest, sum of exp(logit - largest), and that sum weighted."""
    # Finite, so that a tile of minus infinities alone has no share, and not NaN.
    top = tl.maximum(tl.max(z, 1), LOWEST)
    is_top = z == top[:, None]
    second = tl.where(tl.sum(is_top.to(tl.int32), 1) > 1, top, tl.max(tl.where(is_top, float("-inf"), z), 1))
    below = z - top[:, None]
    shares = tl.exp(below)
    return top, second, tl.sum(shares, 1), tl.sum(shares * tl.maximum(below, LOWEST), 1)


@triton.jit
def tile_statistics(
    logits, bias, least, table, rows, vocabulary, tiles, temperature,
    HAS_BIAS: tl.constexpr, CUT: tl.constexpr, PLAIN: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Statistics of tiles, see `COLUMNS`. Grid: (R x T / GROUP,).

    Args:
        least: float32 [R], read if CUT.
        table: float32 [COLUMNS, R, T].
        PLAIN: temperature 1 and no cut: the last two sums are one.
    """
    size = rows.to(tl.int64) * tiles
    at = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    exists = at < size
    item = tl.minimum(at, size - 1)
    row = item // tiles
    columns = ((item - row * tiles) * TILE).to(tl.int32)[:, None] + tl.arange(0, TILE)[None, :]
    z = _logits_at(logits, bias, row, columns, vocabulary, HAS_BIAS)
    top, second, sums, moments = tile_figures(z)
    if PLAIN:
        drawn = sums
    else:
        pointed = tl.exp((z - top[:, None]) / temperature)
        if CUT:
            pointed = tl.where(z >= tl.load(least + row)[:, None], pointed, 0.0)
        drawn = tl.sum(pointed, 1)
    tl.store(table + at, top, mask=exists)
    tl.store(table + size + at, second, mask=exists)
    tl.store(table + 2 * size + at, sums, mask=exists)
    tl.store(table + 3 * size + at, moments, mask=exists)
    tl.store(table + 4 * size + at, drawn, mask=exists)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10, as in megadiff/rng.py, of uint32 counters and keys."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32)), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32)), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(number):
    """int64 as the lower and upper 32 bits."""
    return (number & 0xFFFFFFFF).to(tl.uint32), ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _uniform(first, second):
    """float64 in (0, 1) out of the upper 26 bits of two words."""
    return ((first >> 6).to(tl.float64) * 67108864.0 + (second >> 6).to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def tile_uniforms(keys, places, first, second, tile):
    """The pair of `row_uniforms` of each row [G] and tile [T]: float64 [G, T], float64 [G, T]."""
    zero = keys.to(tl.uint32) * 0
    low, high = _words(keys)
    place_low, place_high = _words(places)
    k0, k1, _, _ = _philox(place_low, place_high, zero, zero + 1, low, high)
    zero = zero[:, None] + tile[None, :].to(tl.uint32) * 0
    w0, w1, w2, w3 = _philox(
        zero + tile[None, :].to(tl.uint32), zero + first.to(tl.uint32), zero + second.to(tl.uint32), zero,
        zero + k0[:, None], zero + (k1 & 0x7FFFFFFF)[:, None],
    )  # fmt: skip
    return _uniform(w0, w1), _uniform(w2, w3)


@triton.jit
def row_figures(at, size, exists):
    """Of rows [G], out of their tiles' [G, T] at `at` in the table: largest logit, second largest, largest of every tile less
    that of the row, sum of exp(logit - largest), and that sum weighted."""
    tops = tl.load(at, mask=exists, other=LOWEST)
    seconds = tl.load(at + size, mask=exists, other=float("-inf"))
    sums = tl.load(at + 2 * size, mask=exists, other=0.0)
    moments = tl.load(at + 3 * size, mask=exists, other=0.0)
    best = tl.max(tops, 1)
    below = tl.maximum(tops - best[:, None], LOWEST)
    is_best = below == 0
    next_best = tl.maximum(tl.max(tl.where(is_best, float("-inf"), tops), 1), tl.max(seconds, 1))
    next_best = tl.where(tl.sum(is_best.to(tl.int32), 1) > 1, best, next_best)
    scale = tl.exp(below)
    return best, next_best, below, tl.sum(scale * sums, 1), tl.sum(scale * (moments + sums * below), 1)


@triton.jit
def tile_of(drawn, below, of_tile, temperature):
    """The tile of each row [G], by its share of what may be drawn [G, T] and a number in (0, 1)."""
    logs = tl.where(drawn > 0, below, 0.0) / temperature + tl.log(tl.where(drawn > 0, drawn, 1.0))
    return tl.argmax(tl.where(drawn > 0, logs.to(tl.float64) - tl.log(-tl.log(of_tile)), float("-inf")), 1)


@triton.jit
def choices(
    logits, bias, least, table, keys, places, ids, log_probabilities, entropies, margins,
    rows, vocabulary, tiles, temperature, first, second,
    HAS_BIAS: tl.constexpr, CUT: tl.constexpr, GREEDY: tl.constexpr,
    GROUP: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of each row, and figures of its distribution. Grid: (R / GROUP,).

    Args:
        table: of `tile_statistics`.
        keys, places: int64 [R].
        first, second: the purpose's words.
        TILES: a power of two from T up.
    """
    own = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    row = tl.minimum(own, rows - 1)
    tile = tl.arange(0, TILES)
    size = rows.to(tl.int64) * tiles
    at = table + row.to(tl.int64)[:, None] * tiles + tile[None, :]
    exists = (tile < tiles)[None, :]
    best, next_best, below, total, moment = row_figures(at, size, exists)
    columns = tl.arange(0, TILE)[None, :]
    if GREEDY:
        chosen = tl.argmax(below, 1)
        z = _logits_at(logits, bias, row, chosen[:, None] * TILE + columns, vocabulary, HAS_BIAS)
        place = tl.argmax(z, 1)
    else:
        of_tile, within = tile_uniforms(tl.load(keys + row), tl.load(places + row), first, second, tile)
        chosen = tile_of(tl.load(at + 4 * size, mask=exists, other=0.0), below, of_tile, temperature)
        z = _logits_at(logits, bias, row, chosen[:, None] * TILE + columns, vocabulary, HAS_BIAS)
        shares = tl.exp((z - tl.max(z, 1)[:, None]) / temperature)
        if CUT:
            shares = tl.where(z >= tl.load(least + row)[:, None], shares, 0.0)
        ends = tl.cumsum(shares.to(tl.float64), 1)
        target = tl.sum(tl.where(tile[None, :] == chosen[:, None], within, 0.0), 1) * tl.max(ends, 1)
        place = tl.sum((ends <= target[:, None]).to(tl.int32), 1)
    of_token = tl.max(tl.where(columns == place[:, None], z, float("-inf")), 1)

    kept = own < rows
    tl.store(ids + own, (chosen * TILE + place).to(tl.int64), mask=kept)
    tl.store(log_probabilities + own, of_token - best - tl.log(total), mask=kept)
    tl.store(entropies + own, tl.log(total) - moment / total, mask=kept)
    tl.store(margins + own, (1 - tl.exp(next_best - best)) / total, mask=kept)


def draw(logits: Tensor, bias: Tensor | None, keys: RowKeys, rule: DrawRule, outputs: Sequence[Tensor]) -> None:
    """Fill ids, log-probabilities, entropies and margins [R] from float32 logits of at least R rows, without their bias."""
    rows, vocabulary = len(outputs[0]), logits.shape[1]
    tiles = triton.cdiv(vocabulary, TILE)
    greedy = rule.temperature == 0
    top_k = 0 < rule.top_k < vocabulary and not greedy
    top_p, min_p = rule.top_p < 1 and not greedy, rule.min_p > 0 and not greedy
    cut = top_k or top_p or min_p
    temperature = 1.0 if greedy else rule.temperature

    def config(kernel: str, defaults: Defaults) -> Config:
        return configuration(f"head_draw.{kernel}", "", logits.dtype, logits.device, defaults)

    least = logits.new_empty(rows if cut else 0)
    if cut:
        chosen = config("least_logits", LEAST_DEFAULTS)
        least_logits[(triton.cdiv(rows, chosen["group"]),)](
            logits, bias, least, rows, vocabulary, temperature, rule.top_k, rule.top_p, math.log(rule.min_p) if min_p else 0.0,
            HAS_BIAS=bias is not None, TOP_K=top_k, TOP_P=top_p, MIN_P=min_p, GROUP=chosen["group"], BLOCK=chosen["block"],
            **options(chosen),
        )  # fmt: skip
    table = logits.new_empty(COLUMNS, rows, tiles)
    chosen = config("tile_statistics", TILES_DEFAULTS)
    tile_statistics[(triton.cdiv(rows * tiles, chosen["group"]),)](
        logits, bias, least, table, rows, vocabulary, tiles, temperature,
        HAS_BIAS=bias is not None, CUT=cut, PLAIN=not cut and temperature == 1, GROUP=chosen["group"], TILE=TILE,
        **options(chosen),
    )  # fmt: skip
    chosen = config("choices", CHOICE_DEFAULTS)
    choices[(triton.cdiv(rows, chosen["group"]),)](
        logits, bias, least, table, keys.keys, keys.places, *outputs, rows, vocabulary, tiles, temperature,
        *(signed(word) for word in rng.purpose_words(keys.purpose)),
        HAS_BIAS=bias is not None, CUT=cut, GREEDY=greedy, GROUP=chosen["group"],
        TILES=triton.next_power_of_2(tiles), TILE=TILE, **options(chosen),
    )  # fmt: skip


def signed(word: int) -> int:
    """The int32 of the same 32 bits, so that kernels take one type for all words."""
    return word - (1 << 32) if word >> 31 else word


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    if kernel == "least_logits":
        yield from ({"group": 1, "block": block, "num_warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8, 16))
    else:
        groups = (4, 8, 16, 32) if kernel == "tile_statistics" else (1, 2)
        yield from ({"group": group, "num_warps": warps} for group in groups for warps in (2, 4, 8))


def cases() -> Iterator[Case]:
    """A chunk of rows of CLIP's vocabulary, by what the rule asks for."""
    rules = {"plain": DrawRule(), "greedy": DrawRule(temperature=0), "cut": DrawRule(0.9, top_k=50, top_p=0.9, min_p=0.01)}
    for name, rule in rules.items():
        yield Case(name, functools.partial(_launch, rule), usual=name == "plain")


def _launch(rule: DrawRule, device: torch.device) -> object:
    logits, bias = torch.randn(256, 49_408, device=device), torch.randn(49_408, device=device)
    numbers = torch.arange(256, device=device)
    outputs = torch.empty_like(numbers), *torch.empty(3, 256, device=device)
    draw(logits, bias, RowKeys(numbers, "token", numbers), rule, outputs)
    return outputs
