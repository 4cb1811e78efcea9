"""Categorical diffusion with an absorbing mask state: at time t every token is masked independently with probability t.

Visible tokens are never changed (carried over), the mask state is never predicted. Source: Sahoo et al., "Simple and Effective
Masked Diffusion Language Models", arXiv 2406.07524; Shi et al., arXiv 2406.04329.
Legend: B samples, S tokens, V vocabulary, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import MaskedProcess, TokenSpace
from megadiff.diffusion.process import Losses, NoisedState
from megadiff.types import TokenLosses

CLEAN_TIME = 1e-3
"""Up to this time tokens count as clean: what follows their end mark is hidden."""
SMALLEST_TIME = 1e-5
_ROWS_AT_ONCE = 512


class Masked:
    """One modality's masked process with the linear schedule alpha(t) = 1 - t."""

    def __init__(self, name: str, config: MaskedProcess, space: TokenSpace) -> None:
        self.name, self.config, self.space = name, config, space
        self.shape = (space.length,)
        self.mask_id = space.vocabulary

    def mask_rate(self, times: Tensor) -> Tensor:
        """The probability 1 - alpha(t) that a token is masked at t."""
        return times

    def nelbo_weight(self, times: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): 1 / t for the linear schedule."""
        return 1 / times.clamp_min(SMALLEST_TIME)

    def clock(self, times: Tensor) -> Tensor:
        return times

    def visible(self, state: Tensor, times: Tensor) -> Tensor | None:
        if self.config.padding == "pad_id":
            hidden = None if self.space.pad_id is None else state == self.space.pad_id
        else:
            hidden = None if self.space.end_id is None else self.after_end(state) & (times <= CLEAN_TIME)[:, None]
        if hidden is None:
            return None
        hidden[:, 0] = False  # a softmax over no key at all is not a number
        return ~hidden

    def after_end(self, ids: Tensor) -> Tensor:
        """bool [B, S]: positions after the first end mark."""
        if self.space.end_id is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        ended = (ids == self.space.end_id).cumsum(1)
        return (ended - (ids == self.space.end_id).long()) > 0

    # -------------------------------------------------------------------------------------------------------- noising

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        masked = rng.uniform(keys, f"{self.name} noise", self.shape) < self.mask_rate(times)[:, None]
        return NoisedState(torch.where(masked, self.mask_id, clean), clean)

    def prior(self, keys: Tensor) -> Tensor:
        return torch.full((len(keys), *self.shape), self.mask_id, dtype=torch.int64, device=keys.device)

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        now, then = self.mask_rate(times), self.mask_rate(later)
        rate = (then - now) / (1 - now).clamp_min(SMALLEST_TIME)
        masked = rng.uniform(keys, f"{self.name} guidance", self.shape) < rate[:, None]
        return torch.where(masked, self.mask_id, state)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, scored: Tensor) -> TokenLosses:
        rows = torch.ones_like(noised.state, dtype=torch.bool) if self.config.loss == "plain" else noised.state == self.mask_id
        return TokenLosses(noised.target, rows & scored[:, None])

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return self._positions(noised.target, exact=exact).sum(1)

    def _positions(self, clean: Tensor, *, exact: bool) -> Tensor:
        """How much each position counts, float32 [B, S]."""
        ones = torch.ones_like(clean, dtype=torch.float32)
        alike = exact or self.config.loss == "plain"
        return ones if alike else torch.where(self.after_end(clean), self.config.after_end_weight, ones)

    def losses(self, prediction: Tensor, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """Cross entropies to the NELBO per token, or their plain mean.

        The count is that of all positions, not of the masked ones: the weight 1 / t makes up for those that are not.
        `exact`: the true NELBO, with an uncapped weight and every position counting alike.
        """
        counts = self.counts(noised, exact=exact)
        if self.config.loss == "plain" and not exact:
            return Losses(prediction.sum(1), counts)
        weight = self.nelbo_weight(times)
        if not exact:
            weight = weight.clamp_max(self.config.weight_cap)
        masked = noised.state == self.mask_id
        return Losses((prediction * self._positions(noised.target, exact=exact) * masked).sum(1) * weight, counts)

    # ------------------------------------------------------------------------------------------------------- sampling

    def chosen(self, state: Tensor, times: Tensor, earlier: Tensor, keys: Tensor) -> Tensor:
        """bool [B, S]: the masked positions that become visible between `times` and `earlier`.

        Each does with probability (rate(t) - rate(s)) / rate(t), whatever it will be: the exact reverse process (all of them at
        s = 0). So positions are chosen first, and the head is only asked about those.
        """
        now, then = self.mask_rate(times), self.mask_rate(earlier)
        share = (now - then) / now.clamp_min(SMALLEST_TIME)
        return (state == self.mask_id) & (rng.uniform(keys, f"{self.name} unmask", self.shape) < share[:, None])

    def fill(self, state: Tensor, rows: Tensor, logits: Tensor, keys: Tensor) -> Tensor:
        """The state with flat positions `rows` [R] drawn from `logits` [R, V]."""
        uniforms = rng.uniform(keys, f"{self.name} token", self.shape, dtype=torch.float64).flatten()[rows]
        filled = state.flatten().clone()
        filled[rows] = draw_categorical(logits, uniforms)
        return filled.view_as(state)


def draw_categorical(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids int64 [R] from logits [R, V] by inverse CDF in float64.

    Gumbel noise in float32 lowers the temperature (arXiv 2409.02908); a float64 cumulative sum does not.
    """
    drawn = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cumulative = logits[part].double().softmax(-1).cumsum(-1)
        ids = torch.searchsorted(cumulative, (uniforms[part] * cumulative[:, -1])[:, None], right=True)
        drawn.append(ids[:, 0].clamp_max(logits.shape[1] - 1))
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64, device=logits.device)
