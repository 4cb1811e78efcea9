"""The input of attention: the projections of each modality, and the memory layout of its tokens.

Legend: B samples, S tokens of one modality, R rows of packed tokens, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The memory layout of one modality's tokens, and which of them exist.

    Attributes:
        batch: B.
        longest: the largest number of tokens of a sample; S for dense tokens.
        starts: int32 [B], the row at which each sample's tokens start; None: sample b starts at row b * longest (dense).
        lengths: int32 [B], tokens of each sample, 0 to `longest`; None: `longest`. Rows beyond a sample's length are not
            computed: no query sees them as keys, their outputs and gradients are zero.
        visible: bool [B, S], for dense tokens without lengths; False hides a position as a key, it still gets an output.
    """

    batch: int
    longest: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    visible: Tensor | None = None

    def counts(self, device: torch.device) -> Tensor:
        """int32 [B]: tokens of each sample."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.batch,), self.longest, dtype=torch.int32, device=device)

    def firsts(self, device: torch.device) -> Tensor:
        """int32 [B]: the row at which each sample starts."""
        if self.starts is not None:
            return self.starts
        return torch.arange(self.batch, dtype=torch.int32, device=device) * self.longest

    def there(self, device: torch.device) -> Tensor:
        """bool [B, longest]: whether there is a token at a place."""
        return torch.arange(self.longest, device=device) < self.counts(device)[:, None]

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(int64 [B, longest], the row of every place, 0 without a token; `there`)."""
        there = self.there(device)
        return torch.where(there, self.firsts(device)[:, None].long() + torch.arange(self.longest, device=device), 0), there


class Projected(NamedTuple):
    """One modality's projections, as the linear map wrote them.

    Attributes:
        qkv: [B, S, 3, H, d] or, packed, [R, 3, H, d]; contiguous.
        gains: float [2, H, d], RMS gains of query and key; None: neither is normalised.
        rotary: float32 [2, n, 1, d / 2], cosines and sines by place in the sequence; None: no rotation.
        span: the tokens' memory layout.
    """

    qkv: Tensor
    gains: Tensor | None
    rotary: Tensor | None
    span: Span
