"""How one modality moves from a time to an earlier one.

A solver asks for a readout at the step's beginning, moves its state with the answer, and may ask once more at the step's end.
It knows its own modality only; the sampler keeps all clocks together. A solver belongs to one run of the sampler: some remember
what they saw before.
Legend: B samples, S tokens, R rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Sampling
from megadiff.diffusion.categorical import SMALLEST_SHARE
from megadiff.diffusion.gaussian import SMALLEST_SHARE as SMALLEST_NOISE
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import Process
from megadiff.diffusion.uniform import Uniform
from megadiff.types import Dense, Drawn, DrawRule, Readout, RowKeys, SampledRows

LOOP_FROM, LOOP_TO, LOOP_SHARE = 0.55, 0.05, 0.1
"""ReMDM-loop: between these parts of the run the clock stands where this share of the tokens is masked."""


class Step(NamedTuple):
    """One step: times float32 [B] at its ends, keys int64 [B] that no other step has, and whether it is the one to t = 0."""

    now: Tensor
    then: Tensor
    keys: Tensor
    last: bool


class Moved(NamedTuple):
    """A state at the step's end, and the slope that led there; None where no second evaluation is wanted."""

    state: Tensor
    slope: Tensor | None = None


class Solver(Protocol):
    """The steps of one modality.

    Which steps want a second evaluation must not depend on the samples: under ZeRO-3 all ranks make the same calls.
    """

    steep_at_zero: bool
    """Whether the process changes as sqrt(t) near t = 0, so that steps should be even in sqrt(t)."""

    def warp(self, fraction: float) -> float:
        """Where the clock stands when this fraction of the run is left, as a share of its starting time."""

    def plan(self, state: Tensor, steps: Sequence[Step]) -> None:
        """Told before the run the state and all its steps, where each is made once: what they will ask for can be counted."""

    def request(self, state: Tensor, step: Step) -> Readout:
        """What to read out at the step's beginning."""

    def move(self, state: Tensor, step: Step, request: Any, prediction: Any) -> Moved:
        """The state at the step's end, from what `request` gave."""

    def correct(self, state: Tensor, step: Step, moved: Moved, prediction: Any) -> Tensor:
        """The same, from a second prediction made at `moved`; asked for only where `moved` has a slope."""

    def finished(self, state: Tensor) -> bool:
        """Whether further steps would change nothing."""

    def forget(self) -> None:
        """The next step does not go on from the last one."""


class _Plain:
    """What most solvers do not do."""

    steep_at_zero = False

    def warp(self, fraction: float) -> float:
        return fraction

    def plan(self, state: Tensor, steps: Sequence[Step]) -> None:
        """Nothing depends on it."""

    def correct(self, state: Tensor, step: Step, moved: Moved, prediction: Any) -> Tensor:
        return moved.state

    def finished(self, state: Tensor) -> bool:
        return False

    def forget(self) -> None:
        """There is nothing to forget."""


# ------------------------------------------------------------------------------------------------------------ continuous


class Heun(_Plain):
    """Second order: Euler's step, then the step again with the average of the slopes at both ends.

    The step to t = 0 is Euler's alone: at t = 0 there is no noise whose slope could be told.
    """

    def __init__(self, process: Gaussian) -> None:
        self.process = process
        self.steep_at_zero = process.config.schedule == "vp"

    def request(self, state: Tensor, step: Step) -> Dense:
        return Dense()

    def move(self, state: Tensor, step: Step, request: Dense, prediction: Tensor) -> Moved:
        slope = self.slope(prediction.float(), state, step.now)
        return Moved(self.integrate(state, step, slope), None if step.last else slope)

    def correct(self, state: Tensor, step: Step, moved: Moved, prediction: Tensor) -> Tensor:
        if moved.slope is None:
            return moved.state
        slope = 0.5 * (moved.slope + self.slope(prediction.float(), moved.state, step.then))
        corrected = self.integrate(state, step, slope)
        # Where there is next to no noise left, the clean state alone does not tell which it is.
        blind = (self.process.config.target == "clean") & (self.process.sigma(step.then) < SMALLEST_NOISE)
        return torch.where(_wide(blind), moved.state, corrected)

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        return self.process.slope(prediction, state, times)

    def integrate(self, state: Tensor, step: Step, slope: Tensor) -> Tensor:
        return self.process.integrate(state, step.now, step.then, slope)


class HeunInTime(Heun):
    """Heun's method along t itself, as in the paper's code: a step to t = 0 leaves about half of its noise in."""

    def slope(self, prediction: Tensor, state: Tensor, times: Tensor) -> Tensor:
        return self.process.time_slope(prediction, state, times)

    def integrate(self, state: Tensor, step: Step, slope: Tensor) -> Tensor:
        return state + _wide(step.then - step.now) * slope


class Exponential(_Plain):
    """DPM-Solver++ of first order (Euler's step with clean and noise held fixed, DDIM) or second (2M), as an ODE or an SDE.

    With h the step in log(alpha / sigma) and D the clean state, extrapolated by the step before where the order is 2:
    ODE: sigma_s / sigma_t x + alpha_s (1 - e^-h) D. SDE: sigma_s / sigma_t e^-h x + alpha_s (1 - e^-2h) D + noise of deviation
    sigma_s sqrt(1 - e^-2h), the exact step of the reverse SDE for a constant D. Where h is infinite (from alpha = 0, to
    sigma = 0) the first order is exact and taken. Source: Lu et al., arXiv 2211.01095, algorithms 2 and 4 and appendix.
    """

    def __init__(self, process: Gaussian, *, order: int, stochastic: bool) -> None:
        self.process, self.order, self.stochastic = process, order, stochastic
        self.steep_at_zero = process.config.schedule == "vp"
        self._before: tuple[Tensor, Tensor] | None = None

    def request(self, state: Tensor, step: Step) -> Dense:
        return Dense()

    def move(self, state: Tensor, step: Step, request: Dense, prediction: Tensor) -> Moved:
        clean, _ = self.process.clean_and_noise(prediction.float(), state, step.now)
        alpha, sigma = self.process.alpha(step.then), self.process.sigma(step.then)
        # A clock that stands (a start at t = 0) would divide 0 by 0; its state stays as it is.
        standing = _wide(step.now == step.then)
        ratio = sigma / self.process.sigma(step.now)
        decay = ratio * self.process.alpha(step.now) / alpha  # e^-h
        aim = self._extrapolated(clean, -decay.log(), step.last)
        if not self.stochastic:
            return Moved(torch.where(standing, state, _wide(ratio) * state + _wide(alpha * (1 - decay)) * aim))
        moved = _wide(ratio * decay) * state + _wide(alpha * (1 - decay**2)) * aim
        noise = rng.normal(step.keys, f"{self.process.name} step", self.process.shape)
        moved = moved + _wide(sigma * (1 - decay**2).clamp_min(0).sqrt()) * noise
        return Moved(torch.where(standing, state, moved))

    def forget(self) -> None:
        self._before = None

    def _extrapolated(self, clean: Tensor, distance: Tensor, last: bool) -> Tensor:
        before, self._before = self._before, (clean, distance)
        if self.order == 1 or before is None or last:
            return clean
        return clean + _wide(distance / (2 * before[1])) * (clean - before[0])


# ----------------------------------------------------------------------------------------------------------- categorical


class Tokens(_Plain):
    """What all orders of unmasking share. `fixed` are positions that are known, bool [B, S], or None."""

    def __init__(self, process: Masked, sampling: Sampling, fixed: Tensor | None = None) -> None:
        self.process, self.sampling, self.fixed = process, sampling, fixed
        self._counts: deque[int] = deque()

    def masked(self, state: Tensor) -> Tensor:
        return state == self.process.mask_id

    def move(self, state: Tensor, step: Step, request: SampledRows, prediction: Drawn) -> Moved:
        filled = state.flatten().clone()
        filled[request.rows[0]] = prediction.ids
        return Moved(filled.view_as(state))

    def at(self, chosen: Tensor, step: Step) -> SampledRows:
        """Draws at the positions `chosen`, bool [B, S]; of none, it is still a readout: the head runs on every rank."""
        count = self._counts.popleft() if self._counts else None
        return draws(self.process.name, self.sampling, chosen, step, count)

    def expect(self, counts: Sequence[Tensor]) -> None:
        """How many positions each step will choose: all are asked for at once, and no step has to wait for the device."""
        self._counts = deque(torch.stack(list(counts)).tolist())


def draws(name: str, sampling: Sampling, chosen: Tensor, step: Step, count: int | None = None) -> SampledRows:
    """A draw at every chosen position, bool [B, S], from numbers that belong to the sample, the step and the position.

    Args:
        count: how many are chosen; None waits for the device to tell.
    """
    flat = chosen.flatten()
    rows = (flat.nonzero() if count is None else torch.nonzero_static(flat, size=count))[:, 0]
    keys = RowKeys(step.keys[rows // chosen.shape[1]], f"{name} token", rows % chosen.shape[1])
    rule = DrawRule(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SampledRows(rows[None], torch.ones_like(rows, dtype=torch.float32)[None], keys, rule)


class Ancestral(Tokens):
    """The exact reverse process: positions are chosen first, and the head is asked about those only."""

    def plan(self, state: Tensor, steps: Sequence[Step]) -> None:
        masked = self.masked(state)
        counts = []
        for step in steps:
            chosen = masked & self.lucky(step)
            counts.append(chosen.sum())
            masked = masked & ~chosen
        self.expect(counts)

    def request(self, state: Tensor, step: Step) -> SampledRows:
        return self.at(self.masked(state) & self.lucky(step), step)

    def lucky(self, step: Step) -> Tensor:
        """Which positions become visible in a step if they are still masked, bool [B, S]; drawn from the step's keys."""
        draw = rng.uniform(step.keys, f"{self.process.name} unmask", self.process.shape)
        return (draw < self.share(step)[:, None]) | step.last

    def share(self, step: Step) -> Tensor:
        """The probability that a masked position becomes visible, [B]."""
        return self.process.unmasking_share(step.now, step.then)


class TauLeaping(Ancestral):
    """Rates held fixed over a step, as in the paper's code; of several jumps in one step the first counts.

    That code drops such positions, P(unmask) = L e^-L instead of 1 - e^-L, and leaves 2.7 % of the tokens to a last guess at 50
    steps.
    """

    def share(self, step: Step) -> Tensor:
        return -torch.expm1(-self.process.schedule.weight(step.now) * (step.now - step.then))


class FirstHitting(Ancestral):
    """Every position becomes visible at a time drawn beforehand: one at a time, each seeing all before it.

    Source: Zheng et al., arXiv 2409.02908. On a grid of times it is the ancestral order; `events` are times that make it exact.
    """

    def __init__(self, process: Masked, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        share = rng.uniform(keys, f"{process.name} hit", process.shape, dtype=torch.float64)
        # In float32, as the clocks are: a hit at a step's end must not count as one before it.
        self.hits = process.schedule.time_of(share * process.schedule.share(start.double())[:, None]).float()

    def lucky(self, step: Step) -> Tensor:
        return (self.hits > step.then[:, None]) | step.last

    def events(self, state: Tensor) -> Tensor:
        """Float32 [E + 1, B], falling to 0: the times at which masked positions become visible; 0 where a sample has fewer."""
        times = torch.where(self.masked(state), self.hits, 0.0).sort(1, descending=True).values
        most = int(self.masked(state).sum(1).max())
        return F.pad(times, (0, 1))[:, : most + 1].T


class Ranked(Tokens):
    """The surest first: as many as the schedule wants visible, by the draw's probability, by entropy, or by the margin between
    the two likeliest tokens.

    Source: Chang et al. (MaskGIT), arXiv 2202.04200; of the margin Kim et al., arXiv 2502.06768.
    """

    def __init__(self, process: Masked, sampling: Sampling, start: Tensor, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        self.start = start
        self._at_first: Tensor | None = None

    def plan(self, state: Tensor, steps: Sequence[Step]) -> None:
        masked = self.masked(state).sum(1)
        self._at_first = masked
        counts = []
        for step in steps:
            counts.append(masked.sum())
            masked = masked - self.scheduled(masked, step)
        self.expect(counts)

    def request(self, state: Tensor, step: Step) -> SampledRows:
        return self.at(self.masked(state), step)

    def move(self, state: Tensor, step: Step, request: SampledRows, prediction: Drawn) -> Moved:
        filled = super().move(state, step, request, prediction).state
        score = self.scores(state, step, request, prediction)
        count = self.budget(state, step, score)
        place = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return Moved(torch.where(self.masked(state) & (place < count[:, None]), filled, state))

    def scores(self, state: Tensor, step: Step, request: SampledRows, prediction: Drawn) -> Tensor:
        """float32 [B, S], minus infinity where nothing was drawn."""
        match self.sampling.order:
            case "entropy":
                found = -prediction.entropy
            case "margin":
                found = prediction.margin
            case _:
                found = prediction.log_probability
        score = torch.full(state.shape, -torch.inf, device=state.device).flatten()
        score[request.rows[0]] = found
        score = score.view_as(state)
        if self.sampling.order_noise:
            uniform = rng.uniform(step.keys, f"{self.process.name} order", self.process.shape, dtype=torch.float64)
            score = score + (self.sampling.order_noise * step.now)[:, None] * -(-uniform.log()).log().float()
        return score

    def budget(self, state: Tensor, step: Step, scores: Tensor) -> Tensor:
        """How many positions become visible, int64 [B]."""
        return self.scheduled(self.masked(state).sum(1), step)

    def scheduled(self, count: Tensor, step: Step) -> Tensor:
        """How many of `count` masked positions, int64 [B]: none beyond those that the schedule wants masked at the end."""
        if self._at_first is None:
            self._at_first = count
        share = self.process.schedule.share(step.then) / self.process.schedule.share(self.start).clamp_min(SMALLEST_SHARE)
        kept = (self._at_first * share.clamp_max(1.0) + 1e-4).floor().long()
        return count if step.last else (count - kept).clamp_min(0)


class Threshold(Ranked):
    """All positions whose draw is surer than a threshold, and the surest one in any case.

    Source: Wu et al. (Fast-dLLM), arXiv 2505.22618.
    """

    def plan(self, state: Tensor, steps: Sequence[Step]) -> None:
        """How many are sure enough is not known before."""

    def budget(self, state: Tensor, step: Step, scores: Tensor) -> Tensor:
        sure = (scores.exp() > self.sampling.threshold).sum(1)
        return self.masked(state).sum(1) if step.last else sure.clamp_min(1)

    def finished(self, state: Tensor) -> bool:
        return not bool(self.masked(state).any())


class Remasking(Tokens):
    """ReMDM: visible positions may be masked again, and the masked ones unmask that much faster.

    With probability s a visible position is masked again, s <= (1 - alpha_then) / alpha_now; a masked one becomes visible with
    probability (alpha_then - (1 - s) alpha_now) / (1 - alpha_now), so that marginals stay those of the process. Source: Wang et
    al., arXiv 2503.00307, equations 7 and 8. `conf` weighs s by softmax(-probability of the draw) over the visible positions,
    its mean left as it is.
    """

    def __init__(self, process: Masked, sampling: Sampling, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        self._sureness: Tensor | None = None
        self._again: Tensor | None = None

    def warp(self, fraction: float) -> float:
        if self.sampling.remask != "loop":
            return fraction
        stands = float(self.process.schedule.time_of(torch.tensor(LOOP_SHARE, dtype=torch.float64)))
        if fraction > LOOP_FROM:
            return stands + (1 - stands) * (fraction - LOOP_FROM) / (1 - LOOP_FROM)
        return stands if fraction > LOOP_TO else stands * fraction / LOOP_TO

    def request(self, state: Tensor, step: Step) -> SampledRows:
        now, then = (1 - self.process.schedule.share(at) for at in (step.now, step.then))
        most = ((1 - then) / now.clamp_min(SMALLEST_SHARE)).clamp_max(1.0)
        again = most.clamp_max(self.sampling.remask_strength)
        if self.sampling.remask == "loop":
            again = torch.where(step.now == step.then, again, 0.0)
        share = (then - (1 - again) * now) / (1 - now).clamp_min(SMALLEST_SHARE)
        lucky = rng.uniform(step.keys, f"{self.process.name} unmask", self.process.shape) < share[:, None]
        unlucky = rng.uniform(step.keys, f"{self.process.name} remask", self.process.shape) < self._chances(state, again, most)
        free = torch.ones_like(unlucky) if self.fixed is None else ~self.fixed
        self._again = unlucky & ~self.masked(state) & free & (not step.last)
        return self.at(self.masked(state) & (lucky | step.last), step)

    def move(self, state: Tensor, step: Step, request: SampledRows, prediction: Drawn) -> Moved:
        assert self._again is not None
        if self._sureness is None:
            self._sureness = torch.ones(state.shape, device=state.device)
        self._sureness.flatten()[request.rows[0]] = prediction.log_probability.exp()
        filled = super().move(state, step, request, prediction).state
        return Moved(torch.where(self._again, self.process.mask_id, filled))

    def _chances(self, state: Tensor, again: Tensor, most: Tensor) -> Tensor:
        """The probability of being masked again, [B, S] or [B, 1]."""
        if self.sampling.remask != "conf" or self._sureness is None:
            return again[:, None]
        visible = ~self.masked(state)
        shares = torch.where(visible, -self._sureness, -torch.inf).softmax(1).nan_to_num()
        return (shares * visible.sum(1, keepdim=True) * again[:, None]).minimum(most[:, None])


class Exchange(_Plain):
    """The uniform process: a clean token is drawn at every position, then the state before it given both.

    ancestral: exactly; tau_leaping: by jump rates held fixed over the step.
    """

    def __init__(self, process: Uniform, sampling: Sampling) -> None:
        self.process, self.sampling = process, sampling

    def request(self, state: Tensor, step: Step) -> SampledRows:
        everywhere = torch.ones_like(state, dtype=torch.bool)
        return draws(self.process.name, self.sampling, everywhere, step, state.numel())

    def move(self, state: Tensor, step: Step, request: SampledRows, prediction: Drawn) -> Moved:
        clean = prediction.ids.view_as(state)
        how = self.process.leap if self.sampling.order == "tau_leaping" else self.process.backwards
        return Moved(how(state, clean, step.now, step.then, step.keys))


# -------------------------------------------------------------------------------------------------------------- building

CONTINUOUS: dict[str, Callable[[Gaussian], Solver]] = {
    "heun": Heun,
    "heun_time": HeunInTime,
    "euler": lambda process: Exponential(process, order=1, stochastic=False),
    "dpmpp_2m": lambda process: Exponential(process, order=2, stochastic=False),
    "sde_euler": lambda process: Exponential(process, order=1, stochastic=True),
    "sde_dpmpp_2m": lambda process: Exponential(process, order=2, stochastic=True),
}


def build_solver(process: Process, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None = None) -> Solver:
    """The solver of a process, for one run, in an order that the process can go (checks.order_faults).

    Args:
        keys: int64 [B], of the samples.
        start: the time from which it runs, float32 [B].
        fixed: positions that are known, bool [B, S].
    """
    match process:
        case Gaussian():
            return CONTINUOUS[sampling.solver](process)
        case Uniform():
            return Exchange(process, sampling)
        case Masked():
            return _of_masked(process, sampling, keys, start, fixed)
    raise TypeError(f"{process.name}: there is no solver for a {type(process).__name__} process")


def _of_masked(process: Masked, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None) -> Solver:
    if sampling.remask != "none":
        return Remasking(process, sampling, fixed)
    match sampling.order:
        case "ancestral":
            return Ancestral(process, sampling, fixed)
        case "tau_leaping":
            return TauLeaping(process, sampling, fixed)
        case "first_hitting":
            return FirstHitting(process, sampling, keys, start, fixed)
        case "confidence" | "entropy" | "margin":
            return Ranked(process, sampling, start, fixed)
        case "threshold":
            return Threshold(process, sampling, start, fixed)


def _wide(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
