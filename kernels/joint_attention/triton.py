"""Joint attention of one or two streams in Triton, forward and backward; README.md derives it.

Legend: B samples, R rows of a stream (B * S if dense), H heads, d channels of a head, C a multiple of 16 not below R.

Numbers per row and head are kept as [H, C], so that those of a tile are contiguous. Products take operands of the input's dtype
and add in float32; everything else is float32. Nothing is added by atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megadiff.kernels import tuning
from megadiff.kernels.qk_norm_pack.reference import SMALLEST_NORM
from megadiff.kernels.streams import Span
from megadiff.kernels.toolchain.triton import Case, texts
from megadiff.kernels.tuning import Config, Defaults

LOG2_E = tl.constexpr(math.log2(math.e))
NOWHERE = tl.constexpr(-1.0e30)
"""A running maximum below every score, finite so that differences of two are not NaN."""


def _tiles(queries: int, keys: int, warps: int, stages: int, tma: int = 0) -> Config:
    return {"queries": queries, "keys": keys, "num_warps": warps, "num_stages": stages, "tma": tma}


_BY_QUERIES, _BY_KEYS = {0: _tiles(64, 32, 4, 2, 1)}, {0: _tiles(32, 64, 4, 2, 1)}
DEFAULTS: dict[tuple[str, str], Defaults] = {
    ("forward", "d64"): {**_BY_QUERIES, 80: _tiles(64, 64, 8, 3), 90: _tiles(64, 64, 4, 3, 1)},
    ("forward", "d128"): {**_BY_QUERIES, 80: _tiles(64, 64, 8, 2), 90: _tiles(128, 128, 8, 2, 1)},
    ("key_gradients", "d64"): {**_BY_KEYS, 80: {**_tiles(64, 32, 8, 2), "maxnreg": 168}, 90: _tiles(64, 64, 8, 2, 1)},
    ("key_gradients", "d128"): {**_BY_KEYS, 80: _tiles(32, 64, 8, 2), 90: _tiles(16, 64, 8, 2, 1)},
    ("query_gradients", "d64"): {**_BY_QUERIES, 80: _tiles(32, 64, 8, 2), 90: _tiles(64, 64, 8, 2, 1)},
    ("query_gradients", "d128"): {**_BY_QUERIES, 80: _tiles(64, 32, 8, 2), 90: _tiles(64, 32, 8, 2, 1)},
    **{
        (kernel, bucket): {0: {"rows": 64}, 80: {"rows": 64, "num_warps": 4}}
        for kernel in ("norms", "deltas")
        for bucket in ("d64", "d128")
    },
}
"""By kernel and bucket; chosen so that nothing spills."""


class Rows(NamedTuple):
    """A stream as kernels read it; a kernel uses a part, the rest is None.

    Attributes:
        qkv: [R, 3, H, d].
        gains: float32 [2, H, d], of queries and keys.
        starts, lengths, visible: as in Span.
        norms: float32 [2, H, C], sqrt(d) / |x| of queries and keys.
        dout: [R, H, d], the gradient of the output.
        lse: float32 [H, C], log2 of the sum over keys of 2 ** (score * log2(e)).
        deltas: float32 [H, C], the sum over channels of output x its gradient.
        capacity: C.
        longest: as in Span.
    """

    qkv: Tensor
    gains: Tensor
    starts: Tensor | None
    lengths: Tensor | None
    visible: Tensor | None
    norms: Tensor | None
    dout: Tensor | None
    lse: Tensor | None
    deltas: Tensor | None
    capacity: int
    longest: int

    @classmethod
    def of(cls, qkv: Tensor, gains: Tensor, span: Span) -> Rows:
        """Those of the arguments, with all else absent."""
        capacity = triton.cdiv(qkv.shape[0], 16) * 16
        return cls(qkv, gains, span.starts, span.lengths, span.visible, None, None, None, None, capacity, span.longest)


@triton.jit
def span_of(stream, sample):
    """(first row, tokens, places that are written) of a sample: dense rows without a token are written, as zeros."""
    if stream.lengths is None:
        length = stream.longest
    else:
        length = tl.load(stream.lengths + sample).to(tl.int32)
    if stream.starts is None:
        return sample * stream.longest, length, stream.longest
    else:
        return tl.load(stream.starts + sample).to(tl.int32), length, length


@triton.jit
def _keys(stream, sample, place, length, KEYS: tl.constexpr):
    """bool [KEYS]: which places of a tile hold a key that may be seen."""
    places = place + tl.arange(0, KEYS)
    if stream.visible is None:
        return places < length
    else:
        return tl.load(stream.visible + sample.to(tl.int64) * stream.longest + places, mask=places < length, other=0) != 0


@triton.jit
def _tile(matrix, row, column, there, PITCH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, ANEW: tl.constexpr = False):
    """[ROWS, d] from a row and column of a [R, PITCH] matrix, zero where `there` is false.

    ANEW reads memory again: else the compiler keeps an earlier load of the same numbers in registers.
    """
    offsets = tl.arange(0, ROWS)[:, None] * PITCH + tl.arange(0, D)[None, :]
    return tl.load(matrix + row.to(tl.int64) * PITCH + column + offsets, mask=there[:, None], other=0.0, volatile=ANEW)


@triton.jit
def _numbers(vector, there, ROWS: tl.constexpr, other):
    """[ROWS] numbers, `other` where `there` is false."""
    return tl.load(vector + tl.arange(0, ROWS), mask=there, other=other)


@triton.jit
def _put(matrix, values, row, column, there, PITCH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * PITCH + tl.arange(0, D)[None, :]
    tl.store(matrix + row.to(tl.int64) * PITCH + column + offsets, values.to(matrix.dtype.element_ty), mask=there[:, None])


@triton.jit
def _dot(one, other, sums=None):
    """float32 operands are not rounded to TF32."""
    return tl.dot(one, other, sums, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def norms(qkv, out, rows, capacity, smallest, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """sqrt(d) / |x| of every query and key: [R, 3, H, d] -> [2, H, C]. Grid: 2H x row tiles, the former fastest."""
    which = tl.program_id(0) % (2 * H)
    row = tl.program_id(0) // (2 * H) * ROWS
    there = row + tl.arange(0, ROWS) < rows
    vectors = _tile(qkv, row, which * D, there, 3 * H * D, ROWS, D).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(vectors * vectors, 1)), smallest)
    places = row + tl.arange(0, ROWS)
    tl.store(out + which.to(tl.int64) * capacity + places, tl.sqrt(D * 1.0) / length, mask=places < capacity)


@triton.jit(do_not_specialize=["rows"])
def deltas(output, dout, out, rows, capacity, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """The product of every output with its gradient: twice [R, H, d] -> [H, C]. Grid: H x row tiles, the former fastest."""
    head = tl.program_id(0) % H
    row = tl.program_id(0) // H * ROWS
    there = row + tl.arange(0, ROWS) < rows
    products = _tile(output, row, head * D, there, H * D, ROWS, D).to(tl.float32)
    products *= _tile(dout, row, head * D, there, H * D, ROWS, D).to(tl.float32)
    tl.store(out + head.to(tl.int64) * capacity + row + tl.arange(0, ROWS), tl.sum(products, 1), mask=there)


@triton.jit
def _attend(
    sums, total, top, query, stream, tiles, row, there, head,
    TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys and values to a tile of queries: the softmax as it goes, in powers of two."""
    if TMA:
        key = tiles.load([row, (H + head) * D])
    else:
        key = _tile(stream.qkv, row, (H + head) * D, there, 3 * H * D, KEYS, D)
    inverse = _numbers(stream.norms + (H + head).to(tl.int64) * stream.capacity + row, there, KEYS, 0.0)
    # Scaling and hiding a score is one fused multiply-add.
    score = _dot(query, key.T) * inverse[None, :] + tl.where(there, 0.0, float("-inf"))[None, :]
    higher = tl.maximum(top, tl.max(score, 1))
    weight = tl.math.exp2(score - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    if TMA:
        value = tiles.load([row, (2 * H + head) * D])
    else:
        value = _tile(stream.qkv, row, (2 * H + head) * D, there, 3 * H * D, KEYS, D)
    sums = _dot(weight.to(value.dtype), value, sums * shrink[:, None])
    return sums, total * shrink + tl.sum(weight, 1), higher


@triton.jit
def forward(
    tiles0, tiles1, streams, out, lse, scale,
    OWN: tl.constexpr, TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Outputs of stream OWN, [R, H, d], and its log2 of sums, [H, C]. Grid: its query tiles x H x B, the first fastest.

    A sample's last tile of keys may reach into other rows; TMA reads them as they are, so all numbers must be finite.
    """
    own = streams[OWN]
    count = tl.cdiv(own.longest, QUERIES)
    first = tl.program_id(0) % count * QUERIES
    head = tl.program_id(0) // count % H
    sample = tl.program_id(0) // count // H
    start, length, limit = span_of(own, sample)
    places = first + tl.arange(0, QUERIES)
    row = start + first
    if first >= length:
        _put(out, tl.zeros([QUERIES, D], tl.float32), row, head * D, places < limit, H * D, QUERIES, D)
        return
    there = places < length
    channels = head * D + tl.arange(0, D)
    raw = _tile(own.qkv, row, head * D, there, 3 * H * D, QUERIES, D)
    inverse = _numbers(own.norms + head.to(tl.int64) * own.capacity + row, there, QUERIES, 0.0)
    normal = raw.to(tl.float32) * inverse[:, None] * (tl.load(own.gains + channels) * (scale * LOG2_E))[None, :]
    sums = tl.zeros([QUERIES, D], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], NOWHERE, tl.float32)
    for index in tl.static_range(len(streams)):
        stream = streams[index]
        tiles = tiles0 if index == 0 else tiles1
        key_start, keys, _ = span_of(stream, sample)
        # The gains of the keys go into the queries, so that keys reach the tensor cores as they are in memory.
        query = (normal * tl.load(stream.gains + H * D + channels)[None, :]).to(raw.dtype)
        for place in tl.range(0, keys, KEYS):
            seen = _keys(stream, sample, place, keys, KEYS)
            sums, total, top = _attend(
                sums, total, top, query, stream, tiles, key_start + place, seen, head, TMA, H, D, KEYS
            )  # fmt: skip
    blind = total == 0  # in a sample without a visible key: its weights are 0, then and in the backward pass
    total = tl.where(blind, 1.0, total)
    attended = tl.where(there[:, None], sums / total[:, None], 0.0)
    _put(out, attended, row, head * D, places < limit, H * D, QUERIES, D)
    logs = tl.where(blind, float("inf"), top + tl.math.log2(total))
    tl.store(lse + head.to(tl.int64) * own.capacity + row + tl.arange(0, QUERIES), logs, mask=there)


@triton.jit
def _from_queries(
    change, dvalue, key, value, stream, queries, douts, row, there, head,
    TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of values and of keys, the latter without gains and scale.

    key: with norm, both gains, scale and log2(e), so that its products with queries are scores but for the queries' norms.
    """
    if TMA:
        query = queries.load([row, head * D])
        dout = douts.load([row, head * D])
    else:
        query = _tile(stream.qkv, row, head * D, there, 3 * H * D, QUERIES, D)
        dout = _tile(stream.dout, row, head * D, there, H * D, QUERIES, D)
    offset = head.to(tl.int64) * stream.capacity + row
    inverse = _numbers(stream.norms + offset, there, QUERIES, 0.0)
    lse = _numbers(stream.lse + offset, there, QUERIES, float("inf"))  # a weight of 0 where there is no query
    delta = _numbers(stream.deltas + offset, there, QUERIES, 0.0)
    # Scores are transposed, [keys, queries], so that no tile is transposed in registers.
    weight = tl.math.exp2(_dot(key, query.T) * inverse[None, :] - lse[None, :])
    dvalue = _dot(weight.to(dout.dtype), dout, dvalue)
    dscore = weight * (_dot(value, dout.T) - delta[None, :]) * inverse[None, :]
    return _dot(dscore.to(query.dtype), query, change), dvalue


@triton.jit
def _through_norm(
    dqkv, dgains, raw, inverse, gain, dnormal, row, column, there, written,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the gradient of x r gain to those of x, which is stored, and of the gain, of which this tile's sum is."""
    unit = raw.to(tl.float32) * inverse[:, None]
    dnormal = tl.where(there[:, None], dnormal, 0.0)
    tl.store(dgains + tl.arange(0, D), tl.sum(dnormal * unit, 0))
    dunit = dnormal * gain[None, :]
    draw = inverse[:, None] * (dunit - unit * (tl.sum(dunit * unit, 1) / D)[:, None])
    _put(dqkv, draw, row, column, written, 3 * H * D, ROWS, D)


@triton.jit
def key_gradients(
    queries0, douts0, queries1, douts1, streams, dqkv, dgains, scale,
    OWN: tl.constexpr, TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of stream OWN's keys and values in dqkv, [R, 3, H, d], and by tile of the keys' gains, [H, B, tiles, d].

    Grid: its key tiles x H x B, the first fastest.
    """
    own = streams[OWN]
    count = tl.cdiv(own.longest, KEYS)
    tile = tl.program_id(0) % count
    head = tl.program_id(0) // count % H
    sample = tl.program_id(0) // count // H
    samples = tl.num_programs(0) // count // H
    start, length, limit = span_of(own, sample)
    places = tile * KEYS + tl.arange(0, KEYS)
    row = start + tile * KEYS
    dgains += ((head * samples + sample).to(tl.int64) * count + tile) * D
    if tile * KEYS >= length:
        nothing = tl.zeros([KEYS, D], tl.float32)
        _put(dqkv, nothing, row, (H + head) * D, places < limit, 3 * H * D, KEYS, D)
        _put(dqkv, nothing, row, (2 * H + head) * D, places < limit, 3 * H * D, KEYS, D)
        tl.store(dgains + tl.arange(0, D), tl.zeros([D], tl.float32))
        return
    there = places < length
    channels = head * D + tl.arange(0, D)
    value = _tile(own.qkv, row, (2 * H + head) * D, there, 3 * H * D, KEYS, D)
    norms_of_keys = own.norms + (H + head).to(tl.int64) * own.capacity + row
    dkey = tl.zeros([KEYS, D], tl.float32)
    dvalue = tl.zeros([KEYS, D], tl.float32)
    for index in tl.static_range(len(streams)):
        stream = streams[index]
        queries = queries0 if index == 0 else queries1
        douts = douts0 if index == 0 else douts1
        query_start, length_of_queries, _ = span_of(stream, sample)
        gain = tl.load(stream.gains + channels)
        gains = tl.load(own.gains + H * D + channels) * gain * (scale * LOG2_E)
        raw = _tile(own.qkv, row, (H + head) * D, there, 3 * H * D, KEYS, D, ANEW=True)
        inverse = _numbers(norms_of_keys, there, KEYS, 0.0)
        key = (raw.to(tl.float32) * inverse[:, None] * gains[None, :]).to(value.dtype)
        change = tl.zeros([KEYS, D], tl.float32)
        for place in tl.range(0, length_of_queries, QUERIES):
            exist = place + tl.arange(0, QUERIES) < length_of_queries
            change, dvalue = _from_queries(
                change, dvalue, key, value, stream, queries, douts, query_start + place, exist, head, TMA, H, D, QUERIES
            )  # fmt: skip
        dkey += change * (gain * scale)[None, :]
    seen = _keys(own, sample, tile * KEYS, length, KEYS)
    _put(dqkv, tl.where(seen[:, None], dvalue, 0.0), row, (2 * H + head) * D, places < limit, 3 * H * D, KEYS, D)
    raw = _tile(own.qkv, row, (H + head) * D, there, 3 * H * D, KEYS, D, ANEW=True)
    inverse = _numbers(norms_of_keys, there, KEYS, 0.0)
    gain = tl.load(own.gains + H * D + channels)
    _through_norm(dqkv, dgains, raw, inverse, gain, dkey, row, (H + head) * D, seen, places < limit, H, D, KEYS)


@triton.jit
def _from_keys(
    change, query, dout, lse, delta, stream, tiles, row, there, head,
    TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries, without gains and scale; `query` as `key` above."""
    if TMA:
        key = tiles.load([row, (H + head) * D])
        value = tiles.load([row, (2 * H + head) * D])
    else:
        key = _tile(stream.qkv, row, (H + head) * D, there, 3 * H * D, KEYS, D)
        value = _tile(stream.qkv, row, (2 * H + head) * D, there, 3 * H * D, KEYS, D)
    inverse = _numbers(stream.norms + (H + head).to(tl.int64) * stream.capacity + row, there, KEYS, 0.0)
    hidden = tl.where(there, 0.0, float("-inf"))
    weight = tl.math.exp2(_dot(query, key.T) * inverse[None, :] + hidden[None, :] - lse[:, None])
    dscore = weight * (_dot(dout, value.T) - delta[:, None]) * inverse[None, :]
    return _dot(dscore.to(key.dtype), key, change)


@triton.jit
def query_gradients(
    tiles0, tiles1, streams, dqkv, dgains, scale,
    OWN: tl.constexpr, TMA: tl.constexpr, H: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of stream OWN's queries in dqkv, [R, 3, H, d], and by tile of their gains, [H, B, tiles, d].

    Grid: its query tiles x H x B, the first fastest.
    """
    own = streams[OWN]
    count = tl.cdiv(own.longest, QUERIES)
    tile = tl.program_id(0) % count
    head = tl.program_id(0) // count % H
    sample = tl.program_id(0) // count // H
    samples = tl.num_programs(0) // count // H
    start, length, limit = span_of(own, sample)
    places = tile * QUERIES + tl.arange(0, QUERIES)
    row = start + tile * QUERIES
    dgains += ((head * samples + sample).to(tl.int64) * count + tile) * D
    if tile * QUERIES >= length:
        _put(dqkv, tl.zeros([QUERIES, D], tl.float32), row, head * D, places < limit, 3 * H * D, QUERIES, D)
        tl.store(dgains + tl.arange(0, D), tl.zeros([D], tl.float32))
        return
    there = places < length
    channels = head * D + tl.arange(0, D)
    offset = head.to(tl.int64) * own.capacity + row
    dout = _tile(own.dout, row, head * D, there, H * D, QUERIES, D)
    lse = _numbers(own.lse + offset, there, QUERIES, float("inf"))
    delta = _numbers(own.deltas + offset, there, QUERIES, 0.0)
    dquery = tl.zeros([QUERIES, D], tl.float32)
    for index in tl.static_range(len(streams)):
        stream = streams[index]
        tiles = tiles0 if index == 0 else tiles1
        key_start, keys, _ = span_of(stream, sample)
        gain = tl.load(stream.gains + H * D + channels)
        raw = _tile(own.qkv, row, head * D, there, 3 * H * D, QUERIES, D, ANEW=True)
        inverse = _numbers(own.norms + offset, there, QUERIES, 0.0)
        gains = tl.load(own.gains + channels) * gain * (scale * LOG2_E)
        query = (raw.to(tl.float32) * inverse[:, None] * gains[None, :]).to(dout.dtype)
        change = tl.zeros([QUERIES, D], tl.float32)
        for place in tl.range(0, keys, KEYS):
            seen = _keys(stream, sample, place, keys, KEYS)
            change = _from_keys(
                change, query, dout, lse, delta, stream, tiles, key_start + place, seen, head, TMA, H, D, KEYS
            )  # fmt: skip
        dquery += change * (gain * scale)[None, :]
    raw = _tile(own.qkv, row, head * D, there, 3 * H * D, QUERIES, D, ANEW=True)
    inverse = _numbers(own.norms + offset, there, QUERIES, 0.0)
    gain = tl.load(own.gains + channels)
    _through_norm(dqkv, dgains, raw, inverse, gain, dquery, row, head * D, there, places < limit, H, D, QUERIES)


class Attended(NamedTuple):
    """What the forward pass makes of a stream: the output, [R, H, d] in the stream's memory layout, and Rows' lse and norms."""

    out: Tensor
    lse: Tensor
    norms: Tensor


class Gradients(NamedTuple):
    """Of a stream's qkv, in its dtype and shape, and of its gains, float32 [2, H, d]."""

    qkv: Tensor
    gains: Tensor


def attend(streams: Sequence[Rows], samples: int) -> list[Attended]:
    """Joint attention of one or two streams that have rows."""
    made = [allocate(stream) for stream in streams]
    streams = [stream._replace(norms=_norms(stream, each.norms)) for stream, each in zip(streams, made, strict=True)]
    heads, channels = streams[0].qkv.shape[-2:]
    config = _config("forward", streams[0].qkv)
    tiles = [_descriptor(stream.qkv, 3 * heads * channels, config, "keys") for stream in streams]
    for own, stream in enumerate(streams):
        grid = (triton.cdiv(stream.longest, config["queries"]) * heads * samples,)
        constants = _constants(stream.qkv, config)
        forward[grid](*_two(tiles), tuple(streams), made[own].out, made[own].lse, channels**-0.5, OWN=own, **constants)
    return made


def allocate(stream: Rows) -> Attended:
    """Memory for what `attend` makes of a stream."""
    rows, _, heads, channels = stream.qkv.shape
    lse = stream.gains.new_zeros(heads, stream.capacity)  # rows without a token are not written
    return Attended(stream.qkv.new_empty(rows, heads, channels), lse, stream.gains.new_empty(2, heads, stream.capacity))


def differentiate(
    streams: Sequence[Rows], attended: Sequence[Attended], douts: Sequence[Tensor], samples: int
) -> list[Gradients]:
    """The gradients by qkv and gains, given those by the outputs; zero in rows without a token.

    Args:
        streams, attended: arguments and results of `attend`.
        douts: like the outputs; contiguous.
    """
    qkv = streams[0].qkv
    heads, channels = qkv.shape[-2:]
    for_keys, for_queries = _config("key_gradients", qkv), _config("query_gradients", qkv)
    streams = [
        stream._replace(norms=each.norms, dout=dout, lse=each.lse, deltas=_deltas(each, dout))
        for stream, each, dout in zip(streams, attended, douts, strict=True)
    ]
    pitch = heads * channels
    sides = [side for stream, dout in zip(streams, douts, strict=True) for side in ((stream.qkv, 3 * pitch), (dout, pitch))]
    queries = [_descriptor(tensor, columns, for_keys, "queries") for tensor, columns in sides]
    keys = [_descriptor(stream.qkv, 3 * pitch, for_queries, "keys") for stream in streams]
    gradients = []
    for own, stream in enumerate(streams):
        dqkv = torch.empty_like(stream.qkv)
        last = (dqkv, channels**-0.5, own)
        dkey_gains = _gradient(key_gradients, [*queries, None, None][:4], streams, "keys", for_keys, samples, *last)
        dquery_gains = _gradient(query_gradients, _two(keys), streams, "queries", for_queries, samples, *last)
        gradients.append(Gradients(dqkv, torch.stack([dquery_gains, dkey_gains])))
    return gradients


def _gradient(kernel, descriptors, streams, own_tiles, config, samples, dqkv, scale, own) -> Tensor:
    """Run one of the two backward kernels for a stream; float32 [H, d], the gradient of its gains."""
    heads, channels = dqkv.shape[-2:]
    tiles = triton.cdiv(streams[own].longest, config[own_tiles])
    dgains = streams[own].gains.new_empty(heads, samples * tiles, channels)
    grid = (tiles * heads * samples,)
    kernel[grid](*descriptors, tuple(streams), dqkv, dgains, scale, OWN=own, **_constants(dqkv, config))
    summed: Tensor = dgains.sum(1)
    return summed


def _norms(stream: Rows, out: Tensor) -> Tensor:
    rows, _, heads, channels = stream.qkv.shape
    config = _config("norms", stream.qkv)
    grid = (2 * heads * triton.cdiv(rows, config["rows"]),)
    sizes = (rows, stream.capacity, SMALLEST_NORM, heads, channels, config["rows"])
    norms[grid](stream.qkv, out, *sizes, **tuning.options(config))
    return out


def _deltas(attended: Attended, dout: Tensor) -> Tensor:
    rows, heads, channels = dout.shape
    config = _config("deltas", dout)
    out = torch.empty_like(attended.lse)
    grid = (heads * triton.cdiv(rows, config["rows"]),)
    deltas[grid](attended.out, dout, out, rows, out.shape[1], heads, channels, config["rows"], **tuning.options(config))
    return out


def _two(descriptors: Sequence[TensorDescriptor | None]) -> list[TensorDescriptor | None]:
    return [*descriptors, None][:2]


def _descriptor(tensor: Tensor, pitch: int, config: Config, rows: str) -> TensorDescriptor | None:
    """For loads by TMA of tiles of a tensor as a matrix of so many columns."""
    return TensorDescriptor.from_tensor(tensor.view(-1, pitch), [config[rows], tensor.shape[-1]]) if config["tma"] else None


def _config(kernel: str, tensor: Tensor) -> Config:
    bucket = "d64" if tensor.shape[-1] <= 64 else "d128"
    return tuning.configuration(f"joint_attention.{kernel}", bucket, tensor.dtype, tensor.device, DEFAULTS[kernel, bucket])


def _constants(tensor: Tensor, config: Config) -> dict[str, int | bool]:
    heads, channels = tensor.shape[-2:]
    tiles = {"QUERIES": config["queries"], "KEYS": config["keys"]}
    return {"TMA": bool(config["tma"]), "H": heads, "D": channels, **tiles, **tuning.options(config)}


def candidates(kernel: str, architecture: int) -> Iterator[Config]:
    """What tuning measures."""
    if kernel in ("norms", "deltas"):
        yield from ({"rows": rows, "num_warps": warps} for rows in (32, 64, 128) for warps in (4, 8))
        return
    for queries, keys, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield _tiles(queries, keys, warps, stages, tma=int(architecture >= 90))
    yield {**_tiles(64, 64, 4, 3, tma=int(architecture >= 90)), "maxnreg": 168}  # three blocks on a multiprocessor


def cases() -> Iterator[Case]:
    """A dense stream alone, and with a second one in each memory layout."""
    for channels in (64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            for second in ("packed", "ragged", "hidden", "alone"):
                usual = (channels, dtype, second) == (64, torch.bfloat16, "packed")
                name = f"d{channels} {str(dtype).removeprefix('torch.')} {second}"
                yield Case(name, partial(_launch, 64, 16, channels, dtype, second), usual)


def _launch(samples: int, heads: int, channels: int, dtype: torch.dtype, second: str, device: torch.device) -> object:
    def stream(rows: int, span: Span) -> Rows:
        qkv = torch.randn(rows, 3, heads, channels, dtype=dtype, device=device)
        return Rows.of(qkv, torch.ones(2, heads, channels, device=device), span)

    lengths, starts, total = texts(samples, 120, device)
    seconds = {
        "packed": [(total, Span(samples, 120, starts, lengths))],
        "ragged": [(samples * 120, Span(samples, 120, None, lengths))],
        "hidden": [(samples * 120, Span(samples, 120, visible=torch.rand(samples, 120, device=device) < 0.5))],
        "alone": [],
    }
    streams = [stream(samples * 256, Span(samples, 256)), *(stream(*own) for own in seconds[second])]
    attended = attend(streams, samples)
    outs = [each.out for each in attended]
    return outs, differentiate(streams, attended, outs, samples)
