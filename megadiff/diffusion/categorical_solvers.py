"""Solvers of token modalities: orders of unmasking for the masked process, and the reverse of the uniform one.

Legend: B samples, S tokens, R rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Sampling
from megadiff.diffusion.categorical import SMALLEST_SHARE
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.solvers import Solver, SolverBase, SolverStep, StepEnd
from megadiff.diffusion.uniform import Uniform
from megadiff.types import DrawRule, RowKeys, SampledRows, TokenDraws

LOOP_FROM, LOOP_TO, LOOP_SHARE = 0.55, 0.05, 0.1
"""ReMDM-loop: between these fractions of the run the clock stands where this share of the tokens is masked."""


class UnmaskingSolver(SolverBase):
    """The common part of all orders of unmasking.

    Attributes:
        fixed: bool [B, S], positions that are known; None where none are.
    """

    def __init__(self, process: Masked, sampling: Sampling, fixed: Tensor | None = None) -> None:
        self.process, self.sampling, self.fixed = process, sampling, fixed
        self._counts: deque[int] = deque()

    def masked(self, state: Tensor) -> Tensor:
        return state == self.process.mask_id

    def move(self, state: Tensor, step: SolverStep, request: SampledRows, prediction: TokenDraws) -> StepEnd:
        filled = state.flatten().clone()
        filled[request.rows[0]] = prediction.ids
        return StepEnd(filled.view_as(state))

    def at(self, chosen: Tensor, step: SolverStep) -> SampledRows:
        """Draws at the positions `chosen`, bool [B, S]. No position is a readout too: the head runs on every rank."""
        count = self._counts.popleft() if self._counts else None
        return draws(self.process.name, self.sampling, chosen, step, count)

    def expect(self, counts: Sequence[Tensor]) -> None:
        """Fetch how many positions each step will choose, scalars, at once: no step waits for the device then."""
        self._counts = deque(torch.stack(list(counts)).tolist())


def draws(name: str, sampling: Sampling, chosen: Tensor, step: SolverStep, count: int | None = None) -> SampledRows:
    """A draw at every chosen position, bool [B, S]; its random number belongs to the sample, the step and the position.

    Args:
        count: how many positions are chosen; None asks the device, and waits.
    """
    flat = chosen.flatten()
    rows = (flat.nonzero() if count is None else torch.nonzero_static(flat, size=count))[:, 0]
    keys = RowKeys(step.keys[rows // chosen.shape[1]], f"{name} token", rows % chosen.shape[1])
    rule = DrawRule(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SampledRows(rows[None], torch.ones_like(rows, dtype=torch.float32)[None], keys, rule)


class Ancestral(UnmaskingSolver):
    """The exact reverse process: positions are chosen first, and the head reads those only."""

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        masked = self.masked(state)
        counts = []
        for step in steps:
            chosen = masked & self.unmasks(step)
            counts.append(chosen.sum())
            masked = masked & ~chosen
        self.expect(counts)

    def request(self, state: Tensor, step: SolverStep) -> SampledRows:
        return self.at(self.masked(state) & self.unmasks(step), step)

    def unmasks(self, step: SolverStep) -> Tensor:
        """bool [B, S]: the positions that become visible in a step if they are still masked; drawn from the step's keys."""
        uniform = rng.uniform(step.keys, f"{self.process.name} unmask", self.process.shape)
        return (uniform < self.share(step)[:, None]) | step.last

    def share(self, step: SolverStep) -> Tensor:
        """The probability that a masked position becomes visible, [B]."""
        return self.process.unmasking_share(step.now, step.then)


class TauLeaping(Ancestral):
    """Jump rates held fixed over a step, as in the paper's code. The first of several jumps in one step counts.

    That code drops positions that jump twice, P(unmask) = L e^-L instead of 1 - e^-L, and leaves 2.7 % of the tokens to a last
    guess at 50 steps.
    """

    def share(self, step: SolverStep) -> Tensor:
        return -torch.expm1(-self.process.schedule.weight(step.now) * (step.now - step.then))


class FirstHitting(Ancestral):
    """Every position becomes visible at a time drawn beforehand: one at a time, each seeing all before it.

    Exact at the times that `events` gives; on any other grid it is the ancestral order. Source: Zheng et al., arXiv 2409.02908.
    """

    def __init__(self, process: Masked, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        share = rng.uniform(keys, f"{process.name} hit", process.shape, dtype=torch.float64)
        # In float32 like the clocks: a hit at a step's end must not count as one before it.
        self.hits = process.schedule.time_of(share * process.schedule.share(start.double())[:, None]).float()

    def unmasks(self, step: SolverStep) -> Tensor:
        return (self.hits > step.then[:, None]) | step.last

    def events(self, state: Tensor) -> Tensor:
        """Float32 [E + 1, B], falling to 0: the times at which masked positions become visible; 0 where a sample has fewer."""
        times = torch.where(self.masked(state), self.hits, 0.0).sort(1, descending=True).values
        most = int(self.masked(state).sum(1).max())
        return F.pad(times, (0, 1))[:, : most + 1].T


class MaskGIT(UnmaskingSolver):
    """MaskGIT: in each step the surest positions become visible, as many as the schedule asks for.

    Sureness is the draw's probability, minus the entropy, or the margin between the two likeliest tokens. Source: Chang et al.,
    arXiv 2202.04200; for the margin Kim et al., arXiv 2502.06768.
    """

    def __init__(self, process: Masked, sampling: Sampling, start: Tensor, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        self.start = start
        self._initial_count: Tensor | None = None
        """int64 [B]: masked positions at the run's beginning."""

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        masked = self.masked(state).sum(1)
        self._initial_count = masked
        counts = []
        for step in steps:
            counts.append(masked.sum())
            masked = masked - self.scheduled(masked, step)
        self.expect(counts)

    def request(self, state: Tensor, step: SolverStep) -> SampledRows:
        return self.at(self.masked(state), step)

    def move(self, state: Tensor, step: SolverStep, request: SampledRows, prediction: TokenDraws) -> StepEnd:
        filled = super().move(state, step, request, prediction).state
        score = self.scores(state, step, request, prediction)
        count = self.budget(state, step, score)
        place = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return StepEnd(torch.where(self.masked(state) & (place < count[:, None]), filled, state))

    def scores(self, state: Tensor, step: SolverStep, request: SampledRows, prediction: TokenDraws) -> Tensor:
        """float32 [B, S]: how sure each draw is; minus infinity where nothing was drawn."""
        match self.sampling.order:
            case "entropy":
                sureness = -prediction.entropy
            case "margin":
                sureness = prediction.margin
            case _:
                sureness = prediction.log_probability
        score = torch.full(state.shape, -torch.inf, device=state.device).flatten()
        score[request.rows[0]] = sureness
        score = score.view_as(state)
        if self.sampling.order_noise:
            uniform = rng.uniform(step.keys, f"{self.process.name} order", self.process.shape, dtype=torch.float64)
            score = score + (self.sampling.order_noise * step.now)[:, None] * -(-uniform.log()).log().float()
        return score

    def budget(self, state: Tensor, step: SolverStep, scores: Tensor) -> Tensor:
        """int64 [B]: how many positions become visible."""
        return self.scheduled(self.masked(state).sum(1), step)

    def scheduled(self, count: Tensor, step: SolverStep) -> Tensor:
        """int64 [B]: how many of `count` masked positions become visible; the schedule's share stays masked."""
        if self._initial_count is None:
            self._initial_count = count
        share = self.process.schedule.share(step.then) / self.process.schedule.share(self.start).clamp_min(SMALLEST_SHARE)
        masked = (self._initial_count * share.clamp_max(1.0) + 1e-4).floor().long()
        return count if step.last else (count - masked).clamp_min(0)


class FastDLLM(MaskGIT):
    """Fast-dLLM: all positions whose draw is surer than a threshold become visible, and the surest one in any case.

    Source: Wu et al., arXiv 2505.22618.
    """

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        """How many are sure enough is not known beforehand."""

    def budget(self, state: Tensor, step: SolverStep, scores: Tensor) -> Tensor:
        sure = (scores.exp() > self.sampling.threshold).sum(1)
        return self.masked(state).sum(1) if step.last else sure.clamp_min(1)

    def finished(self, state: Tensor) -> bool:
        return not bool(self.masked(state).any())


class ReMDM(UnmaskingSolver):
    """ReMDM: visible positions may be masked again, and masked ones become visible that much faster.

    A visible position is masked again with probability s <= (1 - alpha_then) / alpha_now. A masked one becomes visible with
    probability (alpha_then - (1 - s) alpha_now) / (1 - alpha_now), so that marginals stay those of the process. Source: Wang et
    al., arXiv 2503.00307, equations 7 and 8. `conf` weighs s by softmax(-probability of the draw) over the visible positions
    and keeps its mean.
    """

    def __init__(self, process: Masked, sampling: Sampling, fixed: Tensor | None) -> None:
        super().__init__(process, sampling, fixed)
        self._sureness: Tensor | None = None
        """float32 [B, S]: the probability of each position's last draw."""
        self._remasks: Tensor | None = None
        """bool [B, S]: the positions that the present step masks again."""

    def warp(self, fraction: float) -> float:
        if self.sampling.remask != "loop":
            return fraction
        loop_time = float(self.process.schedule.time_of(torch.tensor(LOOP_SHARE, dtype=torch.float64)))
        if fraction > LOOP_FROM:
            return loop_time + (1 - loop_time) * (fraction - LOOP_FROM) / (1 - LOOP_FROM)
        return loop_time if fraction > LOOP_TO else loop_time * fraction / LOOP_TO

    def plan(self, state: Tensor, steps: Sequence[SolverStep]) -> None:
        if self.sampling.remask == "conf":  # what is masked again depends on the draws
            return
        masked = self.masked(state)
        counts = []
        for step in steps:
            unmasks, remasks = self._changes(masked, step)
            counts.append(unmasks.sum())
            masked = (masked & ~unmasks) | remasks
        self.expect(counts)

    def request(self, state: Tensor, step: SolverStep) -> SampledRows:
        unmasks, self._remasks = self._changes(self.masked(state), step)
        return self.at(unmasks, step)

    def _changes(self, masked: Tensor, step: SolverStep) -> tuple[Tensor, Tensor]:
        """bool [B, S] each: the positions that become visible in a step, and those that are masked again."""
        now, then = (1 - self.process.schedule.share(at) for at in (step.now, step.then))
        largest = ((1 - then) / now.clamp_min(SMALLEST_SHARE)).clamp_max(1.0)
        strength = largest.clamp_max(self.sampling.remask_strength)
        if self.sampling.remask == "loop":
            strength = torch.where(step.now == step.then, strength, 0.0)
        share = (then - (1 - strength) * now) / (1 - now).clamp_min(SMALLEST_SHARE)
        unmasks = rng.uniform(step.keys, f"{self.process.name} unmask", self.process.shape) < share[:, None]
        chances = self._chances(~masked, strength, largest)
        remasks = rng.uniform(step.keys, f"{self.process.name} remask", self.process.shape) < chances
        free = torch.ones_like(remasks) if self.fixed is None else ~self.fixed
        return masked & (unmasks | step.last), remasks & ~masked & free & (not step.last)

    def move(self, state: Tensor, step: SolverStep, request: SampledRows, prediction: TokenDraws) -> StepEnd:
        assert self._remasks is not None
        if self._sureness is None:
            self._sureness = torch.ones(state.shape, device=state.device)
        self._sureness.flatten()[request.rows[0]] = prediction.log_probability.exp()
        filled = super().move(state, step, request, prediction).state
        return StepEnd(torch.where(self._remasks, self.process.mask_id, filled))

    def _chances(self, visible: Tensor, strength: Tensor, largest: Tensor) -> Tensor:
        """The probability of being masked again, [B, S] or [B, 1]."""
        if self.sampling.remask != "conf" or self._sureness is None:
            return strength[:, None]
        shares = torch.where(visible, -self._sureness, -torch.inf).softmax(1).nan_to_num()
        return (shares * visible.sum(1, keepdim=True) * strength[:, None]).minimum(largest[:, None])


class UniformReverse(SolverBase):
    """The reverse of the uniform process (D3PM): a clean token is drawn at every position, then the earlier state given both.

    The order `ancestral` draws it exactly, `tau_leaping` by jump rates held fixed over the step.
    """

    def __init__(self, process: Uniform, sampling: Sampling) -> None:
        self.process, self.sampling = process, sampling

    def request(self, state: Tensor, step: SolverStep) -> SampledRows:
        everywhere = torch.ones_like(state, dtype=torch.bool)
        return draws(self.process.name, self.sampling, everywhere, step, state.numel())

    def move(self, state: Tensor, step: SolverStep, request: SampledRows, prediction: TokenDraws) -> StepEnd:
        clean = prediction.ids.view_as(state)
        reverse = self.process.leap if self.sampling.order == "tau_leaping" else self.process.backwards
        return StepEnd(reverse(state, clean, step.now, step.then, step.keys))


def masked_solver(process: Masked, sampling: Sampling, keys: Tensor, start: Tensor, fixed: Tensor | None) -> Solver:
    """The solver of a masked process; arguments as for build.build_solver."""
    if sampling.remask != "none":
        return ReMDM(process, sampling, fixed)
    match sampling.order:
        case "ancestral":
            return Ancestral(process, sampling, fixed)
        case "tau_leaping":
            return TauLeaping(process, sampling, fixed)
        case "first_hitting":
            return FirstHitting(process, sampling, keys, start, fixed)
        case "confidence" | "entropy" | "margin":
            return MaskGIT(process, sampling, start, fixed)
        case "threshold":
            return FastDLLM(process, sampling, start, fixed)
