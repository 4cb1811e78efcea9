"""Categorical diffusion without a mask state: at time t a token is replaced, with probability 1 - alpha(t), by a uniform draw.

The network's softmax is the posterior p(clean | all noised tokens, its own included), which a cross entropy learns. Sources:
Austin et al. (D3PM), arXiv 2107.03006, for the process; Lou et al., arXiv 2310.16834, for the bound in continuous time.
Legend: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import TokenSpace, UniformProcess
from megadiff.diffusion.categorical import SMALLEST_SHARE, Schedule, clean_lengths
from megadiff.diffusion.process import Losses, NoisedState
from megadiff.types import Dense


class Uniform:
    """One modality's uniform process."""

    bounded = True

    def __init__(self, name: str, config: UniformProcess, space: TokenSpace) -> None:
        self.name, self.config, self.space = name, config, space
        self.schedule = Schedule(config.schedule)
        self.shape = (space.length,)

    def clock(self, times: Tensor) -> Tensor:
        return times

    def visible(self, state: Tensor, times: Tensor) -> None:
        return None

    def lengths(self, state: Tensor, times: Tensor) -> Tensor | None:
        return clean_lengths(state, times, self.space)

    # -------------------------------------------------------------------------------------------------------- noising

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        return NoisedState(self._replaced(clean, self.schedule.share(times), keys, "noise"), clean)

    def prior(self, keys: Tensor) -> Tensor:
        return self.any_token(keys, "prior")

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        now, then = self.schedule.share(times), self.schedule.share(later)
        return self._replaced(state, (then - now) / (1 - now).clamp_min(SMALLEST_SHARE), keys, "renoise")

    def pin(self, state: Tensor, clean: Tensor, where: Tensor, times: Tensor, keys: Tensor) -> Tensor:
        return torch.where(where, self.noise(clean, times, keys).state, state)

    def any_token(self, keys: Tensor, purpose: str) -> Tensor:
        """Uniform draws of ids, int64 [B, S]."""
        return (rng.uniform(keys, f"{self.name} {purpose} token", self.shape) * self.space.vocabulary).long()

    def _replaced(self, ids: Tensor, shares: Tensor, keys: Tensor, purpose: str) -> Tensor:
        reached = rng.uniform(keys, f"{self.name} {purpose}", self.shape) < shares[:, None]
        return torch.where(reached, self.any_token(keys, purpose), ids)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> Dense:
        return Dense()

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return torch.full((len(noised.state),), float(self.space.length), device=noised.state.device)

    def losses(self, prediction: Tensor, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """The cross entropy of the clean tokens, or the bound per token; `exact`: the bound, its weight in time uncapped."""
        counts = self.counts(noised)
        if self.config.loss == "plain" and not exact:
            log_probability = prediction.float().log_softmax(-1).gather(2, noised.target[..., None])[..., 0]
            return Losses(-log_probability.sum(1), counts)
        bound = self._bound(prediction, noised, times).sum(1)
        if not exact:
            weight = self.schedule.weight(times)
            bound = bound * (weight.clamp_max(self.config.weight_cap) / weight)
        return Losses(bound.float(), counts)

    def _bound(self, logits: Tensor, noised: NoisedState, times: Tensor) -> Tensor:
        """The integrand in time of the negative likelihood bound, float64 [B, S].

        Sum over y != z of rate / V * (g(y) - r(y) + r(y) log(r(y) / g(y))), where z is the noised token, r(y) = q(y|x) / q(z|x)
        belongs to the clean token x and g(y) is its mean under the network's posterior.
        """
        posterior = logits.double().softmax(-1)
        state, target = noised.state[..., None], noised.target[..., None]
        same = self._other_for_own(times.double())[:, None, None]
        guess = 1 + posterior * (1 / same - 1) + posterior.gather(2, state) * (same - 1)
        truth = torch.where(target == state, same, 1.0).expand_as(guess)
        truth = truth.scatter(2, target, (1 / same).expand_as(target))
        terms = guess - truth + torch.xlogy(truth, truth / guess)
        rate = self.schedule.rate(times.double()) / self.space.vocabulary
        return terms.scatter(2, state, 0.0).sum(-1) * rate[:, None]

    def _other_for_own(self, times: Tensor) -> Tensor:
        """q(y|x) / q(x|x) for y != x, [B]: 0 at t = 0, 1 at t = 1."""
        share = self.schedule.share(times)
        spread = (share / self.space.vocabulary).clamp_min(1e-12)
        return spread / (spread + 1 - share)

    # ------------------------------------------------------------------------------------------------------- sampling

    def backwards(self, state: Tensor, clean: Tensor, times: Tensor, earlier: Tensor, keys: Tensor) -> Tensor:
        """An exact draw of the state at `earlier` from q(. | state at `times`, clean).

        Proportional to (a + b [y = state]) (c + d [y = clean]): a mixture of any token, the state, and the clean token.
        """
        now, then = 1 - self.schedule.share(times), 1 - self.schedule.share(earlier)
        kept = now / then.clamp_min(SMALLEST_SHARE)
        a, b, c, d = (1 - kept) / self.space.vocabulary, kept, (1 - then) / self.space.vocabulary, then
        alike = state == clean
        weights = [w[:, None].expand_as(state) for w in (self.space.vocabulary * a * c, b * c, a * d)]
        weights[1] = weights[1] + alike * (b * d)[:, None]
        total = weights[0] + weights[1] + weights[2]
        place = rng.uniform(keys, f"{self.name} backwards", self.shape) * total
        rest = torch.where(place < weights[0] + weights[1], state, clean)
        return torch.where(place < weights[0], self.any_token(keys, "backwards"), rest)

    def leap(self, state: Tensor, clean: Tensor, times: Tensor, earlier: Tensor, keys: Tensor) -> Tensor:
        """The state after jumps at the rates of q(. | clean) at `times`, held fixed; the clean tokens where `earlier` is 0.

        The first of several jumps in one step counts, so none is lost.
        """
        vocabulary = self.space.vocabulary
        same = self._other_for_own(times)[:, None]
        alike = state == clean
        rate = (self.schedule.rate(times) / vocabulary)[:, None]
        leaving = rate * torch.where(alike, (vocabulary - 1) * same, 1 / same + vocabulary - 2)
        jumps = rng.uniform(keys, f"{self.name} leap", self.shape) < -torch.expm1(-leaving * (times - earlier)[:, None])
        # A jump's target is the clean token with probability (1 / same) / (1 / same + V - 2), else a token that is neither.
        straight = rng.uniform(keys, f"{self.name} leap to", self.shape) < 1 / (1 + (vocabulary - 2) * same)
        target = torch.where(straight & ~alike, clean, self._neither(state, clean, keys))
        return torch.where((earlier == 0)[:, None], clean, torch.where(jumps, target, state))

    def _neither(self, state: Tensor, clean: Tensor, keys: Tensor) -> Tensor:
        """A uniform draw among the tokens that are neither `state` nor `clean`."""
        low, high = torch.minimum(state, clean), torch.maximum(state, clean)
        choices = self.space.vocabulary - torch.where(low == high, 1, 2)
        token = (rng.uniform(keys, f"{self.name} other", self.shape) * choices.clamp_min(1)).long()
        token = token + (token >= low)
        return torch.where(low == high, token, token + (token >= high)).clamp_max(self.space.vocabulary - 1)
