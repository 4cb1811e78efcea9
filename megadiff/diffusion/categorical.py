"""The common part of the two categorical processes: schedules, and positions after a sequence's end mark.

Legend: B samples, S tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadiff.config.schema import CategoricalSchedule, TokenSpace

CLEAN_TIME = 1e-3
"""Up to this time a condition's tokens count as clean: positions after their end mark are left out."""
SMALLEST_SHARE = 1e-5
"""Smallest share of tokens, or time, that is divided by."""
GEOMETRIC = (1e-5, 20.0)
"""Smallest and largest exponent of the geometric schedule; it leaves a share of 2e-9 clean at t = 1, which is negligible."""


class Schedule:
    """The share 1 - alpha(t) of tokens that noise has reached. Source: Shi et al., arXiv 2406.04329, table 4."""

    def __init__(self, kind: CategoricalSchedule) -> None:
        self.kind = kind

    def share(self, times: Tensor) -> Tensor:
        """1 - alpha(t), [B]: 0 at t = 0."""
        match self.kind:
            case "linear":
                return times
            case "cosine":
                return torch.sin(0.5 * math.pi * times)
            case "geometric":
                return -torch.expm1(-self._exponent(times))

    def weight(self, times: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), [B]; like 1 / t near t = 0."""
        times = times.clamp_min(SMALLEST_SHARE)
        match self.kind:
            case "linear":
                return 1 / times
            case "cosine":
                return 0.5 * math.pi / torch.tan(0.5 * math.pi * times)
            case "geometric":
                return self._slope(times) / torch.expm1(self._exponent(times))

    def rate(self, times: Tensor) -> Tensor:
        """-alpha'(t) / alpha(t), [B]: how fast noise reaches a token that it has not reached yet."""
        share = self.share(times)
        return self.weight(times) * share / (1 - share).clamp_min(1e-6)

    def time_of(self, share: Tensor) -> Tensor:
        """The time at which 1 - alpha is `share`, any shape."""
        match self.kind:
            case "linear":
                return share
            case "cosine":
                return torch.asin(share) * (2 / math.pi)
            case "geometric":
                low, high = GEOMETRIC
                return (torch.log1p(-torch.log1p(-share) / low) / math.log(high / low)).clamp_max(1.0)

    def _exponent(self, times: Tensor) -> Tensor:
        low, high = GEOMETRIC
        return low * torch.expm1(times * math.log(high / low))

    def _slope(self, times: Tensor) -> Tensor:
        low, high = GEOMETRIC
        return (self._exponent(times) + low) * math.log(high / low)


def after_end(ids: Tensor, space: TokenSpace) -> Tensor:
    """bool [B, S]: the positions after the first end mark."""
    if space.end_id is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    ends = ids == space.end_id
    return ends.cumsum(1) - ends.long() > 0


def clean_lengths(ids: Tensor, times: Tensor, space: TokenSpace) -> Tensor | None:
    """int32 [B]: positions up to and including the end mark, S for samples that are noised; None without an end mark."""
    if space.end_id is None:
        return None
    absent = after_end(ids, space) & (times <= CLEAN_TIME)[:, None]
    return (ids.shape[1] - absent.sum(1)).int()
