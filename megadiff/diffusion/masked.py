"""Categorical diffusion with an absorbing mask state: at time t each token is masked, independently, with share 1 - alpha(t).

Visible tokens are never changed (carried over), the mask state is never predicted. Source: Sahoo et al., "Simple and Effective
Masked Diffusion Language Models", arXiv 2406.07524; Shi et al., arXiv 2406.04329.
Legend: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import MaskedProcess, TokenSpace
from megadiff.diffusion.categorical import SMALLEST_SHARE, Schedule, after_end, clean_lengths
from megadiff.diffusion.process import Losses, NoisedState
from megadiff.types import CrossEntropy, TokenLosses


class Masked:
    """One modality's masked process."""

    bounded = True

    def __init__(self, name: str, config: MaskedProcess, space: TokenSpace) -> None:
        self.name, self.config, self.space = name, config, space
        self.schedule = Schedule(config.schedule)
        self.shape = (space.length,)
        self.mask_id = space.vocabulary

    def clock(self, times: Tensor) -> Tensor:
        return times

    def visible(self, state: Tensor, times: Tensor) -> Tensor | None:
        if self.config.padding != "pad_id" or self.space.pad_id is None:
            return None
        return state != self.space.pad_id

    def lengths(self, state: Tensor, times: Tensor) -> Tensor | None:
        return clean_lengths(state, times, self.space) if self.config.padding == "after_end" else None

    # -------------------------------------------------------------------------------------------------------- noising

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        masked = rng.uniform(keys, f"{self.name} noise", self.shape) < self.schedule.share(times)[:, None]
        return NoisedState(torch.where(masked, self.mask_id, clean), clean)

    def prior(self, keys: Tensor) -> Tensor:
        return torch.full((len(keys), *self.shape), self.mask_id, dtype=torch.int64, device=keys.device)

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        now, then = self.schedule.share(times), self.schedule.share(later)
        rate = (then - now) / (1 - now).clamp_min(SMALLEST_SHARE)
        masked = rng.uniform(keys, f"{self.name} renoise", self.shape) < rate[:, None]
        return torch.where(masked, self.mask_id, state)

    def pin(self, state: Tensor, clean: Tensor, where: Tensor, times: Tensor, keys: Tensor) -> Tensor:
        # The known positions are visible at every time: masked diffusion tells visible positions from masked ones.
        return torch.where(where, clean, state)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> TokenLosses:
        """Scores every position for the plain loss, else the masked ones. Waits for the device to count them."""
        rows = torch.ones_like(noised.state, dtype=torch.bool) if self.config.loss == "plain" else noised.state == self.mask_id
        positions = rows & scored[:, None]
        weights = self._weights(noised, times, exact=False)
        return TokenLosses(noised.target, positions, weights, int(positions.sum()), self.config.mask_class)

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return self._positions(noised.target, exact=exact).sum(1)

    def _positions(self, clean: Tensor, *, exact: bool) -> Tensor:
        """float32 [B, S]: the count of each position."""
        ones = torch.ones_like(clean, dtype=torch.float32)
        equal = exact or self.config.loss == "plain"
        return ones if equal else torch.where(after_end(clean, self.space), self.config.after_end_weight, ones)

    def losses(self, prediction: CrossEntropy, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """The NELBO per token, or the plain mean of cross entropies.

        All positions count, not the masked ones alone: the weight in time makes up for the visible ones.
        `exact`: the true NELBO, with an uncapped weight; every position counts 1.
        """
        losses = prediction.unweighted * self._weights(noised, times, exact=True) if exact else prediction.weighted
        return Losses(losses.sum(1), self.counts(noised, exact=exact))

    def _weights(self, noised: NoisedState, times: Tensor, *, exact: bool) -> Tensor:
        """float32 [B, S]: the factor on each position's cross entropy."""
        positions = self._positions(noised.target, exact=exact)
        if self.config.loss == "plain" and not exact:
            return positions
        weight = self.schedule.weight(times)
        if not exact:
            weight = weight.clamp_max(self.config.weight_cap)
        return positions * (noised.state == self.mask_id) * weight[:, None]

    # ------------------------------------------------------------------------------------------------------- sampling

    def unmasking_share(self, times: Tensor, earlier: Tensor) -> Tensor:
        """The probability that a position masked at `times` is visible at `earlier`, [B].

        It does not depend on the token, so the exact reverse process can choose positions first and run the head on those only.
        """
        now, then = self.schedule.share(times), self.schedule.share(earlier)
        return (now - then) / now.clamp_min(SMALLEST_SHARE)
