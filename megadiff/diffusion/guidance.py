"""Guidance across modalities: w * conditional + (1 - w) * unconditional; w = 1 is none.

The unconditional branch of a modality sees all *other* modalities noised to max(final time, their present time). A final time
of 1 is classifier-free guidance; below 1 it is the paper's noisy guidance, and it works just as well while the condition is
itself being generated. The noise of that branch belongs to the sample's key: it is the same at every call, so a deterministic
solver stays deterministic (the released code draws it anew each time). Autoguidance adds (v - 1) * (conditional - weaker), from
a weaker network that sees the same. For tokens, logits are mixed and the mixture is normalised, so that guidance scales no rate
of unmasking.
Legend: B samples, S tokens, V vocabulary, R rows, K branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadiff.config.schema import Sampling
from megadiff.diffusion.categorical import CLEAN_TIME
from megadiff.diffusion.objective import assemble, ragged_of
from megadiff.diffusion.process import Process
from megadiff.diffusion.solvers import SolverReadout
from megadiff.kernels.head_draw import draw_rows
from megadiff.types import Denoiser, Dense, Noised, Prediction, Ragged, Readout, RowLogits, SampledRows, TokenDraws


@dataclass(frozen=True)
class Guided:
    """A denoiser with guidance, for one batch of samples.

    Attributes:
        keys: int64 [B], of the samples.
        guide: a weaker network for autoguidance, or None.
    """

    denoiser: Denoiser
    processes: Mapping[str, Process]
    sampling: Sampling
    keys: Tensor
    guide: Denoiser | None = None
    _lengths: dict[str, tuple[Tensor, Tensor, Ragged | None]] = field(default_factory=dict)

    def __call__(
        self, states: Mapping[str, Tensor], times: Mapping[str, Tensor], readout: Mapping[str, SolverReadout]
    ) -> Prediction:
        """The guided prediction for states whose clocks stand at `times`.

        All branches run as one batch: the conditional one first, then one per guided modality. A modality is read in the first
        and its own alone.

        Args:
            times: per modality [B], on the CPU: which branches are needed is decided without waiting for a GPU.
            readout: Dense or SampledRows with one branch.
        """
        weights = {name: weight for name in readout if (weight := self._weights(name, times)) is not None}
        ragged = self._ragged({name: state for name, state in states.items() if name not in readout}, times)
        own = assemble(self.processes, states, self._vectors(times), ragged)
        noised = _joined([own, *(self._without_conditions(name, states, times, ragged) for name in weights)])
        branch_of = {name: index for index, name in enumerate(weights, 1)}
        requests = {
            name: self._read_in(
                _in_branches(request, states[name], branch_of.get(name), weights.get(name)),
                branch_of.get(name),
                1 + len(weights),
            )
            for name, request in readout.items()
        }
        if self.guide is not None and self.sampling.autoguidance != 1:
            return self._autoguided(self.guide, own, noised, requests, weights, branch_of)
        answers = self.denoiser(noised, requests)
        return {name: self._mixed(answers[name], branch_of.get(name), weights.get(name)) for name in readout}

    def _weights(self, target: str, times: Mapping[str, Tensor]) -> Tensor | None:
        """w per sample, float32 [B]; None where no sample needs a second evaluation.

        A sample needs one inside the interval, if some condition is to be noised further.
        """
        low, high = self.sampling.guidance_interval
        inside = (times[target] >= low) & (times[target] <= high)
        cleaner = [time < self.sampling.guidance_final_time for name, time in times.items() if name != target]
        active = inside & torch.stack([torch.zeros_like(inside), *cleaner]).any(0)
        if self.sampling.guidance == 1 or not active.any():
            return None
        return torch.where(active, self.sampling.guidance, 1.0).to(self.keys.device)

    def _ragged(self, states: Mapping[str, Tensor], times: Mapping[str, Tensor]) -> dict[str, Ragged]:
        """How long conditions are. The device is asked, and waited for, once per condition that does not change."""
        ragged: dict[str, Ragged] = {}
        for name, state in states.items():
            if not bool((times[name] <= CLEAN_TIME).any()):
                continue
            cached = self._lengths.get(name)
            if cached is None or cached[0] is not state or not torch.equal(cached[1], times[name]):
                of_state = ragged_of(self.processes[name], state, times[name].to(state.device, torch.float32), None)
                self._lengths[name] = cached = state, times[name], of_state
            if cached[2] is not None:
                ragged[name] = cached[2]
        return ragged

    def _without_conditions(
        self, target: str, states: Mapping[str, Tensor], times: Mapping[str, Tensor], ragged: Mapping[str, Ragged]
    ) -> Noised:
        final = self.sampling.guidance_final_time
        later = {name: time if name == target else time.clamp_min(final) for name, time in times.items()}
        at, then = self._vectors(times), self._vectors(later)
        noisier = {
            name: states[name]
            if torch.equal(later[name], times[name])
            else process.renoise(states[name], at[name], then[name], self.keys)
            for name, process in self.processes.items()
        }
        as_before = {name: lengths for name, lengths in ragged.items() if noisier[name] is states[name]}
        return assemble(self.processes, noisier, then, as_before)

    def _read_in(self, readout: SolverReadout, branch: int | None, branches: int) -> SolverReadout:
        """The readout in the first of the branches and in `branch`."""
        read = [0] if branch is None else [0, branch]
        if len(read) == branches:
            return readout
        own = torch.arange(len(self.keys), device=self.keys.device)
        return readout._replace(samples=torch.cat([own + place * len(own) for place in read]))

    def _mixed(self, answer: Tensor | TokenDraws, branch: int | None, weights: Tensor | None) -> Tensor | TokenDraws:
        if isinstance(answer, TokenDraws):
            return answer
        parts = torch.split(answer, len(self.keys))
        if branch is None or weights is None:
            return parts[0]
        weight = weights.view(-1, *[1] * (answer.dim() - 1))
        mixed: Tensor = weight * parts[0] + (1 - weight) * parts[branch]
        return mixed

    def _autoguided(
        self,
        guide: Denoiser,
        own: Noised,
        noised: Noised,
        requests: Mapping[str, SolverReadout],
        weights: Mapping[str, Tensor],
        branch_of: Mapping[str, int],
    ) -> Prediction:
        """Two networks have two heads, so tokens' logits [K, R, V] are mixed here, and tokens are drawn from the mixture."""
        answers = self.denoiser(noised, {name: _logits_of(request) for name, request in requests.items()})
        weaker = guide(own, {name: _logits_of(request, branches=1) for name, request in requests.items()})
        away = self.sampling.autoguidance - 1
        mixed: Prediction = {}
        for name, request in requests.items():
            if isinstance(request, SampledRows):
                logits = answers[name].view(*request.rows.shape, answers[name].shape[-1])
                guided = (request.weights[..., None] * logits).sum(0) + away * (logits[0] - weaker[name])
                mixed[name] = draw_rows(guided, request.keys, request.rule)
            else:
                guided = self._mixed(answers[name], branch_of.get(name), weights.get(name))
                mixed[name] = guided + away * (answers[name][: len(self.keys)] - weaker[name])
        return mixed

    def _vectors(self, times: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: time.to(self.keys.device, torch.float32) for name, time in times.items()}


def _joined(branches: list[Noised]) -> Noised:
    """The branches, concatenated along B."""
    if len(branches) == 1:
        return branches[0]
    names = branches[0].states
    visible: dict[str, Tensor | None] = {}
    for name in names:
        masks = [mask for branch in branches if (mask := branch.visible[name]) is not None]
        visible[name] = torch.cat(masks) if masks else None  # a process hides positions in all branches or in none
    return Noised(
        states={name: torch.cat([branch.states[name] for branch in branches]) for name in names},
        clocks={name: torch.cat([branch.clocks[name] for branch in branches]) for name in names},
        visible=visible,
        ragged={name: _joined_lengths(name, branches) for name in names if any(name in b.ragged for b in branches)},
    )


def _joined_lengths(name: str, branches: list[Noised]) -> Ragged:
    parts = []
    for branch in branches:
        batch, length = branch.states[name].shape
        full = torch.full((batch,), length, dtype=torch.int32, device=branch.states[name].device)
        parts.append(branch.ragged.get(name, Ragged(full, batch * length, length)))
    lengths = torch.cat([part.lengths for part in parts])
    return Ragged(lengths, sum(part.total for part in parts), max(part.longest for part in parts))


def _in_branches(readout: SolverReadout, state: Tensor, branch: int | None, weights: Tensor | None) -> SolverReadout:
    """A modality's readout: chosen rows are read in the conditional branch and in its own unconditional one."""
    if not isinstance(readout, SampledRows) or branch is None or weights is None:
        return readout
    rows, of_row = readout.rows[0], weights[readout.rows[0] // state.shape[1]]
    return readout._replace(rows=torch.stack([rows, rows + branch * state.numel()]), weights=torch.stack([of_row, 1 - of_row]))


def _logits_of(readout: SolverReadout, branches: int | None = None) -> Readout:
    """The logits behind draws; a whole output as it is."""
    return RowLogits(readout.rows[:branches].flatten()) if isinstance(readout, SampledRows) else Dense()
