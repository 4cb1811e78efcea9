"""The parts of an engine: a Backend distributes the weights, an Objective is the method; they are independent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megadiff.config.layout import Layout
from megadiff.engine.pieces import Pieces
from megadiff.types import Batch, Denoiser, LossTerms, Noised, Prediction, Readout

QUARTILES = 4
NOISE, FORWARD, BACKWARD, REDUCE, OPTIMIZER, EMA = "noise", "forward", "backward", "reduce", "optimizer", "EMA"
"""Phases of a step, as traces name them."""


class PreparedBatch(Protocol):
    """What an objective prepares of a micro-batch: the model's input, what is read out, and numbers of scored elements."""

    @property
    def noised(self) -> Noised: ...
    @property
    def readout(self) -> Mapping[str, Readout]: ...
    @property
    def counts(self) -> Mapping[str, Tensor]: ...


class Objective(Protocol):
    """The method: the same object for every engine, without any parallelism."""

    @property
    def losses(self) -> Sequence[str]:
        """Names of its losses: the scored modalities, and the alignment."""

    def prepare(self, batch: Batch) -> Any: ...
    def score(self, prediction: Prediction, prepared: Any, normaliser: Mapping[str, Tensor]) -> LossTerms: ...


Score = Callable[[Prediction, PreparedBatch], LossTerms]
"""From a prediction to its loss terms, normalised for the whole step."""


@dataclass(frozen=True)
class Outcome:
    """The result of a backend's optimizer step.

    Attributes:
        terms: one per micro-batch if this rank speaks for its replica; else empty.
        grad_norm: gradient norm over all parameters and ranks, before clipping; a scalar that may still be on the device.
        applied: False if the optimizer skipped the step (non-finite gradients); likewise.
    """

    terms: list[LossTerms]
    grad_norm: float | Tensor
    applied: bool | Tensor


class Backend(Protocol):
    """All differences between ZeRO, pipeline and tensor parallelism."""

    layout: Layout
    device: torch.device
    accumulation: int
    """Micro-batches of a step on this replica."""
    pieces: Pieces

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        """Forward, backward and one optimizer step. Collective; ranks that read no data pass no batches."""

    def denoiser(self) -> AbstractContextManager[Denoiser]:
        """The model with its present weights, in evaluation mode without gradients; equal numbers of calls on all ranks."""


@dataclass(frozen=True)
class Inspection:
    """What a step shows of the network and its data, beyond losses; over all ranks, and equal on all of them.

    Attributes:
        gradients: by place in the model (`models.names.place_of`), the norm of the gradient, before clipping.
        updates: likewise of what the step changed in the master weights; 0 where nothing is trained.
        weights: likewise of the trained weights after the step.
        activations: the largest |x| of the residual stream after any block, by `trunk MODALITY` and `tower MODALITY`.
        scored: by categorical modality, the share of all positions that were noised and scored (the mask rate).
        computed: by categorical modality, the share of all positions that were computed: conditions end at their end mark.
    """

    gradients: dict[str, float]
    updates: dict[str, float]
    weights: dict[str, float]
    activations: dict[str, float]
    scored: dict[str, float]
    computed: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks; equal on all of them.

    Attributes:
        losses: per modality the mean loss per scored element; NaN if nothing was scored.
        quartiles: per modality the mean loss in each quarter of the time axis; NaN for quarters without samples.
        total: the weighted sum that was minimised.
        grad_norm: gradient norm before clipping.
        learning_rate: learning rate of the step.
        applied: False if the optimizer skipped the step (non-finite gradients).
        samples: number of scored (readable) samples.
        nelbo: per categorical modality the likelihood bound in nats per token, for any training loss.
        by_source: per modality and source of data the mean loss; NaN for sources without samples.
        inspection: if it was asked for.
    """

    losses: dict[str, float]
    quartiles: dict[str, list[float]]
    total: float
    grad_norm: float
    learning_rate: float
    applied: bool
    samples: int
    nelbo: dict[str, float] = field(default_factory=dict)
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)
    inspection: Inspection | None = None
