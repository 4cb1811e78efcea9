"""One modality's queries, keys and values for joint attention.

Legend: B samples, S tokens, R packed rows, D width, H heads, d channels of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megadiff.config.schema import Model, TokenSpace
from megadiff.kernels.streams import Projected, Span
from megadiff.models.embeddings import rotary_table
from megadiff.models.initial import ONE, Initial
from megadiff.models.layers import CachedConstant, Linear


class Projection(nn.Module):
    """One fused linear map to queries, keys and values, with their RMS gains and rotary table.

    The map's rows are laid out (query | key | value, head, channel).
    """

    def __init__(self, config: Model, name: str) -> None:
        super().__init__()
        modality = config.modalities[name]
        self.heads, self.head_dim = config.heads, config.head_dim
        self.linear = Linear(config.width_of(name), 3 * config.heads * config.head_dim, bias=config.attention_bias)
        gains = (config.heads, config.head_dim)
        self.query_gain = nn.Parameter(torch.empty(gains)) if config.qk_norm else None
        self.key_gain = nn.Parameter(torch.empty(gains)) if config.qk_norm else None
        rope = modality.positions == "rope"
        self.rotary = CachedConstant(partial(rotary_table, config.head_dim)) if rope else None
        self.length = modality.space.length if isinstance(modality.space, TokenSpace) else 0

    def initial(self) -> dict[str, Initial]:
        return {"query_gain": ONE, "key_gain": ONE}

    def forward(self, tokens: Tensor, span: Span, grid: tuple[int, int] | None = None) -> Projected:
        """Tokens [B, S, D] or [R, D] in the layout `span`; `grid` is their rows and columns of patches, if they have any."""
        qkv = self.linear(tokens).unflatten(-1, (3, self.heads, self.head_dim))
        gains = None
        if self.query_gain is not None and self.key_gain is not None:
            # A new tensor: after this forward ZeRO-3 empties the parameters, and attention runs later.
            gains = torch.stack([self.query_gain, self.key_gain])
        return Projected(qkv, gains, self.table(tokens.device, grid), span)

    def table(self, device: torch.device, grid: tuple[int, int] | None) -> Tensor | None:
        """The rotary table of a grid of patches, or of a sequence; None without rotary positions."""
        return None if self.rotary is None else self.rotary(device, *(grid or (self.length,)))
