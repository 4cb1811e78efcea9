"""The reference for packing: plain torch, at least float32 inside.

Legend: B samples, S tokens of one modality, N tokens of all modalities, H heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.streams import Projected

SMALLEST_NORM = 1e-12


class Packed(NamedTuple):
    """Of all modalities, one after another: queries and keys, normalised and rotated, and values; each [B, N, H, d].

    Finite at places without a token.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def qk_norm_pack(streams: Sequence[Projected]) -> Packed:
    """The projections of all modalities as attention's operands; norms and rotations in float32, N the sum of Span.longest."""
    return Packed(*(torch.cat(parts, 1) for parts in zip(*(_heads(stream) for stream in streams), strict=True)))


def rms_normalise(vectors: Tensor, gain: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) * sqrt(d) * gain over the last axis (size d); at least float32 inside, the input's dtype outside."""
    unit = F.normalize(_wide(vectors), dim=-1, eps=SMALLEST_NORM)
    return (unit * math.sqrt(vectors.shape[-1]) * _wide(gain)).to(vectors.dtype)


def rotate(vectors: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of [B, S, H, d] by a table [2, n, 1, d/2], n >= S."""
    cosine, sine = table[:, : vectors.shape[1]]
    first, second = _wide(vectors).chunk(2, dim=-1)
    rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return rotated.to(vectors.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _heads(stream: Projected) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value), each [B, longest, H, d], normalised and rotated."""
    query, key, value = _dense(stream).unbind(-3)
    if stream.gains is not None:
        query, key = rms_normalise(query, stream.gains[0]), rms_normalise(key, stream.gains[1])
    if stream.rotary is not None:
        query, key = rotate(query, stream.rotary), rotate(key, stream.rotary)
    return query, key, value


def finite(stream: Projected) -> Tensor:
    """The projections, zero at places of a dense stream without a token, since a weight of zero does not remove a NaN."""
    if stream.span.starts is not None or stream.span.lengths is None:
        return stream.qkv
    _, there = stream.span.rows(stream.qkv.device)
    return stream.qkv.masked_fill(~there[..., None, None, None], 0.0)


def _dense(stream: Projected) -> Tensor:
    """[B, longest, 3, H, d]; finite at places without a token."""
    if stream.span.starts is None:
        return finite(stream)
    if not len(stream.qkv):
        return stream.qkv.new_zeros(stream.span.batch, stream.span.longest, *stream.qkv.shape[1:])
    rows, _ = stream.span.rows(stream.qkv.device)
    return stream.qkv[rows]
