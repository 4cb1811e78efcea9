"""The whole method: a clean batch to a noised one, and a prediction to a loss. It knows nothing of parallelism.

Legend: B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from megadiff.config.schema import Model, Stage
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.process import NoisedState, Process
from megadiff.diffusion.times import draw_times
from megadiff.types import ALIGNMENT, Aligned, Batch, LossTerms, Noised, Prediction, Ragged, Readout

T = TypeVar("T")


@dataclass(frozen=True)
class NoisedBatch:
    """A noised micro-batch.

    Attributes:
        noised: what the network reads.
        readout: what is read out; the same modalities for all samples (ZeRO-3 needs equal calls on all ranks).
        states: per scored modality the noised state and its target.
        times: per modality [B].
        weights: per scored modality float32 [B]; 0 where the modality is only a condition or the sample could not be read.
        counts: per loss the number of scored elements, scalar; of the alignment the number of samples.
    """

    noised: Noised
    readout: dict[str, Readout]
    states: dict[str, NoisedState]
    times: dict[str, Tensor]
    weights: dict[str, Tensor]
    counts: dict[str, Tensor]


class DiffusionObjective:
    """Decoupled noising of all modalities, and the weighted sum of their own losses."""

    def __init__(self, model: Model, stage: Stage, seed: int) -> None:
        self.processes = build_processes(model)
        self.stage, self.seed = stage, seed
        self.scored = [name for name in self.processes if stage.modalities[name].has_loss]
        self.losses = [*self.scored, *([ALIGNMENT] if stage.alignment is not None else [])]

    def prepare(self, batch: Batch) -> NoisedBatch:
        """Draw times and noise, both keyed by the samples. Tokens are noised on the host: their counts wait for nothing."""
        host, device = batch.host or batch, batch.keys.device
        times, free = draw_times(self.stage, host, self.seed)
        states = {}
        for name, process in self.processes.items():
            own = host if name in host.states else batch
            states[name] = process.noise(own.states[name], _moved(times[name], own.keys.device), own.keys)
        weights = {name: host.weight * free[name] for name in self.scored}
        scored_samples = {name: weight > 0 for name, weight in weights.items()}
        noised = noised_of(self.processes, {name: s.state for name, s in states.items()}, times, scored_samples)
        readout = {name: self.processes[name].readout(states[name], times[name], scored_samples[name]) for name in self.scored}
        noised, readout = _moved(noised, device), _moved(readout, device)
        times, weights = _moved(times, device), _moved(weights, device)
        scored = {name: _moved(states[name], device) for name in self.scored}
        counts = {name: (self.processes[name].counts(scored[name]) * weights[name]).sum() for name in self.scored}
        if self.stage.alignment is not None:
            readout[ALIGNMENT] = Aligned(batch.features[self.stage.alignment.modality])
            weights[ALIGNMENT] = batch.weight
            counts[ALIGNMENT] = batch.weight.sum()
        return NoisedBatch(noised, readout, scored, times, weights, counts)

    def score(self, prediction: Prediction, prepared: NoisedBatch, normaliser: Mapping[str, Tensor]) -> LossTerms:
        """The loss terms of one micro-batch.

        Args:
            normaliser: by loss the factor on its sum (data ranks x accumulation / global count), scalars.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        exact: dict[str, tuple[Tensor, Tensor]] = {}
        times = dict(prepared.times)
        total = torch.zeros((), device=next(iter(times.values())).device)
        for name in self.scored:
            process, state, weight = self.processes[name], prepared.states[name], prepared.weights[name]
            losses = process.losses(prediction[name], state, times[name])
            sums[name] = losses.sums * weight
            counts[name] = losses.counts * weight
            total = total + _scaled(sums[name], self.stage.modalities[name].loss_weight * normaliser[name])
            if process.bounded:
                with torch.no_grad():
                    bound = process.losses(prediction[name], state, times[name], exact=True)
                exact[name] = ((bound.sums * weight).sum(), (bound.counts * weight).sum())
        if self.stage.alignment is not None:
            weight = prepared.weights[ALIGNMENT]
            sums[ALIGNMENT], counts[ALIGNMENT] = prediction[ALIGNMENT] * weight, weight
            times[ALIGNMENT] = times[self.stage.alignment.modality]
            total = total + _scaled(sums[ALIGNMENT], self.stage.alignment.weight * normaliser[ALIGNMENT])
        detached = {name: value.detach() for name, value in sums.items()}
        return LossTerms(
            total=total,
            sums={name: value.sum() for name, value in detached.items()},
            counts={name: value.sum() for name, value in counts.items()},
            sample_sums=detached,
            sample_counts=counts,
            times={name: times[name] for name in sums},
            exact=exact,
        )


def _moved(tree: T, device: torch.device) -> T:
    """The same with its tensors on a device; nothing waits for the copies."""
    moved: T = tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, tree)
    return moved


def _scaled(sums: Tensor, factor: Tensor) -> Tensor:
    """The sum of per-sample sums, times a factor that stays on the device."""
    return factor.to(sums.dtype) * sums.sum()


def noised_of(
    processes: Mapping[str, Process],
    states: Mapping[str, Tensor],
    times: Mapping[str, Tensor],
    predicted: Mapping[str, Tensor],
) -> Noised:
    """A network's input at given states and times. Waits for the device once per modality that can be ragged.

    Args:
        predicted: by modality read out, bool [B]: the samples in which it is; these keep all positions.
    """
    ragged = {name: ragged_of(p, states[name], times[name], predicted.get(name)) for name, p in processes.items()}
    return assemble(processes, states, times, {name: lengths for name, lengths in ragged.items() if lengths is not None})


def assemble(
    processes: Mapping[str, Process],
    states: Mapping[str, Tensor],
    times: Mapping[str, Tensor],
    ragged: Mapping[str, Ragged],
) -> Noised:
    """A network's input at given states and times, with the lengths of conditions."""
    return Noised(
        states=dict(states),
        clocks={name: process.clock(times[name]) for name, process in processes.items()},
        visible={name: process.visible(states[name], times[name]) for name, process in processes.items()},
        ragged=ragged,
    )


def ragged_of(process: Process, state: Tensor, times: Tensor, predicted: Tensor | None) -> Ragged | None:
    """A modality's leading positions; None if all of them are there. Waits for the device."""
    lengths = process.lengths(state, times)
    if lengths is None:
        return None
    if predicted is not None:
        lengths = lengths.masked_fill(predicted, state.shape[1])
    total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
    return Ragged(lengths, total, longest) if total < state.numel() else None
