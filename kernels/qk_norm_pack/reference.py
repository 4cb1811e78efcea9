"""The reference for packing: plain torch, at least float32 inside.

Legend: B samples, S tokens of one modality, N tokens of all modalities, H heads, d channels of a head.
"""

from __future__ import annotations

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
    pairs, values = zip(*(_heads(stream) for stream in streams), strict=True)
    query, key = _joined(pairs).unbind(-3)
    return Packed(query, key, _joined(values))


def rms_normalise(vectors: Tensor, gain: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-24) * sqrt(d) * gain over the last axis; at least float32 inside, the input's dtype outside."""
    size = vectors.shape[-1]
    return (F.rms_norm(_wide(vectors), (size,), eps=SMALLEST_NORM**2 / size) * _wide(gain)).to(vectors.dtype)


def rotate(vectors: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of [B, S, ..., d] by a table [2, n, ..., d/2], n >= S."""
    cosine, sine = table[:, : vectors.shape[1]]
    first, second = _wide(vectors).chunk(2, dim=-1)
    turned = torch.addcmul(first * cosine, second, sine, value=-1), torch.addcmul(second * cosine, first, sine)
    return torch.cat(turned, dim=-1).to(vectors.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Along N; one part alone is not copied."""
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _heads(stream: Projected) -> tuple[Tensor, Tensor]:
    """Query and key [B, longest, 2, H, d], normalised and rotated, and value [B, longest, H, d]."""
    pair, value = torch.split(_dense(stream), [2, 1], dim=-3)
    if stream.gains is not None:
        pair = rms_normalise(pair, stream.gains)
    if stream.rotary is not None:
        pair = rotate(pair, stream.rotary[:, :, None])
    return pair, value.squeeze(-3)


def finite(stream: Projected) -> Tensor:
    """The projections, zero at places of a dense stream without a token, since a weight of zero does not remove a NaN."""
    if stream.span.starts is not None or stream.span.lengths is None:
        return stream.qkv
    return stream.qkv.masked_fill(~stream.span.there(stream.qkv.device)[..., None, None, None], 0.0)


def _dense(stream: Projected) -> Tensor:
    """[B, longest, 3, H, d]; finite at places without a token."""
    if stream.span.starts is None:
        return finite(stream)
    if not len(stream.qkv):
        return stream.qkv.new_zeros(stream.span.batch, stream.span.longest, *stream.qkv.shape[1:])
    rows, _ = stream.span.rows(stream.qkv.device)
    return stream.qkv[rows]
