"""Loss statistics of a step: sums and counts of every loss, in all, by quarter of time and by source; divided at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megadiff.config.layout import Layout
from megadiff.distributed.reduce import sum_over_replicas
from megadiff.engine.api import QUARTILES, Outcome, PreparedBatch, StepResult
from megadiff.types import Batch, LossTerms


def normaliser_of(
    prepared: Sequence[PreparedBatch], names: Sequence[str], layout: Layout, accumulation: int, device: torch.device
) -> dict[str, Tensor]:
    """By loss, the factor on its sum over a micro-batch that turns DeepSpeed's means over ranks and micro-batches into the mean
    over the global batch: data ranks x accumulation / global count. Float64 scalars on the device; 0 for a count of 0.
    """
    own = torch.zeros(len(names), dtype=torch.float64, device=device)
    if prepared:
        own = torch.stack([sum_tensors([micro_batch.counts[name] for micro_batch in prepared]) for name in names])
    counts = sum_over_replicas(own, layout)
    return dict(zip(names, torch.where(counts > 0, layout.data_ranks * accumulation / counts, 0.0).unbind(), strict=True))


def step_result(
    outcome: Outcome,
    batches: Sequence[Batch],
    weights: Mapping[str, float],
    sources: Sequence[str],
    layout: Layout,
    device: torch.device,
    rate: float,
) -> StepResult:
    """The step's result, by one collective and one wait for the device.

    Args:
        weights: by loss, its weight in the total.
        sources: of the data, whose losses are told apart.
    """
    names = list(weights)
    losses = torch.zeros(len(names), 1 + QUARTILES + len(sources), 2, dtype=torch.float64, device=device)
    bounds = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for terms, batch in zip(outcome.terms, batches if outcome.terms else (), strict=True):
        losses += _losses(terms, names, _indices(batch, sources, device), len(sources))
        bounds += _bounds(terms, names)
    readable = sum_tensors([batch.weight.sum() for batch in batches]).to(device) if batches else losses.new_zeros(())
    sums = torch.cat([losses.flatten(), bounds.flatten(), readable.reshape(1)])
    own = torch.stack([_scalar(value, device) for value in (outcome.grad_norm, outcome.applied)])
    read = torch.cat([sum_over_replicas(sums, layout), own]).cpu()
    loss_totals, bound_totals, samples, (grad_norm, applied) = torch.split(read, [losses.numel(), bounds.numel(), 1, 2])
    means = dict(zip(names, _means(loss_totals.reshape(losses.shape)).tolist(), strict=True))
    counted = {name: bool(count) for name, count in zip(names, loss_totals.reshape(losses.shape)[:, 0, 1], strict=True)}
    return StepResult(
        losses={name: values[0] for name, values in means.items()},
        quartiles={name: values[1 : 1 + QUARTILES] for name, values in means.items()},
        total=sum(weights[name] * means[name][0] for name in names if counted[name]),
        grad_norm=float(grad_norm),
        learning_rate=rate,
        applied=bool(applied),
        samples=int(samples),
        nelbo={
            name: total / count
            for name, (total, count) in zip(names, bound_totals.reshape(bounds.shape).tolist(), strict=True)
            if count
        },
        by_source={name: dict(zip(sources, values[1 + QUARTILES :], strict=True)) for name, values in means.items()}
        if sources
        else {},
    )


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The element-wise sum of a few tensors of one shape, float64."""
    return torch.stack([tensor.to(torch.float64) for tensor in tensors]).sum(0)


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def _indices(batch: Batch, sources: Sequence[str], device: torch.device) -> Tensor | None:
    """int64 [B], each sample's source; None if they are not told apart."""
    return torch.tensor([sources.index(name) for name in batch.sources], device=device) if sources else None


def _losses(terms: LossTerms, names: Sequence[str], source: Tensor | None, sources: int) -> Tensor:
    """Loss sums and counts, over all times, per quarter of the time axis, per source: [losses, 1 + QUARTILES + sources, 2]."""
    rows = []
    for name in names:
        pairs = torch.stack([terms.sample_sums[name], terms.sample_counts[name]], dim=-1).to(torch.float64)
        quarter = (terms.times[name] * QUARTILES).long().clamp(0, QUARTILES - 1)
        per_quarter = pairs.new_zeros(QUARTILES, 2).index_add_(0, quarter, pairs)
        per_source = pairs.new_zeros(sources, 2)
        if source is not None:
            per_source.index_add_(0, source, pairs)
        rows.append(torch.cat([pairs.sum(0, keepdim=True), per_quarter, per_source]))
    return torch.stack(rows)


def _bounds(terms: LossTerms, names: Sequence[str]) -> Tensor:
    """Sum and count of every loss's likelihood bound, zeros without one: [losses, 2]."""
    nothing = torch.zeros((), dtype=torch.float64, device=terms.total.device)
    pairs = [terms.exact.get(name, (nothing, nothing)) for name in names]
    return torch.stack([torch.stack([value.to(torch.float64) for value in pair]) for pair in pairs])


def _means(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]
