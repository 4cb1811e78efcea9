"""The truth for joint attention: plain torch.

Legend: B samples, S tokens of one modality, N tokens of all modalities, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_attention(projections: Sequence[tuple[Tensor, Tensor, Tensor]], visible: Sequence[Tensor | None]) -> list[Tensor]:
    """Every token attends to every visible token of every modality; the scale is 1 / sqrt(d).

    Runs in the dtype of its inputs (SDPA keeps its softmax in float32). Without hidden keys no mask tensor exists, so that
    the mask-free kernels can be taken.

    Args:
        projections: per modality (query, key, value), each [B, S, H, d].
        visible: per modality bool [B, S], False hides a position as a key; None for all visible. Every sample needs at
            least one visible key among all modalities.

    Returns:
        Per modality [B, S, H, d]. Hidden positions still get an output: hiding is about keys only.
    """
    query, key, value = (_join([projection[role] for projection in projections]).transpose(1, 2) for role in range(3))
    lengths = [projection[0].shape[1] for projection in projections]
    mask = key_mask(visible, lengths, batch=query.shape[0], device=query.device)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return list(torch.split(attended.transpose(1, 2), lengths, dim=1))


def key_mask(visible: Sequence[Tensor | None], lengths: Sequence[int], *, batch: int, device: torch.device) -> Tensor | None:
    """bool [B, 1, 1, N], True where a key may be seen; None if no modality hides anything."""
    if all(mask is None for mask in visible):
        return None
    masks = [
        torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
        for mask, length in zip(visible, lengths, strict=True)
    ]
    return torch.cat(masks, dim=1)[:, None, None, :]


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
