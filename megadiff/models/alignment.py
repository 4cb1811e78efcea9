"""Representation alignment: a training-only loss that makes a block's tokens point where a frozen encoder's features do.

Source: Yu et al., "Representation Alignment for Generation" (REPA), arXiv 2410.06940: a three-layer SiLU projection and the
mean negative cosine similarity over patches.
Legend: B samples, S tokens, D width, F numbers of a feature.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megadiff.config.parameters import ALIGNMENT_HIDDEN
from megadiff.config.schema import Alignment
from megadiff.models.layers import Linear
from megadiff.types import Stream


class Aligner(nn.Module):
    """The layer that taps the stream: one modality's projected tokens travel in it to the last layer."""

    def __init__(self, config: Alignment, width: int) -> None:
        super().__init__()
        self.block, self.modality = config.block, config.modality
        hidden = ALIGNMENT_HIDDEN * width
        self.layers = nn.ModuleList([Linear(width, hidden), Linear(hidden, hidden), Linear(hidden, config.features)])

    def forward(self, stream: Stream) -> Stream:
        tokens = stream.dense(self.modality)
        for layer in self.layers[:-1]:
            tokens = F.silu(layer(tokens))
        return stream._replace(tapped=self.layers[-1](tokens))


def misalignment(projected: Tensor, features: Tensor) -> Tensor:
    """1 - cosine similarity of two [B, S, F], float32 [B], the mean over tokens."""
    return 1 - F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)
