"""Solvers of Gaussian modalities: Heun's method and DPM-Solver++, as ODEs and SDEs.

Legend: B samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megadiff import rng
from megadiff.diffusion.gaussian import SMALLEST_DIVISOR, Gaussian, wide
from megadiff.diffusion.solvers import Solver, SolverBase, SolverStep, StepEnd
from megadiff.types import Dense


class Heun(SolverBase):
    """Second order: Euler's step, then the step again with the average of the slopes at both ends.

    The step to t = 0 is Euler's alone: without noise there is no slope.
    """

    def __init__(self, process: Gaussian) -> None:
        self.process = process

    def request(self, state: Tensor, step: SolverStep) -> Dense:
        return Dense()

    def move(self, state: Tensor, step: SolverStep, request: Dense, prediction: Tensor) -> StepEnd:
        slope = self.slope(prediction.float(), state, step.now)
        return StepEnd(self.integrate(state, step, slope), None if step.last else slope)

    def correct(self, state: Tensor, step: SolverStep, end: StepEnd, prediction: Tensor) -> Tensor:
        if end.slope is None:
            return end.state
        slope = 0.5 * (end.slope + self.slope(prediction.float(), end.state, step.then))
        corrected = self.integrate(state, step, slope)
        # The clean state alone does not determine the noise where next to none is left.
        blind = (self.process.config.target == "clean") & (self.process.sigma(step.then) < SMALLEST_DIVISOR)
        return torch.where(wide(blind), end.state, corrected)

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        return self.process.slope(prediction, state, times)

    def integrate(self, state: Tensor, step: SolverStep, slope: Tensor) -> Tensor:
        return self.process.integrate(state, step.now, step.then, slope)


class HeunInTime(Heun):
    """Heun's method along t itself, as in the paper's code. Its step to t = 0 leaves about half of the noise in."""

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        return self.process.time_slope(prediction, state, times)

    def integrate(self, state: Tensor, step: SolverStep, slope: Tensor) -> Tensor:
        return state + wide(step.then - step.now) * slope


class DPMSolverPlusPlus(SolverBase):
    """DPM-Solver++ of first order (Euler's step with clean and noise held fixed, DDIM) or second (2M), as an ODE or an SDE.

    h is the step in log(alpha / sigma); D is the clean state, for order 2 extrapolated from the step before.
    ODE: sigma_s / sigma_t x + alpha_s (1 - e^-h) D. SDE: sigma_s / sigma_t e^-h x + alpha_s (1 - e^-2h) D + noise of deviation
    sigma_s sqrt(1 - e^-2h), the exact step of the reverse SDE for a constant D. Steps of infinite h (from alpha = 0, to
    sigma = 0) are of first order, which is exact there. Source: Lu et al., arXiv 2211.01095, algorithms 2 and 4 and appendix.
    """

    def __init__(self, process: Gaussian, *, order: int, stochastic: bool) -> None:
        self.process, self.order, self.stochastic = process, order, stochastic
        self._previous: tuple[Tensor, Tensor] | None = None
        """Clean state and h of the step before."""

    def request(self, state: Tensor, step: SolverStep) -> Dense:
        return Dense()

    def move(self, state: Tensor, step: SolverStep, request: Dense, prediction: Tensor) -> StepEnd:
        clean, _ = self.process.clean_and_noise(prediction.float(), state, step.now)
        alpha, sigma = self.process.alpha(step.then), self.process.sigma(step.then)
        # A clock that stands (a start at t = 0) would divide 0 by 0. Its state stays as it is.
        standing = wide(step.now == step.then)
        ratio = sigma / self.process.sigma(step.now)
        decay = ratio * self.process.alpha(step.now) / alpha  # e^-h
        target = self._extrapolated(clean, -decay.log(), step.last)
        if not self.stochastic:
            return StepEnd(torch.where(standing, state, wide(ratio) * state + wide(alpha * (1 - decay)) * target))
        mean = wide(ratio * decay) * state + wide(alpha * (1 - decay**2)) * target
        noise = rng.normal(step.keys, f"{self.process.name} step", self.process.shape)
        end = mean + wide(sigma * (1 - decay**2).clamp_min(0).sqrt()) * noise
        return StepEnd(torch.where(standing, state, end))

    def forget(self) -> None:
        self._previous = None

    def _extrapolated(self, clean: Tensor, h: Tensor, last: bool) -> Tensor:
        previous, self._previous = self._previous, (clean, h)
        if self.order == 1 or previous is None or last:
            return clean
        return clean + wide(h / (2 * previous[1])) * (clean - previous[0])


GAUSSIAN_SOLVERS: dict[str, Callable[[Gaussian], Solver]] = {
    "heun": Heun,
    "heun_time": HeunInTime,
    "euler": lambda process: DPMSolverPlusPlus(process, order=1, stochastic=False),
    "dpmpp_2m": lambda process: DPMSolverPlusPlus(process, order=2, stochastic=False),
    "sde_euler": lambda process: DPMSolverPlusPlus(process, order=1, stochastic=True),
    "sde_dpmpp_2m": lambda process: DPMSolverPlusPlus(process, order=2, stochastic=True),
}
