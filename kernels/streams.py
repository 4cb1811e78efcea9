"""What attention and its companions read: the projections of each modality, and how its tokens lie in memory.

Legend: B samples, S tokens of one modality, R rows of packed tokens, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """How the tokens of one modality lie in memory, and which of them there are.

    Attributes:
        batch: B.
        longest: the most tokens that a sample can have; of dense tokens S.
        starts: int32 [B], the row at which a sample's tokens start; None: sample b starts at row b * longest (dense).
        lengths: int32 [B], tokens of a sample, 0 to `longest`; None: all of them. Rows beyond a sample's length are not
            computed: they are not seen as keys, their outputs and gradients are zero.
        visible: bool [B, S] of dense tokens, False hides a position as a key only: it still gets an output. Excludes lengths.
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

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(int64 [B, longest], the row of every place, 0 where there is no token; bool [B, longest], whether there is one)."""
        place = torch.arange(self.longest, device=device)
        there = place < self.counts(device)[:, None]
        return torch.where(there, self.firsts(device)[:, None].long() + place, 0), there


class Projected(NamedTuple):
    """One modality's projections as the linear map wrote them.

    Attributes:
        qkv: [B, S, 3, H, d] or, packed, [R, 3, H, d]; contiguous.
        gains: float [2, H, d], RMS gains of query and key; None: neither is normalised.
        rotary: float32 [2, n, 1, d / 2], cosines and sines by place in the sequence; None: not turned.
        span: where the tokens are.
    """

    qkv: Tensor
    gains: Tensor | None
    rotary: Tensor | None
    span: Span
