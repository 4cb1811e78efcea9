"""Sampling: all clocks of the generated modalities run together to 0; the others stand still.

It needs a Denoiser and nothing else. Random numbers are keyed by sample, step and purpose: a key gives the same sample in any
batch, on any rank.
Legend: B samples, S tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config import checks
from megadiff.config.errors import UserError
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.build import build_processes, build_solver
from megadiff.diffusion.categorical_solvers import FirstHitting
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.guidance import Guided
from megadiff.diffusion.solvers import Solver, SolverStep
from megadiff.diffusion.times import SMALLEST_TIME
from megadiff.types import Denoiser

States = dict[str, Tensor]
Times = dict[str, Tensor]
"""Per modality [B], on the CPU."""

KARRAS_POWER = 7.0
LARGEST_RATIO, SMALLEST_RATIO = 80.0, 0.002
"""Ends of the karras grid in sigma / alpha (Karras et al. 2022, table 1)."""


class Known(NamedTuple):
    """The known part of a generated modality: clean states, and the places where they are known, bool of the same shape."""

    clean: Tensor
    where: Tensor


class Conditions(NamedTuple):
    """The conditions of samples. Modalities that are neither given nor generated are absent (t = 1).

    Attributes:
        given: clean states [B, ...] of modalities that are not generated.
        held_at: the time at which each given modality is held, 0 by default; above 0 it is noised once.
        known: known parts of generated modalities.
        initial: states to start from; the prior's draws by default.
        start_at: the time of each initial state, from which its clock runs; 1 by default.
    """

    given: Mapping[str, Tensor] = {}
    held_at: Mapping[str, float] = {}
    known: Mapping[str, Known] = {}
    initial: Mapping[str, Tensor] = {}
    start_at: Mapping[str, float] = {}

    def part(self, rows: slice) -> Conditions:
        """The conditions of some samples."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Conditions:
        """The same conditions on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """The conditions with `change` applied to every tensor."""
        return self._replace(
            given={name: change(state) for name, state in self.given.items()},
            known={name: Known(*(change(tensor) for tensor in known)) for name, known in self.known.items()},
            initial={name: change(state) for name, state in self.initial.items()},
        )


NOTHING = Conditions()


class Sampler:
    """Draws any modalities given any others, wholly or in part."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        """Raises ConfigError if a modality's process does not support the order that `sampling` names."""
        checks.require(checks.order_faults(model, sampling))
        self.sampling = sampling
        self.processes = build_processes(model)

    def sample(
        self,
        denoiser: Denoiser,
        keys: Tensor,
        *,
        generate: Sequence[str],
        conditions: Conditions = NOTHING,
        guide: Denoiser | None = None,
        progress: Callable[[int, int], None] | None = None,
        after_step: Callable[[int, Times, States], States] | None = None,
    ) -> States:
        """Draw the modalities `generate`.

        Args:
            keys: int64 [B], one per sample.
            guide: a weaker network for autoguidance.
            progress: called with (steps done, steps in all).
            after_step: called with (step, clocks at its end, states); sampling continues from the states that it returns.

        Returns:
            Clean states of the generated modalities, and the unchanged states of the others.

        Raises:
            UserError: nothing is to be generated, or the conditions contradict `generate`.
        """
        self._check(generate, conditions)
        run = _Run(self, keys, generate, conditions, Guided(denoiser, self.processes, self.sampling, keys, guide))
        steps = run.steps()
        if after_step is None and not conditions.known:  # else others than the solvers change the states
            run.plan([(now, then, rng.fold(keys, index)) for index, (now, then, _) in enumerate(steps)])
        for index, (now, then, again) in enumerate(steps):
            run.advance(now, then, rng.fold(keys, index), again=again)
            if after_step:
                run.states = after_step(index, then, run.states)
            done = run.finished()
            if progress:
                progress(len(steps) if done else index + 1, len(steps))
            if done:
                break
        return run.states

    def noised(self, name: str, clean: Tensor, time: float, keys: Tensor) -> Tensor:
        """Clean states at a time, with noise that belongs to the keys."""
        return self.processes[name].noise(clean, torch.full((len(keys),), time, device=keys.device), keys).state

    def _check(self, generate: Sequence[str], conditions: Conditions) -> None:
        known = list(self.processes)
        if not generate:
            raise UserError(f"nothing is to be generated; name at least one modality of {', '.join(known)}")
        named = (*generate, *(name for part in conditions for name in part))
        if unknown := [name for name in named if name not in known]:
            raise UserError(f"this model has no modality {', '.join(unknown)}; it has {', '.join(known)}")
        if both := [name for name in generate if name in conditions.given]:
            raise UserError(f"{', '.join(both)} cannot be given and generated at once; leave it out of one of the two")
        for what, names in (("initial states", conditions.initial), ("known parts", conditions.known)):
            if idle := [name for name in names if name not in generate]:
                raise UserError(f"{what} are for generated modalities, and {', '.join(idle)} is not one of them")
        for section in (conditions.held_at, conditions.start_at):
            if wrong := [f"{name} {time:g}" for name, time in section.items() if not 0 <= time <= 1]:
                raise UserError(f"times lie between 0 and 1: {', '.join(wrong)}")

    def grid(self, generate: Collection[str]) -> list[float]:
        """The fraction of the run that is left at the ends of its steps, from 1 to 0."""
        even = torch.linspace(1.0, 0.0, self.sampling.steps + 1, dtype=torch.float64)
        gaussian = [p for name, p in self.processes.items() if name in generate and isinstance(p, Gaussian)]
        kind = self.sampling.grid
        if kind == "auto":
            # vp's sigma grows as sqrt(t). The last step, which is Euler's, would begin at sigma = 0.13 on an even grid of 50
            # steps, and Heun's method would be of first order.
            kind = "square" if any(process.config.schedule == "vp" for process in gaussian) else "uniform"
        match kind:
            case "square":
                even = even**2
            case "paper":
                even[:-1] = torch.linspace(1.0, SMALLEST_TIME, self.sampling.steps, dtype=torch.float64)
            case "shifted":
                even = self.sampling.grid_shift * even / (1 + (self.sampling.grid_shift - 1) * even)
            case "karras" if gaussian:
                even = _karras(gaussian[0], self.sampling.steps)
        fractions: list[float] = even.tolist()
        return fractions


class _Run:
    """One call of the sampler: states, clocks and solvers."""

    def __init__(self, sampler: Sampler, keys: Tensor, generate: Sequence[str], conditions: Conditions, guided: Guided) -> None:
        self.sampler, self.keys, self.guided = sampler, keys, guided
        self.generate, self.conditions = list(generate), conditions
        self.start = {name: conditions.start_at.get(name, 1.0) for name in generate}
        self.states: States = {name: self._first(name) for name in sampler.processes}
        self.solvers: dict[str, Solver] = {
            name: build_solver(sampler.processes[name], sampler.sampling, keys, self._at(name), self._fixed(name))
            for name in generate
        }

    def clocks(self) -> list[Times]:
        """Every clock at the ends of the steps."""
        events = self._events()
        if events is not None:
            ends = [{self.generate[0]: times} for times in events]
        else:
            ends = [
                {name: self._full(self.start[name] * self.solvers[name].warp(fraction)) for name in self.generate}
                for fraction in self.sampler.grid(self.generate)
            ]
        standing = {
            name: self._full(self.conditions.held_at.get(name, 0.0) if name in self.conditions.given else 1.0)
            for name in self.sampler.processes
        }
        return [{**standing, **end} for end in ends]

    def steps(self) -> list[tuple[Times, Times, bool]]:
        """(from, to, and whether the step is repeated) of every step.

        RePaint: with known parts every step is made several times, its noise put back in between. The unknown part moved
        without seeing the known part's new noise, and sees it in the repetition.
        """
        repeats = self.sampler.sampling.resample if self.conditions.known else 1
        return [(now, then, repeat + 1 < repeats) for now, then in pairwise(self.clocks()) for repeat in range(repeats)]

    def plan(self, steps: Sequence[tuple[Times, Times, Tensor]]) -> None:
        """Let the solvers plan all steps: (from, to, keys)."""
        solver_steps = [self._steps(*step) for step in steps]
        for name, solver in self.solvers.items():
            solver.plan(self.states[name], [step[name] for step in solver_steps])

    def advance(self, now: Times, then: Times, keys: Tensor, *, again: bool) -> None:
        """One step; `again` puts its noise back, so that it can be repeated."""
        steps = self._steps(now, then, keys)
        self._move(now, then, steps)
        if again:
            self._put_noise_back(steps)

    def finished(self) -> bool:
        return all(solver.finished(self.states[name]) for name, solver in self.solvers.items())

    def _move(self, now: Times, then: Times, steps: Mapping[str, SolverStep]) -> None:
        """All generated modalities over one step.

        A second evaluation is made at the end point, with every clock at `then`: Gaussian modalities stand where the first
        evaluation led, tokens as just unmasked. So the network only ever sees states as in its training.
        """
        requests = {name: solver.request(self.states[name], steps[name]) for name, solver in self.solvers.items()}
        first = self.guided(self.states, now, requests)
        moves = {
            name: solver.move(self.states[name], steps[name], requests[name], first[name])
            for name, solver in self.solvers.items()
        }
        moves = {name: end._replace(state=self._pinned(name, end.state, steps[name].then)) for name, end in moves.items()}
        ends = {**self.states, **{name: end.state for name, end in moves.items()}}
        second_order = [name for name, end in moves.items() if end.slope is not None]
        if second_order:
            second = self.guided(ends, then, {name: requests[name] for name in second_order})
            for name in second_order:
                corrected = self.solvers[name].correct(self.states[name], steps[name], moves[name], second[name])
                ends[name] = self._pinned(name, corrected, steps[name].then)
        self.states = ends

    def _put_noise_back(self, steps: Mapping[str, SolverStep]) -> None:
        for name, step in steps.items():
            noisier = self.sampler.processes[name].renoise(self.states[name], step.then, step.now, rng.fold(step.keys, "again"))
            self.states[name] = self._pinned(name, noisier, step.now)
            self.solvers[name].forget()

    def _first(self, name: str) -> Tensor:
        process = self.sampler.processes[name]
        if name in self.conditions.given:
            time = self.conditions.held_at.get(name, 0.0)
            clean = self.conditions.given[name]
            return self.sampler.noised(name, clean, time, rng.fold(self.keys, "held")) if time > 0 else clean
        state = self.conditions.initial[name] if name in self.conditions.initial else process.prior(self.keys)
        return self._pinned(name, state, self._at(name)) if name in self.generate else state

    def _pinned(self, name: str, state: Tensor, times: Tensor) -> Tensor:
        if name not in self.conditions.known:
            return state
        clean, where = self.conditions.known[name]
        return self.sampler.processes[name].pin(state, clean, where, times, rng.fold(self.keys, "known"))

    def _fixed(self, name: str) -> Tensor | None:
        return self.conditions.known[name].where if name in self.conditions.known else None

    def _events(self) -> Tensor | None:
        """Clocks [E + 1, B] of a solver with times of its own, if it is the only one that runs; else None."""
        solver = self.solvers[self.generate[0]]
        if len(self.generate) > 1 or not isinstance(solver, FirstHitting):
            return None
        return solver.events(self.states[self.generate[0]]).cpu()

    def _steps(self, now: Times, then: Times, keys: Tensor) -> dict[str, SolverStep]:
        def on_device(times: Tensor) -> Tensor:
            return times.to(keys.device, torch.float32)

        last = {name: not bool(then[name].any()) for name in self.generate}
        return {name: SolverStep(on_device(now[name]), on_device(then[name]), keys, last[name]) for name in self.generate}

    def _at(self, name: str) -> Tensor:
        """A generated modality's starting time, float32 [B]."""
        return torch.full((len(self.keys),), self.start[name], device=self.keys.device)

    def _full(self, time: float) -> Tensor:
        return torch.full((len(self.keys),), time)


def _karras(process: Gaussian, steps: int) -> Tensor:
    """Float64 [steps + 1], from 1 to 0: times at which the 7th root of sigma / alpha falls evenly.

    Source: Karras et al. 2022, eq. 5, with this ratio for that paper's sigma (its alpha is 1).
    """

    def ratio(times: Tensor) -> Tensor:
        return process.sigma(times) / process.alpha(times).clamp_min(1e-12)

    one = torch.ones(1, dtype=torch.float64)
    ends = [min(float(ratio(one)), LARGEST_RATIO) ** (1 / KARRAS_POWER), SMALLEST_RATIO ** (1 / KARRAS_POWER)]
    targets = torch.linspace(ends[0], ends[1], max(steps, 2), dtype=torch.float64)[:steps] ** KARRAS_POWER
    low, high = torch.zeros_like(targets), torch.ones_like(targets)
    for _ in range(60):  # the ratio grows with the time
        middle = (low + high) / 2
        above = ratio(middle) > targets
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    high[0] = 1.0
    return torch.cat([high, torch.zeros(1, dtype=torch.float64)])
