"""Sampling: all clocks of the generated modalities run together from 1 to 0; the others stand still.

It needs a Denoiser and nothing else. Random numbers are keyed by sample, step and purpose: the same key gives the same sample
in any batch, on any rank.
Legend: B samples, S tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.process import build_processes
from megadiff.diffusion.solvers import build_solver
from megadiff.types import Denoiser

States = dict[str, Tensor]


class Sampler:
    """Heun for Gaussian modalities, exact ancestral unmasking for masked ones, on one grid of times for all."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.sampling = sampling
        self.processes = build_processes(model)
        self.solvers = {name: build_solver(process) for name, process in self.processes.items()}

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
            UserError: nothing is to be generated, a modality is unknown, or it is both given and generated.
        """
        self._check(generate, given, initial or {})
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

    def _check(self, generate: Sequence[str], given: Collection[str], initial: Collection[str]) -> None:
        known = list(self.processes)
        if not generate:
            raise UserError(f"nothing is to be generated; name at least one modality of {', '.join(known)}")
        if unknown := [name for name in (*generate, *given, *initial) if name not in known]:
            raise UserError(f"this model has no modality {', '.join(unknown)}; it has {', '.join(known)}")
        if both := [name for name in generate if name in given]:
            raise UserError(f"{', '.join(both)} cannot be given and generated at once; leave it out of one of the two")
        if idle := [name for name in initial if name not in generate]:
            raise UserError(f"initial states are for generated modalities, and {', '.join(idle)} is not one of them")

    def _grid(self, generate: Sequence[str]) -> list[float]:
        """Times from 1 to 0: evenly spaced, or evenly spaced in sqrt(t) where a vp modality is generated.

        vp's sigma grows as sqrt(t) near 0: on an even grid of 50 steps the last one, which is Euler's, would begin at sigma =
        0.13, and Heun's method would be of first order.
        """
        even = torch.linspace(1.0, 0.0, self.sampling.steps + 1, dtype=torch.float64)
        steep = any(self.solvers[name].steep_at_zero for name in generate)
        times: list[float] = (even**2 if steep else even).tolist()
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
        shown it.
        """
        requests = {name: self.solvers[name].request(states[name], now[name], then[name], keys) for name in generate}
        first = guided(states, now, requests)
        moved = {
            name: self.solvers[name].move(states[name], now[name], then[name], keys, requests[name], first[name])
            for name in generate
        }
        ends = {**states, **{name: end.state for name, end in moved.items()}}
        unfinished = [name for name in generate if moved[name].slope is not None]
        if not unfinished:
            return ends
        second = guided(ends, then, {name: requests[name] for name in unfinished})
        corrected = {
            name: self.solvers[name].correct(states[name], now[name], then[name], moved[name], second[name])
            for name in unfinished
        }
        return {**ends, **corrected}
