"""Continuous diffusion: state = alpha(t) * clean + sigma(t) * noise.

Schedules: `vp`, alpha^2 + sigma^2 = 1 with the paper's scaled-linear betas; `rectified_flow`, alpha = 1 - t, sigma = t.
Legend: B samples, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import GaussianProcess, GridSpace
from megadiff.diffusion.process import Losses, NoisedState
from megadiff.types import Dense

BETA_START, BETA_END, DISCRETE_STEPS = 0.00085, 0.012, 1000
SMALLEST_ALPHA = 1e-3
"""Below this (the flow at t = 1) nothing is divided by alpha any more."""


def vp_log_alpha(times: Tensor) -> Tensor:
    """log alpha(t) = -1/2 of the integral of beta, with sqrt(beta) linear in t; alpha(1) is 0.0688.

    Source: the betas of latent diffusion (Rombach et al. 2022), in continuous time as in the paper's code.
    """
    start, end = BETA_START**0.5, BETA_END**0.5
    root = start + (end - start) * times.double()
    integral: Tensor = DISCRETE_STEPS * (root**3 - start**3) / (3 * (end - start))
    return (-0.5 * integral).to(times.dtype)


class Gaussian:
    """One modality's Gaussian process. Conversions between targets are exact; each says where it is singular."""

    def __init__(self, name: str, config: GaussianProcess, space: GridSpace) -> None:
        self.name, self.config = name, config
        self.shape = (space.channels, space.height, space.width)

    # ------------------------------------------------------------------------------------------------------- schedule

    def alpha(self, times: Tensor) -> Tensor:
        """Signal share, [B]."""
        return vp_log_alpha(times).exp() if self.config.schedule == "vp" else 1 - times

    def sigma(self, times: Tensor) -> Tensor:
        """Noise share, [B]; for vp by expm1, since 1 - alpha^2 loses its digits near t = 0."""
        return torch.sqrt(-torch.expm1(2 * vp_log_alpha(times))) if self.config.schedule == "vp" else times

    def clock(self, times: Tensor) -> Tensor:
        return self.sigma(times) if self.config.clock == "std" else times

    def visible(self, state: Tensor, times: Tensor) -> None:
        return None

    # -------------------------------------------------------------------------------------------------------- noising

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        noise = rng.normal(keys, f"{self.name} noise", self.shape)
        alpha, sigma = _wide(self.alpha(times)), _wide(self.sigma(times))
        return NoisedState(alpha * clean + sigma * noise, self.target(clean, noise, times))

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network learns: the noise; or the velocity (flow: noise - clean; vp: alpha * noise - sigma * clean)."""
        if self.config.target == "epsilon":
            return noise
        if self.config.schedule == "vp":
            return _wide(self.alpha(times)) * noise - _wide(self.sigma(times)) * clean
        return noise - clean

    def prior(self, keys: Tensor) -> Tensor:
        return rng.normal(keys, f"{self.name} prior", self.shape)

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        ratio = self.alpha(later) / self.alpha(times).clamp_min(SMALLEST_ALPHA)
        added = (self.sigma(later) ** 2 - (ratio * self.sigma(times)) ** 2).clamp_min(0).sqrt()
        return _wide(ratio) * state + _wide(added) * rng.normal(keys, f"{self.name} guidance", self.shape)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, scored: Tensor) -> Dense:
        return Dense()

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return torch.full((len(noised.state),), float(math.prod(self.shape)), device=noised.state.device)

    def losses(self, prediction: Tensor, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """Squared error; there is no other weight in time."""
        errors = (prediction.float() - noised.target.float()).square().flatten(1)
        return Losses(errors.sum(1), self.counts(noised))

    # ---------------------------------------------------------------------------------------------------- conversions

    def clean_and_noise(self, prediction: Tensor, state: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(clean, noise) that a prediction stands for.

        From epsilon, clean divides by alpha: vp by 0.069 at t = 1; the flow is singular there, and since a prediction's error
        would be multiplied without bound, clean is taken to be 0, the middle of the data's range. From the velocity nothing is
        divided by anything.
        """
        alpha, sigma = _wide(self.alpha(times)), _wide(self.sigma(times))
        if self.config.target == "epsilon":
            clean = (state - sigma * prediction) / alpha.clamp_min(SMALLEST_ALPHA)
            return torch.where(alpha < SMALLEST_ALPHA, 0.0, clean), prediction
        if self.config.schedule == "vp":
            return alpha * state - sigma * prediction, sigma * state + alpha * prediction
        return state - sigma * prediction, state + alpha * prediction

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        """The derivative that `integrate` steps along: the noise for vp, the velocity for the flow."""
        clean, noise = self.clean_and_noise(prediction, state, times)
        return noise if self.config.schedule == "vp" else noise - clean

    def integrate(self, state: Tensor, times: Tensor, earlier: Tensor, slope: Tensor) -> Tensor:
        """One step of the probability-flow ODE from `times` to `earlier` with a constant slope.

        vp: x / alpha has derivative `noise` in lambda = sigma / alpha (Karras et al. 2022), so the step is exact for a constant
        noise and nothing is divided by sigma; a step to t = 0 returns the clean state that the slope stands for. Flow: in t.
        """
        if self.config.schedule != "vp":
            return state + _wide(earlier - times) * slope
        now, then = self.alpha(times), self.alpha(earlier)
        distance = self.sigma(earlier) / then - self.sigma(times) / now
        return _wide(then / now) * state + _wide(then * distance) * slope


def _wide(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
