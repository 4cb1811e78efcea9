"""The reference for joint attention: plain torch.

Legend: B samples, S tokens of one modality, N tokens of all modalities, R rows, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.kernels.qk_norm_pack.reference import Packed, qk_norm_pack
from megadiff.kernels.streams import Projected


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
    return attend(qk_norm_pack(streams), streams)


def attend(packed: Packed, streams: Sequence[Projected]) -> list[Tensor]:
    """`joint_attention` by torch's SDPA, given attention's operands."""
    query, key, value = (operand.transpose(1, 2) for operand in packed)
    mask = _key_mask(streams, query.device)
    if mask is None or any(_whole(stream) for stream in streams):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        blind = ~mask.any(-1, keepdim=True)  # a softmax over no key and its gradient are NaN
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind).masked_fill(blind, 0.0)
    places = torch.split(attended.transpose(1, 2), [stream.span.longest for stream in streams], dim=1)
    return [_rows_of(dense, stream) for dense, stream in zip(places, streams, strict=True)]


def _key_mask(streams: Sequence[Projected], device: torch.device) -> Tensor | None:
    """bool [B, 1, 1, N], True where a key may be seen; None if nothing is hidden."""
    if all(_whole(stream) for stream in streams):
        return None
    masks = [stream.span.there(device) if stream.span.visible is None else stream.span.visible for stream in streams]
    return torch.cat(masks, dim=1)[:, None, None, :]


def _whole(stream: Projected) -> bool:
    """Whether every sample has all its tokens, and none is hidden."""
    return stream.span.lengths is None and stream.span.visible is None


def _rows_of(dense: Tensor, stream: Projected) -> Tensor:
    """[B, longest, H, d] in the stream's memory layout, zero at places without a token."""
    span = stream.span
    if span.lengths is None and span.starts is None:
        return dense
    if span.starts is None:
        return dense * span.there(dense.device)[..., None, None].to(dense.dtype)
    if not len(stream.qkv):
        return dense.new_zeros(0, *dense.shape[2:])
    rows, there = span.rows(dense.device)
    # Places without a token add zeros to row 0. No two tokens share a row, so the order does not matter.
    tokens = (dense * there[..., None, None].to(dense.dtype)).flatten(0, 1)
    return dense.new_zeros(len(stream.qkv), *dense.shape[2:]).index_add(0, rows.flatten(), tokens)
