"""One modality's queries, keys and values for joint attention.

Legend: B samples, S tokens, D width, H heads, d channels of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megadiff.config.schema import Modality, Model, TokenSpace
from megadiff.models.embeddings import rotary_table, rotate
from megadiff.models.layers import Linear, Table, rms_normalise


class Projection(nn.Module):
    """One fused linear map to queries, keys and values, RMS-normalised per head and turned by position where configured.

    The map's rows are laid out (query | key | value, head, channel).
    """

    def __init__(self, config: Model, modality: Modality) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.linear = Linear(config.width, 3 * config.heads * config.head_dim, bias=config.attention_bias)
        gains = (config.heads, config.head_dim)
        self.query_gain = nn.Parameter(torch.empty(gains)) if config.qk_norm else None
        self.key_gain = nn.Parameter(torch.empty(gains)) if config.qk_norm else None
        rope = modality.positions == "rope"
        self.rotary = Table(partial(rotary_table, config.head_dim)) if rope else None
        self.length = modality.space.length if isinstance(modality.space, TokenSpace) else 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for gain in (self.query_gain, self.key_gain):
            if gain is not None:
                nn.init.ones_(gain)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> query, key, value, each [B, S, H, d]; `grid` is the rows and columns of patches, if it is one."""
        query, key, value = self.linear(tokens).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        if self.query_gain is not None and self.key_gain is not None:
            query, key = rms_normalise(query, self.query_gain), rms_normalise(key, self.key_gain)
        if self.rotary is not None:
            table = self.rotary(tokens.device, *(grid or (self.length,)))
            query, key = rotate(query, table), rotate(key, table)
        return query, key, value
