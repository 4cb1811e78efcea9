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
        # Masked diffusion knows which positions are visible: the known ones are, at every time.
        return torch.where(where, clean, state)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> TokenLosses:
        """Every position of the plain loss, else the masked ones. Waits for the device, to tell their number."""
        rows = torch.ones_like(noised.state, dtype=torch.bool) if self.config.loss == "plain" else noised.state == self.mask_id
        asked = rows & scored[:, None]
        weights = self._weights(noised, times, exact=False)
        return TokenLosses(noised.target, asked, weights, int(asked.sum()), self.config.mask_class)

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return self._positions(noised.target, exact=exact).sum(1)

    def _positions(self, clean: Tensor, *, exact: bool) -> Tensor:
        """How much each position counts, float32 [B, S]."""
        ones = torch.ones_like(clean, dtype=torch.float32)
        alike = exact or self.config.loss == "plain"
        return ones if alike else torch.where(after_end(clean, self.space), self.config.after_end_weight, ones)

    def losses(self, prediction: CrossEntropy, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """Cross entropies to the NELBO per token, or their plain mean.

        The count is that of all positions, not of the masked ones: the weight in time makes up for those that are not.
        `exact`: the true NELBO, with an uncapped weight and every position counting alike.
        """
        losses = prediction.unweighted * self._weights(noised, times, exact=True) if exact else prediction.weighted
        return Losses(losses.sum(1), self.counts(noised, exact=exact))

    def _weights(self, noised: NoisedState, times: Tensor, *, exact: bool) -> Tensor:
        """What each position's cross entropy is multiplied by, float32 [B, S]."""
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

        It does not depend on what the token will be: the exact reverse process. So positions can be chosen first, and the head
        be asked about those only.
        """
        now, then = self.schedule.share(times), self.schedule.share(earlier)
        return (now - then) / now.clamp_min(SMALLEST_SHARE)
