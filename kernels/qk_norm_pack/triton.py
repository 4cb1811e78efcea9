"""Norms, rotation and packing of projections in Triton: one launch forward, one backward; README.md derives it.

Legend: B samples, R rows of a stream (B * S if dense), N places of all streams, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadiff.kernels import tuning
from megadiff.kernels.joint_attention.triton import span_of
from megadiff.kernels.qk_norm_pack.reference import SMALLEST_NORM
from megadiff.kernels.streams import Span
from megadiff.kernels.toolchain.triton import Case, texts
from megadiff.kernels.tuning import Config, Defaults

DEFAULTS: Defaults = {0: {"rows": 32}, 80: {"rows": 32, "num_warps": 4}}


class Rows(NamedTuple):
    """A stream as kernels read it.

    Attributes:
        qkv: [R, 3, H, d].
        gains: float32 [2, H, d], of queries and keys.
        rotary: float32 [2, n, 1, d / 2], n >= longest, or None.
        starts, lengths, longest: as in Span.
        turns: n.
    """

    qkv: Tensor
    gains: Tensor
    rotary: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    longest: int
    turns: int

    @classmethod
    def of(cls, qkv: Tensor, gains: Tensor, rotary: Tensor | None, span: Span) -> Rows:
        return cls(qkv, gains, rotary, span.starts, span.lengths, span.longest, 0 if rotary is None else rotary.shape[1])


@triton.jit
def _half(matrix, places, column, there, PITCH: tl.constexpr, HALF: tl.constexpr):
    """float32 [ROWS, HALF] from rows and a column of a matrix, zero where `there` is false."""
    offsets = places.to(tl.int64)[:, None] * PITCH + column + tl.arange(0, HALF)[None, :]
    return tl.load(matrix + offsets, mask=there[:, None], other=0.0).to(tl.float32)


@triton.jit
def _put(matrix, values, places, column, there, PITCH: tl.constexpr, HALF: tl.constexpr):
    offsets = places.to(tl.int64)[:, None] * PITCH + column + tl.arange(0, HALF)[None, :]
    tl.store(matrix + offsets, values.to(matrix.dtype.element_ty), mask=there[:, None])


@triton.jit
def _turns(stream, places, there, HALF: tl.constexpr):
    """Cosines and sines, float32 [ROWS, HALF] each."""
    cosine = _half(stream.rotary, places, 0, there, HALF, HALF)
    return cosine, _half(stream.rotary + stream.turns * HALF, places, 0, there, HALF, HALF)


@triton.jit
def _first(firsts, sample, places_of_all):
    """The row of the results at which a sample starts."""
    if firsts is None:
        return sample.to(tl.int64) * places_of_all
    else:
        return tl.load(firsts + sample).to(tl.int64)


@triton.jit
def _places(firsts, stream, sample):
    """How many rows of the results a stream has in a sample."""
    if firsts is None:
        return stream.longest
    else:
        _, length, _ = span_of(stream, sample)
        return length


@triton.jit
def _pack(
    stream, outs, sample, head, tile, base, places_of_it, smallest, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """One tile of a stream's rows, [3, H, d], to the three of `outs` from row `base` on; zeros at places without a token."""
    start, length, _ = span_of(stream, sample)
    places = tile * ROWS + tl.arange(0, ROWS)
    there = places < length
    written = places < places_of_it
    target = base + places
    for which in tl.static_range(3):
        column = (which * H + head) * 2 * HALF
        first = _half(stream.qkv, start + places, column, there, 6 * H * HALF, HALF)
        second = _half(stream.qkv, start + places, column + HALF, there, 6 * H * HALF, HALF)
        if which < 2:
            norm = tl.sqrt(tl.sum(first * first, 1) + tl.sum(second * second, 1))
            inverse = tl.sqrt(2.0 * HALF) / tl.maximum(norm, smallest)
            gains = stream.gains + (which * H + head) * 2 * HALF + tl.arange(0, HALF)
            first *= inverse[:, None] * tl.load(gains)[None, :]
            second *= inverse[:, None] * tl.load(gains + HALF)[None, :]
            if stream.rotary is not None:
                cosine, sine = _turns(stream, places, there, HALF)
                first, second = first * cosine - second * sine, second * cosine + first * sine
        _put(outs[which], first, target, head * 2 * HALF, written, 2 * H * HALF, HALF)
        _put(outs[which], second, target, head * 2 * HALF + HALF, written, 2 * H * HALF, HALF)


@triton.jit
def pack(streams, outs, firsts, places_of_all, smallest, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """All streams' [R, 3, H, d] to three [B, N, H, d], or to packed rows. Grid: H x row tiles of all streams x B, the first
    fastest.

    Args:
        firsts: int32 [B], each sample's first row of three [R, H, d] without gaps; None: they are dense.
    """
    head = tl.program_id(0)
    sample = tl.program_id(2)
    tile = tl.program_id(1)
    base = _first(firsts, sample, places_of_all)
    for index in tl.static_range(len(streams)):
        tiles = tl.cdiv(streams[index].longest, ROWS)
        own = _places(firsts, streams[index], sample)
        if (tile >= 0) & (tile < tiles):
            _pack(streams[index], outs, sample, head, tile, base, own, smallest, H, HALF, ROWS)
        tile -= tiles
        base += own


@triton.jit
def _unpack(
    stream, dqkv, dgains, douts, sample, head, tile, base, smallest,
    H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile: of its rows, and its part of those of the gains, [2, d] at `dgains`."""
    start, length, limit = span_of(stream, sample)
    places = tile * ROWS + tl.arange(0, ROWS)
    there = places < length
    written = places < limit
    source = base + places
    for which in tl.static_range(3):
        column = (which * H + head) * 2 * HALF
        dfirst = _half(douts[which], source, head * 2 * HALF, there, 2 * H * HALF, HALF)
        dsecond = _half(douts[which], source, head * 2 * HALF + HALF, there, 2 * H * HALF, HALF)
        if which < 2:
            if stream.rotary is not None:
                cosine, sine = _turns(stream, places, there, HALF)
                dfirst, dsecond = dfirst * cosine + dsecond * sine, dsecond * cosine - dfirst * sine
            first = _half(stream.qkv, start + places, column, there, 6 * H * HALF, HALF)
            second = _half(stream.qkv, start + places, column + HALF, there, 6 * H * HALF, HALF)
            norm = tl.sqrt(tl.sum(first * first, 1) + tl.sum(second * second, 1))
            inverse = tl.sqrt(2.0 * HALF) / tl.maximum(norm, smallest)
            first *= inverse[:, None]
            second *= inverse[:, None]
            parts = dgains + which * 2 * HALF + tl.arange(0, HALF)
            tl.store(parts, tl.sum(dfirst * first, 0))
            tl.store(parts + HALF, tl.sum(dsecond * second, 0))
            gains = stream.gains + (which * H + head) * 2 * HALF + tl.arange(0, HALF)
            dfirst *= tl.load(gains)[None, :]
            dsecond *= tl.load(gains + HALF)[None, :]
            mean = (tl.sum(dfirst * first, 1) + tl.sum(dsecond * second, 1)) / (2.0 * HALF)
            dfirst = inverse[:, None] * (dfirst - first * mean[:, None])
            dsecond = inverse[:, None] * (dsecond - second * mean[:, None])
        _put(dqkv, dfirst, start + places, column, written, 6 * H * HALF, HALF)
        _put(dqkv, dsecond, start + places, column + HALF, written, 6 * H * HALF, HALF)


@triton.jit
def unpack(
    streams, dqkvs, dgains, douts, firsts, places_of_all, smallest, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """Gradients of all streams' qkv, and by tile of their gains, [B, tiles of all streams, 2, H, d]. Grid: as of `pack`."""
    head = tl.program_id(0)
    sample = tl.program_id(2)
    tile = tl.program_id(1)
    parts = dgains + (((sample * tl.num_programs(1) + tile) * H + head).to(tl.int64)) * 4 * HALF
    base = _first(firsts, sample, places_of_all)
    for index in tl.static_range(len(streams)):
        tiles = tl.cdiv(streams[index].longest, ROWS)
        if (tile >= 0) & (tile < tiles):
            _unpack(streams[index], dqkvs[index], parts, douts, sample, head, tile, base, smallest, H, HALF, ROWS)
        tile -= tiles
        base += _places(firsts, streams[index], sample)


def pack_rows(streams: Sequence[Rows], samples: int, firsts: Tensor | None = None) -> list[Tensor]:
    """Query, key and value, each [B, N, H, d]; or [R, H, d] if there are `firsts`, see `pack`."""
    first = streams[0].qkv
    outs = allocate(streams, samples, firsts is not None)
    config, grid = _launch("pack", streams, samples)
    pack[grid](
        tuple(streams), tuple(outs), firsts, outs[0].shape[1], SMALLEST_NORM, first.shape[2], first.shape[3] // 2,
        config["rows"], **tuning.options(config),
    )  # fmt: skip
    return outs


def allocate(streams: Sequence[Rows], samples: int, packed: bool) -> list[Tensor]:
    """Memory for what `pack_rows` makes; if packed, rows for as many tokens as there can be."""
    first = streams[0].qkv
    if packed:
        return [first.new_empty(sum(len(stream.qkv) for stream in streams), *first.shape[2:]) for _ in range(3)]
    places = sum(stream.longest for stream in streams)
    return [first.new_empty(samples, places, *first.shape[2:]) for _ in range(3)]


def unpack_gradients(
    streams: Sequence[Rows], douts: Sequence[Tensor], samples: int, firsts: Tensor | None = None
) -> list[Tensor]:
    """Per stream the gradients of its qkv and of its gains, float32 [2, H, d], given those of query, key and value."""
    first = streams[0].qkv
    heads, channels = first.shape[2:]
    config, grid = _launch("unpack", streams, samples)
    dqkvs = [torch.empty_like(stream.qkv) for stream in streams]
    dgains = streams[0].gains.new_empty(samples, grid[1], heads, 2, channels)
    unpack[grid](
        tuple(streams), tuple(dqkvs), dgains, tuple(douts), firsts, douts[0].shape[1], SMALLEST_NORM, heads, channels // 2,
        config["rows"], **tuning.options(config),
    )  # fmt: skip
    of_stream = dgains.split([triton.cdiv(stream.longest, config["rows"]) for stream in streams], dim=1)
    sums = [parts.sum((0, 1)).transpose(0, 1).contiguous() for parts in of_stream]
    return [tensor for pair in zip(dqkvs, sums, strict=True) for tensor in pair]


def _launch(kernel: str, streams: Sequence[Rows], samples: int) -> tuple[tuning.Config, tuple[int, int, int]]:
    qkv = streams[0].qkv
    bucket = f"d{qkv.shape[-1]}"
    config = tuning.configuration(f"qk_norm_pack.{kernel}", bucket, qkv.dtype, qkv.device, DEFAULTS)
    return config, (qkv.shape[2], sum(triton.cdiv(stream.longest, config["rows"]) for stream in streams), samples)


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    yield from ({"rows": rows, "num_warps": warps} for rows in (8, 16, 32, 64) for warps in (2, 4, 8))


def cases() -> Iterator[Case]:
    """Two streams, the first rotated, the second packed."""
    for channels in (64, 128):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = f"d{channels} {str(dtype).removeprefix('torch.')}"
            yield Case(name, partial(_run, 16, 16, channels, dtype), (channels, dtype) == (64, torch.bfloat16))


def _run(samples: int, heads: int, channels: int, dtype: torch.dtype, device: torch.device) -> object:
    def stream(rows: int, table: Tensor | None, span: Span) -> Rows:
        qkv = torch.randn(rows, 3, heads, channels, dtype=dtype, device=device)
        return Rows.of(qkv, torch.ones(2, heads, channels, device=device), table, span)

    lengths, starts, total = texts(samples, 120, device)
    table = torch.randn(2, 4096, 1, channels // 2, device=device)
    streams = [stream(samples * 4096, table, Span(samples, 4096)), stream(total, None, Span(samples, 120, starts, lengths))]
    outs = pack_rows(streams, samples)
    firsts = starts + torch.arange(samples, dtype=torch.int32, device=device) * 4096
    tokens = pack_rows(streams, samples, firsts)
    return outs, unpack_gradients(streams, outs, samples), tokens, unpack_gradients(streams, tokens, samples, firsts)
