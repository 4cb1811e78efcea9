"""The reference for joint attention: plain torch.

Legend: B samples, S tokens of one modality, N tokens of all modalities, R rows, H heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.streams import Projected

SMALLEST_NORM = 1e-12


def joint_attention(streams: Sequence[Projected]) -> list[Tensor]:
    """Every token attends to every visible token of every modality; the scale is 1 / sqrt(d).

    Runs in the dtype of its inputs (SDPA keeps its softmax in float32); queries and keys are normalised and rotated in float32.
    There is no mask tensor if nothing is hidden, so that mask-free kernels can run. A sample whose keys are all hidden gets
    zeros.

    Args:
        streams: per modality its projections.

    Returns:
        Per modality [B, S, H, d], or packed [R, H, d]; zero at places without a token.
    """
    query, key, value = (
        torch.cat(parts, 1).transpose(1, 2) for parts in zip(*(_heads(stream) for stream in streams), strict=True)
    )
    mask = _key_mask(streams, query.device)
    if mask is None:
        attended = F.scaled_dot_product_attention(query, key, value)
    else:
        blind = ~mask.any(-1, keepdim=True)  # a softmax over no key and its gradient are NaN
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind).masked_fill(blind, 0.0)
    places = torch.split(attended.transpose(1, 2), [stream.span.longest for stream in streams], dim=1)
    return [_rows_of(dense, stream) for dense, stream in zip(places, streams, strict=True)]


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


def _key_mask(streams: Sequence[Projected], device: torch.device) -> Tensor | None:
    """bool [B, 1, 1, N], True where a key may be seen; None if nothing is hidden."""
    if all(stream.span.lengths is None and stream.span.visible is None for stream in streams):
        return None
    masks = [stream.span.rows(device)[1] if stream.span.visible is None else stream.span.visible for stream in streams]
    return torch.cat(masks, dim=1)[:, None, None, :]


def _rows_of(dense: Tensor, stream: Projected) -> Tensor:
    """[B, longest, H, d] in the stream's memory layout, zero at places without a token."""
    span = stream.span
    if span.lengths is None and span.starts is None:
        return dense
    rows, there = span.rows(dense.device)
    if span.starts is None:
        return dense * there[..., None, None].to(dense.dtype)
    if not len(stream.qkv):
        return dense.new_zeros(0, *dense.shape[2:])
    # Places without a token add zeros to row 0. No two tokens share a row, so the order does not matter.
    tokens = (dense * there[..., None, None].to(dense.dtype)).flatten(0, 1)
    return dense.new_zeros(len(stream.qkv), *dense.shape[2:]).index_add(0, rows.flatten(), tokens)
