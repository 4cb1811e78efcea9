"""The head's product with the statistics and the draw of each of its tiles, and the choice of a tile.

Legend: R rows, D width, V vocabulary, T tiles of the vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadiff import rng
from megadiff.kernels.head_draw.reference import TILE
from megadiff.kernels.head_draw.triton import row_figures, signed, tile_figures, tile_of, tile_uniforms
from megadiff.kernels.toolchain.triton import Case
from megadiff.kernels.tuning import Config, Defaults, configuration, options
from megadiff.types import DrawRule, RowKeys

COLUMNS = 7
"""Of the table of tiles: those of head_draw, then the place of the token that the tile would give, and its logit."""
TILES_DEFAULTS: Defaults = {
    0: {"rows": 16, "depth": 32},
    80: {"rows": 64, "depth": 32, "num_warps": 8, "num_stages": 3},
    90: {"rows": 64, "depth": 64, "num_warps": 8, "num_stages": 3},
}
CHOICE_DEFAULTS: Defaults = {0: {"group": 64}, 80: {"group": 1, "num_warps": 4}}


@triton.jit
def drawn_tiles(
    hidden, weight, bias, keys, places, table, rows, vocabulary, tiles, temperature, first, second,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, GREEDY: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of rows and tokens, in registers, to their column of the table. Grid: row tiles x T, the former fastest.

    Args:
        hidden: [R, WIDTH].
        weight: [V, WIDTH].
        bias: float32 [V].
        keys, places: int64 [R].
        table: float32 [COLUMNS, R, T].
        first, second: the purpose's words.
        PLAIN: the temperature is 1.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    columns = tile * TILE + tl.arange(0, TILE)
    kept, exists = row < rows, columns < vocabulary
    own = hidden + row.to(tl.int64)[:, None] * WIDTH
    head = weight + columns.to(tl.int64)[None, :] * WIDTH
    z = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < WIDTH
        one = tl.load(own + depth[None, :], mask=kept[:, None] & inside[None, :], other=0.0)
        other = tl.load(head + depth[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
        z = tl.dot(one, other, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=exists, other=0.0)[None, :]
    z = tl.where(exists[None, :], z, float("-inf"))

    top, following, sums, moments = tile_figures(z)
    if GREEDY:
        drawn = sums
        place = tl.argmax(z, 1)
    else:
        shares = tl.exp((z - top[:, None]) / temperature)
        drawn = sums if PLAIN else tl.sum(shares, 1)
        held = tl.minimum(row, rows - 1)
        single = tile + tl.zeros([1], tl.int32)
        _, within = tile_uniforms(tl.load(keys + held), tl.load(places + held), first, second, single)
        # Float32: the ends of a tile's 128 tokens in float64 do not fit into the registers.
        ends = tl.cumsum(shares, 1)
        total = tl.max(ends, 1)[:, None]
        # `within` may round to 1: the last token that has a share then, not one behind it.
        place = tl.minimum(tl.sum(((ends <= within.to(tl.float32) * total) & (ends < total)).to(tl.int32), 1), TILE - 1)
    of_token = tl.max(tl.where(tl.arange(0, TILE)[None, :] == place[:, None], z, float("-inf")), 1)

    size = rows.to(tl.int64) * tiles
    at = table + row.to(tl.int64) * tiles + tile
    tl.store(at, top, mask=kept)
    tl.store(at + size, following, mask=kept)
    tl.store(at + 2 * size, sums, mask=kept)
    tl.store(at + 3 * size, moments, mask=kept)
    tl.store(at + 4 * size, drawn, mask=kept)
    tl.store(at + 5 * size, place.to(tl.float32), mask=kept)
    tl.store(at + 6 * size, of_token, mask=kept)


@triton.jit
def chosen_tiles(
    table, keys, places, ids, log_probabilities, entropies, margins, rows, tiles, temperature, first, second,
    GREEDY: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of each row out of its tiles', and figures of its distribution. Grid: (R / GROUP,)."""
    own = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    row = tl.minimum(own, rows - 1)
    tile = tl.arange(0, TILES)
    size = rows.to(tl.int64) * tiles
    at = table + row.to(tl.int64)[:, None] * tiles + tile[None, :]
    exists = (tile < tiles)[None, :]
    best, next_best, below, total, moment = row_figures(at, size, exists)
    if GREEDY:
        chosen = tl.argmax(below, 1)
    else:
        of_tile, _ = tile_uniforms(tl.load(keys + row), tl.load(places + row), first, second, tile)
        chosen = tile_of(tl.load(at + 4 * size, mask=exists, other=0.0), below, of_tile, temperature)
    token = table + row.to(tl.int64) * tiles + chosen
    place, of_token = tl.load(token + 5 * size).to(tl.int32), tl.load(token + 6 * size)
    kept = own < rows
    tl.store(ids + own, (chosen * TILE + place).to(tl.int64), mask=kept)
    tl.store(log_probabilities + own, of_token - best - tl.log(total), mask=kept)
    tl.store(entropies + own, tl.log(total) - moment / total, mask=kept)
    tl.store(margins + own, (1 - tl.exp(next_best - best)) / total, mask=kept)


def draw(hidden: Tensor, weight: Tensor, bias: Tensor | None, keys: RowKeys, rule: DrawRule, outputs: Sequence[Tensor]) -> None:
    """Fill ids, log-probabilities, entropies and margins [R] from hidden states [R, D] and the head's [V, D], bias float32."""
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles = triton.cdiv(vocabulary, TILE)
    greedy = rule.temperature == 0
    temperature = 1.0 if greedy else rule.temperature
    words = tuple(signed(word) for word in rng.purpose_words(keys.purpose))

    def config(kernel: str, defaults: Defaults) -> Config:
        return configuration(f"fused_head_draw.{kernel}", "", hidden.dtype, hidden.device, defaults)

    table = torch.empty(COLUMNS, rows, tiles, dtype=torch.float32, device=hidden.device)
    chosen = config("drawn_tiles", TILES_DEFAULTS)
    drawn_tiles[(triton.cdiv(rows, chosen["rows"]) * tiles,)](
        hidden, weight, bias, keys.keys, keys.places, table, rows, vocabulary, tiles, temperature, *words,
        WIDTH=width, HAS_BIAS=bias is not None, PLAIN=temperature == 1, GREEDY=greedy,
        ROWS=chosen["rows"], DEPTH=chosen["depth"], TILE=TILE, **options(chosen),
    )  # fmt: skip
    chosen = config("chosen_tiles", CHOICE_DEFAULTS)
    chosen_tiles[(triton.cdiv(rows, chosen["group"]),)](
        table, keys.keys, keys.places, *outputs, rows, tiles, temperature, *words,
        GREEDY=greedy, GROUP=chosen["group"], TILES=triton.next_power_of_2(tiles), TILE=TILE, **options(chosen),
    )  # fmt: skip


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    if kernel == "chosen_tiles":
        yield from ({"group": group, "num_warps": warps} for group in (1, 2) for warps in (2, 4, 8))
        return
    for rows, depth, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (3, 4)):
        yield {"rows": rows, "depth": depth, "num_warps": warps, "num_stages": stages}


def cases() -> Iterator[Case]:
    """A chunk of rows of CLIP's vocabulary at the paper's width."""
    rules = {"plain": DrawRule(), "greedy": DrawRule(temperature=0), "warm": DrawRule(temperature=0.9)}
    for dtype in (torch.bfloat16, torch.float16):
        for name, rule in rules.items():
            usual = (name, dtype) == ("plain", torch.bfloat16)
            yield Case(f"{name} {str(dtype).removeprefix('torch.')}", functools.partial(_launch, rule, dtype), usual)


def _launch(rule: DrawRule, dtype: torch.dtype, device: torch.device) -> object:
    hidden, weight = (torch.randn(count, 1024, device=device).to(dtype) for count in (256, 49_408))
    numbers = torch.arange(256, device=device)
    outputs = torch.empty_like(numbers), *torch.empty(3, 256, device=device)
    draw(hidden, weight / 32, torch.randn(49_408, device=device), RowKeys(numbers, "token", numbers), rule, outputs)
    return outputs
