"""Sampling: all clocks of the generated modalities run together from 1 to 0; the others stand still.

It needs a Denoiser and nothing else. Random numbers are keyed by sample, step and purpose: the same key gives the same sample
in any batch, on any rank.
Legend: B samples, S tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import build_processes
from megadiff.types import Denoiser, Dense, Prediction, Readout, RowLogits

States = dict[str, Tensor]


class Sampler:
    """Heun for Gaussian modalities, exact ancestral unmasking for masked ones, on one grid of times for all."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.sampling = sampling
        self.processes = build_processes(model)

    def sample(
        self,
        denoiser: Denoiser,
        keys: Tensor,
        *,
        generate: Sequence[str],
        given: Mapping[str, Tensor],
        initial: Mapping[str, Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> States:
        """Draw the modalities `generate`.

        Args:
            keys: int64 [B], one per sample.
            given: clean states [B, ...], held at t = 0. A modality that is neither given nor generated is absent (t = 1).
            initial: states at t = 1 to start from; the prior's draws by default.
            progress: called with (steps done, steps in all).

        Returns:
            Clean states of all modalities; absent ones as their prior.

        Raises:
            UserError: a modality is unknown, or both given and generated.
        """
        wrong = [name for name in (*generate, *given) if name not in self.processes] + [
            name for name in generate if name in given
        ]
        if wrong or not generate:
            raise UserError(
                f"cannot generate {', '.join(generate) or 'nothing'} given {', '.join(given) or 'nothing'}: {', '.join(wrong)}"
            )
        states = {name: given[name] if name in given else process.prior(keys) for name, process in self.processes.items()}
        states |= dict(initial or {})
        guided = Guided(denoiser, self.processes, self.sampling, keys)
        times = self._grid(generate)
        for step in range(self.sampling.steps):
            clocks = [{n: t if n in generate else 0.0 if n in given else 1.0 for n in states} for t in times[step : step + 2]]
            states = self._step(guided, states, clocks[0], clocks[1], generate, rng.fold(keys, step))
            if progress:
                progress(step + 1, self.sampling.steps)
        return states

    def _grid(self, generate: Sequence[str]) -> list[float]:
        """Times from 1 to 0: evenly spaced, or evenly spaced in sqrt(t) where a vp modality is generated.

        vp's sigma grows as sqrt(t) near 0: on an even grid of 50 steps the last one, which is Euler's, would begin at sigma =
        0.13, and Heun's method would be of first order.
        """
        even = torch.linspace(1.0, 0.0, self.sampling.steps + 1, dtype=torch.float64)
        processes = [self.processes[name] for name in generate]
        vp = any(isinstance(process, Gaussian) and process.config.schedule == "vp" for process in processes)
        times: list[float] = (even**2 if vp else even).tolist()
        return times

    def _step(
        self,
        guided: Guided,
        states: States,
        now: dict[str, float],
        then: dict[str, float],
        generate: Sequence[str],
        keys: Tensor,
    ) -> States:
        """All generated modalities from their times `now` to `then`.

        Heun's second evaluation happens at the end point, where every clock stands at `then`: Gaussian modalities at Euler's
        prediction, tokens as they have just been unmasked. So the network is only ever asked about states that its training has
        shown it. The last step, to t = 0, is Euler's.
        """
        chosen = {
            name: self._chosen(name, states[name], now[name], then[name], keys) for name in generate if self._masked(name)
        }
        readout: dict[str, Readout] = {name: RowLogits(chosen[name]) if name in chosen else Dense() for name in generate}
        first = guided(states, now, readout)
        slopes = self._slopes(first, states, now, generate)
        moved = dict(states)
        for name in generate:
            process = self.processes[name]
            if isinstance(process, Masked):
                moved[name] = process.fill(states[name], chosen[name], first[name], keys)
            elif isinstance(process, Gaussian):
                moved[name] = self._integrate(process, states[name], now[name], then[name], slopes[name])
        if not slopes or any(then[name] == 0 for name in slopes):
            return moved
        second = self._slopes(guided(moved, then, {name: Dense() for name in slopes}), moved, then, generate)
        for name, slope in slopes.items():
            process = self.processes[name]
            if isinstance(process, Gaussian):
                average = 0.5 * (slope + second[name])
                moved[name] = self._integrate(process, states[name], now[name], then[name], average)
        return moved

    def _masked(self, name: str) -> bool:
        return isinstance(self.processes[name], Masked)

    def _chosen(self, name: str, state: Tensor, now: float, then: float, keys: Tensor) -> Tensor:
        """Flat positions int64 [R] of the tokens that become visible in this step."""
        process = self.processes[name]
        assert isinstance(process, Masked)
        return process.chosen(state, _vector(now, keys), _vector(then, keys), keys).flatten().nonzero()[:, 0]

    def _slopes(self, prediction: Prediction, states: States, times: dict[str, float], generate: Sequence[str]) -> States:
        slopes = {}
        for name in generate:
            process = self.processes[name]
            if isinstance(process, Gaussian):
                slopes[name] = process.slope(prediction[name].float(), states[name], _vector(times[name], states[name]))
        return slopes

    def _integrate(self, process: Gaussian, state: Tensor, now: float, then: float, slope: Tensor) -> Tensor:
        return process.integrate(state, _vector(now, state), _vector(then, state), slope)


def _vector(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, dtype=torch.float32, device=like.device)
