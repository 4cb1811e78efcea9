"""Continuous diffusion: state = alpha(t) * clean + sigma(t) * noise.

Schedules: `vp`, alpha^2 + sigma^2 = 1 with the paper's scaled-linear betas; `cosine`, alpha = cos(pi t / 2); `rectified_flow`,
sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma.
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
VELOCITY_WEIGHT_CAP = 400.0
SMALLEST_DIVISOR = 1e-3
"""Nothing is divided by an alpha (the flow and the cosine at t = 1) or a sigma (t = 0) below this."""


def vp_log_alpha(times: Tensor) -> Tensor:
    """log alpha(t) = -1/2 of the integral of beta, with sqrt(beta) linear in t; alpha(1) is 0.069.

    Source: the betas of latent diffusion (Rombach et al. 2022), in continuous time as in the paper's code.
    """
    start, end = BETA_START**0.5, BETA_END**0.5
    root = start + (end - start) * times.double()
    integral: Tensor = DISCRETE_STEPS * (root**3 - start**3) / (3 * (end - start))
    return (-0.5 * integral).to(times.dtype)


class Gaussian:
    """One modality's Gaussian process."""

    bounded = False

    def __init__(self, name: str, config: GaussianProcess, space: GridSpace) -> None:
        self.name, self.config = name, config
        self.shape = (space.channels, space.height, space.width)

    # ------------------------------------------------------------------------------------------------------- schedule

    def alpha(self, times: Tensor) -> Tensor:
        """Signal share, [B]."""
        match self.config.schedule:
            case "vp":
                return vp_log_alpha(times).exp()
            case "cosine":
                return torch.sin(0.5 * math.pi * (1 - times))  # the cosine would leave 6e-17 (float32: -4e-8) at t = 1
            case "rectified_flow":
                return (1 - times) / (1 + (self.config.shift - 1) * times)

    def sigma(self, times: Tensor) -> Tensor:
        """Noise share, [B]; for vp by expm1, since 1 - alpha^2 loses its digits near t = 0."""
        match self.config.schedule:
            case "vp":
                return torch.sqrt(-torch.expm1(2 * vp_log_alpha(times)))
            case "cosine":
                return torch.sin(0.5 * math.pi * times)
            case "rectified_flow":
                return self.config.shift * times / (1 + (self.config.shift - 1) * times)

    def clock(self, times: Tensor) -> Tensor:
        return self.sigma(times) if self.config.clock == "std" else times

    def visible(self, state: Tensor, times: Tensor) -> None:
        return None

    def lengths(self, state: Tensor, times: Tensor) -> None:
        return None

    # -------------------------------------------------------------------------------------------------------- noising

    def noise(self, clean: Tensor, times: Tensor, keys: Tensor) -> NoisedState:
        noise = rng.normal(keys, f"{self.name} noise", clean.shape[1:])
        alpha, sigma = wide(self.alpha(times)), wide(self.sigma(times))
        return NoisedState(alpha * clean + sigma * noise, self.target(clean, noise, times))

    def prior(self, keys: Tensor) -> Tensor:
        return rng.normal(keys, f"{self.name} prior", self.shape)

    def renoise(self, state: Tensor, times: Tensor, later: Tensor, keys: Tensor) -> Tensor:
        ratio = self.alpha(later) / self.alpha(times).clamp_min(SMALLEST_DIVISOR)
        added = (self.sigma(later) ** 2 - (ratio * self.sigma(times)) ** 2).clamp_min(0).sqrt()
        return wide(ratio) * state + wide(added) * rng.normal(keys, f"{self.name} renoise", state.shape[1:])

    def pin(self, state: Tensor, clean: Tensor, where: Tensor, times: Tensor, keys: Tensor) -> Tensor:
        return torch.where(where, self.noise(clean, times, keys).state, state)

    # ------------------------------------------------------------------------------------------------------- training

    def readout(self, noised: NoisedState, times: Tensor, scored: Tensor) -> Dense:
        return Dense()

    def counts(self, noised: NoisedState, *, exact: bool = False) -> Tensor:
        return torch.full((len(noised.state),), float(math.prod(noised.state.shape[1:])), device=noised.state.device)

    def losses(self, prediction: Tensor, noised: NoisedState, times: Tensor, *, exact: bool = False) -> Losses:
        """Squared error, weighted in time where the configuration asks for it; `exact`: unweighted."""
        errors = (prediction.float() - noised.target.float()).square().flatten(1).sum(1)
        match self.config.loss_weight:
            case "min_snr" if not exact:
                errors = errors * self.min_snr_weight(times)
            case "velocity" if not exact:
                errors = errors * self.velocity_weight(times)
        return Losses(errors, self.counts(noised))

    def velocity_weight(self, times: Tensor) -> Tensor:
        """[B]: the weight of the clean state's squared error that gives the velocity's, (1 + alpha / sigma)^2, up to 400.

        The cap is met at sigma / (alpha + sigma) = 0.05. Source: Li and He, "Back to Basics", arXiv 2511.13720.
        """
        alpha, sigma = self.alpha(times), self.sigma(times)
        return ((alpha + sigma) / sigma.clamp_min(1e-6)).square().clamp_max(VELOCITY_WEIGHT_CAP)

    def min_snr_weight(self, times: Tensor) -> Tensor:
        """[B]: the weight of the target's squared error that gives the clean state's min(SNR, gamma); SNR = (alpha / sigma)^2.

        For a given noised state, an error e of the clean state is alpha / sigma * e in the noise, e / sigma in v (where
        alpha^2 + sigma^2 = 1) and (1 + alpha / sigma) * e in the velocity. Source: Hang et al., arXiv 2303.09556.
        """
        alpha, sigma = self.alpha(times), self.sigma(times).clamp_min(1e-6)
        ratio = alpha / sigma
        capped = (ratio**2).clamp_max(self.config.min_snr_gamma)
        match self.config.target:
            case "epsilon":
                return capped / (ratio**2).clamp_min(1e-12)
            case "clean":
                return capped
            case "v":
                return capped * sigma**2
            case "velocity":
                return capped / (1 + ratio) ** 2

    # ---------------------------------------------------------------------------------------------------- conversions

    def _mixture(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with target = a * clean + b * noise, [B, 1, 1, 1] each."""
        zero = torch.zeros_like(times)
        match self.config.target:
            case "epsilon":
                pair = zero, zero + 1
            case "clean":
                pair = zero + 1, zero
            case "v":
                pair = -self.sigma(times), self.alpha(times)
            case "velocity":
                pair = zero - 1, zero + 1
        return wide(pair[0]), wide(pair[1])

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The network's target."""
        of_clean, of_noise = self._mixture(times)
        return of_clean * clean + of_noise * noise

    def clean_and_noise(self, prediction: Tensor, state: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(clean, noise) of a prediction: the solution of two linear equations, exact for every target.

        Their determinant is alpha for epsilon, -sigma for clean, alpha^2 + sigma^2 for v and alpha + sigma for the velocity;
        the last two are never 0. From epsilon, clean is divided by alpha: 0.069 for vp at t = 1, 0 for the others;
        from clean, noise is divided by sigma, 0 at t = 0. These divisions would multiply a prediction's error without bound, so
        the clean state is taken to be 0 there, the middle of the data's range, and the noise likewise.
        """
        alpha, sigma = wide(self.alpha(times)), wide(self.sigma(times))
        if self.config.target == "epsilon":
            return _quotient(state - sigma * prediction, alpha), prediction
        if self.config.target == "clean":
            return prediction, _quotient(state - alpha * prediction, sigma)
        of_clean, of_noise = self._mixture(times)
        determinant = alpha * of_noise - sigma * of_clean
        clean = (of_noise * state - sigma * prediction) / determinant
        noise = (alpha * prediction - of_clean * state) / determinant
        return clean, noise

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        """The derivative that `integrate` steps along: noise - clean."""
        clean, noise = self.clean_and_noise(prediction, state, times)
        return noise - clean

    def time_slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        """The derivative of the state in t itself along the probability-flow ODE: alpha'(t) clean + sigma'(t) noise."""
        clean, noise = self.clean_and_noise(prediction, state, times)
        of_clean, of_noise = self._rates(times)
        return wide(of_clean) * clean + wide(of_noise) * noise

    def _rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha'(t), sigma'(t)), [B] each; sigma' of vp grows without bound towards t = 0 and is capped there."""
        match self.config.schedule:
            case "vp":
                root = BETA_START**0.5 + (BETA_END**0.5 - BETA_START**0.5) * times
                alpha = self.alpha(times)
                of_alpha = -0.5 * DISCRETE_STEPS * root**2 * alpha
                return of_alpha, -alpha * of_alpha / self.sigma(times).clamp_min(1e-6)
            case "cosine":
                return -0.5 * math.pi * self.sigma(times), 0.5 * math.pi * self.alpha(times)
            case "rectified_flow":
                rate = self.config.shift / (1 + (self.config.shift - 1) * times) ** 2
                return -rate, rate

    def integrate(self, state: Tensor, times: Tensor, earlier: Tensor, slope: Tensor) -> Tensor:
        """One step of the probability-flow ODE from `times` to `earlier` with a constant slope.

        Every schedule is a rectified flow in other units: state / (alpha + sigma) has derivative noise - clean in
        sigma / (alpha + sigma). A step is therefore exact while clean and noise are constant, divides by neither alpha nor
        sigma alone, and at t = 0 returns the clean state of the slope.
        """
        now, then = (self.alpha(at) + self.sigma(at) for at in (times, earlier))
        distance = self.sigma(earlier) / then - self.sigma(times) / now
        return wide(then / now) * state + wide(then * distance) * slope


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where `below` is too small to divide by."""
    return torch.where(below < SMALLEST_DIVISOR, 0.0, above / below.clamp_min(SMALLEST_DIVISOR))


def wide(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
