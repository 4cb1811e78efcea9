"""Guidance across modalities: w * conditional + (1 - w) * unconditional; w = 1 is none.

The unconditional branch of a modality sees all *other* modalities noised to max(final time, their present time). A final time
of 1 is classifier-free guidance; below 1 it is the paper's noisy guidance, and it works just as well while the condition is
itself being generated. The noise of that branch belongs to the sample's key: it is the same at every call, so a deterministic
solver stays deterministic (the released code draws it anew each time).
Legend: B samples, S tokens, V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megadiff.config.schema import Sampling
from megadiff.diffusion.objective import noised_of
from megadiff.diffusion.process import Process
from megadiff.types import Denoiser, Noised, Prediction, Readout, RowLogits


class Guided:
    """A denoiser with guidance, for one batch of samples."""

    def __init__(self, denoiser: Denoiser, processes: Mapping[str, Process], sampling: Sampling, keys: Tensor) -> None:
        self.denoiser, self.processes, self.sampling, self.keys = denoiser, processes, sampling, keys

    def __call__(self, states: Mapping[str, Tensor], times: Mapping[str, float], readout: Mapping[str, Readout]) -> Prediction:
        """Predictions at states whose clocks stand at `times`: tokens' logits are normalised where they are guided.

        All branches that are needed run as one batch: the conditional one first, then one per guided modality.
        """
        guided = [name for name in readout if self._guides(name, times)]
        branches = [noised_of(self.processes, states, self._vectors(times))]
        branches += [self._without_conditions(name, states, times) for name in guided]
        rows = {name: _repeated(request, len(branches), states[name]) for name, request in readout.items()}
        prediction = self.denoiser(_joined(branches), rows)
        mixed: Prediction = {}
        for name in readout:
            parts = prediction[name].chunk(len(branches))
            mixed[name] = self._mix(parts[0], parts[1 + guided.index(name)], rows[name]) if name in guided else parts[0]
        return mixed

    def _guides(self, target: str, times: Mapping[str, float]) -> bool:
        """Whether a second evaluation is worth anything: inside the interval, and some condition is to be noised further."""
        low, high = self.sampling.guidance_interval
        if self.sampling.guidance == 1 or not low <= times[target] <= high:
            return False
        return any(time < self.sampling.guidance_final_time for name, time in times.items() if name != target)

    def _without_conditions(self, target: str, states: Mapping[str, Tensor], times: Mapping[str, float]) -> Noised:
        later = {name: time if name == target else max(time, self.sampling.guidance_final_time) for name, time in times.items()}
        at, then = self._vectors(times), self._vectors(later)
        noisier = {
            name: states[name] if later[name] == times[name] else process.renoise(states[name], at[name], then[name], self.keys)
            for name, process in self.processes.items()
        }
        return noised_of(self.processes, noisier, then)

    def _mix(self, conditional: Tensor, unconditional: Tensor, readout: Readout) -> Tensor:
        weight = self.sampling.guidance
        if isinstance(readout, RowLogits):
            # Log-probabilities are mixed and normalised again, so that no rate of unmasking is scaled with them.
            conditional, unconditional = conditional.log_softmax(-1), unconditional.log_softmax(-1)
            return (weight * conditional + (1 - weight) * unconditional).log_softmax(-1)
        return weight * conditional + (1 - weight) * unconditional

    def _vectors(self, times: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: torch.full((len(self.keys),), time, device=self.keys.device) for name, time in times.items()}


def _joined(branches: list[Noised]) -> Noised:
    """Branches one after the other along B."""
    if len(branches) == 1:
        return branches[0]
    names = branches[0].states
    visible: dict[str, Tensor | None] = {}
    for name in names:
        masks = [branch.visible[name] for branch in branches]
        present = [mask for mask in masks if mask is not None]
        visible[name] = torch.cat(present) if len(present) == len(masks) else None
    return Noised(
        states={name: torch.cat([branch.states[name] for branch in branches]) for name in names},
        clocks={name: torch.cat([branch.clocks[name] for branch in branches]) for name in names},
        visible=visible,
    )


def _repeated(readout: Readout, branches: int, state: Tensor) -> Readout:
    """The same readout of every branch: chosen rows are asked for in each."""
    if not isinstance(readout, RowLogits):
        return readout
    return RowLogits(torch.cat([readout.rows + branch * state.numel() for branch in range(branches)]))
